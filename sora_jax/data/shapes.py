"""Generated clips: coloured shapes that move, with captions and the truth beside them.

Real H.264 and PNG files of known content, so that a model can be trained in minutes
and its samples measured exactly. Colours, shapes and motions are combined freely, but
some (colour, shape, motion) combinations are kept out of training as a whole; every
pair of attribute values still occurs in training.
"""

import functools
import json
import pathlib

import numpy as np
from absl import logging

from sora_jax.data import clips
from sora_jax.data.shape_worlds import BACKGROUNDS, WORLDS
from sora_jax.data.video import writer

COLORS = {
  "red": (224, 36, 44),
  "orange": (255, 132, 12),
  "yellow": (250, 224, 52),
  "green": (36, 184, 72),
  "cyan": (56, 206, 224),
  "blue": (44, 88, 238),
  "magenta": (226, 60, 206),
  "white": (246, 246, 242),
}
# Circumradius as a multiple of the size, so that all shapes look about equally big.
SHAPES = {"circle": 1.0, "square": 1.22, "triangle": 1.42, "star": 1.42}
MOTIONS = (
  "left", "right", "up", "down", "bounce", "grow", "shrink", "still", "turn",
)  # fmt: skip
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_BAR = (24, 22, 26)
_BAR_FRAMES = 17  # at least, of a clip in which something is hidden for a while
MARKER = "seed.txt"  # says beside the clips of which seed and world they are
_MARGIN = 1.5  # pixels between an object and the edge of its region

_PHRASES = {
  "left": ("moves left", "moves{speed} from right to left"),
  "right": ("moves right", "moves{speed} from left to right"),
  "up": ("moves up", "moves{speed} from bottom to top"),
  "down": ("moves down", "moves{speed} from top to bottom"),
  "bounce": ("bounces", "bounces up and down{speed}"),
  "grow": ("grows", "grows{speed} larger"),
  "shrink": ("shrinks", "shrinks{speed}, getting smaller"),
  "turn": ("turns", "turns{speed} in place"),
  "still": ("stands still", "stands still"),
}


def generate(
  folder,
  *,
  num_train,
  num_heldout,
  seed,
  world="whole",
  watch=lambda items, *_: items,
) -> None:
  """Writes media files and their manifest.jsonl to a folder.

  The same arguments give the same bytes. A folder left half done is completed; files
  that exist are kept, so more clips can be asked for later.

  Rows: path, captions (short, descriptive), split, truth. truth: objects (color, shape,
  motion, trajectory [x, y, r, angle] a frame in units of width, height, the shorter
  side, whole turns), count, occluder, background, frames, fps, height, width.

  Args:
    folder: is made.
    num_train, num_heldout: clips of each split.
    seed: of all that is drawn.
    world: what they can show, one of WORLDS.
    watch: (items, what is done to each, what they are) -> the same items, as
      `runtime.progress.track`; shows nothing by default.

  Raises:
    ValueError: negative counts, an unknown world, or the folder holds clips of another
      seed or world.
  """
  if world not in WORLDS:
    raise ValueError(f"world {world!r} is none of {list(WORLDS)}")
  if num_train < 0 or num_heldout < 0 or num_train + num_heldout == 0:
    raise ValueError(f"{folder}: {num_train} train and {num_heldout} heldout clips")
  folder = pathlib.Path(folder)
  _claim(folder, seed, world)
  rows, drawn = [], 0
  for split, count in (("train", num_train), ("heldout", num_heldout)):
    for index in watch(range(count), "drew", f"{split} clips"):
      clip = describe(split, index, seed, WORLDS[world])
      path = folder / clip["path"]
      if not path.exists():
        writer.write(path, draw(clip["truth"]), clip["truth"]["fps"])
        drawn += 1
      rows.append(json.dumps(clip))
  clips.write_lines(folder / "manifest.jsonl", rows)
  logging.info("%s: %d clips, %d of them drawn now", folder, len(rows), drawn)


def heldout_combinations() -> frozenset:
  """(color, shape, motion) triples that never occur in training, 32 of 280.

  A Latin design: each (color, shape) lacks one motion, and each pair with a motion
  lacks at most one partner, so every pair of values is seen in training.
  """
  triples = set()
  for c, color in enumerate(COLORS):
    for s, shape in enumerate(SHAPES):
      # Circles (s = 0) never reach "turn", the last motion, which they cannot show.
      triples.add((color, shape, MOTIONS[(c + 2 * s) % len(MOTIONS)]))
  return frozenset(triples)


def combinations(split) -> list:
  """All (color, shape, motion) triples of a split; a circle's turn cannot be seen."""
  heldout = heldout_combinations()
  return [
    (color, shape, motion)
    for color in COLORS
    for shape in SHAPES
    for motion in MOTIONS
    if (shape, motion) != ("circle", "turn")
    and ((color, shape, motion) in heldout) == (split == "heldout")
  ]


