"""Descriptions of GPUs that XLA compiles for without having one.

They hold what programs depend on, after XLA's own `h100_sxm.txtpb` (in
xla/backends/gpu/target_config). The H200 is an H100 with more memory. Cores, caches and
memory of the B200 are those of its data sheet, and the rest is the H100's.
"""

from sora_jax.planning.hardware import Chip

_TEXT = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {major} feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 4 }}
device_description_str: "NVIDIA {name}"
"""
# (multiprocessors, bytes of L2 cache, major compute capability)
_SIZES = {
  "h100": (132, 52428800, 9),
  "h200": (132, 52428800, 9),
  "b200": (148, 132644864, 10),
}


def describe(chip: Chip) -> str:
  """Returns XLA's GpuTargetConfigProto of a GPU, as text.

  Raises:
    ValueError: for one that is not known here.
  """
  if chip.name not in _SIZES:
    raise ValueError(f"{chip.name} is none of {', '.join(_SIZES)}")
  cores, cache, major = _SIZES[chip.name]
  return _TEXT.format(
    cores=cores,
    cache=cache,
    major=major,
    bandwidth=int(chip.hbm_bandwidth),
    memory=int(chip.hbm),
    name=chip.name.upper(),
  )
