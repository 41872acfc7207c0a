"""What a user asks for: texts, numbers and media, and what they amount to."""

import dataclasses
import hashlib
import pathlib
from typing import Any

import numpy as np

from sora_jax.sampling import conditioning
from sora_jax.sampling.conditioning import Windows

# A file, or uint8 [T, H, W, 3]; an image may be [H, W, 3].
Media = Any

MODES = (
  "text",
  "image",
  "extend",
  "connect",
  "loop",
  "edit",
  "infill",
  "interpolate",
)
_MEDIA = ("image", "last_image", "video", "connect", "mask")


@dataclasses.dataclass(frozen=True)
class Job:
  """One video to make. Times are in seconds; media are files or uint8 arrays.

  Attributes:
    prompt, negative_prompt, guidance_scale, seed, shots, blend: see
      `conditioning.Request`.
    size: (width, height); that of the first medium, or 64x64. Larger than the grid of
      the model by less than a step, it is cut from the next larger one.
    frames: 17 if there is nothing else to tell. Of a job with `video`, its own.
    fps: that of the video, or 12; a video is read at it.
    image, last_image: first and last frame. key_frames: (seconds, image) of others.
    video: what to work on; what to do with it, one of:
      extend_before, extend_after: seconds to add.
      connect: another video that follows after `gap` seconds (1), which are made; with
        strength, one video that gradually turns from the first into the second.
      loop: `gap` seconds, as many as it has, that lead from its end to its start.
        Without a video: a loop from text alone.
      gap_strength: a gap begins as what is beside it, played backwards and mixed, with
        noise on it: of this level in the middle, less towards the ends. 1: it begins
        as noise alone, and moves as the model has it.
      strength: how much to change, 0 to 1; with a mask, an image that is white where to
        change, only there. mask alone is strength 1.
      infill: (from, to) seconds that are made anew.
      interpolate: how many times as many frames a second.
    fit: "crop" or "pad" media of another aspect ratio than size.
    window, given: frames made at once, and of those taken from the window before. 0:
      all at once. given_noise: noise level on them, against drift.
    preview: first make it at half the size, then that again at full size with this
      strength; 0 = at once.
  """

  prompt: str = ""
  size: tuple[int, int] | None = None
  frames: int | None = None
  fps: float | None = None
  seed: int = 0
  negative_prompt: str = ""
  guidance_scale: float | None = None
  shots: tuple[tuple[float, str], ...] = ()
  blend: str = ""
  image: Media = None
  last_image: Media = None
  key_frames: tuple[tuple[float, Media], ...] = ()
  video: Media = None
  extend_before: float = 0.0
  extend_after: float = 0.0
  connect: Media = None
  gap: float | None = None
  gap_strength: float = 0.4
  loop: bool = False
  strength: float | None = None
  mask: Media = None
  infill: tuple[float, float] | None = None
  interpolate: int = 1
  fit: str = "crop"
  window: int = 33
  given: int = 9
  given_noise: float = 0.0
  preview: float = 0.0

  def __post_init__(self):
    if self.fit not in ("crop", "pad"):
      raise ValueError(f"fit {self.fit!r} is not crop or pad")
    for name in ("strength", "gap_strength", "given_noise", "preview"):
      if getattr(self, name) is not None:
        conditioning.check_level(name, getattr(self, name))
    for name in ("extend_before", "extend_after"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name} {getattr(self, name)} s is negative")
    if self.gap is not None and self.gap <= 0:
      raise ValueError(f"gap {self.gap} s is not above 0")
    if self.interpolate not in (1, 2, 4):
      raise ValueError(f"interpolate {self.interpolate} is not 2 or 4 times the frames")
    if self.window and (self.window < 5 or not 1 <= self.given < self.window):
      raise ValueError(
        f"a window of {self.window} frames with {self.given} given: it needs 5 frames "
        "or more, and fewer given, 1 at least"
      )
    self._check_mode()

  def _check_mode(self):
    wanted = self._actions()
    if len(wanted) > 1:
      raise ValueError(f"{' and '.join(wanted)} exclude each other: give one of them")
    images = [n for n in ("image", "last_image", "key_frames") if _there(self, n)]
    if self.video is None:
      if wanted and wanted != ["loop"]:
        raise ValueError(f"{wanted[0]} needs a video to work on")
      if self.loop and images:
        raise ValueError(f"a loop from text has no {images[0]}: give a video instead")
    elif not wanted:
      raise ValueError(
        "what is to be done with the video? Give one of extend_before, extend_after, "
        "connect, loop, strength, mask, infill, interpolate"
      )
    elif images and wanted != ["edit"]:
      raise ValueError(f"{images[0]} and {wanted[0]} of a video exclude each other")
    if self.preview and self.mode not in ("text", "image"):
      raise ValueError(f"a preview is for text and images, not for {self.mode}")

  def _actions(self) -> list[str]:
    # A strength says more of a connection and of frames in between.
    other = self.connect is not None or self.interpolate > 1
    edits = (self.strength is not None and not other) or _there(self, "mask")
    found = {
      "extend": self.extend_before > 0 or self.extend_after > 0,
      "connect": self.connect is not None,
      "loop": self.loop,
      "edit": edits,
      "infill": self.infill is not None,
      "interpolate": self.interpolate > 1,
    }
    return [name for name in found if found[name]]

  @property
  def mode(self) -> str:
    """One of MODES."""
    images = any(_there(self, n) for n in ("image", "last_image", "key_frames"))
    return (self._actions() or ["image" if images else "text"])[0]

  @property
  def is_plain(self) -> bool:
    """Whether it is a text alone, for one window: many of them can share rows."""
    other = self.shots or self.blend or self.preview
    short = not self.window or (self.frames or 0) <= self.window
    return self.mode == "text" and short and not other

  @property
  def windows(self) -> Windows:
    """How the video is cut, in latent frames."""
    length = 0 if not self.window else 1 + -(-(self.window - 1) // 4)
    given = 1 + -(-(self.given - 1) // 4)
    if length and given >= length:
      given = length - 1
    return Windows(length, given, self.given_noise)

  def as_json(self) -> dict:
    """Everything but defaults; media must be files. See `from_json`.

    Raises:
      ValueError: if a medium is an array, which a file of text cannot hold.
    """
    values = {}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      media = [image for _, image in value] if field.name == "key_frames" else [value]
      if any(isinstance(m, np.ndarray) for m in media):
        raise ValueError(f"{field.name} is an array: only files can be kept in JSON")
      if field.name == "key_frames":
        value = tuple((time, str(image)) for time, image in value)
      if field.name in _MEDIA and value is not None:
        value = str(value)
      if value != field.default:
        values[field.name] = value
    return values

  @classmethod
  def from_json(cls, values: dict) -> "Job":
    """Reverse of `as_json`; ValueError for keys that there are not."""
    if unknown := set(values) - {field.name for field in dataclasses.fields(cls)}:
      raise ValueError(f"{sorted(unknown)} are no keys of a job")
    pairs = {
      name: tuple((float(time), x) for time, x in values[name])
      for name in ("shots", "key_frames")
      if name in values
    }
    tuples = {
      name: tuple(values[name]) for name in ("size", "infill") if values.get(name)
    }
    return cls(**{**values, **pairs, **tuples})

  def files(self) -> dict[str, str]:
    """Hash of every file that is used, by path; ValueError if one cannot be read."""
    media = [getattr(self, name) for name in _MEDIA]
    media += [image for _, image in self.key_frames]
    hashes = {}
    for path in media:
      if isinstance(path, (str, pathlib.Path)):
        try:
          content = pathlib.Path(path).read_bytes()
        except OSError as error:
          raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        hashes[str(path)] = hashlib.sha256(content).hexdigest()
    return hashes


def _there(job, name):
  value = getattr(job, name)
  return value is not None and (isinstance(value, np.ndarray) or bool(value))