def describe(split, index, seed, world=WORLDS["whole"]) -> dict:
  """The manifest row of clip number `index`; depends on nothing but the arguments."""
  rng = np.random.default_rng([seed, split == "heldout", index])
  known = combinations(split)
  stills = [triple for triple in known if triple[2] == "still"]
  if split == "train":
    turning = [triple for triple in known if triple[2] == "turn"]
    known = known + (world.turns - 1) * turning
  triple = _deal(known, index, [seed, split == "heldout"])
  kind = rng.random()
  if kind < world.images or triple[2] == "still" and kind < 0.8:
    triple = _deal(stills, index, [seed, 2])  # an image, which shows no motion
    others = stills if world.pairs and (kind < 0.02 or 0.1 < kind < 0.2) else None
    truth = _scene(rng, world, triple, others, frames=(1,))
  elif world.bars and triple[2] in ("left", "right") and kind < 0.55:
    long = [count for count in sorted(set(world.frames)) if count >= _BAR_FRAMES]
    truth = _scene(rng, world, triple, None, frames=long, bar=True)
  else:
    others = known if world.pairs and (kind < 0.3 or kind > 0.95) else None
    truth = _scene(rng, world, triple, others, frames=world.frames)
  suffix = ".png" if truth["frames"] == 1 else ".mp4"
  return {
    "path": f"{split}/{index:06d}{suffix}",
    "captions": _captions(truth),
    "split": split,
    "truth": truth,
  }


def draw(truth) -> np.ndarray:
  """Draws a clip from its truth, anti-aliased: uint8 [T, H, W, 3]."""
  height, width, count = truth["height"], truth["width"], truth["frames"]
  scene = _background(truth)
  video_THWC = np.repeat(scene[None], count, axis=0)
  for item in truth["objects"]:
    color = np.array(COLORS[item["color"]], np.float64)
    for frame, (x, y, r, angle) in zip(video_THWC, item["trajectory"], strict=True):
      center = x * width, y * height
      radius = r * min(height, width) * SHAPES[item["shape"]]
      left, top = (max(int(c - radius - 2), 0) for c in center)
      right, bottom = (int(c + radius + 3) for c in center)
      patch = frame[top:bottom, left:right]
      y_HW, x_HW = np.mgrid[: patch.shape[0], : patch.shape[1]] + 0.5
      offset = x_HW + left - center[0], y_HW + top - center[1]
      distance = _distance(item["shape"], offset, radius, angle)
      cover = np.clip(0.5 - distance, 0, 1)[..., None]
      patch += cover * (color - patch)
  if truth["occluder"]:
    edge, other = (x * width for x in truth["bar"])
    x_W = np.arange(width) + 0.5
    cover = np.clip(np.minimum(x_W - edge, other - x_W) + 0.5, 0, 1)[:, None]
    video_THWC += cover * (np.array(_BAR, np.float64) - video_THWC)
  return video_THWC.round().astype(np.uint8)


def _claim(folder, seed, world):
  """Refuses a folder of another seed or world: its files would be taken for ours."""
  marker = folder / MARKER
  wanted = str(seed) if world == "whole" else f"{seed} {world}"
  if (turns := WORLDS[world].turns) > 1:
    wanted += f" turns {turns}"
  if marker.exists():
    found = marker.read_text().strip()
    if found != wanted:
      raise ValueError(f"{folder}: holds clips of seed {found}, not of seed {wanted}")
  else:
    clips.write_lines(marker, [wanted])


def _deal(items, index, key):
  """Item `index` of an endless deal: each item once, shuffled, then all again."""
  turn, place = divmod(index, len(items))
  return items[np.random.default_rng([*key, turn]).permutation(len(items))[place]]


# --- what happens in a clip


