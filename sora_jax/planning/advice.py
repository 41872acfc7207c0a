"""What to change in a recipe, by what a plan found out about it."""


def advice(planned: dict, recipe) -> list[str]:
  """Returns what to change, the most likely first; nothing where all is well."""
  found = []
  for program in planned["programs"]:
    if program["name"].startswith("train step"):
      train = _of_speed if program["fits"] else _of_memory
      found += train(program, planned, recipe.dit)
    elif not program["fits"] and program["name"] == "vae":
      found.append(
        "VAE encode does not fit: a smaller config.encode.batch_size (now "
        f"{recipe.encode.batch_size}), or more config.encode.devices_per_clip (now "
        f"{recipe.encode.devices_per_clip})"
      )
    elif not program["fits"]:
      found.append("sampling does not fit: fewer config.sample.rows")
  return found


def _of_memory(program, planned, stage):
  """Returns what makes a train step smaller that does not fit."""
  mesh, found = planned["mesh"], []
  state_share = program["arguments"] / program["hbm"]
  # Along `data` each slice has the whole state; within one it might be shared.
  if state_share > 0.5 or mesh["data"] > planned["slices"]:
    found.append(
      f"arguments (the train state) take {100 * state_share:.0f} % of a chip: shard "
      f"them over more chips (config.mesh.fsdp, now {mesh['fsdp']}), or take a "
      "larger topology"
    )
  if stage.model.remat != "full":
    found.append(
      f"config.dit.model.remat='full' keeps least (now {stage.model.remat!r})"
    )
  batch_shards = mesh["data"] * mesh["fsdp"]
  parts = stage.train.grad_accumulation
  if stage.rows // parts > batch_shards:
    found.append(
      f"config.dit.train.grad_accumulation={parts * 2} halves the rows in flight "
      f"(now {stage.rows // parts // batch_shards} a shard)"
    )
  else:
    found.append(
      f"config.mesh.context={mesh['context'] * 2} halves the tokens of a chip (now "
      f"{stage.tokens // mesh['context']} of a row)"
    )
  found.append("--search tries meshes, remat and row lengths")
  return found


def _of_speed(program, planned, stage):
  """Returns what makes a train step faster that fits."""
  if "seconds" not in program:
    return []
  found, seconds = [], program["seconds"]
  if not program["kernels"]:
    found.append(
      "attention is plain matmuls in this program, no kernel: its memory and time are "
      "those of all pairs"
    )
  if seconds["communication"] > 0.15 * seconds["total"]:
    found.append(
      f"{100 * seconds['communication'] / seconds['total']:.0f} % of the step waits "
      "for collectives: less config.mesh.context or tensor, or longer batches"
    )
  if stage.model.remat == "full" and program["peak"] < 0.6 * program["hbm"]:
    found.append("there is room for config.dit.model.remat='attention_mlp_saved'")
  if planned["load"]["fill"] < 0.9:
    found.append(
      f"rows are {100 * planned['load']['fill']:.0f} % full: config.dit.tokens, now "
      f"{stage.tokens}, should hold a whole number of clips"
    )
  return found
