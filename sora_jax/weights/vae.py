"""Wan's published VAE weights and our params: one entry a tensor."""

from sora_jax.models.vae_config import VAEConfig
from sora_jax.weights.mapping import Entry, conv, plain

# Our name of a layer -> its name in a layout.
_BLOCK = {
  "diffusers": {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
  },
  "original": {
    "norm_1": "residual.0",
    "conv_1": "residual.2",
    "norm_2": "residual.3",
    "conv_2": "residual.6",
    "shortcut": "shortcut",
  },
}
_ENDS = {
  "diffusers": {
    "conv_in": "conv_in",
    "norm_out": "norm_out",
    "conv_out": "conv_out",
    "to_moments": "quant_conv",
    "from_latent": "post_quant_conv",
  },
  "original": {
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "to_moments": "conv1",
    "from_latent": "conv2",
  },
}
_MIDDLE = {
  "diffusers": {
    "block_1": "mid_block.resnets.0",
    "attention": "mid_block.attentions.0",
    "block_2": "mid_block.resnets.1",
  },
  "original": {
    "block_1": "middle.0",
    "attention": "middle.1",
    "block_2": "middle.2",
  },
}


LAYOUTS = tuple(_BLOCK)


def entries(config: VAEConfig, layout: str) -> list[Entry]:
  """Every tensor of a Wan VAE file, by layout "diffusers" or "original".

  The layouts are `AutoencoderKLWan`'s and that of Wan2.1_VAE.pth and Wan2.2_VAE.pth,
  their tensors as safetensors. Paths are those in `VAE`'s params.

  Raises:
    ValueError: for another layout, and if no Wan VAE has this config's structure.
  """
  if layout not in LAYOUTS:
    raise ValueError(f"layout {layout!r} of VAE weights is not one of {LAYOUTS}")
  structure = {
    "patch_size": (1, *config.patch_size[1:]),
    "kernel": (3, 3, 3),
    "end_kernel": (3, 3, 3),
    "bottleneck": 0,
    "middle": True,
    "head_width": 0,
    "overlap": 0,
  }
  for key, value in structure.items():
    if getattr(config, key) != value:
      raise ValueError(
        f"no Wan VAE has {key} = {getattr(config, key)} (it is {value}), so there is "
        f"no {layout} layout for this config"
      )
  if "t" in config.downsample:
    raise ValueError(
      f"no Wan VAE halves time alone, as downsample = {config.downsample} does, so "
      f"there is no {layout} layout for this config"
    )
  return _encoder(config, layout) + _decoder(config, layout)


def _encoder(config, layout):
  ends, widths = _ENDS[layout], config.encoder_widths
  parts = _end_conv(config, "encoder", ends["conv_in"], "conv_in", None, widths[0])
  fan_in = widths[0]
  names = _stage_names(config, layout, "encoder", config.blocks)
  for i, width in enumerate(widths):
    for j in range(config.blocks):
      path = f"encoder/stage_{i}_block_{j}"
      parts += _block(layout, names[i][j], path, fan_in, width)
      fan_in = width
    if i < len(config.downsample):
      parts += _resample(config, names[i][-1], f"encoder/down_{i}", i, width, width)
  parts += _middle(layout, "encoder", fan_in)
  moments = 2 * config.latent_channels
  parts += [
    plain(
      f"encoder.{ends['norm_out']}.gamma", (fan_in, 1, 1, 1), "encoder/norm_out/scale"
    ),
    *_conv(f"encoder.{ends['conv_out']}", "encoder/conv_out/conv", 3, fan_in, moments),
    *_conv(ends["to_moments"], "encoder/to_moments/conv", 1, moments, moments),
  ]
  return parts


def _decoder(config, layout):
  ends, widths, channels = _ENDS[layout], config.decoder_widths, config.latent_channels
  parts = [
    *_conv(ends["from_latent"], "decoder/from_latent/conv", 1, channels, channels),
    *_conv(
      f"decoder.{ends['conv_in']}", "decoder/conv_in/conv", 3, channels, widths[0]
    ),
    *_middle(layout, "decoder", widths[0]),
  ]
  fan_in = widths[0]
  names = _stage_names(config, layout, "decoder", config.blocks + 1)
  for i, width in enumerate(widths):
    for j in range(config.blocks + 1):
      path = f"decoder/stage_{i}_block_{j}"
      parts += _block(layout, names[i][j], path, fan_in, width)
      fan_in = width
    if i < len(config.downsample):
      fan_in = width if config.stage_shortcut else width // 2
      stage = len(config.downsample) - 1 - i
      parts += _resample(config, names[i][-1], f"decoder/up_{i}", stage, width, fan_in)
  name = f"decoder.{ends['norm_out']}.gamma"
  parts.append(plain(name, (fan_in, 1, 1, 1), "decoder/norm_out/scale"))
  return parts + _end_conv(
    config, "decoder", ends["conv_out"], "conv_out", fan_in, None
  )


