"""One recipe with a sixteenth, a quarter and all of its steps of the DiT.

Command: python launch/sweep.py --config=configs/shapes.py:short --workdir=runs/compute
  --sweep=configs/sweeps/compute.py --base=runs/shapes
Then, for the figure of Sora's report: python launch/compute_figure.py runs/compute/*
Hardware: 2 CPU cores. Time: 1.3 times the DiT of the recipe.
Metric: attributes of the samples of evaluate, in the figure.
"""


def sweep(config):
  """Warm-up and decay of the learning rate keep their shares of the steps."""
  train = config.dit.train
  for part in (16, 4, 1):
    yield {
      f"dit.train.{name}": -(-train[name] // part)
      for name in ("steps", "warmup_steps", "decay_steps")
      if train[name]
    }
