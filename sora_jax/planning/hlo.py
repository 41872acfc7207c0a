"""What a compiled program does, counted from its scheduled HLO text.

XLA's own `cost_analysis` counts the body of a loop once and a Pallas kernel as nothing.
Here loops count as often as they run, so that matmul FLOPs, kernel launches and bytes
on the wire are those of one step of one chip.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from sora_jax.planning import hlo_text
from sora_jax.planning.hlo_text import COLLECTIVES, Op

# (name, type, rest) of a kernel's custom call -> FLOPs of one launch.
KernelFlops = Callable[[str, str, str], float]


@dataclasses.dataclass
class Traffic:
  """What one kind of collective sends.

  Attributes:
    runs: how often it runs.
    bytes: of its results, all runs together.
    wire: bytes that a chip sends for it.
    hidden: of those, the bytes of runs with computation scheduled between their start
      and their end.
    groups: numbers of chips that take part.
    exposed: the other bytes, by the first group of chips (a tuple of partition ids;
      sender and receiver of a permute).
  """

  runs: float = 0.0
  bytes: float = 0.0
  wire: float = 0.0
  hidden: float = 0.0
  groups: set = dataclasses.field(default_factory=set)
  exposed: dict[tuple[int, ...], float] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(float)
  )

  def hide(self, wire: float, group: tuple[int, ...]) -> None:
    """Counts bytes of a group as hidden that were counted as exposed before."""
    self.hidden += wire
    self.exposed[group] -= wire


@dataclasses.dataclass
class Kernel:
  """A Pallas kernel: launches, and FLOPs of its matmuls where they are known."""

  launches: float = 0.0
  flops: float = 0.0


@dataclasses.dataclass
class Report:
  """Totals of a program on one chip.

  Attributes:
    matmul_flops: of matmuls and convolutions outside of kernels.
    kernels: name -> Kernel.
    collectives: kind -> Traffic.
    cycles: the compiler's estimate for what is neither kernel nor collective, by
      "matmul" and "other".
    trips: body of a loop -> how often it runs.
    matmuls: FLOPs by the operation's path in JAX, to see what is computed twice.
  """

  matmul_flops: float = 0.0
  kernels: dict = dataclasses.field(
    default_factory=lambda: collections.defaultdict(Kernel)
  )
  collectives: dict = dataclasses.field(
    default_factory=lambda: collections.defaultdict(Traffic)
  )
  cycles: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  trips: dict = dataclasses.field(default_factory=dict)
  matmuls: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def analyze(text: str, chips: int, kernel_flops: KernelFlops | None = None) -> Report:
  """Reports what a program does, from its text after optimisation and scheduling.

  Args:
    text: of `compiled.as_text()`, or of a dump `*.after_optimizations.txt`.
    chips: that the program runs on.
    kernel_flops: FLOPs of kernels; without it they have none.

  Raises:
    ValueError: if the text is no HLO module, or has a loop of unknown length.
  """
  computations, entry = hlo_text.parse(text)
  walk = _Walk(computations, chips, kernel_flops)
  walk.visit(entry, 1.0)
  return walk.report


class _Transfer(NamedTuple):
  """A transfer that has begun: when, its kind, the bytes of a chip, and who takes part.

  begin: on the clock of its computation, see `_Schedule`.
  """

  begin: float
  kind: str
  wire: float
  group: tuple[int, ...]


@dataclasses.dataclass
class _Schedule:
  """How far a computation has come, whose instructions stand in the order they run.

  Attributes:
    types: name -> type of its instructions.
    clock: cycles of computation so far. It stands still while a transfer is waited for,
      so a transfer was hidden if the clock has moved since it began.
    started: name of an instruction -> the transfer that it began.
    sent: rendezvous of two slices -> what was handed to the network there.
    received: name of a recv -> its rendezvous.
  """

  types: dict[str, str]
  clock: float = 0.0
  started: dict[str, _Transfer] = dataclasses.field(default_factory=dict)
  sent: dict[str, _Transfer] = dataclasses.field(default_factory=dict)
  received: dict[str, str] = dataclasses.field(default_factory=dict)


class _Walk:
  """Goes through a program as it runs, and adds up its report.

  Each method `_count_x` counts an instruction that is an x and says whether it was one.
  """

  def __init__(
    self,
    computations: dict[str, list[Op]],
    chips: int,
    kernel_flops: KernelFlops | None,
  ):
    self.report = Report()
    self._computations, self._chips = computations, chips
    self._kernel_flops = kernel_flops
    self._flops_inside = functools.cache(self._fused_flops)

  def visit(self, name: str, times: float) -> None:
    """Counts a computation that runs so many times."""
    ops = self._computations[name]
    schedule = _Schedule({op.name: op.type for op in ops})
    for op in ops:
      # The order matters once: what SparseCore does is a start like any other, too.
      if not (
        self._count_offloaded(op, times, schedule)
        or self._count_called(op, times)
        or self._count_collective(op, times, schedule)
        or self._count_network(op, times, schedule)
        or self._count_fused_collective(op, times, schedule)
        or self._count_kernel(op, times)
      ):
        self._count_computation(op, times, schedule)

  def _count_offloaded(self, op, times, schedule) -> bool:
    """Counts collectives that SparseCore does beside the TensorCore."""
    started = schedule.started
    if found := _offloaded_collective(op, self._computations):
      kind, inner, types = found
      wire, group = self._add_traffic(kind, inner, types, times)
      started[op.name] = _Transfer(schedule.clock, kind, wire, group)
      return True
    if op.opcode == "async-update" and op.operands()[0] in started:
      # Here it gets its operands, so that it begins only now.
      before = started.pop(op.operands()[0])
      started[op.name] = before._replace(begin=schedule.clock)
      return True
    return False

  def _count_called(self, op, times) -> bool:
    """Counts loops, as often as they run, and other calls of computations."""
    if op.opcode == "while":
      body = hlo_text.found(r"body=%([\w.\-]+)", op.rest)
      self.report.trips[body] = hlo_text.loop_trips(op, self._computations)
      self.visit(body, times * self.report.trips[body])
      return True
    if op.opcode in ("call", "conditional", "async-start"):
      for called in op.calls():
        if called in self._computations:
          self.visit(called, times)
      return True
    return False

  def _count_collective(self, op, times, schedule) -> bool:
    """Counts collectives, which are one instruction or a start and a done."""
    kind = re.sub("-(start|done)$", "", op.opcode)
    if kind in COLLECTIVES and not op.opcode.endswith("-done"):
      wire, group = self._add_traffic(kind, op, schedule.types, times)
      if op.opcode.endswith("-start"):
        schedule.started[op.name] = _Transfer(schedule.clock, kind, wire, group)
      return True
    if kind in COLLECTIVES or (
      op.opcode == "async-done" and op.operands()[0] in schedule.started
    ):
      if transfer := schedule.started.pop(op.operands()[0], None):
        self._finish(transfer, schedule.clock)
      return True
    return False

  def _count_network(self, op, times, schedule) -> bool:
    """Counts what goes between slices: handed to the hosts' network and taken from it.

    A send begins a transfer, the recv-done of the same rendezvous ends it.
    """
    if op.opcode in ("send", "recv") and "xla_megascale" in op.rest:
      meeting = hlo_text.found(r'_rendezvous="([^"]*)"', op.rest)
      if op.opcode == "recv":
        schedule.received[op.name] = meeting
        return True
      collective = hlo_text.found(r'_transfer_type="(\w+)"', op.rest)
      kind = f"network-{collective.lower().replace('_', '-')}"
      everybody = tuple(range(self._chips))
      # The type of a send has a context and a token beside the array.
      dtype, shape = hlo_text.shapes(op.type)[0]
      wire = times * math.prod(shape) * hlo_text.bits(dtype) / 8
      traffic = self.report.collectives[kind]
      traffic.runs += times
      traffic.bytes += wire
      traffic.wire += wire
      traffic.exposed[everybody] += wire
      schedule.sent[meeting] = _Transfer(schedule.clock, kind, wire, everybody)
      return True
    if op.opcode == "recv-done" and op.operands()[0] in schedule.received:
      transfer = schedule.sent[schedule.received[op.operands()[0]]]
      self._finish(transfer, schedule.clock)
      return True
    return False

  def _count_fused_collective(self, op, times, schedule) -> bool:
    """Counts collectives that the compiler wrapped into a fusion."""
    found = _fused_collective(op, self._computations)
    if found:
      kind, inner = found
      self._add_traffic(kind, inner, schedule.types, times)
    return bool(found)

  def _count_kernel(self, op, times) -> bool:
    """Counts launches of Pallas kernels."""
    name = op.kernel()
    if name is None:
      return False
    kernel = self.report.kernels[name]
    kernel.launches += times
    if self._kernel_flops:
      kernel.flops += times * self._kernel_flops(op.name, op.type, op.rest)
    return True

  def _count_computation(self, op, times, schedule) -> None:
    """Counts FLOPs and cycles of everything else, and lets the clock go on."""
    report = self.report
    if op.opcode == "fusion":
      calls = [name for name in op.calls() if name in self._computations]
      flops = sum(map(self._flops_inside, calls))
    else:
      flops = hlo_text.matmul_flops(op, schedule.types)
    report.matmul_flops += times * flops
    report.cycles["matmul" if flops else "other"] += times * op.cycles()
    if flops:
      report.matmuls[op.source()] += times * flops
    schedule.clock += op.cycles()

  def _fused_flops(self, name: str) -> float:
    """Returns the matmul FLOPs of a fused computation and of those fused into it."""
    types = {op.name: op.type for op in self._computations[name]}
    total = 0.0
    for op in self._computations[name]:
      total += hlo_text.matmul_flops(op, types)
      total += sum(self._flops_inside(c) for c in op.calls() if c in self._computations)
    return total

  def _finish(self, transfer: _Transfer, clock: float) -> None:
    """Counts a transfer as hidden if there was computation since it began."""
    if clock > transfer.begin:
      self.report.collectives[transfer.kind].hide(transfer.wire, transfer.group)

  def _add_traffic(self, kind, op, types, times) -> tuple[float, tuple[int, ...]]:
    """Adds a collective; returns the bytes that a chip sends for it, and its group."""
    group = hlo_text.chip_group(op.rest, self._chips)
    size = hlo_text.num_bytes(op.type)
    if op.opcode.endswith("-start") and kind != "all-reduce":
      # The type of a start has the operands beside the results.
      size -= sum(hlo_text.num_bytes(types.get(name, "")) for name in op.operands())
    wire = _wire_bytes(kind, size, len(group))
    traffic = self.report.collectives[kind]
    traffic.runs += times
    traffic.bytes += times * size
    traffic.wire += times * wire
    traffic.groups.add(len(group))
    traffic.exposed[group] += times * wire
    return times * wire, group


def _wire_bytes(kind: str, size: float, chips: int) -> float:
  """Returns the bytes that each of a group's chips sends, on rings as XLA has them.

  size: bytes of the result on a chip.
  """
  share = (chips - 1) / chips
  return {
    # A reduce-scatter, and an all-gather of its result.
    "all-reduce": 2 * share * size,
    # The result is one chip's part of what each of them has.
    "reduce-scatter": share * size * chips,
    "collective-permute": size,
  }.get(kind, share * size)


def _fused_collective(op, computations):
  """Returns (kind, op) of a collective inside of a fusion, or None."""
  if op.opcode != "fusion":
    return None
  for name in op.calls():
    for inner in computations.get(name, []):
      # An all-reduce whose result is sliced at once: a reduce-scatter on the wire.
      if inner.opcode == "all-reduce" and name.startswith("all-reduce-scatter"):
        return "reduce-scatter", inner._replace(type=op.type)
      if inner.opcode in COLLECTIVES:
        return inner.opcode, inner
  return None


def _offloaded_collective(op, computations):
  """Returns (kind, op, types around it) of a collective on SparseCore, or None."""
  if op.opcode != "async-start" or "sparsecore" not in op.rest:
    return None
  for name in op.calls():
    for call in computations.get(name, []):
      for called in re.findall(r"called_computations=\{%([\w.\-]+)", call.rest):
        inside = {inner.name: inner.type for inner in computations[called]}
        for inner in computations[called]:
          if inner.opcode in COLLECTIVES:
            return inner.opcode, inner, inside
  return None
