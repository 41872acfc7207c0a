"""sora_jax: train a Sora-like video model on TPUs, from raw videos to samples."""

__version__ = "0.1.0"
