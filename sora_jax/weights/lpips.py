"""Names of LPIPS on VGG16, as the state dict of the authors' `lpips.LPIPS(net="vgg")`.

The file is made once, where torch and lpips are installed:
  x = lpips.LPIPS(net="vgg").state_dict()
  safetensors.torch.save_file({k: v.contiguous().clone() for k, v in x.items()}, file)
"""

import functools

from sora_jax.models import lpips
from sora_jax.runtime import safetensors_io
from sora_jax.weights import mapping

# Index of each convolution in torchvision's `vgg16().features`, by slice.
_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# Heads have a second name in some versions; the scale of the input is a constant.
_IGNORED = (r"lins\..*", r"scaling_layer\..*")


def names(widths=lpips.WIDTHS) -> list[mapping.Entry]:
  """Every tensor of a file, for `models.lpips.LPIPS(widths)`."""
  parts, fan_in = [], 3
  for i, (width, layers) in enumerate(zip(widths, _LAYERS, strict=True)):
    for j, layer in enumerate(layers):
      name, path = f"net.slice{i + 1}.{layer}", f"vgg/conv_{i}_{j}"
      parts += [
        mapping.conv(f"{name}.weight", (3, 3), fan_in, width, f"{path}/kernel"),
        mapping.plain(f"{name}.bias", (width,), f"{path}/bias"),
      ]
      fan_in = width
    parts.append(mapping.plain(f"lin{i}.model.1.weight", (1, width, 1, 1), f"head_{i}"))
  return parts


def load(file, widths=lpips.WIDTHS) -> dict:
  """Params of `models.lpips.LPIPS(widths)`, numpy.

  Raises:
    ValueError: if the file is missing, no safetensors file, or of another network; it
      lists the tensors that are wrong.
  """
  tensors = check(file, widths)
  return mapping.assemble(
    names(widths), lambda name: safetensors_io.read(tensors[name])
  )


@functools.cache
def check(file, widths=lpips.WIDTHS) -> dict[str, safetensors_io.Tensor]:
  """The tensors of a file, not read yet; raises as `load`."""
  try:
    tensors = safetensors_io.read_header(file)
  except OSError as error:
    raise ValueError(f"{file}: {error.strerror or error}") from error
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  if wrong := mapping.differences(names(widths), shapes, _IGNORED):
    raise ValueError(f"{file} is not LPIPS on VGG16: {safetensors_io.listed(wrong)}")
  return tensors
