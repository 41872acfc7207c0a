"""What a CPU can do, as /proc/cpuinfo says it."""

import pathlib

import pytest

from sora_jax.runtime import cpu


@pytest.mark.parametrize(
  "flags, expected",
  [
    ("flags\t\t: fpu avx512f avx512_bf16 sha_ni", True),
    ("flags\t\t: fpu amx_bf16 amx_tile", True),
    ("flags\t\t: fpu avx2 avx512f", False),
    (None, False),
  ],
)
def test_bfloat16_is_found_in_the_flags(monkeypatch, flags, expected):
  def read_text(path):
    assert str(path) == "/proc/cpuinfo"
    if flags is None:
      raise FileNotFoundError(path)
    return flags

  monkeypatch.setattr(pathlib.Path, "read_text", read_text)
  assert cpu.multiplies_bfloat16.__wrapped__() is expected
