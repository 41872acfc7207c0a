"""Chips and the ways they are wired, as data: what `plan` reckons with.

Figures of TPUs are those of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, of
GPUs those of NVIDIA's data sheets (dense bfloat16, SXM).
"""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, or GPU.

  Attributes:
    flops: dense bfloat16 peak, FLOP/s.
    hbm: bytes of memory. hbm_bandwidth: bytes/s.
    link: bytes/s one way over one link to a neighbour; for GPUs over all of NVLink.
    network: bytes/s one way to chips of other slices, or GPUs of other machines.
    axes: of a slice's grid; 0 for GPUs, which have none.
    clock: Hz of the matrix units, by which the compiler's cycles become seconds.
    devices: that JAX sees of one chip.
    full_axis: an axis of a slice is a ring if it has a multiple of this many chips.
    attention: share of the peak that the attention kernel reaches, see cost_model.py.
  """

  name: str
  flops: float
  hbm: float
  hbm_bandwidth: float
  link: float
  network: float
  axes: int
  clock: float = 0.0
  devices: int = 1
  full_axis: int = 0
  attention: float = 0.0


GIB = 2.0**30
# A link's rate one way is the documented bandwidth of a chip, which counts both ways of
# all its links, / 2 / links. The network of v4 is not documented: as that of v5e.
# Clocks: peak / (2 FLOPs x cells of the chip's matrix units: 8 of 128x128 in v4 and
# v5p, 4 in v5e, 4 of 256x256 in v6e, 8 in tpu7x).
# attention: 0.53 fits MaxDiffusion's published 36.0 s a step on v5p (cost_model.py);
# v4 and v5e have the same matrix units (128 wide). The units of 256 leave the softmax
# twice the share: 0.30 fits its published 17 % MFU on 64 chips of tpu7x.
_CHIPS = (
  Chip("v4", 275e12, 32 * GIB, 1228e9, 50e9, 3.1e9, 3, 1.049e9, 2, 4, 0.53),
  Chip("v5e", 197e12, 16 * GIB, 819e9, 50e9, 3.1e9, 2, 1.503e9, 1, 16, 0.53),
  Chip("v5p", 459e12, 95 * GIB, 2765e9, 100e9, 6.25e9, 3, 1.751e9, 1, 4, 0.53),
  Chip("v6e", 918e12, 32 * GIB, 1638e9, 100e9, 12.5e9, 2, 1.751e9, 1, 16, 0.30),
  Chip("tpu7x", 2307e12, 192 * GIB, 7380e9, 100e9, 12.5e9, 3, 2.2e9, 2, 4, 0.30),
  Chip("h100", 989e12, 80e9, 3350e9, 450e9, 50e9, 0),
  Chip("h200", 989e12, 141e9, 4800e9, 450e9, 50e9, 0),
  Chip("b200", 2250e12, 180e9, 7700e9, 900e9, 50e9, 0),
)
CHIPS = {chip.name: chip for chip in _CHIPS}


@dataclasses.dataclass(frozen=True)
class Topology:
  """slices of a grid of chips, such as v5p:4x4x4; GPUs have one axis, their number."""

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    """The text that `parse` reads as this shape of this chip."""
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def chips(self) -> int:
    """Number of chips of all slices."""
    return self.slices * math.prod(self.shape)

  @property
  def devices(self) -> int:
    """Number of devices that JAX sees."""
    return self.chips * self.chip.devices

  @property
  def wrap(self) -> tuple[bool, bool, bool]:
    """Tells which axes are rings: none in less than a full cube of a 3D torus."""
    full = [size % self.chip.full_axis == 0 for size in self.shape]
    if self.chip.axes == 3 and not all(full):
      full = [False] * 3
    first, second, third = (*full, *[False] * (3 - len(full)))
    return first, second, third

  def one_host(self) -> "Topology":
    """Returns the chips of one host, on which VAE and sampler run: 4, or 8 GPUs.

    They are fewer where there are no more, as on a v5e:1x1.
    """
    whole = {0: (8,), 2: (2, 2), 3: (2, 2, 1)}[self.chip.axes]
    shape = tuple(min(sizes) for sizes in zip(whole, self.shape, strict=True))
    return Topology(self.chip, shape)


def parse(text: str, slices: int = 1) -> Topology:
  """Reads a topology, such as "v5p:4x4x4", "v6e:16x16" or "h100:64".

  Raises:
    ValueError: for an unknown chip, a wrong number of axes, sizes that are not
      positive, a 2D slice that is larger than its pod, and slices below 1.
  """
  name, _, sizes = text.partition(":")
  if name not in CHIPS:
    raise ValueError(f"--topology={text}: {name!r} is none of {', '.join(CHIPS)}")
  chip = CHIPS[name]
  wanted = chip.axes or 1
  example = ("64", "", "16x16", "4x4x4")[chip.axes]
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or (
    len(sizes.split("x")) != wanted
  ):
    raise ValueError(
      f"--topology={text}: {name} has {wanted} axes, such as {name}:{example}"
    )
  shape = tuple(int(size) for size in sizes.split("x"))
  if chip.axes == 2 and max(shape) > 16:
    raise ValueError(f"--topology={text}: a pod of {name} is 16x16")
  if slices < 1:
    raise ValueError(f"--slices={slices} must be at least 1")
  return Topology(chip, shape, slices)
