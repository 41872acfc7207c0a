"""Samples videos and images from a trained model.

  python -m sora_jax.sample --checkpoint=runs/quickstart \
    --prompt="a red circle moves right" --size=64x64 --frames=17 --out=x.mp4

  python -m sora_jax.sample --checkpoint=runs/quickstart --video=x.mp4 \
    --prompt="it moves on" --extend_after=2 --out=longer.mp4

  python -m sora_jax.sample --config=configs/quickstart.py

A checkpoint is the folder of a run, or the name of one that comes with the package.
Size, length, rate and the options of the solver are as its recipe has them, where no
flag says otherwise (whatever default --help shows). The last form is the stage "sample"
of a run: the prompts of config.sample. Beside each file its .json says how it was made:
--from=x.mp4.json makes the same again. --expand makes prompts as long as the captions
that the model has seen in training; the .json keeps what they became, so that --from
asks nobody again.
"""

import dataclasses
import pathlib

from absl import flags, logging

from sora_jax.data import clips, text_file
from sora_jax.data.video import contact_sheet, reader
from sora_jax.diffusion.solvers import Options
from sora_jax.language import chat, expander, expansion
from sora_jax.run import cli, stages
from sora_jax.run import recipe as recipes
from sora_jax.runtime import sharding, shipped
from sora_jax.sampling import files
from sora_jax.sampling import flags as job_flags
from sora_jax.sampling.conditioning import Request as Request  # for users
from sora_jax.sampling.defaults import Defaults
from sora_jax.sampling.defaults import read as read_defaults
from sora_jax.sampling.job import GIVEN, Job
from sora_jax.sampling.pipeline import Sampler as Sampler
from sora_jax.sampling.requests import (
  requests_of,
  sample_share,
  sampling_mesh,
  write_samples,
)
from sora_jax.tasks.dit import WEIGHTS
from sora_jax.weights import merge

# Fields of a job without a flag of their own: there may be several prompts, and the
# scale is that of the options.
_OWN = ("prompt", "guidance_scale")


def run(recipe: recipes.Recipe, workdir) -> None:
  """Makes the prompts of config.sample: files, a contact sheet, samples.jsonl."""
  folder, config = pathlib.Path(workdir) / "sample", recipe.sample
  requests = requests_of(recipe, workdir)
  mesh = sampling_mesh(config, len(requests))
  model = Sampler.from_checkpoint(workdir, mesh, recipe.dtype, weights=config.weights)
  videos = sample_share(model, requests, config)
  write_samples(folder, requests, videos)
  logging.info("%d samples and contact_sheet.png are in %s", len(videos), folder)


def _define_flags():
  flags.DEFINE_string(
    "checkpoint",
    None,
    "Folder of a run, with vae/ and dit/ in it, or the name of a model that comes with "
    f"the package: {', '.join(shipped.names()) or 'none'}. Its recipe says how it is "
    "sampled, where no flag does.",
  )
  flags.DEFINE_multi_string(
    "lora",
    [],
    "Adapters to merge in, .safetensors files, each with its own strength behind it if "
    "it has one: a.safetensors:0.8,b.safetensors:0.5",
  )
  flags.DEFINE_multi_string("lora_low", [], "The same for the second of two experts.")
  flags.DEFINE_float(
    "lora_strength", 1.0, "Of adapters without one; 1 is as they were trained."
  )
  flags.DEFINE_multi_string("prompt", [], "What to make; may be given several times.")
  flags.DEFINE_string("prompts_file", None, "Text file with one prompt a line.")
  flags.DEFINE_string("from", None, "A video's .json: makes the same again.")
  flags.DEFINE_string("out", "sample.mp4", "File to write: .mp4, .webm, .gif or .png.")
  flags.DEFINE_string("sheet", None, "Also write a contact sheet, a .png.")
  flags.DEFINE_integer("tile", None, "Pixels a side of what is decoded at once.")
  flags.DEFINE_enum(
    "weights",
    "",
    ["", *WEIGHTS],
    "How the DiT's weights are held; as saved by default.",
  )
  flags.DEFINE_bool(
    "low_memory", False, "Text encoder, DiT and VAE take turns on the accelerator."
  )
  flags.DEFINE_bool("expand", False, "Make prompts longer first, as captions are.")
  flags.DEFINE_string(
    "expand_endpoint",
    None,
    "Address of a chat API that does it, in place of the model's own expander.",
  )
  flags.DEFINE_string("expand_model", "", "Name of the endpoint's model.")
  flags.DEFINE_float(
    "expand_top_p", 0.0, "Nucleus of the own expander, by --seed; 0: likeliest words."
  )
  job_flags.define(Job, without=_OWN)
  job_flags.define(Options)


