"""What the CPU of this machine can do."""

import functools
import pathlib


@functools.cache
def multiplies_bfloat16() -> bool:
  """Whether it has instructions for that, as Linux says; False without a word."""
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    return False
  return "amx_bf16" in text or "avx512_bf16" in text
