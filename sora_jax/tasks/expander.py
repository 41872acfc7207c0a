"""What an expander learns: the long caption of a pair, token by token."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sora_jax.models.expander import ExpanderConfig, ExpanderLM
from sora_jax.models.partition import PARAMS
from sora_jax.tasks import Task

RULES = (
  (r"token_embed/embedding", P(None, PARAMS)),
  (r"blocks/(query|key|value|mlp_up)/kernel", P(None, PARAMS, "tensor")),
  (r"blocks/(attention_out|mlp_down)/kernel", P(None, "tensor", PARAMS)),
  (r".*/scale", P()),
)


def make(config: ExpanderConfig) -> Task:
  """The task over batches of `ids_S` and `long_S`, see `language.pairs`; float32."""
  model = ExpanderLM(config)

  def init(key):
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

  def loss(params, batch, key):
    del key
    ids_BS, long_BS = batch["ids_S"], batch["long_S"]
    logits_BSV, _ = model.apply({"params": params}, ids_BS[:, :-1])
    target_BS, weight_BS = ids_BS[:, 1:], long_BS[:, 1:].astype(jnp.float32)
    log_BSV = jax.nn.log_softmax(logits_BSV)
    log_BS = jnp.take_along_axis(log_BSV, target_BS[..., None], axis=-1)[..., 0]
    hit_BS = (jnp.argmax(logits_BSV, axis=-1) == target_BS).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weight_BS), 1.0)
    accuracy = jnp.sum(hit_BS * weight_BS) / count
    return -jnp.sum(log_BS * weight_BS) / count, {"accuracy": accuracy}

  def evaluate(params, batch, key):
    value, values = loss(params, batch, key)
    return {"loss": value, **values}

  return Task(init, loss, evaluate)
