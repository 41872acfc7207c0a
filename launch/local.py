"""Runs a config as several processes on this machine, as a pod runs it on its hosts.

  python launch/local.py --processes=2 --devices=4 -- --config=configs/quickstart.py

Each process has that many simulated CPU devices, and finds the others on loopback: so
this shows what a change does on many hosts before any are paid for. Lines of the log
begin with the number of their process. When one process fails the others are ended;
SIGTERM and SIGINT go on to all, which save and exit. A machine with several GPUs needs
no launcher: one process drives them all.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import app, flags


def commands(module, arguments, processes, port) -> list[list[str]]:
  """Returns the command of each process; `arguments` are those of the module."""
  found = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
  return [
    [sys.executable, "-m", module, "--distributed", *found, f"--process={i}"]
    + list(arguments)
    for i in range(processes)
  ]


def environment(devices: int) -> dict[str, str]:
  """Returns what each process has beside the environment of this one."""
  given = os.environ.get("XLA_FLAGS", "").split()
  name = "--xla_force_host_platform_device_count"
  kept = [flag for flag in given if not flag.startswith(f"{name}=")]
  return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*kept, f"{name}={devices}"])}


def free_port() -> int:
  """Returns a port of loopback that nothing listens on."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def run(commands, extra_environment, grace: float, out=sys.stderr) -> int:
  """Runs the commands side by side to their end; the first exit code that is not 0.

  Their output goes to `out`, each line behind the number of its process. After a
  failure the others get SIGTERM, and SIGKILL `grace` seconds later. A signal to this
  process goes to all, once; after a second one they are killed.
  """
  processes = [
    subprocess.Popen(
      command,
      env={**os.environ, **extra_environment},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
      # Ctrl-C reaches a whole group of processes: they would get it twice.
      start_new_session=True,
    )
    for command in commands
  ]
  lock = threading.Lock()
  readers = [
    threading.Thread(target=_copy, args=(process.stdout, i, out, lock), daemon=True)
    for i, process in enumerate(processes)
  ]
  for reader in readers:
    reader.start()
  signals = []

  def forward(number, _):
    signals.append(number)
    send = signal.SIGTERM if len(signals) == 1 else signal.SIGKILL
    _send(processes, send)

  before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT)}
  try:
    code = _wait(processes, grace, out, lock)
  finally:
    _send(processes, signal.SIGKILL)
    for number, handler in before.items():
      signal.signal(number, handler)
  for reader in readers:
    reader.join()
  return code


def _wait(processes, grace, out, lock) -> int:
  code, deadline = 0, None
  while any(process.poll() is None for process in processes):
    time.sleep(0.05)
    failed = [i for i, process in enumerate(processes) if process.poll()]
    if failed and deadline is None:
      first = failed[0]
      code, deadline = processes[first].returncode, time.monotonic() + grace
      with lock:
        out.write(f"process {first} ended with code {code}: ending the others\n")
      _send(processes, signal.SIGTERM)
    if deadline and time.monotonic() > deadline:
      _send(processes, signal.SIGKILL)
  code = code or next((p.returncode for p in processes if p.returncode), 0)
  return code if code >= 0 else 128 - code  # as a shell says that a signal ended it


def _send(processes, number) -> None:
  for process in processes:
    if process.poll() is None:
      process.send_signal(number)


def _copy(stream, index, out, lock) -> None:
  for line in stream:
    with lock:
      out.write(f"[{index}] {line}")
      out.flush()


def _define_flags():
  flags.DEFINE_integer("processes", 2, "Number of processes.", 1)
  flags.DEFINE_integer("devices", 1, "CPU devices of each process.", 1)
  flags.DEFINE_string("module", "sora_jax.main", "What `python -m` runs.")
  flags.DEFINE_float(
    "grace", 30.0, "Seconds that the rest has to end once a process has failed."
  )
  flags.DEFINE_bool("dry-run", False, "Print the commands, run nothing.")


def main(argv):
  args = flags.FLAGS
  started = commands(args.module, argv[1:], args.processes, free_port())
  extra = environment(args.devices)
  if args["dry-run"].value:
    shown = " ".join(f"{name}={shlex.quote(value)}" for name, value in extra.items())
    for command in started:
      sys.stdout.write(f"{shown} {shlex.join(command)}\n")
    return
  sys.exit(run(started, extra, args.grace))


if __name__ == "__main__":
  _define_flags()
  app.run(main)
