"""What worlds of shapes can show, see `shapes`."""

import dataclasses

# Muted, so that no background or bar can be taken for an object.
BACKGROUNDS = {
  "grey": (92, 92, 95),
  "dark grey": (62, 62, 66),
  "slate": (70, 80, 98),
  "brown": (98, 84, 72),
  "olive": (82, 88, 68),
  "plum": (88, 72, 90),
}


@dataclasses.dataclass(frozen=True)
class World:
  """What clips can show; all colours, shapes and motions in any.

  Attributes:
    sizes, frames, rates: (height, width), frames and frames a second to draw from.
    backgrounds: of BACKGROUNDS; gradients: share of them that are shaded.
    images: share of the clips that are images, beside those of what stands still.
    steady: whether objects have one size, and each motion one speed and one reach, in
      place of random ones. Where they are, and how they are turned, stays random.
    pairs, bars: whether some clips have two objects, or one that passes behind a bar.
    turns: how often a colour and shape turns in training, for each time that it moves
      in one of the other ways; it is the hardest to learn. Circles do not turn. Of
      held-out clips all ways are equally frequent.
  """

  sizes: tuple[tuple[int, int], ...] = ((64, 64), (64, 96), (96, 64))
  frames: tuple[int, ...] = (9, 9, 17, 17, 33)  # long clips are rarer
  rates: tuple[int, ...] = (8, 12, 16, 24)
  backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
  gradients: float = 0.5
  images: float = 0.1
  steady: bool = False
  pairs: bool = True
  bars: bool = True
  turns: int = 1


# One object on one ground, at one size and rate.
_SIMPLE = World(
  sizes=((64, 64),),
  frames=(17,),
  rates=(12,),
  backgrounds=("dark grey",),
  gradients=0.0,
  images=0.5,
  steady=True,
  pairs=False,
  bars=False,
)
WORLDS = {
  "whole": World(),
  "simple": _SIMPLE,
  # For minutes on a laptop: a second, in which everything moves as far.
  "short": dataclasses.replace(_SIMPLE, frames=(9,), rates=(8,)),
  # For an hour: also clips that are long enough to be cut in two, and bars.
  "medium": dataclasses.replace(
    _SIMPLE, frames=(9, 17), rates=(8, 12), images=0.3, bars=True, turns=4
  ),
}
