"""A tour of the ways of prompting, as one looping GIF of about 25 seconds.

  python launch/tour.py --checkpoint=shapes --out=tour.gif

Each scene is a row of four results of one mode, made here and now by the checkpoint;
a green frame marks what was given, as far as it is shown as it was given. Scenes are
played until all four are through. With --sheet=FILE.png the same as a contact sheet.
"""

import pathlib
import textwrap
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from absl import flags, logging

from sora_jax.data.video import contact_sheet
from sora_jax.run import cli
from sora_jax.runtime import files
from sora_jax.sampling.pipeline import Sampler

LIMIT_MB = 4.0
_SCALE, _GAP, _TITLE, _CAPTION = 2, 8, 24, 32
_MARK = (60, 190, 90)
_COLORS = ("red", "blue", "yellow", "green")
_SHAPES = ("circle", "square", "star", "triangle")
_THINGS = tuple(
  f"a {color} {shape}" for color, shape in zip(_COLORS, _SHAPES, strict=True)
)


class Result(NamedTuple):
  """A video, its caption, and which of its frames were given."""

  video_THWC: np.ndarray
  caption: str
  given: frozenset[int] = frozenset()


def _video(model, prompt, **job) -> np.ndarray:
  # Arrays, unlike files, do not know their rate.
  return model.video(prompt, fps=model.defaults.fps, **job)


def _text(model, frames) -> Iterator[Result]:
  prompts = ("moves right", "bounces", "turns", "grows")
  for thing, does in zip(_THINGS, prompts, strict=True):
    yield Result(_video(model, f"{thing} {does}"), f"{thing} {does}")


def _image(model, frames) -> Iterator[Result]:
  for thing, does in zip(_THINGS, ("up", "down", "left", "right"), strict=True):
    still = _video(model, f"{thing} stands still", frames=1, seed=3)
    prompt = f"{thing} moves {does}"
    yield Result(_video(model, prompt, image=still[0]), prompt, frozenset({0}))


def _extension(model, frames) -> Iterator[Result]:
  pairs = (("right", "left"), ("left", "right"), ("up", "down"), ("down", "up"))
  for seed, (thing, (one, two)) in enumerate(zip(_THINGS, pairs, strict=True)):
    first = _video(model, f"{thing} moves {one}", seed=seed)
    prompt = f"{thing} moves {two}"
    longer = _video(
      model, prompt, video=first, extend_after=frames / model.defaults.fps
    )
    yield Result(longer, f"then {prompt}", frozenset(range(len(first))))


def _loop(model, frames) -> Iterator[Result]:
  does = ("bounces", "moves up", "turns", "grows")
  for seed, (thing, what) in enumerate(zip(_THINGS, does, strict=True)):
    video = _video(model, f"{thing} {what}", loop=True, seed=seed)
    yield Result(np.concatenate([video] * 2), f"{thing} {what}, twice")


def _connection(model, frames) -> Iterator[Result]:
  for seed, thing in enumerate(_THINGS):
    one = _video(model, f"{thing} moves right", seed=seed)
    two = _video(model, f"{thing} moves left", seed=seed + 4)
    both = _video(model, thing, video=one, connect=two, gap=1.0)
    # The first frame of the second guides, and is made.
    ends = {*range(len(one)), *range(len(both) - len(two) + 1, len(both))}
    yield Result(both, f"{thing}, from one video to another", frozenset(ends))


def _edit(model, frames) -> Iterator[Result]:
  for index, thing in enumerate(_THINGS):
    video = _video(model, f"{thing} moves right", seed=index)
    other = f"a {_COLORS[(index + 1) % 4]} {_SHAPES[index]} moves right"
    edited = _video(model, other, video=video, strength=0.9)
    yield Result(edited, f"{thing}, edited: {other}")


def _shots(model, frames) -> Iterator[Result]:
  at = frames / model.defaults.fps
  for index, thing in enumerate(_THINGS):
    after = f"{_THINGS[(index + 1) % 4]} grows"
    first = f"{thing} bounces"
    video = _video(model, first, shots=((at, after),), frames=2 * frames - 1)
    yield Result(video, f"{first}; cut; {after}")


