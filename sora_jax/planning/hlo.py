"""What a compiled program does, read from its scheduled HLO text.

XLA's own `cost_analysis` counts the body of a loop once and a Pallas kernel as nothing.
Here loops count as often as they run, so that matmul FLOPs, kernel launches and bytes
on the wire are those of one step of one chip.
"""

import collections
import dataclasses
import functools
import math
import re
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b(pred|[usf](?:2|4|8|16|32|64)|bf16|f8\w+)\[([\d,]*)\]")
_OP = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
# Metadata of Pallas kernels has line breaks inside an instruction.
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n[^\n]*\n\}")


_PALLAS = re.compile(r'"(tpu_custom_call|__gpu\$xla\.gpu\.triton)"')


class Op(NamedTuple):
  """An instruction: %name = type opcode(rest, with operands and attributes."""

  name: str
  type: str
  opcode: str
  rest: str

  def operands(self) -> list[str]:
    """Names of the operands."""
    return re.findall(r"%([\w.\-]+)", _balanced("(" + self.rest))

  def calls(self) -> list[str]:
    """Names of the computations that it calls."""
    found = re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", self.rest)
    branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
    return found + re.findall(r"%([\w.\-]+)", branches[1] if branches else "")

  def cycles(self) -> float:
    """The TPU compiler's estimate, 0 where it has none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
    return float(found[1]) if found else 0.0


@dataclasses.dataclass
class Traffic:
  """One kind of collective: runs, bytes of its result, and bytes a chip sends.

  hidden: of the sent bytes, those of runs with computation scheduled between start and
  done. groups: numbers of chips that take part. exposed: the other bytes, by the first
  group of chips (a tuple of partition ids; sender and receiver of a permute).
  """

  runs: float = 0.0
  bytes: float = 0.0
  wire: float = 0.0
  hidden: float = 0.0
  groups: set = dataclasses.field(default_factory=set)
  exposed: collections.Counter = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass
class Kernel:
  """A Pallas kernel: launches, and FLOPs of its matmuls where they are known."""

  launches: float = 0.0
  flops: float = 0.0


@dataclasses.dataclass
class Report:
  """Totals of a program on one chip.

  matmul_flops: of matmuls and convolutions outside of kernels. cycles: the compiler's
  estimate for what is neither kernel nor collective, by "matmul" and "other". matmuls:
  (flops, op name) of the greatest, for a look at what is computed twice.
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


def parse(text: str) -> tuple[dict[str, list[Op]], str]:
  """Instructions of each computation, in order, and the name of the entry.

  Raises:
    ValueError: if the text has no entry computation.
  """
  computations, entry, current = {}, None, None
  for line in _KERNEL_METADATA.sub("kernel_metadata={}", text).splitlines():
    if line[:1] in ("%", "E") and line.rstrip().endswith("{"):
      name = re.match(r"(ENTRY )?%([\w.\-]+)", line)
      if name:
        current = computations[name[2]] = []
        entry = name[2] if name[1] else entry
    elif line.startswith("}"):
      current = None
    elif current is not None and (found := _OP.match(line)):
      current.append(Op(found[1], *_split(found[2])))
  if entry is None:
    raise ValueError("no ENTRY computation: not the text of an HLO module")
  return computations, entry


