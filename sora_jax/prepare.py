"""Stage "data": finds or makes the clips and writes workdir/data/manifest.jsonl.

python -m sora_jax.prepare --config=configs/quickstart.py

On the cores of this host; or as an Apache Beam pipeline, by flags of Beam behind "--":

python -m sora_jax.prepare --config=C.py --beam  # here, in processes
python -m sora_jax.prepare --config=C.py --beam -- --runner=DataflowRunner \
  --project=P --region=R --temp_location=gs://B/tmp --sdk_container_image=I
"""

import dataclasses
import json
import pathlib

from absl import flags, logging

from sora_jax.data import clips, listing, mixture, shapes, sources
from sora_jax.data.intake import workers
from sora_jax.data.intake.measuring import Measuring
from sora_jax.run import cli
from sora_jax.run import recipe as recipes
from sora_jax.run.parts import MIXTURE
from sora_jax.runtime.progress import track

# Beam's own runner of one host: "DirectRunner" would look for a program to download.
_LOCAL_BEAM = (
  "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner",
  "--direct_running_mode=multi_processing",
  "--direct_num_workers=0",  # all cores
)


def run(recipe: recipes.Recipe, workdir) -> None:
  """Writes the manifest of clips, and rejected.jsonl with the files left out.

  Raises:
    ValueError: if the source cannot be used, or leaves no clip to train on.
  """
  data, folder = recipe.data, pathlib.Path(workdir) / "data"
  source, generated = data.source, data.source == "shapes"
  if generated:
    source = str(folder / "shapes")
    shapes.generate(
      source,
      num_train=data.train_clips,
      num_heldout=data.heldout_clips,
      seed=recipe.seed,
      world=data.world,
      watch=track,
    )
  found, rejected = sources.scan(
    source,
    max_frames=data.max_frames,
    max_pixels=data.max_pixels,
    size_multiple=data.size_multiple,
    fps=data.fps or None,
    cut_threshold=data.cut_threshold,
    crop_borders=data.crop_borders,
    heldout_share=data.heldout_share,
    heldout_min=data.heldout_min if data.heldout_share else 1,
    limits=data.filter,
    # What was drawn just now is known to be whole, and each clip is one scene.
    how=Measuring(decode=False) if generated else _measuring(data, folder),
    allow_outside=data.allow_outside,
    listed=_listed(data, source, folder),
    watch=track,
  )
  found = _with_both_splits(found, source)
  clips.write_lines(
    folder / "rejected.jsonl",
    (json.dumps({"path": path, "reason": reason}) for path, reason in rejected),
  )
  manifest = folder / "manifest.jsonl"
  clips.write_manifest(manifest, found)
  if (summary := clips.recaption_summary(manifest)).exists():
    summary.unlink()
    logging.warning(
      "the manifest is new and has no captions of recaption: run that again, which "
      "asks for nothing that it has been answered"
    )
  logging.info(
    "%s: %d clips to train on, %d held out, %d files left out",
    folder / "manifest.jsonl",
    sum(clip.split == "train" for clip in found),
    sum(clip.split == "heldout" for clip in found),
    len(rejected),
  )
  if not any(clip.captions for clip in found):
    logging.warning("no clip has a caption: the model will be unconditional")


def _listed(data, source, folder) -> listing.Listing:
  """The media of the source, or of all sources of a mixture."""

  def of(one):
    return listing.of_source(
      one,
      folder,
      fps=data.fps,
      allow_outside=data.allow_outside,
      copy_remote=data.copy_remote,
    )

  if source != MIXTURE:
    return of(source)
  names = mixture.names([one for one, _ in data.mixture])
  parts = {name: of(one) for name, (one, _) in zip(names, data.mixture, strict=True)}
  for name, part in parts.items():
    logging.info("source %s: %d media files", name, len(part.rows))
  return listing.mixed(parts)


def _measuring(data, folder) -> Measuring:
  """On all cores, or by Beam, going on from what was measured before."""
  return Measuring(
    decode=data.measure,
    score_fn=data.score_fn,
    processes=workers.cores(),
    ledger=folder / "measured.jsonl",
    beam=data.beam,
  )


def _with_both_splits(found, source):
  """Training needs a clip and so does evaluation; few files may leave one without."""
  if {clip.split for clip in found} == {"train", "heldout"}:
    return found
  if len(found) == 1:
    raise ValueError(f"{source}: one clip only; training needs another to evaluate on")
  if found[0].split == "heldout":
    raise ValueError(
      f"{source}: all {len(found)} clips are marked as held out; training needs some"
    )
  logging.warning("no clip is held out: the last one is now, %s", found[-1].id)
  return [*found[:-1], dataclasses.replace(found[-1], split="heldout")]


def _main(argv):
  if flags.FLAGS.beam:
    flags.FLAGS.config.data.beam = tuple(argv[1:]) or _LOCAL_BEAM
    argv = argv[:1]
  cli.run_stages(argv, "data")


if __name__ == "__main__":
  cli.define_flags()
  flags.mark_flag_as_required("config")
  flags.DEFINE_bool(
    "beam", False, "Measure by an Apache Beam pipeline, whose flags are behind --."
  )
  cli.run_app(_main)
