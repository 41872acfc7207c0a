"""Rows of sampling, also of published sizes."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from sora_jax.diffusion import schedules
from sora_jax.diffusion import solvers as solver
from sora_jax.diffusion.solvers import Options
from sora_jax.models import dit
from sora_jax.packing import packed_row
from sora_jax.sampling import (
  batching,
  conditioning,
  integrate,
  modes,
  sample_batch,
  windows,
)
from sora_jax.sampling.job import Job
from sora_jax.tasks import dit as dit_task


@functools.cache
def published_params(model):
  init = dit_task.make(model, None, dit_task.DiTLossConfig(), 1).init
  return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize(
  "wanted, trained, length",
  [
    *((80, 256, 256), (300, 256, 512), (5000, 256, 5120), (100, 75776, 4096)),
    *((16384, 75776, 17408), (75600, 75776, 75776), (171360, 75776, 189440)),
  ],
)
def test_rows_have_few_lengths(wanted, trained, length):
  assert batching.row_length(wanted, trained) == length


def test_rows_are_shorter_so_that_all_devices_have_one():
  meta = types.SimpleNamespace(tokens=32768, text_tokens=64, segments=8)
  sizes = [(6000, 8, 1)] * 4
  for shards, tokens, rows in ((1, 24576, 1), (2, 12288, 2), (4, 6144, 4)):
    budget = batching.budget_of(sizes, meta, shards)
    assert budget.tokens == tokens and len(batching.plan_rows(sizes, budget)) == rows
  many = batching.budget_of(8 * sizes, meta, 2)
  assert many.tokens == 32768


@pytest.mark.parametrize(
  "size, frames, tokens",
  [
    ((2048, 2048), 1, 16384),
    ((1920, 1080), 17, 40800),
    # 60 s at 16 frames a second, in windows of 81 with 9 of them given.
    ((832, 480), 961, 32760),
  ],
)
def test_rows_of_a_published_size(size, frames, tokens):
  """Wan 2.1's 14B: prompts of large images and long videos become one row each."""
  model = dit.PRESETS["wan2.1-t2v-14b"]
  meta = types.SimpleNamespace(tokens=4096, text_tokens=512, segments=1)
  job = Job("a star", size=size, frames=frames, fps=16.0, window=81, given=9)
  timeline = modes.plan(job, None, 16)
  assert timeline.frames == frames and timeline.grid[0] == 1 + (frames - 1) // 4
  state = windows.begin(timeline)
  prompt, _, _ = windows.next_window(timeline, job.windows, state)
  assert np.prod(prompt.grid) == tokens
  features = np.zeros((512, 1), np.float32)
  texts, shot_T = conditioning.texts(prompt)
  clip = batching.RowClip(prompt, [(features, features)] * len(texts), shot_T)
  budget = batching.budget_of([clip.size], meta)
  assert tokens <= budget.tokens < max(2 * tokens, 4097)
  rows = sample_batch.RowLayout(dataclasses.replace(model, channels=1), 16.0, "flow")
  batch, _ = rows.batch([[clip]], [[0]], 1, budget, 5.0)
  assert (batch.packed["segment_L"] > 0).sum() == tokens
  # The network itself: nothing is computed, but every shape has to fit.
  params = published_params(model)
  L, S, N = dataclasses.astuple(budget)
  size = packed_row.RowSize(budget, model.patch_width, model.text_width)
  whole = jax.eval_shape(
    functools.partial(sample_batch.empty_batch, 1, size)
  ).on_device()
  table = solver.make_table("euler", schedules.uniform(2, np.ones((1, N))))
  networks = integrate.Networks(model, None, np.float32)
  out = jax.eval_shape(
    functools.partial(integrate.integrate, networks, options=Options(steps=1)),
    params, whole, table,
  )  # fmt: skip
  assert out.shape == (1, L, model.patch_width)
