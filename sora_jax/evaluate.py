"""Stage "evaluate": how good reconstructions and samples are, in numbers.

  python -m sora_jax.evaluate --config=configs/quickstart.py
  python -m sora_jax.evaluate --config=configs/quickstart.py --suite=vae
  python -m sora_jax.evaluate --config=configs/quickstart.py --suite=sampling
  python -m sora_jax.evaluate --config=configs/quickstart.py --suite=prompting
  python -m sora_jax.evaluate --config=configs/captioner.py --suite=captioner

PSNR and SSIM of held-out clips through the VAE, and whether its latents are healthy.
For the generated shapes also the share of samples whose colour, shape, ... are what the
prompt of a held-out clip says, read off the written files by evaluation/attributes.py,
beside chance, the ceiling that the VAE sets, and the score of the real files.

The suite "vae" measures the VAE alone, before there is a DiT. The others measure the
sampler's settings and the ways of prompting, see evaluation/sampling_suite.py and
prompting_suite.py; they need only the models, of the run or of --checkpoint. The suite
"captioner" captions held-out clips, see evaluation/captioning.py; with
config.evaluate.captioner the stage says how well samples go with their prompts.
"""

import pathlib

import jax
from absl import flags, logging

from sora_jax.data.clips import Clip
from sora_jax.encoders import model_folders
from sora_jax.encoders.autoencoder import Autoencoder
from sora_jax.encoders.captioner import Captioner
from sora_jax.evaluation import (
  attributes,
  captioning,
  heldout,
  prompting_suite,
  sampling_suite,
)
from sora_jax.evaluation.reconstruction import log_figures, reconstruction
from sora_jax.run import build, cli
from sora_jax.run import recipe as recipes
from sora_jax.runtime import files


def run(recipe: recipes.Recipe, workdir) -> None:
  """Writes workdir/evaluate/{results.json, samples/} and logs the tables.

  Raises:
    ValueError: if no held-out clip can be read.
  """
  workdir = pathlib.Path(workdir)
  captioner = None
  if recipe.evaluate.captioner:
    captioner = Captioner.from_checkpoint(recipe.evaluate.captioner, dtype=recipe.dtype)
  clips = heldout.heldout_clips(recipe, workdir)
  reconstructed = _reconstruct(recipe, workdir, clips)
  results = {"vae": reconstructed.figures}
  measured = all(clip.truth for clip in clips)
  # Training has seen no combination of objects like those of held-out prompts.
  learnt = recipe.evaluate.split == "train"
  prompts = heldout.prompts(recipe, clips) if measured or learnt or captioner else []
  if not measured and not learnt:
    prompts = [clip for clip in prompts if clip.captions]
  sampled = attributes.sample_captions(recipe, workdir, prompts) if prompts else None
  if jax.process_index():
    return  # what is left to do is quick, and done once
  if sampled and learnt:
    results["memorised"] = attributes.likeness(clips, sampled)
    logging.info("samples beside the clips of their captions: %s", results["memorised"])
  if sampled and captioner:
    seeds = recipe.evaluate.seeds
    results["similarity"] = captioning.similarity_of_samples(
      captioner, sampled.paths, prompts, seeds
    )
    logging.info("similarity to prompts: %s", results["similarity"])
  if sampled and measured:
    results |= _attributes(recipe, clips, prompts, sampled, reconstructed.scores)
  else:
    logging.info("no ground truth in the manifest: attributes are not evaluated")
  path = workdir / "evaluate" / "results.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_json(path, results)
  logging.info("results are in %s", path)
  _say_what_next(workdir, clips)


def _reconstruct(recipe, workdir: pathlib.Path, clips: list[Clip]):
  """Sends the clips through the run's VAE, and logs how good that is."""
  mesh = build.clip_mesh(recipe.encode)
  autoencoder = Autoencoder(workdir / "vae" / "model", mesh, recipe.dtype)
  reconstructed = reconstruction(clips, autoencoder, recipe.encode)
  log_figures(reconstructed.figures)
  return reconstructed


def _vae_suite(recipe: recipes.Recipe, workdir: pathlib.Path) -> None:
  """Writes workdir/evaluate/vae.json: the VAE's figures and ceilings, without a DiT."""
  clips = heldout.heldout_clips(recipe, workdir)
  reconstructed = _reconstruct(recipe, workdir, clips)
  ceiling = attributes.shares_of(reconstructed.scores)
  for name, share in ceiling.items():
    logging.info("ceiling of %s: %.1f %% of %d", name, 100 * share.value, share.n)
  shares = {name: share.value for name, share in ceiling.items()}
  path = workdir / "evaluate" / "vae.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_json(path, {"vae": reconstructed.figures, "ceiling": shares})


