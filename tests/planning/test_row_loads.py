"""Work of attention kernels, and of what rows hold, by hand."""

import dataclasses

import pytest
from planning.test_plan import recipe_of

from sora_jax.data import clips
from sora_jax.packing import planner
from sora_jax.planning import cost_model, workload
from sora_jax.run import recipe

# --- attention kernels

KERNEL = (
  '%a, %b), custom_call_target="tpu_custom_call", operand_layout_constraints={{{count}'
  "s32[4]{{0}}, s8[4]{{0}}, bf16[2,2048,128]{{2,1,0}}, bf16[2,{keys},128]{{2,1,0}}, "
  "bf16[2,{keys},128]{{2,1,0}}}}, frontend_attributes={{}}"
)  # fmt: skip


@pytest.mark.parametrize(
  "name, results, matmuls",
  [
    ("splash_mha_fwd_segmented_residuals.6", "(bf16[2,2048,128], f32[2,2048,128])", 2),
    ("splash_mha_dkv_segmented_no_residuals.2",
     "(bf16[3,2,2048,128], bf16[2,2048,128], bf16[2,2048,128])", 5),
    ("splash_mha_dkv_no_residuals", "(bf16[2,2048,128], bf16[2,2048,128])", 4),
    ("splash_mha_dq", "bf16[2,2048,128]", 3),
  ],
)  # fmt: skip
def test_attention_launches(name, results, matmuls):
  rest = KERNEL.format(count="s32[], ", keys=2048)
  launch = cost_model.attention_launch(name, results, rest)
  assert launch == cost_model.Launch(matmuls, 2, 2048, 2048, 128, skips=True)
  assert launch.flops == 2 * matmuls * 2 * 2048 * 2048 * 128
  load = cost_model.Load("", 1.0, 4.0, 2048.0, 256.0, 0.0, 0.25, 0.5, 0.2)
  flops = cost_model.kernel_flops(load, text_tokens=256)
  assert flops(name, results, rest) == launch.flops / 4
  captions = KERNEL.format(count="s32[], ", keys=256)
  assert flops(name, results, captions) == launch.flops / 8 / 2
  static = KERNEL.format(count="", keys=2048)
  assert flops(name, results, static) == launch.flops


def test_other_kernels_are_no_attention():
  assert cost_model.attention_launch("gather_kernel", "f32[8]", KERNEL) is None


# --- what rows hold


@pytest.mark.slow
def test_load_of_rows():
  budget = planner.Budget(4096, 256, 8)
  found = workload.of_rows([[(1024, 32)] * 4, [(2048, 64)]], 0.75, budget, "two")
  assert found.fill == 0.75 and found.clips == 2.5
  assert found.tokens == 3072 and found.text_tokens == 96
  assert found.pairs == (4 * 1024 * 1056 + 2048 * 2112) / 2


def test_blocks_between_clips_are_not_visited():
  budget = planner.Budget(8192, 256, 8)
  whole = workload.of_rows([[(8192, 256)]], 1.0, budget, "")
  parts = workload.of_rows([[(2048, 64)] * 4], 1.0, budget, "")
  assert whole.self_share == whole.own_share == 1.0
  assert parts.self_share == parts.own_share == 0.25
  # A block across two clips is visited for both.
  off = workload.of_rows([[(2000, 64)] * 4], 1.0, budget, "")
  assert off.own_share == 4 * 2000**2 / 8192**2 < 0.25 < off.self_share


def test_load_without_a_manifest(tmp_path):
  built = recipe_of()
  longest = recipe.longest_clip(built)
  assert longest == 5 * 4 * 4
  load = workload.of_recipe(built, str(tmp_path))
  assert (load.clips, load.tokens, load.text_tokens) == (1, 80, 40)
  load = workload.of_recipe(built, str(tmp_path), clip_tokens=48)
  assert (load.clips, load.tokens) == (2, 96)
  with pytest.raises(ValueError, match="--clip_tokens=97 .* config.dit.tokens 96"):
    workload.of_recipe(built, str(tmp_path), clip_tokens=97)


def test_load_of_a_manifest(tmp_path):
  sizes = ((17, 64, 64), (1, 64, 64), (9, 64, 32))  # 80, 16 and 24 tokens
  rows = [
    clips.Clip(str(i), str(tmp_path / "x.mp4"), 0.0, *size[:1], 16.0, *size[1:])
    for i, size in enumerate(sizes)
  ]
  path = tmp_path / "data" / "manifest.jsonl"
  clips.write_manifest(path, rows)
  load = workload.of_recipe(recipe_of(), str(tmp_path))
  assert load.source == str(path)
  assert load.fill == pytest.approx((80 + 16 + 24) / (2 * 96))
  assert load.clips == 1.5
  assert load == workload.of_recipe(recipe_of(), "/none", manifest=str(path))
  heldout = [dataclasses.replace(clip, split="heldout") for clip in rows]
  clips.write_manifest(path, heldout)
  with pytest.raises(ValueError, match="no clip of split 'train'"):
    workload.of_recipe(recipe_of(), str(tmp_path))


def test_load_of_latents(tiny_run):
  built = recipe_of(rows=2)
  load = workload.of_recipe(built, str(tiny_run.workdir))
  assert load.source.endswith("latents.jsonl")
  assert 0.3 < load.fill <= 1.0
  assert load.clips * 1 <= built.dit.segments
