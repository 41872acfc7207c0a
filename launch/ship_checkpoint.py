"""A finished run to one small folder that samples anywhere: a checkpoint to ship.

  python launch/ship_checkpoint.py --workdir=runs/quickstart \
    --out=sora_jax/shipped/quickstart --hardware="2 CPU cores" \
    --made_by="python -m sora_jax.main --config=configs/quickstart.py"

The folder has the run's EMA params in bfloat16 (safetensors), its tokenizer, what
model.json says of each network, sample.json with the options and the size of the
recipe's samples, and a model card with the figures of the stage "evaluate". It is a
checkpoint like any run's: --checkpoint=FOLDER. What is in sora_jax/shipped/ goes with
the package, and then its name is enough.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import flags, logging

from sora_jax.data.clips import read_manifest
from sora_jax.models.meta import DiTMeta, ExpanderMeta, VAEMeta
from sora_jax.run import cli, stage_file, stages
from sora_jax.run import recipe as recipes
from sora_jax.runtime import checkpoint, files, portable
from sora_jax.runtime.text import format_seconds
from sora_jax.sampling import defaults as sample_defaults
from sora_jax.sampling.pipeline import Sampler

LIMIT_MB = 16.0
_FROM = ("vae", "dit", "sample", "evaluate")  # stages that must be there
_PROMPT = "a red circle moves right"
_TOKENIZER = "tokenizer.model"


class Origin(NamedTuple):
  """What a run's folder does not know of itself: the command and the machine."""

  command: str
  hardware: str


def ship(workdir, out, origin: Origin, limit_mb: float = LIMIT_MB) -> pathlib.Path:
  """Writes the folder `out`, whole or not at all; returns it.

  Params are rounded to bfloat16, so they get new ids.

  Raises:
    ValueError: if `out` is there already; if the run is not finished, its figures are
      of other models than it has now, or its DiT reads a frozen text encoder; if the
      folder would be larger than limit_mb.
  """
  workdir, out = pathlib.Path(workdir), pathlib.Path(out)
  if out.exists():
    raise ValueError(
      f"{out} is there already: delete it first, or choose another --out"
    )
  _check(workdir)
  with _replacing(out) as folder:
    _write_models(workdir, folder)
    usual = sample_defaults.read(workdir)
    files.write_json(folder / sample_defaults.NAME, usual.to_json())
    files.write_text(folder / "README.md", card(workdir, folder, out.name, origin))
    Sampler.from_checkpoint(folder)  # raises unless all of it is there and fits
    size = folder_bytes(folder)
    if size > limit_mb * 1e6:
      raise ValueError(
        f"the checkpoint has {size / 1e6:.1f} MB, more than {limit_mb:g}: of them "
        + ", ".join(
          f"{path.relative_to(folder)} {path.stat().st_size / 1e6:.1f}"
          for path in sorted(folder.rglob("*.safetensors"))
        )
      )
  logging.info("%s: %.1f MB", out, size / 1e6)
  return out


def folder_bytes(folder: pathlib.Path) -> int:
  """Bytes of all files in a folder."""
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _check(workdir: pathlib.Path) -> None:
  """Raises ValueError unless the run is finished, and its figures are of its models."""
  for name in _FROM:
    if not stage_file.load(workdir / name).get("complete"):
      raise ValueError(
        f"{workdir}: stage {name} is not complete; run it first (python -m "
        f"sora_jax.{stages.STAGES[name].module})"
      )
  for name in ("vae", "dit"):
    made_from = stage_file.load(workdir / "evaluate")["inputs"].get(name)
    if made_from != stages.fingerprint(name, workdir):
      raise ValueError(
        f"{workdir}/evaluate/results.json is of another {name} than the one that is "
        "there now; run python -m sora_jax.evaluate again"
      )


