"""Measures what a clip of coloured shapes shows: colours, shapes, motions, count.

Works from the pixels of a file alone and shares nothing with the code that draws the
clips, so that it can judge drawn and sampled clips alike. It expects saturated or white
objects that do not overlap, on a muted background that does not move, and allows a dark
upright bar that objects pass behind.
"""

import dataclasses
import itertools

import numpy as np
from scipy import ndimage, optimize

from sora_jax.data.video import reader

# Typical colours, for the nearest one in Lab.
_COLORS = {
  "red": (220, 40, 45),
  "orange": (250, 130, 20),
  "yellow": (245, 220, 55),
  "green": (40, 180, 75),
  "cyan": (60, 205, 220),
  "blue": (50, 90, 230),
  "magenta": (220, 65, 200),
  "white": (240, 240, 240),
}
# Rotational symmetry, and the typical size of the Fourier coefficients of the radius
# around the centre over its mean, of orders 2 to 7; below 2 they say size and place.
# A sharp star has 0.15, but its points are the first that blur and roughness take.
_SHAPES = {
  "circle": (None, (0, 0, 0, 0, 0, 0)),
  "triangle": (3, (0, 0.137, 0, 0, 0.05, 0)),
  "square": (4, (0, 0, 0.07, 0, 0, 0)),
  "star": (5, (0, 0, 0, 0.12, 0, 0)),
}

_MIN_CHROMA = 64  # largest minus smallest channel of an object's pixels
_MIN_WHITE = 165  # or all channels above this
_MIN_AREA = 0.004  # of the frame; smaller spots are noise
# The least of a motion in a whole clip.
MIN_TRAVEL = 0.1  # of the shorter side, to call it a move
MIN_GROWTH = 1.28  # in diameter
MIN_TURN = np.radians(32)


@dataclasses.dataclass
class Spot:
  """An object in one frame."""

  time: int  # index of the frame
  center: np.ndarray  # x, y
  area: float
  color: np.ndarray  # Lab
  whole: bool  # touches neither the bar nor the frame's edge
  harmonics: np.ndarray  # complex Fourier coefficients of the radius, by order


@dataclasses.dataclass
class Seen:
  """An object over time.

  Attributes:
    color, shape: names of them.
    motion: left, right, up, down, bounce, grow, shrink, turn or still.
    reappears: it was seen, was hidden, and was seen again.
    identity: and then it had the colour and the shape that it had before.
    spots: where it was seen, in the order of time.
  """

  color: str
  shape: str
  motion: str
  reappears: bool
  identity: bool
  spots: list[Spot]


def analyse(path) -> dict:
  """Finds out what a clip shows, from its file.

  Returns:
    count, and objects: a list of {color, shape, motion, reappears, identity}, largest
    first; see `Seen`.

  Raises:
    ClipError: the file cannot be read.
  """
  return analyse_video(reader.read(path))


def analyse_video(video_THWC) -> dict:
  """Does what `analyse` does, from uint8 [T, H, W, 3]."""
  objects = [
    {f.name: getattr(seen, f.name) for f in dataclasses.fields(seen)[:-1]}
    for seen in find_objects(video_THWC)
  ]
  return {"count": len(objects), "objects": objects}


def find_objects(video_THWC) -> list[Seen]:
  """Finds the objects of a clip, uint8 [T, H, W, 3], the largest first."""
  video_THWC = np.asarray(video_THWC, np.float32)
  background, bar_W = _background(video_THWC)
  spots = [
    spot
    for time, frame in enumerate(video_THWC)
    for spot in _spots(time, frame, background, bar_W)
  ]
  shorter = min(video_THWC.shape[1:3])
  objects = []
  for track in _tracks(spots, len(video_THWC), shorter):
    shape, hidden = _shape(track), _hidden(track)
    objects.append(
      Seen(
        _color(track),
        shape,
        _motion(track, shape, shorter),
        reappears=bool(hidden),
        identity=bool(hidden) and all(_is_same(track, *gap) for gap in hidden),
        spots=track,
      )
    )
  return objects


