"""Checks all of a run: what is whole, what is lost, and how to get it back.

  python -m sora_jax.check runs/quickstart

Every array of checkpoints and models and every byte of latents is read and compared
with the checksums that were saved with them; stage.json, manifests and media files are
looked at, too. Nothing is changed. The exit code is 1 if something is lost.
"""

import pathlib
import sys

import jax
from absl import flags, logging

from sora_jax.run import cli, integrity
from sora_jax.runtime import text

flags.disclaim_key_flags()


def check(workdir) -> list[integrity.Finding]:
  """Logs a table of a run's folder, and how to get back what is lost; those findings.

  Raises:
    ValueError: if there is no run in the folder.
  """
  workdir = pathlib.Path(workdir)
  findings = list(integrity.examine(workdir))
  if not findings:
    raise ValueError(f"{workdir}: no run here, which would have folders such as data/")
  rows = [(finding.thing, finding.state, finding.note) for finding in findings]
  for line in text.table_lines((str(workdir), "state", ""), rows):
    logging.info("%s", line)
  lost = [finding for finding in findings if finding.state == integrity.LOST]
  for finding in lost:
    logging.error("%s is lost. To get it back: %s", finding.thing, finding.remedy)
  if not lost:
    logging.info("nothing of %s is lost", workdir)
  return lost


def _main(argv):
  cli.start_logging()
  if len(argv) != 2:
    raise ValueError(f"one folder of a run is needed, not {argv[1:]}")
  jax.config.update("jax_platforms", "cpu")
  if check(argv[1]):
    sys.exit(1)


if __name__ == "__main__":
  cli.run_app(_main)