def _scene(rng, world, triple, others, frames, bar=False):
  """Draws sizes and rates until the objects fit; the truth of one clip.

  Args:
    rng: numpy generator.
    world: what there is to draw from.
    triple: (color, shape, motion) of the first object.
    others: triples to take a second object from, or None.
    frames: numbers of frames to choose from.
    bar: whether the object passes behind a bar; the motion is then left or right.
  """
  for _ in range(10000):
    height, width = (64, 96) if bar else world.sizes[rng.integers(len(world.sizes))]
    count = int(rng.choice(frames))
    fps = int(rng.choice(world.rates)) if count > 1 else 1
    times = np.arange(count) / fps
    triples = [triple]
    regions = [(0, 0, width, height)]
    if others:
      triples.append(others[rng.integers(len(others))])
      if triples[1][0] == triple[0]:
        continue
      regions = _halves(rng, height, width)
    tracks = [
      _track(
        rng, shape, motion, region, times, bool(others), across=bar, steady=world.steady
      )
      for (_, shape, motion), region in zip(triples, regions, strict=True)
    ]
    if any(track is None for track in tracks):
      continue
    unit = np.array([width, height, min(height, width), 2 * np.pi])
    truth = {
      "objects": [
        {
          "color": color,
          "shape": shape,
          "motion": motion,
          "trajectory": (track / unit).round(5).tolist(),
        }
        for (color, shape, motion), track in zip(triples, tracks, strict=True)
      ],
      "count": len(triples),
      "occluder": bar,
      "background": world.backgrounds[rng.integers(len(world.backgrounds))],
      # Direction of the gradient in turns, None for a flat background.
      "gradient": round(rng.random(), 3) if rng.random() < world.gradients else None,
      "frames": count,
      "fps": fps,
      "height": height,
      "width": width,
    }
    if bar:
      bar_px = _bar(rng, tracks[0], _extent(triple[1], tracks[0][0, 2]), width)
      if bar_px is None:
        continue
      truth["bar"] = [round(x / width, 5) for x in bar_px]
    return truth
  raise AssertionError(f"nothing fits: {triple} {frames} {bar}")


def _bar(rng, track, extent, width):
  """(left, right) of a bar that hides the object fully for two frames at least."""
  half = extent + rng.uniform(4, 6)
  middle = width / 2 + rng.uniform(-2, 2)
  away = np.abs(track[:, 0] - middle)
  hidden = away < half - extent - 0.5
  clear = away > half + extent + 0.5
  if hidden.sum() < 2 or not (clear[0] and clear[-1]):
    return None
  return middle - half, middle + half


def _halves(rng, height, width):
  upright = width > height or width == height and rng.random() < 0.5
  if upright:
    regions = [(0, 0, width / 2, height), (width / 2, 0, width, height)]
  else:
    regions = [(0, 0, width, height / 2), (0, height / 2, width, height)]
  return [regions[i] for i in rng.permutation(2)]


def _extent(shape, radius):
  return SHAPES[shape] * radius


def _track(rng, shape, motion, region, times, small, across, steady):
  """[T, 4] of x, y, size in pixels and angle in radians, or None if it does not fit."""
  x0, y0, x1, y1 = region

  def vary(low, high, of=rng.uniform):
    return np.sqrt(low * high) if steady else of(low, high)

  duration, rate = times[-1], 1 / (times[1] if len(times) > 1 else 1)
  low, high = (8.5, 10.5) if small else (8, 9.5) if across else (9, 13)
  size = np.full(len(times), vary(low, high))
  angle = np.zeros(len(times))
  if motion in ("grow", "shrink"):
    large = vary(10.5, 11.5) if small else vary(12, 16)
    size = np.linspace(large * vary(0.48, 0.62), large, len(times))
    size = size if motion == "grow" else size[::-1]
  if motion == "turn":
    speed = np.radians(vary(40, 200, functools.partial(_log_uniform, rng)))
    fold = {"square": 4, "triangle": 3, "star": 5}[shape]
    # Enough to be seen, and slow enough that its sense is not ambiguous.
    if speed * duration < np.radians(75) or speed / rate > 0.35 * 2 * np.pi / fold:
      return None
    angle = rng.choice([-1, 1]) * speed * times + rng.uniform(0, 2 * np.pi)
  reach = _extent(shape, size.max()) + _MARGIN
  room_x, room_y = x1 - x0 - 2 * reach, y1 - y0 - 2 * reach
  if room_x < 0 or room_y < 0:
    return None
  x = np.full(len(times), x0 + reach + rng.uniform(0, room_x))
  y = np.full(len(times), y0 + reach + rng.uniform(0, room_y))
  if motion == "bounce":
    period = vary(0.5, 1.6)
    height = vary(12, 30)
    if height > room_y or period > duration or period * rate < 6:
      return None
    floor = y1 - reach - rng.uniform(0, room_y - height)
    y = floor - height * _hop(times / period + rng.uniform(0, 1))
  elif motion in _DIRECTIONS:
    step_x, step_y = _DIRECTIONS[motion]
    room = room_x if step_x else room_y
    if steady:  # about as far as a star can
      distance = 60.0 if across else 28.0
    else:
      distance = _log_uniform(rng, 8, 90) * duration
    if not 16 <= distance <= room:
      return None
    # As far as it goes on either side of the middle of its room.
    slip = (room - distance) / 2 * rng.uniform(-1, 1)
    path = distance * (times / duration - 0.5)
    if step_x:
      x = (x0 + x1) / 2 + slip + step_x * path
    else:
      y = (y0 + y1) / 2 + slip + step_y * path
  return np.stack([x, y, size, angle], axis=1)


