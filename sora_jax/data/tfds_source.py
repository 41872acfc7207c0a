"""A TFDS data set as a source of clips: `data.source = "tfds:..."`.

  tfds:NAME, tfds:NAME/CONFIG:VERSION   prepared in TFDS_DATA_DIR
  tfds:/a/prepared/folder
  tfds:NAME?video=clip&text=caption&fps=12

Its media are a Video or Image feature, a sequence of images, a tensor [T, H, W, C], or
the bytes of a file; where there are several, `video` names one. Captions are the Text
features that `text` names, with commas, or the only one; a ClassLabel counts by its
name. `fps` is the rate of frames that do not say it. Splits that are named test,
validation or heldout are held out.

An example is read when it is needed, as a file inside the data set, see `stored`.
"""

import io
import os
import pathlib
import urllib.parse
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from sora_jax.data import tfds_examples
from sora_jax.data.tfds_examples import Prepared
from sora_jax.data.video import in_memory, pictures

PREFIX = "tfds:"
_RATES = ("fps", "frame_rate", "framerate")
_HELDOUT = ("test", "val", "valid", "validation", "heldout", "eval", "dev")
_OWN = {"id", "row", "video", "captions", "frames", "fps", "height", "width"}
_OPTIONS = ("video", "text", "fps")
# What files begin with -> suffix; what is none of them is tried as MP4.
_MAGIC = {
  b"\x89PNG": ".png",
  b"\xff\xd8\xff": ".jpg",
  b"GIF8": ".gif",
  b"\x1aE\xdf\xa3": ".mkv",
}


class Media(NamedTuple):
  """The feature that holds the media. kind: "file", "images" or "pixels"."""

  name: str
  kind: str


def rows(source: str, fps: float = 0.0) -> tuple[str, dict[str, dict[str, Any]]]:
  """What `sources.scan` takes: a folder, and a row for each example by path in it.

  Args:
    source: "tfds:...", see above.
    fps: rate of frames that do not say it, where the source does not either; 0 = none.

  Raises:
    ValueError: no such data set, several features that could be meant, no rate.
  """
  name, options = _parse(source)
  prepared = tfds_examples.read_info(tfds_examples.find_folder(name))
  media = _media(prepared, options.get("video", ""))
  texts = _texts(prepared, options.get("text"))
  fps = float(options.get("fps", fps))
  found: dict[str, dict[str, Any]] = {}
  folder = pathlib.Path(prepared.folder)
  for split, index, number, example in _examples(prepared):
    member = _member(media, example, fps, source)
    path = f"{folder.name}::tfds/{number:08d}/{split}/{index}/{member}"
    captions = [text for texts_of in texts for text in _captions(example, *texts_of)]
    found[path] = {"captions": captions, "split": _split(split, prepared.splits)}
  logging.info(
    "%s: %d examples of %s, media in %r, captions in %s", source, len(found),
    prepared.folder, media.name, [text for text, _ in texts] or "no feature",
  )  # fmt: skip
  return str(folder.parent), dict(sorted(found.items()))


def _parse(source):
  name, _, query = source.removeprefix(PREFIX).partition("?")
  options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
  for key in options:
    if key not in _OPTIONS:
      raise ValueError(f"{source}: {key!r} is none of {', '.join(_OPTIONS)}")
  return name, options


def _examples(prepared):
  """(split, index, number, example) of all examples.

  Clips are visited by their place in the manifest. A data set that was made of a
  manifest (`tfds_builder`) says it, so that it has that order again.
  """
  count, numbered = 0, set(prepared.features) >= _OWN
  for split, described in prepared.splits.items():
    for index in range(described.examples):
      example = tfds_examples.read_example(prepared, split, index)
      yield split, index, int(example["row"][0]) if numbered else count, example
      count += 1


def _media(prepared: Prepared, wanted: str) -> Media:
  """The feature with the media, the wanted or the only one of the likeliest kind."""
  ranks: dict[int, list[Media]] = {}
  for name, feature in prepared.features.items():
    rank, kind = _kind(feature)
    if kind:
      ranks.setdefault(rank, []).append(Media(name, kind))
  every = [media for rank in sorted(ranks) for media in ranks[rank]]
  if wanted:
    chosen = [media for media in every if media.name == wanted]
  else:
    chosen = ranks[min(ranks)] if ranks else []
  if len(chosen) == 1:
    return chosen[0]
  names = ", ".join(media.name for media in every) or "none"
  raise ValueError(
    f"{prepared.folder}: features that may hold media are: {names}; "
    f"{'there is no ' + repr(wanted) if wanted else 'name one as tfds:NAME?video=ONE'}"
  )


