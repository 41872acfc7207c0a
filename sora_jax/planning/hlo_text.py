"""The text of a compiled program, as data: instructions, shapes, FLOPs, groups.

The text is scheduled HLO as `compiled.as_text()` gives it, or as XLA dumps it. What all
of it amounts to is counted in hlo.py.
"""

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
# Types whose name does not say their bits: a pred takes a byte, the others nothing.
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b(pred|[usf](?:2|4|8|16|32|64)|bf16|f8\w+)\[([\d,]*)\]")
_OP = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
# Metadata of Pallas kernels has line breaks inside an instruction.
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n[^\n]*\n\}")
_PALLAS = re.compile(r'"(tpu_custom_call|__gpu\$xla\.gpu\.triton)"')


class Op(NamedTuple):
  """One instruction, `%name = type opcode(rest`.

  `rest` begins with the operands, up to the matching ")", and goes on with attributes.
  """

  name: str
  type: str
  opcode: str
  rest: str

  def operands(self) -> list[str]:
    """Returns the names of the operands."""
    return re.findall(r"%([\w.\-]+)", _balanced("(" + self.rest))

  def calls(self) -> list[str]:
    """Returns the names of the computations that it calls."""
    found = re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", self.rest)
    branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
    return found + re.findall(r"%([\w.\-]+)", branches[1] if branches else "")

  def cycles(self) -> float:
    """Returns the TPU compiler's estimate, or 0 where it has none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
    return float(found[1]) if found else 0.0

  def kernel(self) -> str | None:
    """Returns the name of the Pallas kernel that it launches, or None."""
    if self.opcode != "custom-call" or not _PALLAS.search(self.rest):
      return None
    # A GPU's custom calls are all called alike, but their metadata names the function.
    named = re.search(r'/(\w+)/pallas_call"', self.rest)
    return named[1] if named else re.sub(r"[.\d]+$", "", self.name)

  def source(self) -> str:
    """Returns the path of the JAX operation that it comes from, or its own name."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else self.name


def parse(text: str) -> tuple[dict[str, list[Op]], str]:
  """Returns the instructions of each computation, in order, and the entry's name.

  Raises:
    ValueError: if the text has no entry computation.
  """
  computations: dict[str, list[Op]] = {}
  entry, current = None, None
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


