"""The cache of training clips at training size, which stages that read pixels share."""

import functools
import pathlib
from collections.abc import Sequence

import jax
from absl import logging

from sora_jax.data import cache_filling, pixel_cache, presence
from sora_jax.data.clips import Clip
from sora_jax.data.endless import split_indices
from sora_jax.data.intake.workers import cores
from sora_jax.data.pixel_cache import PixelCache
from sora_jax.run import recipe as recipes
from sora_jax.runtime import hosts, sharding
from sora_jax.runtime.progress import track


def training_cache(
  recipe: recipes.Recipe, workdir: pathlib.Path, clips: Sequence[Clip], visits: int
) -> PixelCache | None:
  """Training clips at training size; what is not there is made. None = read files.

  Args:
    recipe: for config.data.cache.
    workdir: of the run.
    clips: its whole manifest.
    visits: of clips in the whole training.

  Raises:
    ValueError: if hosts do not share a cache that the config asks for.
  """
  data, folder = recipe.data, workdir / "data" / "pixels"
  indices = split_indices(clips, "train").tolist()
  codec = cache_filling.choose(
    data.cache,
    clips,
    indices,
    folder,
    visits=visits,
    generated=data.source == "shapes",
  )
  # The room on a disk that all write to is not the same for all.
  codec = hosts.gather(codec)[0]
  if codec is None:
    return None
  presence.check_media([clips[index] for index in indices])
  shards = pixel_cache.plan(clips, indices, folder, codec)
  # Hosts may have copies of the files, or libraries, of their own.
  if len(set(hosts.gather(pixel_cache.name_of(shards)))) > 1:
    fault = (
      "hosts do not share a cache of clips: times of change of their media files, or "
      "versions of PyAV or Pillow, differ"
    )
    if data.cache != "auto":
      raise ValueError(f'{fault}; config.data.cache "none" needs none')
    logging.warning("%s; files are decoded at each visit", fault)
    return None
  # What is stale in a link may be what the other run reads.
  if jax.process_index() == 0 and not folder.parent.is_symlink():
    pixel_cache.remove_stale(shards, folder)
  cache_filling.fill(
    shards[jax.process_index() :: jax.process_count()],
    folder,
    processes=cores() if data.workers else 0,
    watch=functools.partial(track, process=jax.process_index()),
  )
  sharding.sync("cache of clips")
  return cache_filling.open_cache(shards, data.max_unreadable, data.leave_out)
