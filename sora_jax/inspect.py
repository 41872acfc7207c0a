"""Shows what a run is going to be trained on, as one HTML page: look before you train.

  python -m sora_jax.inspect --config=configs/quickstart.py
  python -m sora_jax.inspect --config=... --workdir=... --out=page.html --rows=3

It needs the stage "data". Once the stage "encode" is complete, it shows training rows
as the DiT sees them, too: decoded by the VAE from their packed tokens. Nothing of the
run is changed, and the VAE is loaded only for that.
"""

import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import app, flags, logging

from sora_jax.data import records
from sora_jax.data.buckets import frame_bucket
from sora_jax.data.caption_texts import CaptionIds, CaptionTexts
from sora_jax.data.clips import read_rows
from sora_jax.data.inspection import figures, left_out, packed_rows, page, sections
from sora_jax.data.packed_dataset import PackedDataset
from sora_jax.encoders.autoencoder import Autoencoder
from sora_jax.packing import patches, time_grid
from sora_jax.run import build, cli, stages
from sora_jax.run import recipe as recipes
from sora_jax.run import rows as training_rows

_LEGEND = (
  "The line is the row: a colour for each segment, grey is padding, yellow below are "
  "given tokens. Each segment follows in its colour, decoded by the VAE from the row's "
  "tokens: a frame for each latent frame, then the images behind the clip. Yellow "
  "lines are around given patches: the DiT sees them without noise."
)


def write_page(
  recipe: recipes.Recipe, workdir, out, *, clips: int = 24, rows: int = 3
) -> None:
  """Writes the page.

  Args:
    recipe: of the run; what is not made yet is counted as it says.
    workdir: of the run.
    out: file to write.
    clips: on the contact sheet.
    rows: that are decoded.

  Raises:
    ValueError: the stage "data" is not complete; says which command makes it.
  """
  workdir = pathlib.Path(workdir)
  if not stages.is_complete("data", workdir):
    raise ValueError(
      f"the stage data is not complete in {workdir}, so there is nothing to look at: "
      "first run python -m sora_jax.prepare with the same --config and --workdir"
    )
  states = {name: _state(name, recipe, workdir) for name in ("data", "vae", "encode")}
  found = figures.measure(workdir / "data", _tokens_of(recipe), clips)
  logging.info("%d clips to train on; reading %d", found.splits["train"], clips)
  parts = [
    page.table(states.items(), ("stage", "state")),
    sections.clips(found),
    _rows(recipe, workdir, states, rows),
    sections.contact_sheet(found.sample),
    sections.left_out(left_out.kinds(workdir)),
  ]
  page.write(out, f"What {workdir.name} is trained on", parts)
  logging.info("the page is %s", out)


def _state(name: str, recipe, workdir: pathlib.Path) -> str:
  """ "complete", or what there is to know or do about a stage."""
  if not stages.is_complete(name, workdir):
    return (
      f"run the stage {name} first: python -m sora_jax.{stages.STAGES[name].module}"
    )
  try:
    reason = stages.left_to_do([name], recipe, workdir)
  except ValueError as error:
    return f"of another config, or made from what is not there now: {error}"
  return f"it would run again: {reason}" if reason else "complete"


def _tokens_of(recipe):
  """A function of (frames, height, width): the tokens of a clip by the config."""
  vae, patch_size = recipe.vae.model, recipe.dit.model.patch_size

  def tokens(frames: int, height: int, width: int) -> int:
    return patches.num_tokens(vae.latent_shape(frames, height, width)[:3], patch_size)

  return tokens


def _rows(recipe, workdir: pathlib.Path, states: dict[str, str], count: int) -> str:
  """How full rows are, and some of them; or why there are none."""
  title = "Training rows as the model sees them"
  encode, vae = states["encode"], states["vae"]
  if not stages.is_complete("encode", workdir):
    return page.section(title, page.note(f"rows: {encode}"))
  try:
    with tempfile.TemporaryDirectory() as folder:
      parts = _packed(recipe, workdir, pathlib.Path(folder), count, [vae, encode])
  except ValueError as error:
    logging.warning("there are no rows to show: %s", error)
    return page.section(title, page.note(f"rows cannot be made: {error}"))
  return page.section(title, *parts)


