"""A plan as people read it: lines of a table, a picture, and what to change."""

import re

from PIL import Image, ImageDraw, ImageFont

_COLOURS = ("#2f6db5", "#d98032", "#8a8a8a", "#b5413a", "#4a9a5b")
_PARTS = ("matmul", "attention", "other", "communication")
_GB, _TF = 1e9, 1e12


def line(values: dict) -> str:
  """'a=1 b=2'."""
  return " ".join(f"{key}={value}" for key, value in values.items())


def table(made: dict) -> list[str]:
  """Lines for the console."""
  load = made["load"]
  lines = [
    f"{made['slices']} x {made['topology']} = {made['chips']} chips, mesh "
    f"{line(made['mesh'])}, remat {made['remat']}",
    f"batch: {made['rows']} rows of {made['tokens']} tokens; {load['source']}: "
    f"{100 * load['fill']:.1f} % full, {load['clips']:.2f} clips a row",
    f"attention's blocks hold {load['self_share'] / load['own_share']:.3f} times the "
    "pairs inside of clips, where the kernel skips the others",
    f"training compiles {made['executables']} programs (init, update, evaluate)",
  ]
  for program in made["programs"]:
    lines += _program(program)
  lines += _speed(made)
  lines.append(f"assumed: {made['assumptions']}")
  if made["remat"] == "offload":
    lines.append("copies to the host's memory and back are not in these times")
  return lines + [f"advice: {text}" for text in made["advice"]]


def _program(made):
  share = 100 * made["peak"] / made["hbm"]
  verdict = "fits" if made["fits"] else "DOES NOT FIT"
  lines = [
    f"{made['name']}: {verdict}: peak {made['peak'] / _GB:.2f} GB of "
    f"{made['hbm'] / _GB:.1f} GB a chip ({share:.0f} %)"
  ]
  if made["arguments"]:
    lines[0] += (
      f", arguments {made['arguments'] / _GB:.2f}, temporaries "
      f"{made['temporaries'] / _GB:.2f}"
    )
  if "collectives" not in made:
    return lines
  units = made["attention_units"]
  shown = (
    f" ({units:.2f} units of all pairs, before blocks are skipped)" if units else ""
  )
  flops = f"  FLOPs a chip: matmul {made['matmul_flops'] / _TF:.1f} TF"
  if made["attention_flops"]:  # of GPUs' kernels they are not known
    flops += f", attention kernels {made['attention_flops'] / _TF:.1f} TF{shown}"
  lines.append(flops)
  kernels = {name: f"{n:g}" for name, n in made["kernels"].items()}
  lines.append(f"  kernel launches: {line(kernels) or 'none'}")
  for kind, traffic in made["collectives"].items():
    hidden = 100 * traffic["hidden"] / traffic["wire"] if traffic["wire"] else 0.0
    groups = ",".join(str(size) for size in traffic["groups"])
    groups = f"in groups of {groups}" if groups else "between slices"
    lines.append(
      f"  {kind}: {traffic['runs']:g} runs {groups}, "
      f"{traffic['wire'] / _GB:.2f} GB sent a chip, {hidden:.0f} % beside computation"
    )
  if "seconds" not in made:
    return [*lines, f"  compiled in {made['compile_seconds']:.0f} s"]
  parts = [f"{name} {made['seconds'][name]:.3g}" for name in _PARTS]
  lines.append(
    f"  estimated {made['seconds']['total']:.4g} s: {', '.join(parts)}; hidden "
    f"communication {made['seconds']['hidden']:.3g}; compiled in "
    f"{made['compile_seconds']:.0f} s"
  )
  return lines


def _speed(made):
  speed, run = made.get("speed"), made.get("run")
  if not speed:
    return []
  fastest = speed.get("fastest_seconds")
  shown = f"{fastest:.4g} to " if fastest else ""
  lines = [
    f"estimated step: {shown}{speed['step_seconds']:.4g} s, MFU {speed['mfu']:.1%} "
    f"(model {made['model_flops'] / made['chips'] / _TF:.1f} TF a chip), "
    f"{speed['tokens_per_day']:.4g} tokens and {speed['clips_per_day']:.4g} clips a day"
  ]
  if "matmul_over_analytic" in speed:
    lines.append(
      f"matmul FLOPs are {speed['matmul_over_analytic']:.4f} of "
      f"{speed['analytic_matmul_flops'] / _TF:.1f} TF by analysis"
    )
  if run:
    price = f", cost {run['cost']:.4g}" if run["cost"] else ""
    lines.append(
      f"{run['steps']} steps: {run['hours']:.4g} h, {run['chip_hours']:.4g} chip-hours"
      f"{price}"
    )
  return lines


def advice(made: dict, recipe) -> list[str]:
  """What to change, the most likely first; nothing where all is well."""
  found = []
  for program in made["programs"]:
    if program["name"].startswith("train step"):
      found += _train_advice(program, made, recipe)
    elif not program["fits"] and program["name"] == "vae":
      found.append(
        "VAE encode does not fit: a smaller config.encode.batch_size (now "
        f"{recipe.encode.batch_size}), or more config.encode.devices_per_clip (now "
        f"{recipe.encode.devices_per_clip})"
      )
    elif not program["fits"]:
      found.append("sampling does not fit: fewer config.sample.rows")
  return found


