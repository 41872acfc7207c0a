"""Samples videos and images from a trained model.

  python -m sora_jax.sample --checkpoint=runs/quickstart \
    --prompt="a red circle moves right" --size=64x64 --frames=17 --out=x.mp4

  python -m sora_jax.sample --checkpoint=runs/quickstart --video=x.mp4 \
    --prompt="it moves on" --extend_after=2 --out=longer.mp4

  python -m sora_jax.sample --config=configs/quickstart.py

The last form is the stage "sample" of a run: the prompts of config.sample. Beside each
file its .json says how it was made: --from=x.mp4.json makes the same again.
"""

import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from absl import flags, logging

from sora_jax.data.video import contact_sheet, reader, writer
from sora_jax.diffusion import solvers
from sora_jax.run import cli, stages
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding
from sora_jax.sampling import job_plan
from sora_jax.sampling.conditioning import Request
from sora_jax.sampling.job import Job
from sora_jax.sampling.pipeline import Sampler
from sora_jax.sampling.requests import (
  requests_of,
  sample_share,
  sampling_mesh,
  write_samples,
)

# --- the stage


def run(recipe: recipes.Recipe, workdir) -> None:
  """Makes the prompts of config.sample: files, a contact sheet, samples.jsonl."""
  folder, config = pathlib.Path(workdir) / "sample", recipe.sample
  requests = requests_of(recipe, workdir)
  mesh = sampling_mesh(config, len(requests))
  model = Sampler.from_checkpoint(workdir, mesh, recipe.dtype)
  videos = sample_share(model, requests, config)
  write_samples(folder, requests, videos)
  logging.info("%d samples and contact_sheet.png are in %s", len(videos), folder)


# --- the command


def _define_flags():
  default, job = solvers.Options(), Job()
  flags.DEFINE_string("checkpoint", None, "Folder of a run, with vae/ and dit/ in it.")
  flags.DEFINE_multi_string("lora", [], "Adapters to merge in, .safetensors files.")
  flags.DEFINE_float("lora_strength", 1.0, "How strongly; 1 is as they were trained.")
  flags.DEFINE_multi_string("prompt", [], "What to make; may be given several times.")
  flags.DEFINE_string("prompts_file", None, "Text file with one prompt a line.")
  flags.DEFINE_string("from", None, "A video's .json: makes the same again.")
  flags.DEFINE_string("size", None, "WIDTHxHEIGHT; that of the input, or 64x64.")
  flags.DEFINE_integer("frames", None, "Frames; 17 by default, 1 for images.", 1)
  flags.DEFINE_float("fps", None, "Frames per second; the input's, or 12.", 0.1)
  flags.DEFINE_integer("seed", 0, "Seed of the first prompt; the next gets the next.")
  flags.DEFINE_string("out", "sample.mp4", "File to write: .mp4, .webm, .gif or .png.")
  flags.DEFINE_string("sheet", None, "Also write a contact sheet, a .png.")
  flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
  flags.DEFINE_multi_string("shot", [], "SECONDS:TEXT of a later shot.")
  flags.DEFINE_string("blend", "", "Text that the video gradually turns to.")
  flags.DEFINE_string("image", None, "First frame.")
  flags.DEFINE_string("last_image", None, "Last frame.")
  flags.DEFINE_multi_string("key_frame", [], "SECONDS:FILE of a frame in between.")
  flags.DEFINE_string("video", None, "What to extend, connect, loop, edit, infill.")
  flags.DEFINE_float("extend_after", 0.0, "Seconds to add at the end.")
  flags.DEFINE_float("extend_before", 0.0, "Seconds to add at the start.")
  flags.DEFINE_string("connect", None, "Another video, that the first leads to.")
  flags.DEFINE_float(
    "gap", None, "Seconds to make: for --connect 1, for --loop as long as --video."
  )
  flags.DEFINE_float(
    "gap_strength", job.gap_strength, "How far a gap is from a mix of its ends, 0 to 1."
  )
  flags.DEFINE_bool("loop", False, "A loop: of --video, or of the prompt alone.")
  flags.DEFINE_float("strength", None, "How much to change of --video, 0 to 1.")
  flags.DEFINE_string("mask", None, "An image, white where to change --video.")
  flags.DEFINE_list("infill", None, "FROM,TO in seconds: what to make anew.")
  flags.DEFINE_integer("interpolate", 1, "Times as many frames a second: 2 or 4.")
  flags.DEFINE_enum("fit", job.fit, ("crop", "pad"), "Inputs of another aspect ratio.")
  flags.DEFINE_integer("window", job.window, "Frames made at once; 0 = all.")
  flags.DEFINE_integer("given", job.given, "Of them, from the window before.")
  flags.DEFINE_float("given_noise", 0.0, "Noise on those, against drift; 0 to 1.")
  flags.DEFINE_float(
    "preview", 0.0, "Make it small first, then refine that: with this strength."
  )
  flags.DEFINE_integer("tile", None, "Pixels a side of what is decoded at once.")
  flags.DEFINE_integer("steps", default.steps, "Steps of the solver.", 1)
  flags.DEFINE_enum("method", default.method, solvers.METHODS, "Solver.")
  flags.DEFINE_float("eta", default.eta, "Noise of ddim, 0 to 1.")
  flags.DEFINE_float("shift", default.shift, "Above 1: more steps at much noise.")
  flags.DEFINE_integer(
    "shift_tokens", 0, "Tokens that `shift` is for; others get more or less. 0 = all."
  )
  flags.DEFINE_float(
    "guidance_scale", default.guidance_scale, "Classifier-free guidance; 1 = none."
  )
  flags.DEFINE_list("guidance_interval", ["0", "1"], "Noise levels where it acts.")
  flags.DEFINE_float("guidance_rescale", 0.0, "Against too much contrast, 0 to 1.")
  flags.DEFINE_bool("cfg_zero", default.cfg_zero, "CFG-Zero* guidance.")
  flags.DEFINE_integer("zero_steps", default.zero_steps, "Its still first steps.")
  flags.DEFINE_float(
    "reuse", default.reuse, "Share of change up to which blocks are skipped; 0 = never."
  )