def score(analysis, truth) -> dict:
  """Returns which attributes are right: {"color": bool, "shape", "count", ...}.

  An attribute is right if all the objects of the truth have it, under the assignment of
  seen to true objects that fits best. "motion" is left out for images. "reappear" and
  "permanence" are there only if something passes behind a bar: that it comes out again,
  and that it then has the colour and the shape that it had before.
  """
  names = ["color", "shape"] + ["motion"] * (truth["frames"] > 1)
  wanted, seen = truth["objects"], list(analysis["objects"])
  seen += [{}] * max(0, len(wanted) - len(seen))

  def rights(order):
    return {
      n: [a.get(n) == b[n] for a, b in zip(order, wanted, strict=True)] for n in names
    }

  # The order in which most is right; the first of equal ones.
  order = max(
    itertools.permutations(seen, len(wanted)),
    key=lambda order: sum(map(sum, rights(order).values())),
  )
  right = rights(order)
  result = {name: all(values) for name, values in right.items()}
  result["count"] = analysis["count"] == truth["count"]
  if truth["occluder"]:
    result["reappear"] = all(item.get("reappears", False) for item in order)
    result["permanence"] = all(item.get("identity", False) for item in order)
  return result


def chance_levels(truths) -> dict:
  """Returns the scores of a sampler that knows these clips but ignores the prompt.

  Each truth is judged against the contents of the others, images and videos apart, so
  these are the levels that a sample's scores must beat. A lone clip meets itself.
  """
  totals: dict = {}
  for still in (True, False):
    group = [truth for truth in truths if (truth["frames"] == 1) == still]
    for shift in range(1, min(max(len(group), 2), 64)):
      for truth, other in zip(group, group[shift:] + group[:shift], strict=True):
        hidden = {"reappears": other["occluder"], "identity": other["occluder"]}
        items = [{**x, **hidden} for x in other["objects"]]
        guess = {"count": other["count"], "objects": items}
        for name, value in score(guess, truth).items():
          totals.setdefault(name, []).append(value)
  return {name: float(np.mean(values)) for name, values in totals.items()}


def symmetry(shape: str) -> int | None:
  """Returns how many turns make a shape the same again; None for a circle."""
  return _SHAPES[shape][0]


# --- from pixels to spots