def _train_advice(program, made, recipe):
  stage, mesh, found = recipe.dit, made["mesh"], []
  ways = mesh["data"] * mesh["fsdp"]
  if not program["fits"]:
    state_share = program["arguments"] / program["hbm"]
    if state_share > 0.5 or mesh["data"] > made["slices"]:
      found.append(
        f"arguments (the train state) take {100 * state_share:.0f} % of a chip: shard "
        f"them over more chips (config.mesh.fsdp, now {mesh['fsdp']}), or take a "
        "larger topology"
      )
    if stage.model.remat != "full":
      found.append(
        f"config.dit.model.remat='full' keeps least (now {stage.model.remat!r})"
      )
    parts = stage.train.grad_accumulation
    if stage.rows // parts > ways:
      found.append(
        f"config.dit.train.grad_accumulation={parts * 2} halves the rows in flight "
        f"(now {stage.rows // parts // ways} a shard)"
      )
    else:
      found.append(
        f"config.mesh.context={mesh['context'] * 2} halves the tokens of a chip (now "
        f"{stage.tokens // mesh['context']} of a row)"
      )
    found.append("--search tries meshes, remat and row lengths")
    return found
  if "seconds" not in program:
    return found
  if not program["kernels"]:
    found.append(
      "attention is plain matmuls in this program, no kernel: its memory and time are "
      "those of all pairs"
    )
  seconds = program["seconds"]
  if seconds["communication"] > 0.15 * seconds["total"]:
    found.append(
      f"{100 * seconds['communication'] / seconds['total']:.0f} % of the step waits "
      "for collectives: less config.mesh.context or tensor, or longer batches"
    )
  if stage.model.remat == "full" and program["peak"] < 0.6 * program["hbm"]:
    found.append("there is room for config.dit.model.remat='attention_mlp_saved'")
  if made["load"]["fill"] < 0.9:
    found.append(
      f"rows are {100 * made['load']['fill']:.0f} % full: config.dit.tokens, now "
      f"{stage.tokens}, should hold a whole number of clips"
    )
  return found


# --- search


def trial_rank(trial: dict):
  """Key to sort trials by: those that fit, the fastest first."""
  speed = trial.get("result", {}).get("speed") or {}
  return (not trial_fits(trial), -speed.get("tokens_per_day", 0.0), "error" in trial)


def trial_fits(trial: dict) -> bool:
  """Whether the trial came to an end and its program fits."""
  return "result" in trial and trial["result"]["programs"][0]["fits"]


def error_line(text: str) -> str:
  """The line of a traceback that names the error."""
  lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
  named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
  return (named or lines or ["no message"])[-1]


def trial_line(trial: dict) -> str:
  """One trial of a search."""
  if "error" in trial:
    return f"{line(trial['overrides'])}: {trial['error']}"
  result = trial["result"]
  program, speed = result["programs"][0], result.get("speed")
  text = f"peak {program['peak'] / _GB:.1f} GB"
  if not program["fits"]:
    return f"{line(trial['overrides'])}: does not fit, {text}"
  return (
    f"{line(trial['overrides'])}: {speed['step_seconds']:.4g} s, MFU "
    f"{speed['mfu']:.1%}, {speed['tokens_per_day']:.4g} tokens a day, {text}"
  )


def ranking(trials: list[dict]) -> list[str]:
  """Lines of a search's result, the best first."""
  return [f"{i + 1}. {trial_line(trial)}" for i, trial in enumerate(trials)]


# --- picture


def picture(made: dict) -> Image.Image:
  """Bars of each program's memory and of the seconds of its parts."""
  font = ImageFont.load_default(16)
  bars = []
  for program in made["programs"]:
    name = program["name"]
    total = max(program["hbm"], program["peak"])
    parts = {
      "arguments": program["arguments"],
      "temporaries": max(program["peak"] - program["arguments"], 0.0),
      "free": max(program["hbm"] - program["peak"], 0.0),
    }
    label = f"{name}: peak {program['peak'] / _GB:.1f} of {program['hbm'] / _GB:.1f} GB"
    label += "" if program["fits"] else " - DOES NOT FIT"
    bars.append((label, parts, total, ("#2f6db5", "#d98032", "#e4e4e4"), "GB", _GB))
    if "seconds" in program:
      seconds = {part: program["seconds"][part] for part in _PARTS}
      label = f"{name}: estimated {program['seconds']['total']:.3g} s"
      bars.append((label, seconds, program["seconds"]["total"], _COLOURS, "s", 1.0))
  image = Image.new("RGB", (900, 60 + 100 * len(bars)), "white")
  draw = ImageDraw.Draw(image)
  mesh = line({k: v for k, v in made["mesh"].items() if v > 1})
  title = f"{made['slices']} x {made['topology']}, {mesh}, remat {made['remat']}"
  if made.get("speed"):
    title += f": MFU {made['speed']['mfu']:.1%}"
  draw.text((20, 16), title, "black", font)
  for i, (label, parts, total, colours, unit, scale) in enumerate(bars):
    left, top = 20, 60 + 100 * i
    draw.text((left, top), label, "black", font)
    legend = left
    for (name, value), colour in zip(parts.items(), colours, strict=False):
      width = round(860 * value / total) if total else 0
      if width:
        draw.rectangle((left, top + 24, left + width - 1, top + 50), colour)
      left += width
      text = f"{name} {value / scale:.3g} {unit}"
      draw.rectangle((legend, top + 61, legend + 10, top + 71), colour)
      draw.text((legend + 15, top + 56), text, "black", font)
      legend += 35 + int(draw.textlength(text, font))
  return image
