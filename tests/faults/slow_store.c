// Delays what writes files below the folder $SLOW_STORE by 0.3 s: for LD_PRELOAD.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void delay(const char *path) {
  const char *slow = getenv("SLOW_STORE");
  if (slow && path && !strncmp(path, slow, strlen(slow))) usleep(300000);
}

static void delay_of(int file) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof path - 1);
  path[size < 0 ? 0 : size] = 0;
  delay(path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                       \
  int name(const char *path, int how, ...) {             \
    va_list rest;                                        \
    va_start(rest, how);                                 \
    int mode = va_arg(rest, int);                        \
    va_end(rest);                                        \
    if (how & (O_WRONLY | O_RDWR)) delay(path);          \
    return NEXT(name)(path, how, mode);                  \
  }
OPEN(open)
OPEN(open64)

int fsync(int file) { delay_of(file); return NEXT(fsync)(file); }
int fdatasync(int file) { delay_of(file); return NEXT(fdatasync)(file); }
int rename(const char *from, const char *to) {
  delay(from);
  return NEXT(rename)(from, to);
}
