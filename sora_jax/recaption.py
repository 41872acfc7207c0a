"""Writes new captions of all clips of a manifest into it, beside the clips' own.

  python -m sora_jax.recaption --workdir=runs/mine --captioner=runs/captioner

  OPENAI_API_KEY=... python -m sora_jax.recaption --workdir=runs/mine \
    --endpoint=https://api.openai.com/v1 --model=NAME --price_in=0.4 --price_out=1.6

--captioner is a run that has trained one; --endpoint is any server with OpenAI's chat
API and a model that sees images (pip install 'sora_jax[language]'). A run is captioned
after `prepare` and before `encode`, whose records hold the captions. What was answered
is kept in recaption/ beside the manifest: the same command may be stopped and typed
again, and asks for nothing twice. Several processes share the clips.
"""

import pathlib

import jax
from absl import flags, logging

from sora_jax.data import text_file
from sora_jax.language import chat, recaptioning, styles, writers
from sora_jax.models.meta import CaptionerMeta
from sora_jax.run import cli
from sora_jax.runtime import checkpoint, hosts, sharding

METHODS = ("greedy", "beam", "nucleus")


def _define_flags():
  flags.DEFINE_string("manifest", None, "A manifest.jsonl that `prepare` has written.")
  flags.DEFINE_string("workdir", None, "Folder of a run, in place of --manifest.")
  flags.DEFINE_string("captioner", None, "Folder of a run with a trained captioner.")
  flags.DEFINE_enum("method", "greedy", METHODS, "How the captioner chooses words.")
  flags.DEFINE_integer("seed", 0, "Of the captioner's method nucleus.")
  flags.DEFINE_integer("batch_size", 8, "Clips that the captioner sees at once.", 1)
  flags.DEFINE_string("endpoint", None, "Address of a chat API, in place of it.")
  flags.DEFINE_string("model", "", "Name of the endpoint's model.")
  flags.DEFINE_list(
    "styles", None, "Of captions; each clip gets one of each. Else the usual ones."
  )
  flags.DEFINE_multi_string("prompt", [], "STYLE:TEXT that asks the endpoint for it.")
  flags.DEFINE_multi_string("prompt_file", [], "STYLE:FILE with such a text.")
  flags.DEFINE_integer("frames", 8, "Frames of a clip that the endpoint sees.", 1)
  flags.DEFINE_integer("max_side", 512, "Pixels a side of them, at most.", 16)
  flags.DEFINE_integer("max_tokens", 512, "Longest answer of the endpoint.", 1)
  flags.DEFINE_integer("max_characters", 2000, "Longest caption.", 1)
  flags.DEFINE_float("temperature", 0.0, "Of the endpoint; below 0 its own.")
  flags.DEFINE_integer("concurrency", 8, "Questions that are open at once.", 1)
  flags.DEFINE_float("requests_per_minute", 0.0, "At most; 0 = no limit.", 0.0)
  flags.DEFINE_float("timeout", 60.0, "Seconds to wait for an answer.")
  flags.DEFINE_integer("retries", 6, "Times that a failed question is put again.", 0)
  flags.DEFINE_float("price_in", 0.0, "Dollars for a million tokens of questions.", 0.0)
  flags.DEFINE_float("price_out", 0.0, "Dollars for a million tokens of answers.", 0.0)
  flags.DEFINE_bool("replace", False, "Leave earlier synthetic captions out.")
  cli.define_host_flags()


def _manifest(args) -> pathlib.Path:
  if bool(args.manifest) == bool(args.workdir):
    raise ValueError("one of --manifest and --workdir is needed, and not both")
  path = pathlib.Path(args.manifest or f"{args.workdir}/data/manifest.jsonl")
  if not path.is_file():  # which is better known before a model is loaded
    raise ValueError(f"{path}: no such manifest; `prepare` writes one")
  return path


def _prompts(args) -> dict[str, str]:
  """Style -> prompt, of both flags."""
  found: dict[str, str] = {}
  for name, values in (("prompt", args.prompt), ("prompt_file", args.prompt_file)):
    for value in values:
      style, _, text = value.partition(":")
      if not style or not text:
        raise ValueError(f"--{name}={value} is not STYLE:{name[7:].upper() or 'TEXT'}")
      if name == "prompt_file":
        text = "\n".join(text_file.read_lines(text, "prompts"))
      if style in found:
        raise ValueError(f"--{name}={value}: style {style!r} has a prompt already")
      found[style] = text
  return found


def _writer(args) -> tuple[writers.Writer, list[styles.Style]]:
  if bool(args.captioner) == bool(args.endpoint):
    raise ValueError("one of --captioner and --endpoint is needed, and not both")
  prompts = _prompts(args)
  if args.endpoint:
    asked = styles.prompted(args.styles, prompts)
    endpoint = chat.Endpoint(
      args.endpoint,
      args.model,
      timeout=args.timeout,
      retries=args.retries,
      requests_per_minute=args.requests_per_minute,
      temperature=args.temperature,
      max_tokens=args.max_tokens,
    )
    vision = writers.Vision(
      chat.Chat(endpoint),
      args.frames,
      args.max_side,
      args.max_characters,
      args.concurrency,
    )
    return vision, asked
  if prompts:
    raise ValueError("--prompt is for --endpoint: a captioner of ours takes none")
  model = pathlib.Path(args.captioner) / "captioner" / "model"
  meta = checkpoint.load_meta(model)
  asked = styles.trained(args.styles, CaptionerMeta.from_json(meta, model).styles)
  return _trained(args, f"captioner-{checkpoint.digest(meta)}"), asked


def _trained(args, identity: str) -> writers.Trained:
  from sora_jax.encoders.captioner import Captioner  # takes JAX's devices

  captioner = Captioner.from_checkpoint(args.captioner)
  return writers.Trained(captioner, identity, args.method, args.seed, args.batch_size)


def _log(summary: recaptioning.Summary, args, manifest) -> None:
  logging.info(
    "%s: %d captions; %d are missing, see %s",
    manifest,
    summary.captions,
    summary.failed,
    manifest.parent / recaptioning.FOLDER / "failed.jsonl",
  )
  if any(summary.tokens):
    asked, answered = summary.tokens
    dollars = (asked * args.price_in + answered * args.price_out) / 1e6
    cost = f", {dollars:.2f} dollars" if dollars else ""
    logging.info("%d tokens of questions, %d of answers%s", asked, answered, cost)


def _main(argv):
  cli.start_logging()
  args = flags.FLAGS
  if len(argv) > 1:
    raise ValueError(f"unexpected arguments {argv[1:]}")
  manifest = _manifest(args)
  share = recaptioning.Share(args.process or 0, args.processes or 1)
  if (args.process is None) != (args.processes is None) and not args.distributed:
    raise ValueError("--process and --processes are needed together")
  if args.distributed:
    hosts.start(args.coordinator, args.processes, args.process)
    share = recaptioning.Share(jax.process_index(), jax.process_count())
  elif share.process >= share.processes:
    raise ValueError(f"--process={share.process} is not below --processes={share[1]}")
  writer, asked = _writer(args)
  recaptioning.run(manifest, writer, asked, share)
  if args.distributed:
    sharding.sync("recaption")
    if share.process:
      return
  summary = recaptioning.merge(manifest, writer, asked, share.processes, args.replace)
  if summary is None:
    logging.info("done; the last of %d processes writes the manifest", share.processes)
    return
  _log(summary, args, manifest)


if __name__ == "__main__":
  _define_flags()
  cli.run_app(_main)