def _prompts(args, described) -> list[str]:
  prompts = list(args.prompt)
  if args.prompts_file:
    path = pathlib.Path(args.prompts_file)
    if not path.is_file():
      raise ValueError(f"--prompts_file: {path} is not a file")
    prompts += text_file.read_lines(path, "prompts")
  if not prompts and described:
    prompts = [described["job"].get("prompt", "")]
  media = (args.video, args.image, args.last_image, args.key_frame)
  if not prompts and any(media):
    prompts = [""]
  if not prompts:
    raise ValueError("no prompt: give --prompt or --prompts_file")
  return prompts


def _jobs(args, described, out) -> list[Job]:
  """A job for each prompt, as the flags say and else as `described`, a sidecar."""
  prompts = _prompts(args, described)
  kept = described.get("job", {})
  if kept:
    old = dataclasses.asdict(Job.from_json(kept))
    kept = {"given": GIVEN, **{name: old[name] for name in kept}}
  job = Job(
    **{name: value for name, value in kept.items() if name in _OWN},
    **job_flags.values(Job, args, kept, without=_OWN),
  )
  if out.suffix not in files.SUFFIXES:
    raise ValueError(f"--out={out}: the name must end in .mp4, .webm, .gif or .png")
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"--out={out}: {error.strerror}") from error
  if out.suffix == ".png" and job.mode == "image":
    given = (("image", job.image), ("last_image", job.last_image))
    name = next((name for name, medium in given if medium is not None), "key_frame")
    raise ValueError(f"--out={out} holds one image, but --{name} makes a video")
  if out.suffix == ".png" and job.mode == "text":
    if (job.frames or 1) > 1:
      raise ValueError(f"--out={out} holds one image, but --frames={job.frames}")
    job = dataclasses.replace(job, frames=1)
  return [
    dataclasses.replace(job, prompt=prompt, seed=job.seed + i)
    for i, prompt in enumerate(prompts)
  ]


def _expander(args, checkpoint) -> expansion.Expander | None:
  """That of the flags; None if the model's own is to be used."""
  if not args.expand:
    given = [n for n in ("endpoint", "model", "top_p") if args[f"expand_{n}"].present]
    if given:
      raise ValueError(f"--expand_{given[0]} needs --expand")
    return None
  if args.expand_endpoint and args["expand_top_p"].present:
    raise ValueError("--expand_top_p is for the model's own expander")
  if args["expand_model"].present and not args.expand_endpoint:
    raise ValueError("--expand_model is for --expand_endpoint")
  folder = shipped.find(checkpoint)
  if not args.expand_endpoint:
    if args.expand_top_p and expander.TrainedExpander.is_in(folder):
      return expander.TrainedExpander(folder, args.expand_top_p)
    return None
  talk = chat.Chat(chat.Endpoint(args.expand_endpoint, args.expand_model))
  manifest = folder / "data" / "manifest.jsonl"
  examples = []
  if manifest.is_file():
    examples = expansion.examples_of(clips.read_manifest(manifest))
  if not examples:
    logging.warning("%s has no captions: the endpoint sees no examples", manifest)
  return expansion.AtEndpoint(talk, examples)


