"""What a user asks for: texts, numbers and media, and what they amount to."""

import dataclasses
import hashlib
import math
import pathlib
from typing import Any

import numpy as np

from sora_jax.packing import time_grid
from sora_jax.sampling.conditioning import check_level
from sora_jax.sampling.windows import Windows

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
# Of a job that does not say its windows, in frames.
_WINDOW, GIVEN = 33, 9
_MEDIA = ("image", "last_image", "video", "connect", "mask")


def _field(default, help: str, **more):
  """A field with what `sampling.flags` shows and needs to parse it."""
  return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass(frozen=True)
class Job:
  """One video to make. Times are in seconds; media are files or uint8 arrays.

  Each field says what it means, which is also the help text of its flag. A job with a
  `video` does one thing with it: extend, connect, loop, edit, infill or interpolate.

  Raises:
    ValueError: for values out of range, and for fields that exclude each other.
  """

  prompt: str = _field("", "What to make.")
  size: tuple[int, int] | None = _field(
    None,
    "WIDTHxHEIGHT; that of the first medium, or the checkpoint's.",
    form="WIDTHxHEIGHT",
  )
  frames: int | None = _field(
    None, "Frames; the video's own, or the checkpoint's, and 1 for an image.", least=1
  )
  fps: float | None = _field(
    None, "Frames per second; the video's, or the checkpoint's.", least=0.1
  )
  seed: int = _field(0, "Seed; of several prompts the next has the next one.")
  negative_prompt: str | None = _field(
    None, "What guidance leads away from; by default the checkpoint's."
  )
  guidance_scale: float | None = _field(None, "In place of that of the options.")
  shots: tuple[tuple[float, str], ...] = _field(
    (), "SECONDS:TEXT of a later shot.", flag="shot", form="SECONDS:TEXT"
  )
  blend: str = _field("", "Text that the video gradually turns to.")
  image: Media = _field(None, "First frame.")
  last_image: Media = _field(None, "Last frame.")
  key_frames: tuple[tuple[float, Media], ...] = _field(
    (), "SECONDS:FILE of a frame in between.", flag="key_frame", form="SECONDS:FILE"
  )
  video: Media = _field(None, "What to extend, connect, loop, edit, infill.")
  extend_before: float = _field(0.0, "Seconds to add at the start.")
  extend_after: float = _field(0.0, "Seconds to add at the end.")
  connect: Media = _field(
    None,
    "Another video, that the first leads to; with --strength one video that gradually "
    "turns from the first into the second.",
  )
  gap: float | None = _field(
    None, "Seconds to make: for --connect 1, for --loop as long as --video."
  )
  gap_strength: float = _field(
    0.4,
    "How far a gap is from what is beside it, played backwards and mixed: noise of "
    "this level in its middle, less towards its ends; 1 is noise alone.",
  )
  loop: bool = _field(False, "A loop: of --video, or of the prompt alone.")
  strength: float | None = _field(None, "How much to change of --video, 0 to 1.")
  mask: Media = _field(
    None, "An image, white where to change --video; alone with a strength of 1."
  )
  infill: tuple[float, float] | None = _field(
    None, "FROM,TO in seconds: what to make anew.", form="FROM,TO in seconds"
  )
  interpolate: int = _field(1, "Times as many frames a second: 2 or 4.")
  fit: str = _field("crop", "Inputs of another aspect ratio.", choices=("crop", "pad"))
  window: int | None = _field(
    None, "Frames made at once; 0 = all. By default as many as the model's videos have."
  )
  given: int | None = _field(
    None, "Frames of a window from the window before. By default half of it, at most 9."
  )
  given_noise: float = _field(0.0, "Noise on those, against drift; 0 to 1.")
  preview: float = _field(
    0.0, "Make it at half the size first, then refine that with this strength."
  )

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field.name} {value} is not a finite number")
    if self.fit not in ("crop", "pad"):
      raise ValueError(f"fit {self.fit!r} is not crop or pad")
    for name in ("strength", "gap_strength", "given_noise", "preview"):
      if getattr(self, name) is not None:
        check_level(name, getattr(self, name))
    if self.seed < 0:
      raise ValueError(f"seed {self.seed} is negative")
    for name in ("extend_before", "extend_after"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name} {getattr(self, name)} s is negative")
    if self.gap is not None and self.gap <= 0:
      raise ValueError(f"gap {self.gap} s is not above 0")
    if self.interpolate not in (1, 2, 4):
      raise ValueError(f"interpolate {self.interpolate} is not 2 or 4 times the frames")
    self._check_window()
    self._check_mode()

  def _check_window(self):
    """Windows overlap, and are longer than that; what is at its default is no fault."""
    window, given = self.window_frames, self.given_frames
    if window and window < 5:
      raise ValueError(f"window {window}: at least 5 frames, or 0 for all at once")
    if given < 1:
      raise ValueError(f"given {given}: at least 1 frame")
    if not window or given < window:
      return
    if self.window is None:
      raise ValueError(
        f"given {given}: at most {window - 1} frames, one less than a window has; more "
        "needs a larger window"
      )
    raise ValueError(f"given {given} is not less than window {window}")

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
    short = not self.window_frames or (self.frames or 0) <= self.window_frames
    return self.mode == "text" and short and not other

  @property
  def window_frames(self) -> int:
    """Frames made at once, 0 for all."""
    return _WINDOW if self.window is None else self.window

  @property
  def given_frames(self) -> int:
    """Frames of a window that come from the window before."""
    if self.given is not None:
      return self.given
    half = time_grid.TIME_FACTOR * ((self.window_frames - 1) // 8) + 1
    return min(half, GIVEN) if self.window_frames else GIVEN

  @property
  def windows(self) -> Windows:
    """How the video is cut, in latent frames."""
    length = time_grid.latent_frames(self.window_frames) if self.window_frames else 0
    given = time_grid.latent_frames(self.given_frames)
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
    """Reverse of `as_json`; ValueError for what is no job."""
    try:
      return cls._from_json(values)
    except (TypeError, AttributeError, KeyError) as error:
      raise ValueError(f"not a job: {error}") from error

  @classmethod
  def _from_json(cls, values):
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