def _first_and_last(model, frames) -> Iterator[Result]:
  for index, thing in enumerate(_THINGS):
    still = f"{thing} stands still"
    ends = [_video(model, still, frames=1, seed=seed)[0] for seed in (index, index + 9)]
    video = _video(model, thing, image=ends[0], last_image=ends[1])
    yield Result(video, f"{thing}, first and last image", frozenset({0}))


SCENES: dict[str, Callable[[Sampler, int], Iterator[Result]]] = {
  "Text to video": _text,
  "Image to video": _image,
  "From a first image to a last one": _first_and_last,
  "Extending a video": _extension,
  "Loops without a seam": _loop,
  "Connecting two videos": _connection,
  "Editing a video": _edit,
  "Several shots": _shots,
}


def scene_frames(title: str, results: list[Result]) -> Iterator[PIL.Image.Image]:
  """Yields the frames of a scene; a video that has ended shows its last frame."""
  height, width = (_SCALE * n for n in results[0].video_THWC.shape[1:3])
  size = (_GAP + (width + _GAP) * len(results), height + _TITLE + _CAPTION)
  font = PIL.ImageFont.load_default(size=15)
  small = PIL.ImageFont.load_default(size=11)
  for time in range(max(len(result.video_THWC) for result in results)):
    canvas = PIL.Image.new("RGB", size, "white")
    pen = PIL.ImageDraw.Draw(canvas)
    pen.text((_GAP, 3), title, "black", font)
    for column, (video_THWC, caption, given) in enumerate(results):
      now = min(time, len(video_THWC) - 1)
      left = _GAP + column * (width + _GAP)
      frame = PIL.Image.fromarray(video_THWC[now]).resize((width, height), 0)
      canvas.paste(frame, (left, _TITLE))
      if now in given:
        box = (left, _TITLE, left + width - 1, _TITLE + height - 1)
        pen.rectangle(box, outline=_MARK, width=3)
      text = "\n".join(textwrap.wrap(caption, 22)[:2])
      pen.text((left, _TITLE + height + 2), text, "black", small, spacing=1)
    yield canvas


def write(path: pathlib.Path, scenes: dict[str, list[Result]], fps: float) -> float:
  """Writes the tour as a GIF that loops; returns its size in MB.

  A scene's last frame stays for a second, so that it can be looked at.

  Raises:
    ValueError: if it is larger than LIMIT_MB; then nothing is written.
  """
  frames, milliseconds = [], []
  for title, results in scenes.items():
    shown = list(scene_frames(title, results))
    frames += [image.quantize(64, dither=PIL.Image.Dither.NONE) for image in shown]
    milliseconds += [round(1000 / fps)] * (len(shown) - 1) + [1000]
  with files.replacing(path) as temporary:
    frames[0].save(
      temporary,
      "GIF",
      save_all=True,
      append_images=frames[1:],
      duration=milliseconds,
      loop=0,
      optimize=True,
    )
    size = pathlib.Path(temporary).stat().st_size / 1e6
    if size > LIMIT_MB:
      raise ValueError(f"{path}: {size:.1f} MB, more than {LIMIT_MB:g}")
  logging.info("%s: %.1f s, %.2f MB", path, sum(milliseconds) / 1000, size)
  return size


def main(argv):
  cli.start_logging()
  args = flags.FLAGS
  model = Sampler.from_checkpoint(args.checkpoint)
  scenes = {}
  for title, make in SCENES.items():
    logging.info("%s", title)
    scenes[title] = list(make(model, model.defaults.frames))
  write(pathlib.Path(args.out), scenes, model.defaults.fps)
  if args.sheet:
    every = [result for results in scenes.values() for result in results]
    captions = [result.caption for result in every]
    videos = [result.video_THWC for result in every]
    contact_sheet.write(args.sheet, videos, captions, columns=9, scale=1)


if __name__ == "__main__":
  flags.DEFINE_string("checkpoint", "shapes", "A run's folder, or a shipped model.")
  flags.DEFINE_string("out", "tour.gif", "GIF to write, at most 4 MB.")
  flags.DEFINE_string("sheet", "", "Contact sheet to write as well.")
  cli.run_app(main)