def _attributes(recipe, clips, prompts, sampled, decoded) -> dict:
  """Returns what results.json says of samples, and logs it.

  Args:
    recipe: for the number of seeds.
    clips: the held-out clips that exist.
    prompts: those that the captions of the samples are of.
    sampled: `attributes.Sampled`.
    decoded: scores of the clips that went through the VAE.
  """
  truths, seeds = [clip.truth for clip in prompts], recipe.evaluate.seeds
  table = attributes.attribute_table(
    truths,
    attributes.scores_of_files(sampled.paths, truths * seeds),
    attributes.scores_of_files([c.path for c in clips], [c.truth for c in clips]),
    decoded,
  )
  for line in attributes.format_table(table):
    logging.info("%s", line)
  logging.info(
    "%d samples of %d held-out prompts, %.2f s each",
    *(len(sampled.paths), len(prompts), sampled.seconds),
  )
  return {
    "attributes": table,
    "sampling": {
      "prompts": len(prompts),
      "seeds": seeds,
      "samples": len(sampled.paths),
      "seconds_a_sample": sampled.seconds,
    },
  }


def _say_what_next(workdir: pathlib.Path, clips: list[Clip]) -> None:
  """Logs where to look, and a command that samples something of the user's own."""
  captions = [caption for clip in clips for caption in clip.captions[:1]]
  longest = max(clips, key=lambda clip: clip.frames)
  sheet = workdir / "sample" / "contact_sheet.png"
  if sheet.exists():
    logging.info("Look at %s", sheet)
  model = model_folders.read_meta(workdir / "dit" / "model").model
  given = " --image=FIRST.png" if model.condition_channels else ""
  given += " --last_image=LAST.png" if model.image_positions else ""
  logging.info(
    "Try next: python -m sora_jax.sample --checkpoint=%s --prompt=%r%s "
    "--size=%dx%d --frames=%d --out=sample.mp4",
    workdir,
    captions[-1] if captions else "anything",
    given,
    longest.width,
    longest.height,
    longest.frames,
  )


def _define_flags():
  flags.DEFINE_enum(
    "suite",
    "stage",
    ("stage", "vae", "sampling", "prompting", "captioner"),
    "What to evaluate.",
  )
  flags.DEFINE_string(
    "checkpoint",
    None,
    "For a suite: folder with vae/ and dit/, or captioner/; the workdir by default.",
  )
  flags.DEFINE_integer("clips", 8, "Of the suite prompting: clips a mode.", 2)
  flags.DEFINE_integer("extensions", 10, "Of the suite prompting: for drift.", 1)
  flags.DEFINE_list(
    "guidance", [*map(str, sampling_suite.GUIDANCE)], "Of the suite sampling: scales."
  )
  flags.DEFINE_list(
    "steps", [*map(str, sampling_suite.STEPS)], "Of the suite sampling: of the solver."
  )


def _numbers(name: str, kind) -> list:
  """The values of a flag that is a list of numbers."""
  try:
    return [kind(value) for value in getattr(flags.FLAGS, name)]
  except ValueError as error:
    raise ValueError(f"--{name}: {error}") from error


def _main(argv):
  args = flags.FLAGS
  if args.suite == "stage":
    if args.checkpoint:
      raise ValueError("--checkpoint is for a suite: the stage evaluates its workdir")
    return cli.run_stages(argv, "evaluate")
  if len(argv) > 1:
    raise ValueError(f"unexpected arguments {argv[1:]}")
  cli.start_logging()
  recipe = recipes.read(args.config)
  checkpoint = pathlib.Path(args.checkpoint or cli.workdir())
  # Figures of another model do not belong into the config's own run.
  workdir = pathlib.Path(args.workdir or checkpoint)
  if args.suite == "vae" and args.checkpoint:
    raise ValueError("--checkpoint is not for the suite vae: it reads a run's clips")
  with recipe.matmuls():
    if args.suite == "vae":
      return _vae_suite(recipe, workdir)
    if args.suite == "captioner":
      return captioning.run(recipe, checkpoint, cli.workdir())
    if args.suite == "prompting":
      return prompting_suite.run(
        recipe, checkpoint, workdir, args.clips, args.extensions
      )
    return sampling_suite.run(
      recipe, checkpoint, workdir, _numbers("guidance", float), _numbers("steps", int)
    )


if __name__ == "__main__":
  cli.define_flags()
  _define_flags()
  flags.mark_flag_as_required("config")
  cli.run_app(_main)