def _numbers(name, texts, form):
  try:
    return tuple(map(float, texts))
  except ValueError:
    raise ValueError(f"--{name}={','.join(texts)} is not {form}") from None


def _options(args, kept: dict) -> solvers.Options:
  values = {
    field.name: getattr(args, field.name)
    for field in dataclasses.fields(solvers.Options)
  }
  interval = _numbers("guidance_interval", args.guidance_interval, "LOW,HIGH")
  if len(interval) != 2:
    raise ValueError(f"--guidance_interval={args.guidance_interval} is not LOW,HIGH")
  values["guidance_interval"] = interval
  for name in kept:
    if not args[name].present:
      values[name] = tuple(kept[name]) if name == "guidance_interval" else kept[name]
  return solvers.Options(**values)


def _job(args, kept: dict) -> Job:
  """What the flags say; `kept` holds what they leave open."""
  names = {field.name for field in dataclasses.fields(Job)} & set(args)
  # Those that are lists of texts, and what is an option of the solver as well.
  names -= {"prompt", "size", "infill", "guidance_scale"}
  values = {name: getattr(args, name) for name in names}
  if args.size is not None:
    size = re.fullmatch(r"(\d+)x(\d+)", args.size)
    if not size or not int(size[1]) or not int(size[2]):
      raise ValueError(f"--size={args.size} is not WIDTHxHEIGHT, such as 64x64")
    values["size"] = (int(size[1]), int(size[2]))
  if args.infill is not None:
    values["infill"] = _numbers("infill", args.infill, "FROM,TO in seconds")
    if len(args.infill) != 2:
      raise ValueError(f"--infill={','.join(args.infill)} is not FROM,TO in seconds")
  for flag, name in (("shot", "shots"), ("key_frame", "key_frames")):
    pairs = []
    for text in getattr(args, flag):
      seconds, colon, rest = text.partition(":")
      if not colon or not rest:
        raise ValueError(f"--{flag}={text} is not SECONDS:{'TEXT or FILE'}")
      pairs.append((*_numbers(flag, [seconds], "SECONDS:..."), rest))
    values[name] = tuple(pairs)
  flag_of = {"shots": "shot", "key_frames": "key_frame"}
  old = dataclasses.asdict(Job.from_json(kept)) if kept else {}
  for name in kept:
    if not args[flag_of.get(name, name)].present:
      values[name] = old[name]
  return Job(**values)


def _read_sidecar(path) -> dict:
  """The .json beside a video; what it was made from must be there, unchanged."""
  try:
    made = json.loads(pathlib.Path(path).read_text())
    for key in ("job", "options", "checkpoint", "model", "files"):
      made[key]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f"--from={path} is no description of a video ({error})") from error
  now = Job.from_json(made["job"]).files()
  for file, digest in made["files"].items():
    if now[file] != digest:
      raise ValueError(f"--from={path}: {file} has changed since")
  return made


def _prompts(args, made) -> list[str]:
  prompts = list(args.prompt)
  if args.prompts_file:
    path = pathlib.Path(args.prompts_file)
    if not path.is_file():
      raise ValueError(f"--prompts_file: {path} is not a file")
    prompts += [line.strip() for line in path.read_text().splitlines() if line.strip()]
  if not prompts and made:
    prompts = [made["job"].get("prompt", "")]
  if not prompts and (args.video or args.image):
    prompts = [""]
  if not prompts:
    raise ValueError("no prompt: give --prompt or --prompts_file")
  return prompts