@contextlib.contextmanager
def _replacing(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder that becomes `out` at the end, and is gone after an error."""
  partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
  try:
    partial.mkdir(parents=True)
    yield partial
    partial.rename(out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _write_models(workdir, folder) -> None:
  place = pathlib.Path("vae", "model")
  params, values = checkpoint.load_model(workdir / place)
  params = portable.rounded(params)
  vae = VAEMeta.from_json(values, workdir / place)
  vae = dataclasses.replace(vae, id=checkpoint.fingerprint(params))
  checkpoint.save_portable(folder / place, params, vae.to_json())

  place = pathlib.Path("dit", "model")
  params, values = checkpoint.load_model(workdir / place)
  params = portable.rounded(params)
  dit = DiTMeta.from_json(values, workdir / place)
  if dit.frozen_text:
    raise ValueError(
      f"{workdir}: its DiT reads the features of a frozen text encoder, which is too "
      "large to ship; a text encoder that was trained with the DiT goes with it"
    )
  dit = dataclasses.replace(
    dit,
    vae=vae.id,
    id=checkpoint.fingerprint(params),
    # Where that was on this machine is nobody's concern.
    init_from=pathlib.Path(dit.init_from).name,
  )
  checkpoint.save_portable(folder / place, params, dit.to_json())
  shutil.copyfile(workdir / place / _TOKENIZER, folder / place / _TOKENIZER)
  if stage_file.load(workdir / "expander").get("complete"):
    write_expander(workdir, folder)


def write_expander(workdir: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes the expander of a run, which may be another than that of the DiT."""
  place = pathlib.Path("expander", "model")
  params, values = checkpoint.load_model(workdir / place)
  params = portable.rounded(params)
  expander = ExpanderMeta.from_json(values, workdir / place)
  weights = f"expander-{checkpoint.fingerprint(params)}"
  expander = dataclasses.replace(expander, id=weights)
  checkpoint.save_portable(folder / place, params, expander.to_json())
  shutil.copyfile(workdir / place / _TOKENIZER, folder / place / _TOKENIZER)


# --- the model card


def card(workdir: pathlib.Path, folder: pathlib.Path, name: str, origin: Origin) -> str:
  """The README.md of a shipped checkpoint, in Markdown.

  Args:
    workdir: of the run. folder: that holds the shipped models already.
    name: of the checkpoint.
    origin: command and hardware.
  """
  results = json.loads((workdir / "evaluate" / "results.json").read_text())
  labels = ["VAE", "DiT", *(["Expander"] if (folder / "expander").is_dir() else [])]
  facts = {
    "Data": _data(workdir),
    **{label: _network(workdir, folder, label.lower()) for label in labels},
    "Hardware": origin.hardware,
    "Params": "of the exponential moving average, bfloat16; float32 once loaded",
    "Sampled with": _sampling(sample_defaults.read(folder)),
  }
  section = stage_file.load(workdir / "sample")["config"]["sample"]
  if negative := section.get("negative_prompt"):
    facts["Negative prompt"] = f"{negative} (of the figures; give it, if you want it)"
  return "\n".join([
    f"# {name}",
    "",
    "A small text-to-video model of sora_jax. If it came with the package its name is",
    "enough, else give the path of this folder:",
    "",
    "```",
    f'python -m sora_jax.sample --checkpoint={name} --prompt="{_PROMPT}" --out=x.mp4',
    "```",
    "",
    *_table(["", ""], facts.items()),
    "",
    "## Figures",
    "",
    "By `python -m sora_jax.evaluate` on held-out clips, with the run's float32 params",
    "before they were rounded.",
    *_figures(results),
    "",
    "## Make it again",
    "",
    "```",
    origin.command,
    "```",
    "",
    "and `launch/ship_checkpoint.py` with the folder of that run.",
    "",
  ])  # fmt: skip


def _data(workdir) -> str:
  config = stage_file.load(workdir / "data").get("config", {}).get("data", {})
  data = recipes.Data(**{"workers": 0, **config})
  source = f"the folder {pathlib.Path(data.source).name}"
  if data.source == "shapes":
    source = f"generated clips of moving shapes, world {data.world!r}"
  clips = read_manifest(workdir / "data" / "manifest.jsonl")
  heldout = sum(clip.split == "heldout" for clip in clips)
  return (
    f"{source}: {len(clips) - heldout} to train with, {heldout} held out, of at most "
    f"{data.max_pixels} pixels and {data.max_frames} frames"
  )


def _network(workdir, folder, name) -> str:
  params, meta = checkpoint.load_model(folder / name / "model")
  count = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
  text = f"{count / 1e6:.2f} million params, {meta['steps']} steps"
  if seconds := _train_seconds(workdir / name / "metrics.jsonl"):
    text += f", {format_seconds(seconds)} of training steps"
  return text


def _train_seconds(path) -> float:
  """Seconds that the steps took, without compilation, evaluation and checkpoints."""
  if not path.is_file():
    return 0.0
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  # After a crash some steps are there twice: the last ones count.
  pace = {row["step"]: row["seconds_per_step"] for row in rows
          if "seconds_per_step" in row}  # fmt: skip
  return sum(
    (step - before) * pace[step]
    for before, step in zip([0, *sorted(pace)], sorted(pace), strict=False)
  )


def _sampling(usual: sample_defaults.Defaults) -> str:
  options, (width, height) = usual.options, usual.size
  return (
    f"{options.steps} steps of {options.method}, shift {options.shift:g}, guidance "
    f"{options.guidance_scale:g}; {width}x{height}, {usual.frames} frames, "
    f"{usual.fps:g} fps"
  )


# Columns of the attributes; low and high are the 95 % interval of the samples.
_SHARES = ("samples", "low", "high", "chance", "ceiling", "real")


def _figures(results: dict) -> list[str]:
  """Markdown tables of results.json: the numbers of each section, and attributes."""
  lines = []
  for section, values in results.items():
    numbers = {k: f"{v:.4g}" for k, v in values.items() if isinstance(v, int | float)}
    if numbers:
      lines += ["", *_table([section, ""], numbers.items())]
    rows = {k: v for k, v in values.items() if isinstance(v, dict)}
    if section == "attributes" and rows:
      lines += ["", *_table([section, *_SHARES, "n"], (
        [name, *(_percent(row[share]) for share in _SHARES), str(row["n"])]
        for name, row in rows.items()
      ))]  # fmt: skip
  return lines


def _percent(share: float | None) -> str:
  return "-" if share is None else f"{share:.1%}"


def _table(head, rows) -> list[str]:
  lines = [head, ["---"] * len(head), *rows]
  return [f"| {' | '.join(cells)} |" for cells in lines]


# --- the command


def _define_flags():
  flags.DEFINE_string("workdir", None, "Folder of the finished run.", required=True)
  flags.DEFINE_string("out", None, "Folder to write.", required=True)
  flags.DEFINE_string("made_by", None, "Command that made the run.", required=True)
  flags.DEFINE_string("hardware", None, "That it was made on.", required=True)
  flags.DEFINE_float("limit_mb", LIMIT_MB, "Most megabytes of the folder.", 0.0)


def main(argv):
  args = flags.FLAGS
  if len(argv) > 1:
    raise ValueError(f"unexpected arguments {argv[1:]}")
  cli.start_logging()
  jax.config.update("jax_platforms", "cpu")  # files in, files out
  origin = Origin(args.made_by, args.hardware)
  ship(args.workdir, args.out, origin, args.limit_mb)


if __name__ == "__main__":
  _define_flags()
  cli.run_app(main)