def analyze(text: str, chips: int, kernel_flops=None) -> Report:
  """Report of a program from its text after optimisation and scheduling.

  Args:
    text: of `compiled.as_text()`, or of a dump `*.after_optimizations.txt`.
    chips: that the program runs on.
    kernel_flops: (name, type, rest) of a kernel's custom call -> FLOPs of a launch.
  """
  computations, entry = parse(text)
  report = Report()

  @functools.cache
  def flops_inside(name):
    """Matmul FLOPs of a fused computation."""
    types = {op.name: op.type for op in computations[name]}
    total = 0.0
    for op in computations[name]:
      total += _matmul_flops(op, types)
      total += sum(flops_inside(c) for c in op.calls() if c in computations)
    return total

  def visit(name, times):
    types = {op.name: op.type for op in computations[name]}
    clock, started, sent, received = 0.0, {}, {}, {}
    for op in computations[name]:
      cycles, kind = op.cycles(), re.sub("-(start|done)$", "", op.opcode)
      flops = _matmul_flops(op, types)
      fused = _fused_collective(op, computations)
      if op.opcode == "while":
        body = re.search(r"body=%([\w.\-]+)", op.rest)[1]
        report.trips[body] = _trips(op, computations)
        visit(body, times * report.trips[body])
      elif offloaded := _offloaded_collective(op, computations):
        kind, inner, inside = offloaded
        started[op.name] = (
          clock,
          kind,
          *_add_traffic(report, kind, inner, inside, times, chips),
        )
      elif op.opcode == "async-update" and op.operands()[0] in started:
        # Here it gets its operands.
        started[op.name] = (clock, *started.pop(op.operands()[0])[1:])
      elif op.opcode in ("call", "conditional", "async-start"):
        for called in op.calls():
          if called in computations:
            visit(called, times)
      elif kind in COLLECTIVES and not op.opcode.endswith("-done"):
        wire, group = _add_traffic(report, kind, op, types, times, chips)
        if op.opcode.endswith("-start"):
          started[op.name] = (clock, kind, wire, group)
      elif kind in COLLECTIVES or (
        op.opcode == "async-done" and op.operands()[0] in started
      ):
        begin, kind, wire, group = started.pop(op.operands()[0], (clock, kind, 0, ()))
        if clock > begin:
          report.collectives[kind].hidden += wire
          report.collectives[kind].exposed[group] -= wire
      elif op.opcode in ("send", "recv") and "xla_megascale" in op.rest:
        # Between slices: handed to the network of the hosts, and taken from it.
        name = (
          re.search(r'_transfer_type="(\w+)"', op.rest)[1].lower().replace("_", "-")
        )
        kind = f"network-{name}"
        meeting = re.search(r'_rendezvous="([^"]*)"', op.rest)[1]
        if op.opcode == "send":
          members = tuple(range(chips))
          dtype, shape = shapes(op.type)[0]
          wire = times * math.prod(shape) * _bits(dtype) / 8
          traffic = report.collectives[kind]
          traffic.runs += times
          traffic.bytes += wire
          traffic.wire += wire
          traffic.exposed[members] += wire
          sent[meeting] = (clock, kind, wire, members)
        else:
          received[op.name] = meeting
      elif op.opcode == "recv-done" and op.operands()[0] in received:
        begin, kind, wire, group = sent[received[op.operands()[0]]]
        if clock > begin:
          report.collectives[kind].hidden += wire
          report.collectives[kind].exposed[group] -= wire
      elif fused:
        _add_traffic(report, *fused, types, times, chips)
      elif op.opcode == "custom-call" and _PALLAS.search(op.rest):
        named = re.search(r'/(\w+)/pallas_call"', op.rest)  # a GPU's
        name = named[1] if named else re.sub(r"[.\d]+$", "", op.name)
        kernel = report.kernels[name]
        kernel.launches += times
        if kernel_flops:
          kernel.flops += times * kernel_flops(op.name, op.type, op.rest)
      else:
        if op.opcode == "fusion":
          flops = sum(flops_inside(c) for c in op.calls() if c in computations)
        report.matmul_flops += times * flops
        report.cycles["matmul" if flops else "other"] += times * cycles
        if flops:
          source = re.search(r'op_name="([^"]*)"', op.rest)
          report.matmuls[source[1] if source else op.name] += times * flops
        clock += cycles

  visit(entry, 1.0)
  return report


def shapes(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
  """(dtype, shape) of each array in a type."""
  return [
    (dtype, tuple(int(n) for n in dims.split(",") if n))
    for dtype, dims in _SHAPE.findall(type_text)
  ]


def num_bytes(type_text: str) -> float:
  """Bytes of all arrays in a type."""
  return sum(math.prod(shape) * _bits(d) / 8 for d, shape in shapes(type_text))


def _bits(dtype):
  if dtype in _BITS:
    return _BITS[dtype]
  return 8 if dtype.startswith("f8") else int(re.search(r"\d+", dtype)[0])


def _balanced(text):
  """The leading "(...)" of a text."""
  depth = 0
  for i, char in enumerate(text):
    depth += (char == "(") - (char == ")")
    if depth == 0:
      return text[: i + 1]
  return text


def _split(text):
  """(type, opcode, rest) of the right side of an instruction."""
  kind = _balanced(text) if text.startswith("(") else text.split(" ", 1)[0]
  found = re.match(r"([\w\-]+)\((.*)$", text[len(kind) :].strip(), re.DOTALL)
  return (kind, found[1], found[2]) if found else (kind, "", text)


def _trips(op, computations) -> int:
  """How often a loop runs: what XLA knows, or the constant that its counter meets."""
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', op.rest)
  if known:
    return int(known[1])
  condition = re.search(r"condition=%([\w.\-]+)", op.rest)[1]
  for name in [condition, *(c for o in computations[condition] for c in o.calls())]:
    for inner in computations.get(name, []):
      # Loops that spread a matmul over a collective count in unsigned numbers.
      if inner.opcode == "constant" and inner.type.startswith(("s32[]", "u32[]")):
        return int(re.match(r"-?\d+", inner.rest)[0])
  raise ValueError(f"the loop {op.name} has no constant number of trips")


def _matmul_flops(op, types) -> float:
  if op.opcode == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)[1]
    lhs = shapes(types.get(op.operands()[0], "") or _balanced("(" + op.rest))[0][1]
    width = math.prod(lhs[int(i)] for i in contracted.split(",") if i)
    return 2.0 * width * math.prod(shapes(op.type)[0][1])
  return _conv_flops(op, types) if op.opcode == "convolution" else 0.0


