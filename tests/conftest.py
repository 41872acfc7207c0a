"""Set before jax is imported: tests run on 8 simulated devices of the CPU."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

from absl import flags  # noqa: E402

# Grain's workers read absl flags, which nothing parses under pytest.
flags.FLAGS.mark_as_parsed()