def _background(video_THWC):
  """Background as a plane a channel, [H, W, 3], and which columns a bar covers, [W]."""
  still = np.median(video_THWC[:: -(-len(video_THWC) // 9)], axis=0)
  height, width = still.shape[:2]
  light = still.mean(axis=-1)
  muted = ~_strong(still)
  if not muted.any():
    muted[:] = True
  muted &= light > 0.6 * np.percentile(light[muted], 75)
  y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
  basis = np.stack([np.ones_like(x), x, y], axis=-1)
  weight = muted.astype(np.float64)
  for _ in range(8):  # reweighted, so that what is left of objects has no say
    w = weight[muted][:, None]
    fit = np.linalg.lstsq(basis[muted] * w, still[muted] * w, rcond=None)[0]
    plane = basis @ fit
    weight = 1 / (1 + np.abs(still - plane) @ np.full(3, 1 / 12))
  bar_W = (light < 0.72 * plane.mean(axis=-1)).mean(axis=0) > 0.6
  bar_W = ndimage.binary_opening(bar_W, np.ones(5))
  return plane.astype(np.float32), bar_W


def _strong(frame):
  """Pixels that are saturated or white."""
  red, green, blue = np.moveaxis(frame, -1, 0)  # many times faster than axis=-1
  low = np.minimum(np.minimum(red, green), blue)
  high = np.maximum(np.maximum(red, green), blue)
  return (high - low > _MIN_CHROMA) | (low > _MIN_WHITE)


def _spots(time, frame, background, bar_W):
  height, width = frame.shape[:2]
  labels, count = ndimage.label(_strong(frame))
  for label, where in enumerate(ndimage.find_objects(labels), 1):
    core = labels[where] == label
    if core.sum() < _MIN_AREA * height * width:
      continue
    top, left = (max(s.start - 3, 0) for s in where)
    bottom, right = where[0].stop + 3, where[1].stop + 3
    own = labels[top:bottom, left:right]
    patch = frame[top:bottom, left:right]
    ground = background[top:bottom, left:right]
    # The colour of the inside: edges are mixed with the background.
    depth = ndimage.distance_transform_edt(np.pad(own == label, 1))[1:-1, 1:-1]
    inside = depth >= min(2.0, depth.max())
    color = np.median(patch[inside], axis=0)
    toward = color - ground
    alpha = ((patch - ground) * toward).sum(-1) / np.maximum((toward**2).sum(-1), 1)
    near = ndimage.binary_dilation(own == label, iterations=3)
    others = ndimage.binary_dilation((own > 0) & (own != label))
    alpha = np.clip(alpha, 0, 1) * (near & ~others)
    y, x = np.mgrid[: alpha.shape[0], : alpha.shape[1]] + 0.5
    area = alpha.sum()
    center = np.array([(alpha * x).sum(), (alpha * y).sum()]) / area
    harmonics = _harmonics(alpha, center, np.sqrt(area))
    rows, columns = where
    beside = slice(max(columns.start - 2, 0), columns.stop + 2)
    inner = rows.start > 0 and columns.start > 0
    inner &= rows.stop < height and columns.stop < width
    whole = inner and not bar_W[beside].any()
    center = center + (left, top)
    yield Spot(time, center, float(area), _lab(color), whole, harmonics)


def _harmonics(alpha, center, size):
  """Fourier coefficients of the radius as a function of direction, over its mean."""
  turn = 2 * np.pi * np.arange(72) / 72
  step = 0.5
  reach = np.arange(step / 2, 1.5 * size + 2, step)
  x = center[0] - 0.5 + np.cos(turn)[:, None] * reach
  y = center[1] - 0.5 + np.sin(turn)[:, None] * reach
  radius = ndimage.map_coordinates(alpha, [y, x], order=1).sum(axis=1) * step
  spectrum = np.fft.rfft(radius) / len(radius)
  return spectrum[:8] / max(spectrum[0].real, 1e-6)


def _lab(rgb):
  """CIE Lab of sRGB 0 to 255, D65."""
  rgb = np.asarray(rgb, np.float64) / 255
  linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
  to_xyz = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
  )
  xyz = linear @ to_xyz.T / [0.9505, 1.0, 1.089]
  f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
  return np.stack(
    [
      116 * f[..., 1] - 16,
      500 * (f[..., 0] - f[..., 1]),
      200 * (f[..., 1] - f[..., 2]),
    ],
    axis=-1,
  )


# --- from spots to objects


def _tracks(spots, count, shorter):
  """Spots of the same object over time, lists of Spot, the largest object first."""
  tracks = []
  for _, group in itertools.groupby(spots, key=lambda spot: spot.time):
    group = list(group)
    if tracks:
      cost = np.array([[_cost(t, s, shorter) for s in group] for t in tracks])
      pairs = zip(*optimize.linear_sum_assignment(cost), strict=True)
      pairs = {s: t for t, s in pairs if cost[t, s] < 3}
    else:
      pairs = {}
    for index, spot in enumerate(group):
      if index in pairs:
        tracks[pairs[index]].append(spot)
      else:
        tracks.append([spot])

  def size(track):
    return float(np.median([spot.area for spot in track]))

  # Spots that flicker, or are tiny beside the objects, are no objects.
  tracks = [track for track in tracks if len(track) >= 0.3 * count]
  largest = max(map(size, tracks), default=0)
  tracks = [track for track in tracks if size(track) > 0.15 * largest]
  return sorted(tracks, key=size, reverse=True)


def _cost(track, spot, shorter):
  """Returns how unlikely it is that a spot continues a track; 3 and more is never."""
  last = track[-1]
  color = np.linalg.norm(last.color - spot.color) / 25
  gap = spot.time - last.time
  move = np.linalg.norm(last.center - spot.center) / shorter
  # Something hidden may come out anywhere, but in the same colour.
  return color + move / (0.2 if gap == 1 else 1)


def _best(track):
  """The spots to measure: whole ones, if there are any."""
  return [spot for spot in track if spot.whole] or track


def _color(track):
  lab = np.median([spot.color for spot in _best(track)], axis=0)
  # Lightness counts less: shading and fading change it before they change the hue.
  weight = np.array([0.5, 1, 1])
  return min(
    _COLORS, key=lambda name: np.linalg.norm(weight * (lab - _lab(_COLORS[name])))
  )


def _shape(track):
  """The shape whose typical outline is nearest.

  Nearest in all orders at once: an outline that is merely rough has a little of each,
  which is more of a square's than a square needs, and less than a star has of its own.
  """
  spots = sorted(_best(track), key=lambda spot: spot.area)
  spots = spots[len(spots) // 2 :]  # the larger half shows more
  strength = np.median([np.abs(spot.harmonics[2:]) for spot in spots], axis=0)
  return min(_SHAPES, key=lambda name: np.linalg.norm(strength - _SHAPES[name][1]))


def _motion(track, shape, shorter):
  if len(track) < 2:
    return "still"
  spots = _best(track)
  sizes = np.sqrt([spot.area for spot in spots])
  ends = max(1, len(spots) // 8)
  growth = np.median(sizes[-ends:]) / np.median(sizes[:ends])
  if max(growth, 1 / growth) > MIN_GROWTH:
    return "grow" if growth > 1 else "shrink"
  # Partly hidden spots too: their centres are a little off, but they show the way.
  centers = np.array([spot.center for spot in track])
  ends = max(1, len(track) // 8)
  y = centers[:, 1]
  if len(y) > 4:
    y = ndimage.median_filter(y, 3, mode="nearest")
  height = np.ptp(y)
  back = np.abs(np.diff(y)).sum() - abs(y[-1] - y[0])
  if height > MIN_TRAVEL * shorter and back > 0.5 * height:
    return "bounce"
  x_way, y_way = np.median(centers[-ends:], axis=0) - np.median(centers[:ends], axis=0)
  if max(abs(x_way), abs(y_way)) > MIN_TRAVEL * shorter:
    if abs(x_way) > abs(y_way):
      return "right" if x_way > 0 else "left"
    return "down" if y_way > 0 else "up"
  if order := symmetry(shape):
    phase = np.angle([spot.harmonics[order] for spot in spots])
    angle = np.unwrap(phase) / order
    if abs(angle[-1] - angle[0]) > max(MIN_TURN, 0.5 * np.abs(np.diff(angle)).sum()):
      return "turn"
  return "still"


def _hidden(track):
  """Pairs of times between which the object was gone, and which show most of it."""
  full = np.median([spot.area for spot in _best(track)])
  times = [spot.time for spot in track if spot.area > 0.15 * full]
  mostly = [spot.time for spot in track if spot.area > 0.5 * full]
  return [
    (a, b)
    for a, b in itertools.pairwise(times)
    if b - a > 1 and mostly and mostly[0] <= a and mostly[-1] >= b
  ]


def _is_same(track, last, first):
  """Returns whether colour and shape up to time `last` are those from `first` on."""
  sides = (
    [spot for spot in track if spot.time <= last],
    [spot for spot in track if spot.time >= first],
  )
  before, after = ((_color(side), _shape(side)) for side in sides)
  return before == after
