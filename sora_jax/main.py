"""Runs the stages that a config names, in order: from raw videos to samples.

python -m sora_jax.main --config=configs/quickstart.py [--workdir=DIR]
  [--config.key=value ...]
"""

from sora_jax.run import cli

if __name__ == "__main__":
  cli.command()
