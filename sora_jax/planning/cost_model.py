"""How long a step takes, from what its program does and what a chip can do.

Pure arithmetic on an `hlo.Report`; nothing here was timed on a TPU. The assumptions:
  matmuls and what lies between them take the cycles that the TPU compiler itself
    estimates, matmuls at least FLOPs / peak;
  the attention kernel reaches `Chip.attention` of the peak. That one number is fitted:
    MaxDiffusion publishes 36.0 s a step for Wan 2.1 14B (16 clips of 75,600 tokens on
    64 chips of v5p). Its step, compiled for that slice and reckoned in this way, with
    11 matmuls over all pairs of tokens (a model needs 6), takes 35.9 to 38.1 s at 0.53;
  a collective that no computation is scheduled beside is waited for, at 90 % of the
    rate of the links that its group of chips has; one with computation is free.
Of GPUs the compiler tells no cycles: `gpu_seconds` only scales published utilisation.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sora_jax.planning import hlo, hlo_text
from sora_jax.planning.hardware import Chip, Topology

LINK_EFFICIENCY = 0.9
# Between the two dies of a tpu7x: six times a link (its documentation).
_DIE_LINKS = 6.0
# MFU of video diffusion training on H100 that NVIDIA's NeMo DFM publishes: Wan 2.1 14B
# 33 % (325.8 TFLOP/s), a DiT of 7B 48 %.
GPU_MFU = (0.33, 0.48)


def assumptions(chip: Chip) -> str:
  """Returns a line on what the times of a plan rest on."""
  if not chip.axes:
    low, high = GPU_MFU
    return (
      f"MFU {low:.0%} to {high:.0%}, as published for video diffusion on H100, and "
      "memory by a rough count, where it was not compiled"
    )
  return (
    f"matmuls and the rest by the compiler's cycles at {chip.clock / 1e9:.2f} GHz, "
    f"attention kernels at {chip.attention:.0%} of the peak (fitted to published "
    f"steps), collectives at {LINK_EFFICIENCY:.0%} of the links' rate; not timed"
  )


class Launch(NamedTuple):
  """Sizes of one launch of the TPU's attention kernel.

  matmuls: over all pairs, 2 forwards and 5 (dq, dk and dv in one) backwards. skips:
  whether it visits only the blocks of a list that is known at run time.
  """

  matmuls: int
  heads: int
  queries: int
  keys: int
  width: int
  skips: bool

  @property
  def flops(self) -> float:
    """FLOPs of all pairs, also of those in blocks that are skipped."""
    pairs = float(self.queries) * self.keys
    return 2.0 * self.matmuls * self.heads * pairs * self.width

  def on_text(self, text_tokens: int) -> bool:
    """Returns whether its keys are a row's captions, filled up to whole blocks."""
    return self.keys != self.queries and 0 <= self.keys - text_tokens < 512


def attention_launch(name: str, type_text: str, rest: str) -> Launch | None:
  """Reads a splash kernel's custom call (see `hlo.analyze`); None for other kernels."""
  kind = re.search(r"splash_\w*?(fwd|dkv|dq)", name)
  operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", rest)
  if not kind or not operands:
    return None
  arrays = [s for dtype, s in hlo_text.shapes(operands[1]) if dtype in ("bf16", "f32")]
  (heads, queries, width), (_, keys, _) = [s for s in arrays if len(s) == 3][:2]
  results = len(hlo_text.shapes(type_text))
  matmuls = {"fwd": 2, "dq": 3, "dkv": 5 if results > 2 else 4}[kind[1]]
  # The number of blocks to visit is an argument.
  skips = operands[1].startswith("s32[]")
  return Launch(matmuls, heads, queries, keys, width, skips)


class Load(NamedTuple):
  """What a packed row holds on average.

  source: where that is from. fill: share of the row's tokens that are real. clips,
  tokens, text_tokens: real ones. pairs: sum over clips of tokens x (tokens +
  text tokens). self_share, cross_share: of the blocks of all (token, token) pairs and
  (token, text token) pairs, those that attention has to visit. own_share: of the
  (token, token) pairs, those inside of clips.
  """

  source: str
  fill: float
  clips: float
  tokens: float
  text_tokens: float
  pairs: float
  self_share: float
  cross_share: float
  own_share: float


def kernel_flops(load: Load, text_tokens: int) -> Callable[[str, str, str], float]:
  """Returns what `hlo.analyze` asks for FLOPs of a launch, without skipped blocks.

  text_tokens: of a row, by which launches on captions are known.
  """

  def flops(name, type_text, rest):
    launch = attention_launch(name, type_text, rest)
    if launch is None:
      return 0.0
    share = load.cross_share if launch.on_text(text_tokens) else load.self_share
    return launch.flops * (share if launch.skips else 1.0)

  return flops


def attention_units(text: str, devices: int, stage) -> float:
  """Returns how many matmuls over all pairs of tokens the kernels do, per block.

  A model needs 6: two forwards, four backwards. Blocks that are skipped count, too.

  Args:
    text: of the program.
    devices: that it runs on.
    stage: a recipe.DiTStage.
  """

  def flops(name, type_text, rest):
    launch = attention_launch(name, type_text, rest)
    cross = launch is None or launch.on_text(stage.text_tokens)
    return 0.0 if cross else launch.flops

  report = hlo.analyze(text, devices, flops)
  total = devices * sum(kernel.flops for kernel in report.kernels.values())
  pairs = float(stage.rows) * stage.tokens**2
  return total / (2.0 * pairs * stage.model.width * stage.model.depth)