def shapes(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
  """Returns (dtype, shape) of each array in a type."""
  return [
    (dtype, tuple(int(n) for n in dims.split(",") if n))
    for dtype, dims in _SHAPE.findall(type_text)
  ]


def num_bytes(type_text: str) -> float:
  """Returns the bytes of all arrays in a type."""
  return sum(math.prod(shape) * bits(d) / 8 for d, shape in shapes(type_text))


def found(pattern: str, text: str) -> str:
  """Returns what the group of a pattern matches in a text.

  Raises:
    ValueError: if nothing matches; quotes the text.
  """
  match = re.search(pattern, text)
  if match is None:
    raise ValueError(f"no {pattern} in {text[:200]!r}")
  return match[1]


def bits(dtype: str) -> int:
  """Returns the bits of one number of a dtype."""
  if dtype in _BITS:
    return _BITS[dtype]
  return 8 if dtype.startswith("f8") else int(found(r"(\d+)", dtype))


def _balanced(text):
  """Returns the leading "(...)" of a text."""
  depth = 0
  for i, char in enumerate(text):
    depth += (char == "(") - (char == ")")
    if depth == 0:
      return text[: i + 1]
  return text


def _split(text):
  """Returns (type, opcode, rest) of the right side of an instruction."""
  kind = _balanced(text) if text.startswith("(") else text.split(" ", 1)[0]
  found = re.match(r"([\w\-]+)\((.*)$", text[len(kind) :].strip(), re.DOTALL)
  return (kind, found[1], found[2]) if found else (kind, "", text)


def loop_trips(op: Op, computations: dict[str, list[Op]]) -> int:
  """Returns how often a loop runs: as XLA knows it, or by its condition's constant.

  Raises:
    ValueError: if the condition compares the counter with nothing constant.
  """
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', op.rest)
  if known:
    return int(known[1])
  condition = found(r"condition=%([\w.\-]+)", op.rest)
  for name in [condition, *(c for o in computations[condition] for c in o.calls())]:
    for inner in computations.get(name, []):
      # Loops that spread a matmul over a collective count in unsigned numbers.
      if inner.opcode == "constant" and inner.type.startswith(("s32[]", "u32[]")):
        return int(found(r"^(-?\d+)", inner.rest))
  raise ValueError(f"the loop {op.name} has no constant number of trips")


def matmul_flops(op: Op, types: dict[str, str]) -> float:
  """Returns the FLOPs of a dot or convolution; 0 for any other instruction.

  types: name -> type of the instructions around it, for the shapes of operands.
  """
  if op.opcode == "dot":
    contracted = found(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    lhs = shapes(types.get(op.operands()[0], "") or _balanced("(" + op.rest))[0][1]
    width = math.prod(lhs[int(i)] for i in contracted.split(",") if i)
    return 2.0 * width * math.prod(shapes(op.type)[0][1])
  return _conv_flops(op, types) if op.opcode == "convolution" else 0.0


def _conv_flops(op, types) -> float:
  """2 x multiply-adds, counting only taps that meet input.

  The TPU compiler writes matmuls as convolutions, and batched ones as convolutions with
  padding and dilation whose taps mostly meet nothing.
  """
  labels = found(r"dim_labels=(\w+->\w+)", op.rest)
  lhs_labels, kernel_labels, out_labels = re.split("_|->", labels)
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


def chip_group(rest: str, chips: int) -> tuple[int, ...]:
  """Returns the partition ids of the first group of chips that take part together.

  HLO writes groups in three ways; without any, all chips are one group.
  """
  for read in (_iota_group, _mesh_group, _listed_group):
    if group := read(rest):
      return group
  return tuple(range(chips))


def _iota_group(rest):
  """Reads `[groups,size]<=[dims]T(perm)`: rows of a reshaped and transposed iota."""
  found = re.search(
    r"replica_groups=\[(\d+),(\d+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", rest
  )
  if not found:
    return None
  ids = np.arange(int(found[1]) * int(found[2]))
  if found[4]:
    ids = ids.reshape(_ints(found[3])).transpose(_ints(found[4]))
  return tuple(ids.reshape(-1, int(found[2]))[0].tolist())


def _mesh_group(rest):
  """Reads `mesh['a'=2,'b'=4] {'b'}`: the ids along named axes of a mesh.

  An axis may be named in part, as `'b':(2)2`: its 2 parts behind the first 2.
  """
  found = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
  if not found:
    return None
  axes = re.findall(r"'(\w+)'=(\d+)", found[1])
  sizes, chosen = {name: [int(n)] for name, n in axes}, []
  for part in found[2].split(","):
    name = re.search(r"'(\w+)'", part)[1]
    index = 0
    if piece := re.search(r":\((\d+)\)(\d+)", part):
      before, size = int(piece[1]), int(piece[2])
      sizes[name] = [before, size, sizes[name][0] // (before * size)]
      index = 1
    chosen.append((name, index))
  shape = sum(sizes.values(), [])
  ids = np.arange(math.prod(shape)).reshape(shape)
  places = [(name, i) for name in sizes for i in range(len(sizes[name]))]
  # Along all other axes the first group is the one at 0.
  ids = ids[tuple(slice(None) if place in chosen else 0 for place in places)]
  return tuple(ids.ravel().tolist())


def _listed_group(rest):
  """Reads `{{0,1},{2,3}}`, or the (sender, receiver) pairs of a permute."""
  found = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", rest)
  return tuple(_ints(found[1])) if found else None


def _ints(text):
  return [int(n) for n in text.split(",")]
