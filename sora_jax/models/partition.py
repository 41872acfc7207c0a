"""How networks lie on the mesh: rows over data and fsdp, tokens over context.

The mesh is that of `jax.set_mesh`; without one, or with one device, nothing happens.
"""

import math

import jax
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec

# Rows of a batch: each chip of these axes has its own clips.
ROWS = ("data", "fsdp")
# Every param is shared by all chips that would otherwise hold the same.
PARAMS = ("fsdp", "context")
# Between sublayers the tensor axis shares tokens, too: what the backward pass keeps is
# then nowhere twice (arXiv:2205.05198).
TOKENS = ("context", "tensor")


def mesh() -> AbstractMesh | None:
  """Returns the mesh of the program, if it has several devices."""
  current = jax.sharding.get_abstract_mesh()
  return None if current.empty or current.size == 1 else current


def platform() -> str:
  """Returns "cpu", "gpu" or "tpu": what the program is for.

  That need not be this machine: a plan compiles for TPUs on a CPU.
  """
  device = _device()
  return device.platform if device else jax.default_backend()


def device_kind() -> str:
  """Returns what the devices that the program is for are called."""
  device = _device()
  return device.device_kind if device else jax.local_devices()[0].device_kind


def _device():
  current = jax.sharding.get_abstract_mesh()
  return None if current.empty else current.abstract_device


def fit(current: AbstractMesh, shape, *axes) -> PartitionSpec:
  """Returns a PartitionSpec for the first dims of a shape: axes that divide them.

  Of several axes for one dim those that come first are kept.
  """
  fitted = []
  for size, names in zip(shape, axes, strict=False):
    names = (names,) if isinstance(names, str) else tuple(names or ())
    while size % math.prod(current.shape[name] for name in names):
      names = names[:-1]
    fitted.append(names or None)
  return PartitionSpec(*fitted)


def constrain(x: Array, *axes) -> Array:
  """Lays x out over the mesh, dim by dim, where the axes divide it; see `fit`.

  It is a hint to the compiler, which would otherwise choose, and changes no value.
  """
  current = mesh()
  if current is None:
    return x
  return jax.lax.with_sharding_constraint(x, fit(current, x.shape, *axes))