def _stage_names(config, layout, part, blocks):
  """Names of each stage's blocks and, last, of what resamples after it."""
  up = part == "decoder"
  names, number = [], 0
  for i in range(len(config.width_multipliers)):
    if layout == "original":
      stages = f"{part}.{'up' if up else 'down'}samples"
      if config.stage_shortcut:
        inner = f"{stages}.{i}.{'up' if up else 'down'}samples"
        names.append([f"{inner}.{j}" for j in range(blocks + 1)])
        continue
    else:
      stages = f"{part}.{'up' if up else 'down'}_blocks"
      if up or config.stage_shortcut:
        resample = "upsampler" if up else "downsampler"
        resample += "" if config.stage_shortcut else "s.0"
        names.append([f"{stages}.{i}.resnets.{j}" for j in range(blocks)])
        names[-1].append(f"{stages}.{i}.{resample}")
        continue
    # One list of all blocks and resamplings.
    names.append([f"{stages}.{number + j}" for j in range(blocks + 1)])
    number += blocks + 1
  return names


def _block(layout, name, path, fan_in, fan_out):
  names = _BLOCK[layout]
  parts = [
    plain(f"{name}.{names['norm_1']}.gamma", (fan_in, 1, 1, 1), f"{path}/norm_1/scale"),
    *_conv(f"{name}.{names['conv_1']}", f"{path}/conv_1/conv", 3, fan_in, fan_out),
    plain(
      f"{name}.{names['norm_2']}.gamma", (fan_out, 1, 1, 1), f"{path}/norm_2/scale"
    ),
    *_conv(f"{name}.{names['conv_2']}", f"{path}/conv_2/conv", 3, fan_out, fan_out),
  ]
  if fan_in != fan_out:
    parts += _conv(
      f"{name}.{names['shortcut']}", f"{path}/shortcut/conv", 1, fan_in, fan_out
    )
  return parts


def _middle(layout, part, width):
  names = {key: f"{part}.{name}" for key, name in _MIDDLE[layout].items()}
  attention, path = names["attention"], f"{part}/middle/attention"
  return [
    *_block(layout, names["block_1"], f"{part}/middle/block_1", width, width),
    plain(f"{attention}.norm.gamma", (width, 1, 1), f"{path}/norm/scale"),
    *_pointwise(f"{attention}.to_qkv", f"{path}/qkv", width, 3 * width),
    *_pointwise(f"{attention}.proj", f"{path}/out", width, width),
    *_block(layout, names["block_2"], f"{part}/middle/block_2", width, width),
  ]


def _resample(config, name, path, stage, fan_in, fan_out):
  """The convolution over space of a frame, and the one over time."""
  up = path.startswith("decoder")
  parts = [
    Entry(
      f"{name}.resample.1.weight",
      (fan_out, fan_in, 3, 3),
      f"{path}/space/{'conv/' if up else ''}kernel",
      (1, 3, 3, fan_in, fan_out),
      order=(2, 3, 1, 0),
    ),
    plain(
      f"{name}.resample.1.bias", (fan_out,), f"{path}/space/{'conv/' if up else ''}bias"
    ),
  ]
  if "t" in config.downsample[stage]:
    time = f"{path}/time/conv" if up else f"{path}/time"
    features = 2 * fan_in if up else fan_in
    parts += [
      conv(f"{name}.time_conv.weight", (3, 1, 1), fan_in, features, f"{time}/kernel"),
      plain(f"{name}.time_conv.bias", (features,), f"{time}/bias"),
    ]
  return parts


def _conv(name, path, size, fan_in, fan_out):
  return [
    conv(f"{name}.weight", (size,) * 3, fan_in, fan_out, f"{path}/kernel"),
    plain(f"{name}.bias", (fan_out,), f"{path}/bias"),
  ]


def _pointwise(name, path, fan_in, fan_out):
  """A 1x1 convolution of frames, which is a dense layer here."""
  return [
    Entry(
      f"{name}.weight",
      (fan_out, fan_in, 1, 1),
      f"{path}/kernel",
      (fan_in, fan_out),
      split=(fan_out, fan_in),
      order=(1, 0),
    ),
    plain(f"{name}.bias", (fan_out,), f"{path}/bias"),
  ]


def _end_conv(config, part, name, ours, fan_in, fan_out):
  """The convolution that reads (fan_in None) or writes (fan_out None) the pixels.

  Wan orders the values of a patch (channel, w, h), we (h, w, channel).
  """
  p = config.patch_size[1]
  pixels, name, path = 3 * p * p, f"{part}.{name}", f"{part}/{ours}/conv"
  if fan_in is None:
    return [
      Entry(
        f"{name}.weight",
        (fan_out, pixels, 3, 3, 3),
        f"{path}/kernel",
        (3, 3, 3, pixels, fan_out),
        split=(fan_out, 3, p, p, 3, 3, 3),
        order=(4, 5, 6, 3, 2, 1, 0),
      ),
      plain(f"{name}.bias", (fan_out,), f"{path}/bias"),
    ]
  return [
    Entry(
      f"{name}.weight",
      (pixels, fan_in, 3, 3, 3),
      f"{path}/kernel",
      (3, 3, 3, fan_in, pixels),
      split=(3, p, p, fan_in, 3, 3, 3),
      order=(4, 5, 6, 3, 2, 1, 0),
    ),
    Entry(
      f"{name}.bias",
      (pixels,),
      f"{path}/bias",
      (pixels,),
      split=(3, p, p),
      order=(2, 1, 0),
    ),
  ]
