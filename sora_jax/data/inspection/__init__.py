"""A page that shows what a run is going to be trained on, see `sora_jax.inspect`."""