def _hop(turns):
  """Height of a bouncing ball, 0 to 1, one hop a unit of time."""
  part = turns % 1
  return 4 * part * (1 - part)


def _log_uniform(rng, low, high):
  return np.exp(rng.uniform(np.log(low), np.log(high)))


# --- words


def _captions(truth):
  """A short and a descriptive caption."""
  items = truth["objects"]
  last = " behind a bar" if truth["occluder"] else ""
  image = truth["frames"] == 1
  short, long = [], []
  for item in items:
    name = f"{item['color']} {item['shape']}"
    brief, full = _PHRASES[item["motion"]]
    article = "an" if name[0] in "aeiou" else "a"
    short.append(f"{article} {name}" + ("" if image else f" {brief}"))
    size = _size_word(item, truth)
    full = full.format(speed=_speed_word(item, truth))
    if item["motion"] == "turn":
      forward = item["trajectory"][1][3] > item["trajectory"][0][3]
      full += " clockwise" if forward else " anticlockwise"
    long.append(f"a {size} {name}" + ("" if image else f" {full}"))
  shade = "smoothly shaded" if truth["gradient"] is not None else "plain"
  ground = f"{shade} {truth['background']} background"
  article = "an" if ground[0] in "aeiou" else "a"
  text = " and ".join(long)
  if truth["occluder"]:
    text += ", disappears behind a dark bar and comes out again"
  if image:
    text = f"an image of {text}"
  return [
    " and ".join(short) + last,
    f"{text[0].upper()}{text[1:]}, over {article} {ground}.",
  ]


def _size_word(item, truth):
  radius = max(r for _, _, r, _ in item["trajectory"])
  radius *= min(truth["height"], truth["width"])
  return "small" if radius < 10 else "medium-sized" if radius < 12 else "large"


def _speed_word(item, truth):
  """Says how fast, by the largest change in a second."""
  track = np.array(item["trajectory"])
  if item["motion"] == "still":
    return ""
  unit = [truth["width"], truth["height"], min(truth["height"], truth["width"]), 360]
  a_second = np.abs(np.diff(track * unit, axis=0)).max(axis=0) * truth["fps"]
  column, slow, fast = {
    "bounce": (1, 60, 120),
    "grow": (2, 4, 10),
    "shrink": (2, 4, 10),
    "turn": (3, 65, 130),
  }.get(item["motion"], (None, 18, 40))
  value = a_second[:2].max() if column is None else a_second[column]
  return " slowly" if value < slow else " quickly" if value > fast else ""


# --- pixels


def _background(truth):
  """[H, W, 3] float64, flat or a smooth gradient around a muted tone."""
  height, width = truth["height"], truth["width"]
  tone = np.array(BACKGROUNDS[truth["background"]], np.float64)
  scene = np.broadcast_to(tone, (height, width, 3)).copy()
  if truth["gradient"] is not None:
    turn = 2 * np.pi * truth["gradient"]
    y_HW, x_HW = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    slope = (np.cos(turn) * x_HW + np.sin(turn) * y_HW) / np.sqrt(2)
    scene *= 1 + 0.25 * slope[..., None]
  return scene


def _distance(shape, offset, radius, angle):
  """Signed distance in pixels to a shape's edge, negative inside."""
  x, y = offset
  if shape == "circle":
    return np.hypot(x, y) - radius
  points = _corners(shape, radius, 2 * np.pi * angle)
  ax, ay = points.T[..., None, None]
  ex, ey = (np.roll(points, -1, axis=0) - points).T[..., None, None]
  dx, dy = x - ax, y - ay
  along = np.clip((dx * ex + dy * ey) / (ex * ex + ey * ey), 0, 1)
  distance = np.sqrt(((dx - along * ex) ** 2 + (dy - along * ey) ** 2).min(axis=0))
  # Even-odd rule with a ray to the right; written without a division by ey.
  crosses = (dy < 0) != (dy < ey)
  left_of = np.where(ey > 0, dx * ey < dy * ex, dx * ey > dy * ex)
  inside = (crosses & left_of).sum(axis=0) % 2 == 1
  return np.where(inside, -distance, distance)


def _corners(shape, radius, angle):
  """[N, 2] corners around the centre; pointed shapes point up at angle 0."""
  count, first = {"square": (4, np.pi / 4), "triangle": (3, 0), "star": (10, 0)}[shape]
  turn = angle + first - np.pi / 2 + 2 * np.pi * np.arange(count) / count
  radii = np.full(count, float(radius))
  if shape == "star":
    radii[1::2] *= 0.46
  return np.stack([radii * np.cos(turn), radii * np.sin(turn)], axis=1)
