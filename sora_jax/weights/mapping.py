"""What a tensor of a weights file is in our params, as data that reads both ways."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a file and the leaf, or layer of a scanned leaf, that it becomes.

  ours = tensor.reshape(split).transpose(order).reshape(our shape), and back.

  Attributes:
    name, shape: of the tensor in the file.
    path: of our leaf in the network's param tree, "blocks/query/kernel".
    layer: index on the leading axis of a leaf under `nn.scan`; None = the whole leaf.
    split, order: how the tensor is cut into axes, and these permuted.
    our_shape: of the leaf, or of one layer of it.
  """

  name: str
  shape: tuple[int, ...]
  path: str
  our_shape: tuple[int, ...]
  layer: int | None = None
  split: tuple[int, ...] | None = None
  order: tuple[int, ...] | None = None

  def __post_init__(self):
    size = math.prod(self.shape)
    assert size == math.prod(self.our_shape) == math.prod(self._split), self
    assert sorted(self._order) == list(range(len(self._split))), self

  @property
  def _split(self):
    return self.shape if self.split is None else self.split

  @property
  def _order(self):
    return tuple(range(len(self._split))) if self.order is None else self.order

  def load(self, tensor: np.ndarray) -> np.ndarray:
    """Our value of a tensor of the file; a view where that is possible."""
    return tensor.reshape(self._split).transpose(self._order).reshape(self.our_shape)

  def save(self, value: np.ndarray) -> np.ndarray:
    """The tensor of the file for our value: the exact inverse of `load`."""
    permuted = [self._split[i] for i in self._order]
    return (
      value.reshape(permuted).transpose(np.argsort(self._order)).reshape(self.shape)
    )


def plain(name, shape, path, layer=None) -> Entry:
  """Biases, norms, embeddings: the same numbers, without the file's axes of size 1."""
  return Entry(name, shape, path, tuple(n for n in shape if n != 1) or (1,), layer)


def linear(name, fan_in, fan_out, path, layer=None) -> Entry:
  """torch's [out, in] weight to our [in, out] kernel."""
  return Entry(name, (fan_out, fan_in), path, (fan_in, fan_out), layer, order=(1, 0))


def conv(name, kernel, fan_in, fan_out, path, layer=None) -> Entry:
  """torch's [out, in, *kernel] weight to our [*kernel, in, out] kernel."""
  axes = range(2, 2 + len(kernel))
  return Entry(
    name,
    (fan_out, fan_in, *kernel),
    path,
    (*kernel, fan_in, fan_out),
    layer,
    order=(*axes, 1, 0),
  )


def assemble(entries: Sequence[Entry], read: Callable[[str], np.ndarray]) -> dict:
  """Param tree of plain numpy arrays; layers of a leaf are stacked in their order.

  Args:
    entries: of one network.
    read: name of a tensor -> its value.
  """
  params: dict = {}
  for path, parts in by_leaf(entries).items():
    if parts[0].layer is None:
      value = parts[0].load(read(parts[0].name))
    else:
      value = np.stack([entry.load(read(entry.name)) for entry in parts])
    *outer, last = path.split("/")
    node = params
    for key in outer:
      node = node.setdefault(key, {})
    node[last] = value
  return params


def differences(
  entries: Sequence[Entry], shapes: dict[str, tuple], ignored: Sequence[str] = ()
) -> list[str]:
  """How the tensors of a file differ from those of a network, a line each.

  Args:
    entries: of the network.
    shapes: of the file's tensors, by name.
    ignored: regexes of names that may be there as well.
  """
  wanted = {entry.name: entry.shape for entry in entries}
  lines = [f"{name} is missing" for name in wanted if name not in shapes]
  lines += [
    f"{name} has shape {tuple(shapes[name])} instead of {shape}"
    for name, shape in wanted.items()
    if name in shapes and tuple(shapes[name]) != shape
  ]
  lines += [
    f"{name} is not a tensor of this network"
    for name in shapes
    if name not in wanted and not any(re.fullmatch(i, name) for i in ignored)
  ]
  return lines


def by_leaf(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
  """Entries of each leaf of ours, by path, layers in order."""
  leaves: dict[str, list[Entry]] = {}
  for entry in entries:
    leaves.setdefault(entry.path, []).append(entry)
  for path, parts in leaves.items():
    parts.sort(key=lambda entry: -1 if entry.layer is None else entry.layer)
    layers = [entry.layer for entry in parts]
    assert layers in ([None], list(range(len(parts)))), (path, layers)
  return leaves


def leaf_shape(parts: Sequence[Entry]) -> tuple[int, ...]:
  """Shape of a leaf of ours from its entries."""
  shape = parts[0].our_shape
  return shape if parts[0].layer is None else (len(parts), *shape)
