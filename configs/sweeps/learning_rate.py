"""Learning rates and depths of the quickstart's DiT, on the VAE of one run.

Command: python launch/sweep.py --config=configs/quickstart.py --workdir=runs/rates
  --sweep=configs/sweeps/learning_rate.py --base=runs/quickstart --plot=dit:eval/loss
Hardware: 2 CPU cores. Time: 11 minutes for each of the 6 runs, after the quickstart.
Metric: dit:eval/loss in results.csv, lower is better.
"""

from sora_jax.run import sweeps


def sweep(config):
  """Three rates around the config's, at two depths."""
  rate, depth = config.dit.train.learning_rate, config.dit.model.depth
  yield from sweeps.grid(
    {
      "dit.model.depth": [depth, 2 * depth],
      "dit.train.learning_rate": [rate / 2, rate, rate * 2],
    }
  )
