"""Stage "evaluate": how good reconstructions and samples are, in numbers.

  python -m sora_jax.evaluate --config=configs/quickstart.py
  python -m sora_jax.evaluate --config=configs/quickstart.py --suite=prompting

PSNR and SSIM of held-out clips through the VAE. For the generated shapes also the share
of samples whose colour, shape, ... are what the prompt of a held-out clip says, read
off the written files by `attributes`, beside chance and the score of the real files.
"""

import collections
import json
import pathlib

import jax
import numpy as np
from absl import flags, logging

from sora_jax.data.buckets import frame_bucket, limit_sizes
from sora_jax.data.clips import Clip, read_manifest
from sora_jax.data.video import reader
from sora_jax.encoders.autoencoder import Autoencoder
from sora_jax.evaluation import prompting_suite, shape_attributes
from sora_jax.evaluation.quality import psnr, ssim
from sora_jax.run import build, cli
from sora_jax.run import recipe as recipes
from sora_jax.runtime import hosts
from sora_jax.sampling.conditioning import Request
from sora_jax.sampling.pipeline import Sampler
from sora_jax.sampling.requests import sample_share, sampling_mesh, write_samples


def run(recipe: recipes.Recipe, workdir) -> None:
  """Writes workdir/evaluate/{results.json, samples/} and logs the tables."""
  workdir = pathlib.Path(workdir)
  folder = workdir / "evaluate"
  clips = read_manifest(workdir / "data" / "manifest.jsonl")
  clips = limit_sizes(clips, recipe.encode.max_sizes)  # as they were encoded
  heldout = [clip for clip in clips if clip.split == "heldout"]
  heldout = spread(heldout, recipe.evaluate.clips)
  mesh = build.clip_mesh(recipe.encode)
  autoencoder = Autoencoder(workdir / "vae" / "model", mesh, recipe.dtype)
  results = {"vae": reconstruction(heldout, autoencoder, recipe.encode)}
  logging.info(
    "VAE on %(clips)d held-out clips: PSNR %(psnr).2f dB, SSIM %(ssim).4f",
    results["vae"],
  )
  measured = all(clip.truth for clip in heldout)
  # The prompts of clips that training has seen no combination like.
  samples = _sample(recipe, workdir, heldout) if measured else []
  if jax.process_index():
    return  # what is left to do is quick, and done once
  if measured:
    results["attributes"] = attribute_table(
      [clip.truth for clip in heldout], samples, [clip.path for clip in heldout]
    )
    for line in format_table(results["attributes"]).splitlines():
      logging.info("%s", line)
  else:
    logging.info("no ground truth in the manifest: attributes are not evaluated")
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
  logging.info("results are in %s", folder / "results.json")
  captions = [caption for clip in heldout for caption in clip.captions[:1]]
  longest = max(heldout, key=lambda clip: clip.frames)
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


def spread(clips: list, count: int) -> list:
  """At most `count` of the clips, evenly over their order."""
  if len(clips) <= count:
    return clips
  return [clips[i * len(clips) // count] for i in range(count)]


def reconstruction(clips: list[Clip], autoencoder, encode: recipes.Encode) -> dict:
  """Mean PSNR (dB, of each clip's mean squared error) and SSIM through the VAE.

  Clips that cannot be read are left out, and counted as "unread". Each process takes
  its share of the clips; the result is of all.

  Raises:
    ValueError: if none can be read.
  """
  groups = collections.defaultdict(list)
  for clip in clips[jax.process_index() :: jax.process_count()]:
    frames = frame_bucket(clip.frames, encode.frame_buckets)
    groups[frames, clip.height, clip.width].append(clip)
  size = autoencoder.batch_size(encode.batch_size)
  psnrs, ssims, unread = [], [], 0
  for (frames, _, _), group in groups.items():
    for start in range(0, len(group), size):
      videos = []
      for clip in group[start : start + size]:
        try:
          videos.append(read_clip(clip))
        # A file can break in more ways than the decoder names; none ends a run.
        except (ValueError, RuntimeError, OSError) as error:
          logging.warning("left out %s: %s", clip.id, error)
          unread += 1
      if not videos:
        continue
      padded = [
        np.pad(v, ((0, frames - len(v)), (0, 0), (0, 0), (0, 0)), mode="edge")
        for v in videos
      ]
      padded += padded[:1] * (size - len(padded))
      decoded = autoencoder.decode(autoencoder.encode(np.stack(padded)))
      for real, fake in zip(videos, decoded, strict=False):
        fake = fake[: len(real)]
        psnrs.append(psnr(real, fake))
        ssims.append(ssim(real, fake))
  shares = hosts.gather([psnrs, ssims, unread])
  psnrs, ssims = (sum((share[i] for share in shares), []) for i in (0, 1))
  unread = sum(share[2] for share in shares)
  if not psnrs:
    raise ValueError(f"none of {len(clips)} held-out clips could be read")
  return {
    "psnr": float(np.mean(psnrs)),
    "ssim": float(np.mean(ssims)),
    "clips": len(psnrs),
    "unread": unread,
  }


def read_clip(clip: Clip) -> np.ndarray:
  """uint8 [T, H, W, 3] of a clip, as training sees it."""
  return reader.read(
    clip.path,
    start=clip.start,
    frames=clip.frames,
    fps=clip.fps,
    size=(clip.height, clip.width),
  )


def attribute_table(truths, samples, real) -> dict:
  """Share of samples, and of real files, with each attribute of the truths.

  Args:
    truths: what the prompts describe. samples, real: paths of files, in that order.

  Returns:
    attribute -> {"samples", "chance", "real": shares, "n": number it applies to}.
  """
  chance = shape_attributes.chance_levels(truths)
  columns = {}
  for name, paths in (("samples", samples), ("real", real)):
    scores = collections.defaultdict(list)
    for truth, path in zip(truths, paths, strict=True):
      for attribute, right in shape_attributes.score(
        shape_attributes.analyse(path), truth
      ).items():
        scores[attribute].append(right)
    columns[name] = scores
  return {
    attribute: {
      "samples": float(np.mean(columns["samples"][attribute])),
      "chance": float(chance[attribute]),
      "real": float(np.mean(rights)),
      "n": len(rights),
    }
    for attribute, rights in sorted(columns["real"].items())
  }


def format_table(table: dict) -> str:
  """Text of an attribute table; 95 % intervals are of the samples' share."""
  lines = [
    f"{'attribute':12} {'samples':>8} {'+-':>6} {'chance':>7} {'real':>6} {'n':>4}"
  ]
  for name, row in table.items():
    share = row["samples"]
    error = 1.96 * np.sqrt(max(share * (1 - share), 1e-9) / row["n"])
    lines.append(
      f"{name:12} {share:8.1%} {error:6.1%} {row['chance']:7.1%} {row['real']:6.1%} "
      f"{row['n']:4d}"
    )
  return "\n".join(lines)


def _sample(recipe, workdir, clips):
  """Samples each clip's first caption at the clip's size; paths of the files."""
  config = recipe.sample
  requests = [
    Request(
      *(clip.captions[0], clip.width, clip.height, clip.frames, clip.fps, seed),
      config.negative_prompt,
    )
    for seed, clip in enumerate(clips)
  ]
  mesh = sampling_mesh(config, len(requests))
  model = Sampler.from_checkpoint(workdir, mesh, recipe.dtype)
  folder = pathlib.Path(workdir) / "evaluate" / "samples"
  return write_samples(folder, requests, sample_share(model, requests, config))


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