def _conv_flops(op, types) -> float:
  """2 x multiply-adds, counting only taps that meet input.

  The TPU compiler writes matmuls as convolutions, and batched ones as convolutions with
  padding and dilation whose taps mostly meet nothing.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
  lhs_labels, kernel_labels, out_labels = labels.groups()
  lhs, kernel = (shapes(types[name])[0][1] for name in op.operands()[:2])
  out = shapes(op.type)[0][1]
  spatial = sorted(c for c in lhs_labels if c.isdigit())
  window = re.search(r"window=\{([^}]*)\}", op.rest)
  window = window[1] if window else ""

  def setting(key, default):
    found = re.search(rf"\b{key}=([\d_x\-]+)", window)
    if not found:
      return [default] * len(spatial)
    return [[int(n) for n in part.split("_")] for part in found[1].split("x")]

  settings = zip(
    spatial,
    setting("stride", [1]),
    setting("pad", [0, 0]),
    setting("lhs_dilate", [1]),
    setting("rhs_dilate", [1]),
    strict=True,
  )
  taps = 1
  for label, (stride,), (pad, _), (lhs_dilate,), (rhs_dilate,) in settings:
    size = lhs[lhs_labels.index(label)]
    o = np.arange(out[out_labels.index(label)])[:, None]
    k = np.arange(kernel[kernel_labels.index(label)])[None]
    x = o * stride - pad + k * rhs_dilate
    inside = (x >= 0) & (x <= (size - 1) * lhs_dilate) & (x % lhs_dilate == 0)
    taps *= int(np.count_nonzero(inside))
  batch, features = out[out_labels.index("b")], out[out_labels.index("f")]
  return 2.0 * taps * batch * features * kernel[kernel_labels.index("i")]


def _fused_collective(op, computations):
  """(kind, op) of a collective that the compiler wrapped into a fusion, or None."""
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
  """(kind, op, types around it) of a collective that SparseCore does, or None."""
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


def _add_traffic(report, kind, op, types, times, chips):
  """Adds a collective to the report; the bytes that a chip sends for it, its group."""
  members = _group(op.rest, chips)
  group = len(members)
  size = num_bytes(op.type)
  if op.opcode.endswith("-start") and kind != "all-reduce":
    # The type of a start has the operands beside the results.
    size -= sum(num_bytes(types.get(name, "")) for name in op.operands())
  share = (group - 1) / group
  wire = {
    "all-reduce": 2 * share * size,
    "reduce-scatter": share * size * group,
    "collective-permute": size,
  }.get(kind, share * size)
  traffic = report.collectives[kind]
  traffic.runs += times
  traffic.bytes += times * size
  traffic.wire += times * wire
  traffic.groups.add(group)
  traffic.exposed[members] += times * wire
  return times * wire, members


def _group(rest, chips) -> tuple[int, ...]:
  """Partition ids of the first group of chips that take part together."""
  if found := re.search(
    r"replica_groups=\[(\d+),(\d+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", rest
  ):
    # Rows of an iota that is reshaped and transposed.
    ids = np.arange(int(found[1]) * int(found[2]))
    if found[4]:
      ids = ids.reshape(_ints(found[3])).transpose(_ints(found[4]))
    return tuple(ids.reshape(-1, int(found[2]))[0].tolist())
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
    axes = re.findall(r"'(\w+)'=(\d+)", found[1])
    # Ids along the named axes, from the first one of all others.
    sizes, chosen = {name: [int(n)] for name, n in axes}, []
    for part in found[2].split(","):
      name = re.search(r"'(\w+)'", part)[1]
      index = 0
      if piece := re.search(r":\((\d+)\)(\d+)", part):  # a part of an axis
        before, size = int(piece[1]), int(piece[2])
        sizes[name] = [before, size, sizes[name][0] // (before * size)]
        index = 1
      chosen.append((name, index))
    ids = np.arange(math.prod(sum(sizes.values(), [])))
    ids = ids.reshape(sum(sizes.values(), []))
    places = [(name, i) for name in sizes for i in range(len(sizes[name]))]
    ids = ids[tuple(slice(None) if place in chosen else 0 for place in places)]
    return tuple(ids.ravel().tolist())
  if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", rest):
    return tuple(_ints(found[1]))
  return tuple(range(chips))


def _ints(text):
  return [int(n) for n in text.split(",")]