def _expanded(args, described, model, jobs):
  """(jobs with longer texts, what these were): by the flags or by a sidecar."""
  if not args.expand:
    kept = described.get("expanded")
    return jobs, expansion.Expansion(**kept) if kept else None
  if described and not (args.prompt or args.prompts_file):
    raise ValueError("--expand: --from has a prompt as it is; give one with --prompt")
  texts = [text for job in jobs for text in expansion.texts_of(job)]
  made = model.expand(texts, jobs[0].seed)
  jobs = [
    dataclasses.replace(job, **expansion.replaced(job, made.texts)) for job in jobs
  ]
  return jobs, made


def _options(args, described, usual: Options) -> Options:
  """As the flags say, else as `described`, a sidecar, or without one the usual ones."""
  kept = dict(described.get("options", {}) if described else dataclasses.asdict(usual))
  if "guidance_interval" in kept:
    kept["guidance_interval"] = tuple(kept["guidance_interval"])
  if not described:
    # What the flags have left without a meaning, which would be an error.
    for name in _idle(args):
      del kept[name]
  return Options(**job_flags.values(Options, args, kept))


def _idle(args) -> list[str]:
  """Options of a checkpoint that do nothing beside the flags that were given."""
  idle = []
  if args["guidance_scale"].present and args.guidance_scale == 1.0:
    idle += ["guidance_interval", "guidance_rescale", "cfg_zero"]
  if args["method"].present and args.method != "ddim":
    idle.append("eta")
  return idle


def _main(argv):
  cli.start_logging()
  args = flags.FLAGS
  if len(argv) > 1:
    raise ValueError(f"unexpected arguments {argv[1:]}; quote the prompt")
  if args.config is not None:
    if args.checkpoint or args.prompt or args.prompts_file:
      raise ValueError(
        "--config runs the stage; for prompts of your own give --checkpoint instead"
      )
    return stages.run(("sample",), recipes.read(args.config), cli.workdir())
  described = files.read_sidecar(args["from"].value) if args["from"].value else {}
  checkpoint = args.checkpoint or described.get("checkpoint")
  if not checkpoint:
    raise ValueError("--checkpoint is missing: the folder of a run, as runs/quickstart")
  out = pathlib.Path(args.out)
  usual = read_defaults(shipped.find(checkpoint))
  jobs = _jobs(args, described, out)
  # What a sidecar leaves out had the package's default.
  options = _options(args, described, usual.options)
  filling = Defaults() if described else usual
  jobs = [filling.fill(job, options) for job in jobs]
  loras, loras_low = (
    [
      merge.with_strength(text, args.lora_strength)
      for several in args[name].value
      for text in several.split(",")
    ]
    or described.get(f"{name.replace('lora', 'loras')}", [])
    for name in ("lora", "lora_low")
  )
  given = args["weights"].present
  weights = args.weights if given else described.get("weights", "")
  own_expander = _expander(args, checkpoint)
  # Others than texts are made one after the other.
  mesh = sharding.sampling_mesh(len(jobs) if jobs[0].is_plain else 1)
  model = Sampler.from_checkpoint(
    checkpoint,
    mesh,
    loras=loras,
    loras_low=loras_low,
    weights=weights,
    low_memory=args.low_memory,
  )
  if described and model.model_id != described["model"]:
    logging.warning("%s is another model than the one of %s", checkpoint, args["from"])
  model.expander = own_expander or model.expander
  jobs, expanded = _expanded(args, described, model, jobs)
  paths = [out]
  if len(jobs) > 1:
    paths = [out.with_name(f"{out.stem}-{i:03d}{out.suffix}") for i in range(len(jobs))]
  source = {"checkpoint": str(checkpoint), "loras": loras}
  source |= {"loras_low": loras_low} if loras_low else {}
  source |= {"weights": weights} if weights else {}
  files.write_jobs(model, jobs, paths, options, source, args.tile, expanded)
  if args.sheet:
    prompts = [job.prompt for job in jobs]
    contact_sheet.write(args.sheet, [reader.read(path) for path in paths], prompts)
    logging.info("%s: contact sheet", args.sheet)


if __name__ == "__main__":
  cli.define_flags()
  _define_flags()
  cli.run_app(_main)