def collective_seconds(
  kind: str, wire: float, group: tuple[int, ...], place_D5: np.ndarray, where: Topology
) -> float:
  """Returns the seconds in which each device of a group sends `wire` bytes.

  Args:
    kind: of an hlo.Report.
    group: partition ids of the devices.
    place_D5: (slice, x, y, z, core) of each partition.
    where: the topology.
  """
  chip, members = where.chip, place_D5[list(group)]
  if kind.startswith("network-"):
    # Between slices; summing sends what is not a chip's own share twice.
    times = 2 * (where.slices - 1) / where.slices if kind.endswith("reduce") else 1.0
    return times * wire * chip.devices / chip.network / LINK_EFFICIENCY
  slices = len(set(members[:, 0].tolist()))
  # (chips that the group spans, links to the next one) of each axis that it lies on.
  axes = []
  for i, size in enumerate(where.shape):
    extent = len(set(members[:, 1 + i].tolist()))
    if extent > 1:
      axes.append((extent, 2 if where.wrap[i] and extent == size else 1))
  # All devices of a chip share its links.
  wire, local = wire * chip.devices, wire
  if not axes:
    seconds = local / (_DIE_LINKS * chip.link) if slices == 1 else 0.0
  elif kind == "collective-permute":
    seconds = wire / chip.link
  elif "all-to-all" in kind:
    # Each half of a ring sends half of what it has to the other, over its two cuts.
    total = wire * len(group) / (len(group) - 1)
    seconds = max(total * extent / 4 / (links * chip.link) for extent, links in axes)
  else:
    seconds = wire / (chip.link * sum(links for _, links in axes))
  if slices > 1:
    # Inside the slices first, so that the network carries each piece once.
    seconds += wire / (len(group) / slices) / chip.network
  return seconds / LINK_EFFICIENCY


class Seconds(NamedTuple):
  """Parts of a program's time; hidden communication is not in the total."""

  matmul: float
  attention: float
  other: float
  communication: float
  hidden: float

  @property
  def total(self) -> float:
    return self.matmul + self.attention + self.other + self.communication


def seconds(report: hlo.Report, place_D5: np.ndarray, where: Topology) -> Seconds:
  """Estimates one run of a program on every device; see the top of this file."""
  chip = where.chip
  peak = chip.flops / chip.devices
  matmul = report.cycles["matmul"] / chip.clock if chip.clock else 0.0
  exposed = hidden = 0.0
  for kind, traffic in report.collectives.items():
    waited = sum(
      collective_seconds(kind, wire, group, place_D5, where)
      for group, wire in traffic.exposed.items()
    )
    exposed += waited
    shown = sum(traffic.exposed.values())
    if traffic.hidden:
      group = next(iter(traffic.exposed))
      hidden += (
        waited * traffic.hidden / shown
        if shown
        else collective_seconds(kind, traffic.hidden, group, place_D5, where)
      )
  attention = sum(kernel.flops for kernel in report.kernels.values())
  return Seconds(
    matmul=max(matmul, report.matmul_flops / peak),
    attention=attention / (peak * chip.attention) if attention else 0.0,
    other=report.cycles["other"] / chip.clock if chip.clock else 0.0,
    communication=exposed,
    hidden=hidden,
  )


def gpu_seconds(flops: float, chips: int, chip: Chip) -> tuple[float, float]:
  """Returns the (fastest, slowest) step of so many model FLOPs, at published MFU."""
  ideal = flops / chips / chip.flops
  return ideal / GPU_MFU[1], ideal / GPU_MFU[0]


def gpu_bytes(state: float, params: float, model, tokens: float, remat: str) -> float:
  """Returns the bytes of a GPU in a step, roughly.

  Args:
    state: bytes of the train state, and params: numbers of the model, on this GPU.
    model: a models.dit.DiTConfig.
    tokens: of this GPU.
    remat: a key of models.dit.REMAT_POLICIES; anything but "none" keeps a block's
      input, "attention_saved" also the attention outputs, "attention_mlp_saved" the
      MLP's, too, "matmuls_saved" the output of each matmul of tokens with a kernel.
  """
  wide = 2.0 * tokens * model.width
  block = 2.0 * tokens * (16 * model.width + 2 * model.mlp_width)
  kept = {
    "none": block,
    "attention_saved": 3 * wide,
    "attention_mlp_saved": 4 * wide,
    "matmuls_saved": 10 * wide + 2.0 * tokens * model.mlp_width,
  }.get(remat, wide)
  # float32 gradients; two gathered bfloat16 blocks are small beside them.
  return state + 4.0 * params + model.depth * kept + block


def cost(steps: int, step_seconds: float, chips: int, price: float) -> dict:
  """Returns hours, chip-hours and cost of a run; price: of one chip for an hour."""
  hours = steps * step_seconds / 3600
  return {
    "steps": steps,
    "hours": hours,
    "chip_hours": hours * chips,
    "cost": hours * chips * price,
  }
