"""Sizes of the VAE, and the published ones."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Sizes of the VAE.

  Attributes:
    width, width_multipliers: channels of each stage, finest first.
    downsample: what halves between stages: "s" space, "t" time, "st" both. The
      defaults compress 4x8x8.
    blocks: residual blocks per stage (the decoder has one more, as in Wan).
    latent_channels: C of the latent.
    patch_size: (t, h, w) of pixels folded into channels before the first convolution;
      multiplies the compression. Cheap on small machines, at some cost in detail.
    kernel: of the convolutions in residual blocks. end_kernel: of those that read and
      write the (folded) pixels and the latent.
    bottleneck: channels between the two convolutions of a residual block, of which the
      second is then 1x1x1; 0 = as many as the block's, both with the kernel (Wan).
    middle: two more blocks with attention between them at the coarsest grid.
    decoder_width: as width, of the decoder; 0 = width.
    stage_shortcut: an average (encoder) or a repetition (decoder) of the pixels and
      channels goes around each stage that changes the grid (Wan 2.2).
    head_width: of one more 1x1x1 layer before the decoder's last convolution; 0 = none
      (Wan). A folded patch has many pixels for that last, linear layer to draw.
    blend: the frames of a folded patch are drawn one by one, of features that go evenly
      from those of the latent before to its own: no jump is between two latents.
    frame_head: the layer of head_width sees the latent before as well as its own, and
      has weights of its own for each frame of a folded patch. So it draws what moves
      where it is then, and not as two ghosts as with `blend`.
    overlap: pixels by which each drawn patch reaches over its neighbours on every side,
      where what both draw is added up, so that no border is between two patches.
  """

  width: int = 96
  width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
  downsample: tuple[str, ...] = ("s", "st", "st")
  blocks: int = 2
  latent_channels: int = 16
  patch_size: tuple[int, int, int] = (1, 1, 1)
  kernel: tuple[int, int, int] = (3, 3, 3)
  end_kernel: tuple[int, int, int] = (3, 3, 3)
  bottleneck: int = 0
  middle: bool = True
  decoder_width: int = 0
  stage_shortcut: bool = False
  head_width: int = 0
  blend: bool = False
  frame_head: bool = False
  overlap: int = 0

  def __post_init__(self):
    if len(self.downsample) != len(self.width_multipliers) - 1:
      raise ValueError(
        f"vae downsample {self.downsample} needs one entry fewer than "
        f"width_multipliers {self.width_multipliers}"
      )
    if unknown := set(self.downsample) - {"s", "t", "st"}:
      raise ValueError(f"vae downsample entries {sorted(unknown)} are not s, t or st")
    if self.patch_size[1] != self.patch_size[2]:
      raise ValueError(f"vae patch_size {self.patch_size} must be square in space")
    if self.frame_head and (self.blend or not self.head_width):
      raise ValueError(
        "vae frame_head needs a head_width, and takes the place of blend"
      )
    if not 0 <= self.overlap <= self.patch_size[1]:
      raise ValueError(
        f"vae overlap {self.overlap} is not between 0 and the patch's "
        f"{self.patch_size[1]} pixels"
      )
    if self.stage_shortcut:
      self._check_shortcuts()

  def _check_shortcuts(self):
    # Values that an average takes at one cell, and channels it makes of them; the
    # decoder has the same the other way round.
    widths, last = self.encoder_widths, len(self.downsample)
    cells = [(widths[max(i - 1, 0)], i, width) for i, width in enumerate(widths)]
    widths = self.decoder_widths
    cells += [(widths[i], last - 1 - i, widths[max(i - 1, 0)]) for i in range(last)]
    for fine, stage, coarse in cells:
      values = fine * math.prod(self.stage_factors(stage))
      if values % coarse:
        raise ValueError(
          f"vae stage_shortcut needs channels that divide: {coarse} do not divide the "
          f"{values} values of a cell of stage {stage}"
        )

  @property
  def encoder_widths(self) -> list[int]:
    """Channels of the encoder's stages, in its order."""
    return [self.width * m for m in self.width_multipliers]

  @property
  def decoder_widths(self) -> list[int]:
    """Channels of the decoder's stages, in its order: coarsest first."""
    width = self.decoder_width or self.width
    return [width * m for m in reversed(self.width_multipliers)]

  def stage_factors(self, stage: int) -> tuple[int, int, int]:
    """(t, h, w) by which an encoder stage divides the grid; 1 after the last."""
    kind = self.downsample[stage] if stage < len(self.downsample) else ""
    return (1 + ("t" in kind), 1 + ("s" in kind), 1 + ("s" in kind))

  @property
  def space_factor(self) -> int:
    return self.patch_size[1] * 2 ** sum("s" in kind for kind in self.downsample)

  @property
  def time_factor(self) -> int:
    return self.patch_size[0] * 2 ** sum("t" in kind for kind in self.downsample)

  def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent (T, H, W) of a video.

    Raises:
      ValueError: if frames are not 1 + a multiple of the time factor, or the height
        or width are not multiples of the space factor.
    """
    if (
      (frames - 1) % self.time_factor
      or height % self.space_factor
      or (width % self.space_factor)
    ):
      raise ValueError(
        f"a video of {frames} frames of {width}x{height} is off the VAE's grid: "
        f"frames must be 1 + a multiple of {self.time_factor}, width and height "
        f"multiples of {self.space_factor}"
      )
    return (
      1 + (frames - 1) // self.time_factor,
      height // self.space_factor,
      width // self.space_factor,
    )


# Published models. Wan 2.1: arXiv:2503.20314, 127M params, 4x8x8. Wan 2.2: the VAE of
# TI2V-5B, 705M params, 4x16x16.
PRESETS = {
  "wan2.1": VAEConfig(),
  "wan2.2": VAEConfig(
    width=160,
    decoder_width=256,
    latent_channels=48,
    patch_size=(1, 2, 2),
    stage_shortcut=True,
  ),
}

# Nearly all of its work is done on the grid of latents: for CPUs, and for small videos.
SMALL = {
  "patches": VAEConfig(
    width=192,
    width_multipliers=(1,),
    downsample=(),
    blocks=1,
    patch_size=(4, 8, 8),
    kernel=(1, 3, 3),
    end_kernel=(1, 1, 1),
    bottleneck=64,
    middle=False,
    head_width=384,
    frame_head=True,
    overlap=2,
  )
}

# fmt: off
# Of the published: (mean, std) of latents; networks see (latent - mean) / std.
LATENT_STATS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
  "wan2.1": (
    (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134,
     -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526,
     2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
  ),
  "wan2.2": (
    (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382,
     0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207,
     -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109,
     0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
     -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573,
     -0.0548, -0.1681, -0.0667),
    (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344,
     0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804,
     0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999,
     0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
     0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
  ),
}
# fmt: on