def _kind(feature):
  """(rank, kind) of a feature as media; the kind is "" of what is none."""
  inner = feature.get("sequence", {}).get("feature", {})
  shape = feature.get("tensor", {}).get("shape", {}).get("dimensions", [])
  if "video" in feature:
    return 0, "images"
  if _is_bytes(feature):
    return 1, "file"
  if "image" in inner or _is_bytes(inner):
    return 2, "images"
  if len(shape) == 4 and shape[-1] in ("1", "3"):
    if feature["tensor"].get("dtype") == "uint8":
      if feature["tensor"].get("encoding", "none") == "none":
        return 2, "pixels"
  return (3, "file") if "image" in feature else (9, "")


def _is_bytes(feature):
  tensor = feature.get("tensor", {})
  return tensor.get("dtype") in ("string", "object") and not tensor.get("shape")


def _texts(prepared, wanted):
  """[(name, names of its classes or None)] of the features that are captions."""
  if wanted is None:
    found = [name for name, feature in prepared.features.items() if _is_text(feature)]
    # Other texts say where a clip is from.
    found = [n for n in found if n.split("/")[-1].startswith("caption")] or found
    if len(found) > 1:
      raise ValueError(
        f"{prepared.folder}: features of text are {', '.join(found)}; say which are "
        "captions as tfds:NAME?text=ONE,OTHER, or text= for none"
      )
  else:
    found = [name for name in wanted.split(",") if name]
  for name in found:
    if name not in prepared.features:
      raise ValueError(
        f"{prepared.folder}: there is no feature {name!r}, only "
        f"{', '.join(prepared.features)}"
      )
  return [(name, _classes(prepared, name)) for name in found]


def _is_text(feature):
  return "text" in feature or "text" in feature.get("sequence", {}).get("feature", {})


def _classes(prepared, name):
  if "classLabel" not in prepared.features[name]:
    return None
  path = pathlib.Path(prepared.folder, f"{name.replace('/', '-')}.labels.txt")
  return path.read_text(encoding="utf-8").splitlines()


def _captions(example, name, classes):
  values = example.get(name, [])
  if classes is not None:
    return [classes[value] for value in values if 0 <= value < len(classes)]
  texts = [value.decode("utf-8", "replace").strip() for value in values]
  return [text for text in texts if text]


def _split(name, names):
  """Split of a clip; None, to be drawn, where all examples are of one."""
  if name.lower() in _HELDOUT:
    return "heldout"
  return "train" if len(names) > 1 else None


def _member(media, example, fps, source):
  """Name of an example's media: the feature, its rate, and a suffix."""
  quoted = urllib.parse.quote(media.name, safe="")
  values = example.get(media.name, [])
  if media.kind == "file":
    start = values[0][:4] if values else b""
    suffixes = (s for magic, s in _MAGIC.items() if start.startswith(magic))
    return quoted + next(suffixes, ".mp4")
  rates = [example[name][0] for name in _RATES if example.get(name)]
  rate = float(rates[0] if rates else fps)
  if rate <= 0:
    raise ValueError(
      f"{source}: frames of {media.name!r} do not say their rate; set config.data.fps, "
      "or add ?fps=RATE"
    )
  return f"{quoted}@{rate:g}.nut"


def content(folder: str, member: str) -> bytes:
  """The bytes of a media file: of a path that `rows` gave, behind "tfds/".

  Frames are a file of raw video, so that all that reads files reads them.

  Raises:
    ValueError: the example is not there, or damaged.
  """
  prepared = tfds_examples.read_info(folder)
  _, split, index, name = member.split("/")
  stem, _ = os.path.splitext(name)
  feature, _, rate = stem.partition("@")
  feature = urllib.parse.unquote(feature)
  example = tfds_examples.read_example(prepared, split, int(index))
  values = example.get(feature)
  if not values:
    raise ValueError(f"example {index} of {split} has no {feature}")
  if not rate:
    return values[0]
  if isinstance(values[0], bytes):
    frames = [pictures.decoded(member, io.BytesIO(value)) for value in values]
    return raw_video(np.stack(frames), float(rate))
  shape = prepared.features[feature]["tensor"]["shape"]["dimensions"]
  video_THWC = np.array(values, np.uint8).reshape([int(n) for n in shape])
  return raw_video(np.repeat(video_THWC, 3 // video_THWC.shape[-1], -1), float(rate))


def raw_video(video_THWC: np.ndarray, fps: float) -> bytes:
  """A video file (NUT) of the very pixels of uint8 [T, H, W, 3]."""
  return in_memory.encode(video_THWC, fps, "nut", "rawvideo")
