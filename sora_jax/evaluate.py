"""Stage "evaluate": how good reconstructions and samples are, in numbers.

  python -m sora_jax.evaluate --config=configs/quickstart.py
  python -m sora_jax.evaluate --config=configs/quickstart.py --suite=prompting

PSNR and SSIM of held-out clips through the VAE, and whether its latents are healthy.
For the generated shapes also the share of samples whose colour, shape, ... are what the
prompt of a held-out clip says, read off the written files by evaluation/attributes.py,
beside chance, the ceiling that the VAE sets, and the score of the real files.
"""

import pathlib

import jax
from absl import flags, logging

from sora_jax.data.clips import Clip
from sora_jax.encoders.autoencoder import Autoencoder
from sora_jax.evaluation import attributes, prompting_suite
from sora_jax.evaluation.heldout import heldout_clips
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
  clips = heldout_clips(recipe, workdir)
  mesh = build.clip_mesh(recipe.encode)
  autoencoder = Autoencoder(workdir / "vae" / "model", mesh, recipe.dtype)
  reconstructed = reconstruction(clips, autoencoder, recipe.encode)
  results = {"vae": reconstructed.figures}
  log_figures(reconstructed.figures)
  truths = [clip.truth for clip in clips if clip.truth]
  measured = len(truths) == len(clips)
  # Training has seen no combination of objects like those of held-out prompts.
  samples = attributes.sample_captions(recipe, workdir, clips) if measured else []
  if jax.process_index():
    return  # what is left to do is quick, and done once
  if measured:
    results["attributes"] = attributes.attribute_table(
      truths, samples, [clip.path for clip in clips], reconstructed.scores
    )
    for line in attributes.format_table(results["attributes"]):
      logging.info("%s", line)
  else:
    logging.info("no ground truth in the manifest: attributes are not evaluated")
  path = workdir / "evaluate" / "results.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_json(path, results)
  logging.info("results are in %s", path)
  _say_what_next(workdir, clips)


def _say_what_next(workdir: pathlib.Path, clips: list[Clip]) -> None:
  """Logs where to look, and a command that samples something of the user's own."""
  captions = [caption for clip in clips for caption in clip.captions[:1]]
  longest = max(clips, key=lambda clip: clip.frames)
  logging.info(
    "Look at %s. Try next: python -m sora_jax.sample --checkpoint=%s --prompt=%r "
    "--size=%dx%d --frames=%d --out=sample.mp4",
    workdir / "sample" / "contact_sheet.png",
    workdir,
    captions[-1] if captions else "anything",
    longest.width,
    longest.height,
    longest.frames,
  )


def _main(argv):
  if flags.FLAGS.suite == "stage":
    return cli.run_stages(argv, "evaluate")
  cli.start_logging()
  recipe = recipes.read(flags.FLAGS.config)
  return prompting_suite.run(recipe, cli.workdir())


if __name__ == "__main__":
  cli.define_flags()
  flags.DEFINE_enum("suite", "stage", ("stage", "prompting"), "What to evaluate.")
  flags.mark_flag_as_required("config")
  cli.run_app(_main)