def _packed(recipe, workdir, folder, count: int, made: Sequence[str]) -> list[str]:
  """The parts of the section; `made` says whether VAE and latents are complete."""
  stage = recipe.dit
  latents = records.read_latents_manifest(str(workdir / "encode" / "latents.jsonl"))
  texts = _texts(recipe, workdir, latents, folder)
  options = training_rows.packed_options(stage)

  def make(options, seed, choice):
    reader = training_rows.latent_reader(workdir)
    return PackedDataset(latents, reader, texts, options, seed, choice)

  dataset = training_rows.last_part(training_rows.training_rows(make, options, recipe))
  seconds = _seconds_per_step(workdir / "dit" / "metrics.jsonl")
  parts = [sections.fill(dataset, stage.tokens, stage.rows, stage.train.steps, seconds)]
  count = min(count, dataset.elements_per_epoch(0))
  if unfit := [state for state in made if state != "complete"]:
    return [*parts, page.note(f"rows are not decoded: {'; '.join(unfit)}")]
  if not count:
    return parts
  logging.info("decoding %d rows", count)
  decode, patch_size = _decoder(recipe, workdir), stage.model.patch_size
  parts.append(page.note(_LEGEND))
  for number in range(count):  # those of the first steps: their order is random
    parts.append(
      sections.packed_row(number, dataset, latents, patch_size, decode, _text_of(texts))
    )
  return parts


def _texts(recipe, workdir, latents, folder: pathlib.Path) -> CaptionTexts:
  """Captions as training has them; what it would train first is made in `folder`."""
  vocabulary = workdir / "dit" / "tokenizer.model"
  if not recipe.text.folder and not vocabulary.exists():
    vocabulary = folder / "tokenizer.model"
    training_rows.train_tokenizer(recipe.dit.text.vocab_size, latents, vocabulary)
  return training_rows.caption_texts(recipe, workdir, vocabulary)


def _text_of(texts: CaptionTexts) -> Callable[[np.ndarray], str]:
  """What ids of a row say; features are of captions that the manifest has."""
  if isinstance(texts, CaptionIds):
    return lambda text_S: texts.tokenizer.decode(list(text_S))
  return str


def _seconds_per_step(metrics: pathlib.Path) -> float | None:
  """Of the last steps that training has logged; None if there are none."""
  last = None
  for _, row in read_rows(metrics) if metrics.is_file() else ():
    last = row.get("seconds_per_step", last)
  return last


def _decoder(recipe, workdir) -> packed_rows.Decode:
  """The VAE of the run, on as many devices as share a clip."""
  devices = jax.local_devices()[: recipe.encode.devices_per_clip]
  mesh = build.clip_mesh(recipe.encode, devices)
  autoencoder = Autoencoder(workdir / "vae" / "model", mesh, recipe.dtype)

  def decode(latent_THWC: np.ndarray) -> np.ndarray:
    frames = time_grid.video_frames(len(latent_THWC))
    # Padding in time is exact, and few lengths are compiled.
    longer = time_grid.latent_frames(frame_bucket(frames, recipe.encode.frame_buckets))
    wide = ((0, longer - len(latent_THWC)), (0, 0), (0, 0), (0, 0))
    padded_THWC = np.pad(latent_THWC, wide, mode="edge")
    return autoencoder.decode(padded_THWC[None])[0][:frames]

  return decode


def _define_flags() -> None:
  flags.DEFINE_string("out", None, "Page to write; <workdir>/inspect.html by default.")
  flags.DEFINE_integer("clips", 24, "Clips on the contact sheet.", 0)
  flags.DEFINE_integer("rows", 3, "Training rows that are decoded.", 0)


def _main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  cli.start_logging()
  args = flags.FLAGS
  out = args.out or os.path.join(cli.workdir(), "inspect.html")
  recipe = recipes.read(args.config)
  with recipe.matmuls():
    write_page(recipe, cli.workdir(), out, clips=args.clips, rows=args.rows)


if __name__ == "__main__":
  cli.define_flags()
  flags.mark_flag_as_required("config")
  _define_flags()
  cli.run_app(_main)
