"""A plan, and the result of a search for one, as lines for the console."""

import re

from sora_jax.runtime.text import table_lines

PARTS = ("matmul", "attention", "other", "communication")
GB, TF = 1e9, 1e12


def line(values: dict) -> str:
  """Returns the values as 'a=1 b=2'."""
  return " ".join(f"{key}={value}" for key, value in values.items())


def lines_of(planned: dict) -> list[str]:
  """Returns all that `plan` found out, in lines."""
  load = planned["load"]
  lines = [
    f"{planned['slices']} x {planned['topology']} = {planned['chips']} chips, mesh "
    f"{line(planned['mesh'])}, remat {planned['remat']}",
    f"batch: {planned['rows']} rows of {planned['tokens']} tokens; {load['source']}: "
    f"{100 * load['fill']:.1f} % full, {load['clips']:.2f} clips a row",
    f"attention's blocks hold {load['self_share'] / load['own_share']:.3f} times the "
    "pairs inside of clips, where the kernel skips the others",
    f"training compiles {planned['executables']} programs (init, update, evaluate)",
  ]
  for program in planned["programs"]:
    lines += _program(program)
  lines += _speed(planned)
  lines.append(f"assumed: {planned['assumptions']}")
  if planned["remat"] == "offload":
    lines.append("copies to the host's memory and back are not in these times")
  return lines + [f"advice: {text}" for text in planned["advice"]]


def _program(program: dict) -> list[str]:
  """Returns the memory, the work and the seconds of one program."""
  lines = [_memory(program)]
  if "collectives" not in program:
    return lines  # only the compiler's figures of memory are known
  lines.append(_flops(program))
  kernels = {name: f"{n:g}" for name, n in program["kernels"].items()}
  lines.append(f"  kernel launches: {line(kernels) or 'none'}")
  if program["collectives"]:
    lines += [f"  {text}" for text in _collectives(program["collectives"])]
  compiled = f"compiled in {program['compile_seconds']:.0f} s"
  if "seconds" not in program:
    return [*lines, f"  {compiled}"]
  seconds = program["seconds"]
  parts = ", ".join(f"{name} {seconds[name]:.3g}" for name in PARTS)
  lines.append(
    f"  estimated {seconds['total']:.4g} s: {parts}; hidden communication "
    f"{seconds['hidden']:.3g}; {compiled}"
  )
  return lines


def _memory(program):
  share = 100 * program["peak"] / program["hbm"]
  verdict = "fits" if program["fits"] else "DOES NOT FIT"
  text = (
    f"{program['name']}: {verdict}: peak {program['peak'] / GB:.2f} GB of "
    f"{program['hbm'] / GB:.1f} GB a chip ({share:.0f} %)"
  )
  if program["arguments"]:
    text += (
      f", arguments {program['arguments'] / GB:.2f}, temporaries "
      f"{program['temporaries'] / GB:.2f}"
    )
  return text


def _flops(program):
  text = f"  FLOPs a chip: matmul {program['matmul_flops'] / TF:.1f} TF"
  if program["attention_flops"]:  # those of GPUs' kernels are not known
    text += f", attention kernels {program['attention_flops'] / TF:.1f} TF"
    if units := program["attention_units"]:
      text += f" ({units:.2f} units of all pairs, before blocks are skipped)"
  return text


def _collectives(collectives: dict) -> list[str]:
  """Returns a table of what chips send each other, one kind a row."""
  rows = []
  for kind, traffic in collectives.items():
    hidden = 100 * traffic["hidden"] / traffic["wire"] if traffic["wire"] else 0.0
    groups = ",".join(str(size) for size in traffic["groups"]) or "between slices"
    sent = f"{traffic['wire'] / GB:.2f}"
    rows.append([kind, f"{traffic['runs']:g}", groups, sent, f"{hidden:.0f}"])
  head = ["collective", "runs", "group sizes", "GB sent a chip", "% beside computation"]
  return table_lines(head, rows)


def _speed(planned):
  speed, run = planned.get("speed"), planned.get("run")
  if not speed:
    return []
  fastest = speed.get("fastest_seconds")
  shown = f"{fastest:.4g} to " if fastest else ""
  lines = [
    f"estimated step: {shown}{speed['step_seconds']:.4g} s, MFU {speed['mfu']:.1%} "
    f"(model {planned['model_flops'] / planned['chips'] / TF:.1f} TF a chip), "
    f"{speed['tokens_per_day']:.4g} tokens and {speed['clips_per_day']:.4g} clips a day"
  ]
  if "matmul_over_analytic" in speed:
    lines.append(
      f"matmul FLOPs are {speed['matmul_over_analytic']:.4f} of "
      f"{speed['analytic_matmul_flops'] / TF:.1f} TF by analysis"
    )
  if run:
    price = f", cost {run['cost']:.4g}" if run["cost"] else ""
    lines.append(
      f"{run['steps']} steps: {run['hours']:.4g} h, {run['chip_hours']:.4g} chip-hours"
      f"{price}"
    )
  return lines


def trial_rank(trial: dict):
  """Returns the key to sort trials by: those that fit first, the fastest of them."""
  speed = trial.get("result", {}).get("speed") or {}
  return (not trial_fits(trial), -speed.get("tokens_per_day", 0.0), "error" in trial)


def trial_fits(trial: dict) -> bool:
  """Returns whether the trial came to an end and its program fits."""
  return "result" in trial and trial["result"]["programs"][0]["fits"]


def error_line(text: str) -> str:
  """Returns the line of a traceback that names the error."""
  lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
  named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
  return (named or lines or ["no message"])[-1]


def trial_line(trial: dict) -> str:
  """Returns one trial of a search in a line."""
  text = line(trial["overrides"])
  if "error" in trial:
    return f"{text}: {trial['error']}"
  program, speed = trial["result"]["programs"][0], trial["result"].get("speed")
  peak = f"peak {program['peak'] / GB:.1f} GB"
  if not program["fits"]:
    return f"{text}: does not fit, {peak}"
  return (
    f"{text}: {speed['step_seconds']:.4g} s, MFU {speed['mfu']:.1%}, "
    f"{speed['tokens_per_day']:.4g} tokens a day, {peak}"
  )


def ranking(trials: list[dict]) -> list[str]:
  """Returns the table of a search, best first, and why others came to no end.

  trials: in the order of `trial_rank`.
  """
  rows, failed = [], []
  for i, trial in enumerate(trials):
    if "error" in trial:
      failed.append(f"{i + 1}. {trial_line(trial)}")
      continue
    program, speed = trial["result"]["programs"][0], trial["result"].get("speed")
    cells = ["-"] * 3
    if program["fits"]:
      cells = [f"{speed['step_seconds']:.4g}", f"{speed['mfu']:.1%}"]
      cells.append(f"{speed['tokens_per_day']:.4g}")
    peak, fits = f"{program['peak'] / GB:.1f}", "yes" if program["fits"] else "NO"
    rows.append([f"{i + 1}. {line(trial['overrides'])}", *cells, peak, fits])
  head = ["trial", "step s", "MFU", "tokens a day", "peak GB", "fits"]
  return [*(table_lines(head, rows) if rows else []), *failed]
