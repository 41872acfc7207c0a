"""Peak memory of the VAE over the length of a video: streamed, and whole passes.

  python launch/benchmarks/vae_memory.py --seconds=2 --seconds=10 --seconds=60

A process for each length encodes and decodes made frames with random weights, on CPU,
and says its peak resident memory. The network is Wan 2.1's (or 2.2's) at a small width.
All lengths together take ten minutes on two cores. The figures are kept in
runs/benchmarks.jsonl, see record.py.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import record  # noqa: E402
from absl import app, flags  # noqa: E402

from sora_jax.encoders.autoencoder import Autoencoder  # noqa: E402
from sora_jax.models.meta import VAEMeta  # noqa: E402
from sora_jax.models.vae import LATENT_STATS, PRESETS, VAE  # noqa: E402
from sora_jax.runtime import checkpoint, sharding  # noqa: E402

SECONDS = flags.DEFINE_multi_integer("seconds", [2, 5, 15, 30, 60], "Lengths.")
FPS = flags.DEFINE_integer("fps", 16, "Frames a second.")
SIZE = flags.DEFINE_integer("size", 64, "Height and width of the frames.")
WIDTH = flags.DEFINE_integer("width", 8, "Channels of the finest stage.")
PRESET = flags.DEFINE_enum("preset", "wan2.1", list(PRESETS), "The VAE.")
LATENTS = flags.DEFINE_integer("latents", 4, "Latents in a chunk.")
MODE = flags.DEFINE_enum("mode", None, ["stream", "whole"], "One process's.")
record.define_flag()


def measure() -> dict:
  """Runs one length in this process: its frames and its peak memory."""
  config = dataclasses.replace(
    PRESETS[PRESET.value], width=WIDTH.value, decoder_width=WIDTH.value
  )
  size, factor = SIZE.value, config.time_factor
  latents = SECONDS.value[0] * FPS.value // factor
  rng = np.random.default_rng(0)

  def frames(count):
    return rng.integers(0, 256, (1, count, size, size, 3), np.uint8)

  with tempfile.TemporaryDirectory() as folder:
    params = jax.jit(VAE(config).init)(jax.random.key(0), np.zeros((1, 1, 32, 32, 3)))
    mean, std = LATENT_STATS[PRESET.value]
    meta = VAEMeta(config, mean, std)
    checkpoint.save_model(folder, params["params"], meta.to_json())
    autoencoder = Autoencoder(folder, sharding.make_mesh())
  if MODE.value == "whole":
    decoded = autoencoder.decode(autoencoder.encode(frames(1 + factor * latents)))
    count = decoded.shape[1]
  else:
    step, count = LATENTS.value, 0
    chunks = (
      frames(factor * min(step, latents - start) + (start == 0))
      for start in range(0, latents, step)
    )
    for decoded in autoencoder.decode_stream(autoencoder.encode_stream(chunks)):
      count += np.asarray(decoded).shape[1]  # waits, as a user of the frames does
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  return {"frames": count, "megabytes": round(peak)}


def main(_):
  if MODE.value:
    print(json.dumps(measure()))
    return
  options = [f for f in sys.argv[1:] if not f.startswith("--seconds")]
  print("| seconds | frames | streamed MB | whole MB |\n| --: | --: | --: | --: |")
  figures = {}
  for seconds in SECONDS.value:
    row = {}
    for mode in ("stream", "whole"):
      command = [sys.executable, __file__, *options, f"--seconds={seconds}"]
      run = subprocess.run(
        [*command, f"--mode={mode}"], check=True, stdout=subprocess.PIPE, text=True
      )
      row[mode] = json.loads(run.stdout.splitlines()[-1])
    stream, whole = row["stream"], row["whole"]
    assert stream["frames"] == whole["frames"]
    print(
      f"| {seconds} | {stream['frames']} | {stream['megabytes']} "
      f"| {whole['megabytes']} |",
      flush=True,
    )
    for mode in row:
      name = f"{mode}, {seconds} s of video"
      figures[name] = record.Figure(row[mode]["megabytes"], "MB")
  names = ("fps", "size", "width", "preset", "latents")
  settings = {name: flags.FLAGS[name].value for name in names}
  record.append("vae_memory", settings, figures)


if __name__ == "__main__":
  app.run(main)