def _main(argv):
  cli.start_logging()
  args = flags.FLAGS
  if len(argv) > 1:
    raise ValueError(f"unexpected arguments {argv[1:]}; quote the prompt")
  if flags.FLAGS.config is not None:
    if args.checkpoint or args.prompt or args.prompts_file:
      raise ValueError(
        "--config runs the stage; for prompts of your own give --checkpoint instead"
      )
    recipe = recipes.read(flags.FLAGS.config)
    return stages.run(("sample",), recipe, cli.workdir())
  made = _read_sidecar(args["from"].value) if args["from"].value else {}
  checkpoint = args.checkpoint or made.get("checkpoint")
  if not checkpoint:
    raise ValueError("--checkpoint is missing: the folder of a run, as runs/quickstart")
  prompts = _prompts(args, made)
  out = pathlib.Path(args.out)
  if out.suffix not in (".mp4", ".webm", ".gif", ".png"):
    raise ValueError(f"--out={out}: the name must end in .mp4, .webm, .gif or .png")
  job = _job(args, made.get("job", {}))
  if out.suffix == ".png" and job.mode == "text":
    if (job.frames or 1) > 1:
      raise ValueError(f"--out={out} holds one image, but --frames={job.frames}")
    job = dataclasses.replace(job, frames=1)
  work = [
    dataclasses.replace(job, prompt=prompt, seed=job.seed + i)
    for i, prompt in enumerate(prompts)
  ]
  options = _options(args, made.get("options", {}))
  loras = [(path, args.lora_strength) for path in args.lora] or made.get("loras", [])
  # Others than texts are made one after the other.
  mesh = sharding.sampling_mesh(len(work) if work[0].is_plain else 1)
  model = Sampler.from_checkpoint(checkpoint, mesh, loras=loras)
  if made and model.model_id != made["model"]:
    logging.warning("%s is another model than the one of %s", checkpoint, args["from"])
  names = [out.name]
  if len(work) > 1:
    names = [f"{out.stem}-{i:03d}{out.suffix}" for i in range(len(work))]
  paths = [out.with_name(name) for name in names]
  source = {"checkpoint": str(checkpoint), "loras": loras, "model": model.model_id}
  made = _made(model, work, options, args.tile, paths)
  for _, parts in itertools.groupby(made, key=lambda part: part.path):
    _write(parts, options, source)
  if args.sheet:
    contact_sheet.write(args.sheet, [reader.read(path) for path in paths], prompts)
    logging.info("%s: contact sheet", args.sheet)


class _Part(NamedTuple):
  """Frames of a job's video, in the order of its file."""

  path: pathlib.Path
  job: Job
  fps: float
  frames: np.ndarray


def _made(model, work, options, tile, paths) -> Iterator[_Part]:
  """What a model makes of jobs: texts all at once, others in turn and in chunks."""
  if len(work) > 1 and work[0].is_plain:
    requests = [
      Request(
        *(job.prompt, *(job.size or (64, 64)), job.frames or 17, job.fps or 12.0),
        *(job.seed, job.negative_prompt),
      )
      for job in work
    ]
    videos = model.sample(requests, options)
    for path, job, request, made in zip(paths, work, requests, videos, strict=True):
      yield _Part(path, job, request.fps, made)
    return
  for path, job in zip(paths, work, strict=True):
    full = job
    if job.preview:
      small = np.concatenate(list(model.preview(job, options, tile)))
      full = model.refined(job, small)
      preview = path.with_name(f"{path.stem}-preview{path.suffix}")
      writer.write(preview, small, full.fps, metadata={"comment": job.prompt})
      logging.info("%s: preview", preview)
    fps = job_plan.rate(full)
    for frames in model.stream(full, options, tile):
      yield _Part(path, job, fps, frames)


def _write(parts, options, source):
  """Writes a video and its .json, from which --from makes the same again."""
  path, job, fps, frames = next(parts)
  described = {
    "job": job.as_json(),
    "options": {
      field.name: getattr(options, field.name)
      for field in dataclasses.fields(solvers.Options)
    },
    **source,
    "files": job.files(),
  }
  metadata = {"comment": job.prompt, "sora_jax": json.dumps(described)}
  chunks = itertools.chain([frames], (part.frames for part in parts))
  count = writer.write_chunks(path, chunks, fps, metadata=metadata)
  text = json.dumps(described, indent=2, ensure_ascii=False)
  path.with_name(f"{path.name}.json").write_text(text + "\n")
  logging.info("%s: %s, %d frames: %s", path, job.mode, count, job.prompt)


if __name__ == "__main__":
  cli.define_flags()
  _define_flags()
  cli.run_app(_main)
