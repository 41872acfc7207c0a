"""The DiT of `sora_jax.models.dit` in PyTorch, the other side of `compare_gpu`.

Written for speed, as one would by hand: weights are float32 and cast where they are
used, activations bfloat16, norms fused, and attention is scaled_dot_product_attention
in a loop over the clips of a row, which are of equal length. Modules have our names.
"""

import functools
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint

from sora_jax.models import dit, layers


def make_network(config: dit.DiTConfig, clips: int, clip: int, text: int, dtype):
  """The network, for rows of `clips` clips of `clip` tokens and `text` text tokens."""
  D, N, text_tokens = config.width, config.heads, text
  aten = torch.ops.aten
  saved = {
    getattr(aten, name).default
    for name in (
      "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention",
      "_scaled_dot_product_cudnn_attention",
      "_scaled_dot_product_flash_attention_for_cpu",
    )
  }
  if config.remat == "matmuls_saved":
    saved |= {aten.mm.default, aten.addmm.default}
  policy = checkpoint.CheckpointPolicy

  def keep(_, op, *args, **kwargs):
    return policy.MUST_SAVE if op in saved else policy.PREFER_RECOMPUTE

  contexts = functools.partial(checkpoint.create_selective_checkpoint_contexts, keep)

  def dense(layer, x, dtype=dtype):
    return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))

  def plain_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)

  def attend(q_BLD, k_BSD, v_BSD, keys):
    """A loop over the clips; padding gets zeros."""
    parts = []
    for n in range(clips):
      here, there = slice(n * clip, (n + 1) * clip), slice(n * keys, (n + 1) * keys)
      qkv = ((q_BLD, here), (k_BSD, there), (v_BSD, there))
      qkv = [x[:, at].unflatten(-1, (N, -1)).transpose(1, 2) for x, at in qkv]
      parts.append(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
    out = torch.cat(parts, 1)
    return F.pad(out, (0, 0, 0, q_BLD.shape[1] - out.shape[1]))

  def rotate(x_BLD, cos, sin):
    first, second = x_BLD.float().unflatten(-1, (N, 2, -1)).unbind(-2)
    parts = first * cos - second * sin, first * sin + second * cos
    return torch.stack(parts, -2).flatten(2).to(x_BLD.dtype)

  class Norm(nn.Module):
    def __init__(self, bias=False):
      super().__init__()
      self.scale = nn.Parameter(torch.ones(D))
      self.bias = nn.Parameter(torch.zeros(D)) if bias else None

    def forward(self, x):
      scale = self.scale.to(x.dtype)
      if self.bias is None:
        return F.rms_norm(x, (D,), scale, 1e-6)
      return F.layer_norm(x, (D,), scale, self.bias.to(x.dtype), 1e-6)

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      for name in ("query", "key", "value", "attention_out"):
        setattr(self, name, nn.Linear(D, D))
        setattr(self, f"cross_{name.removeprefix('attention_')}", nn.Linear(D, D))
      for name in ("query_norm", "key_norm", "cross_query_norm", "cross_key_norm"):
        setattr(self, name, Norm())
      self.cross_norm = Norm(bias=True)
      self.mlp_up = nn.Linear(D, config.mlp_width)
      self.mlp_down = nn.Linear(config.mlp_width, D)
      self.modulation = nn.Parameter(torch.zeros(6, D))

    def forward(self, x, modulation_BG6D, one_hot_BLG, rope, text):
      made_BG6D = (modulation_BG6D + self.modulation).to(dtype)
      # A matmul, as in ours: the gradient of a gather is slow.
      shift1, scale1, gate1, shift2, scale2, gate2 = (
        one_hot_BLG @ made_BG6D[:, :, i] for i in range(6)
      )
      h = plain_norm(x) * (1 + scale1) + shift1
      q = rotate(self.query_norm(dense(self.query, h)), *rope)
      k = rotate(self.key_norm(dense(self.key, h)), *rope)
      h = attend(q, k, dense(self.value, h), clip)
      x = x + gate1 * dense(self.attention_out, h)
      q = self.cross_query_norm(dense(self.cross_query, self.cross_norm(x)))
      k = self.cross_key_norm(dense(self.cross_key, text))
      h = attend(q, k, dense(self.cross_value, text), text_tokens)
      x = x + dense(self.cross_out, h)
      h = plain_norm(x) * (1 + scale2) + shift2
      h = F.gelu(dense(self.mlp_up, h), approximate="tanh")
      return x + gate2 * dense(self.mlp_down, h)

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      self.patch_embed = nn.Linear(config.patch_width, D)
      self.text_embed_1 = nn.Linear(config.text_width, D)
      self.text_embed_2 = nn.Linear(D, D)
      self.time_embed_1 = nn.Linear(config.frequency_width, D)
      self.time_embed_2 = nn.Linear(D, D)
      self.time_projection = nn.Linear(D, 6 * D)
      self.blocks = nn.ModuleList(Block() for _ in range(config.depth))
      self.head_modulation = nn.Parameter(torch.randn(2, D) * D**-0.5)
      self.head = nn.Linear(D, config.patch_width)

    def forward(self, x_BLP, t_BG, group_BL, rope, text_BSE):
      x = dense(self.patch_embed, x_BLP)
      text = F.gelu(dense(self.text_embed_1, text_BSE), approximate="tanh")
      text = dense(self.text_embed_2, text)
      half = config.frequency_width // 2
      places = torch.arange(half, device=x.device, dtype=torch.float32)
      angle = 1000.0 * t_BG[..., None] * torch.exp(-math.log(1e4) * places / half)
      t_BGD = torch.cat([angle.cos(), angle.sin()], -1)
      t_BGD = F.silu(dense(self.time_embed_1, t_BGD, torch.float32))
      t_BGD = dense(self.time_embed_2, t_BGD, torch.float32)
      made = dense(self.time_projection, F.silu(t_BGD), torch.float32)
      made_BG6D = made.unflatten(-1, (6, D))
      one_hot = F.one_hot(group_BL, t_BG.shape[1])
      context = (made_BG6D, one_hot.to(dtype), rope, text)
      for block in self.blocks:
        if config.remat == "none":
          x = block(x, *context)
        else:
          options = {} if config.remat == "full" else {"context_fn": contexts}
          x = checkpoint.checkpoint(block, x, *context, use_reentrant=False, **options)
      shift, scale = (
        one_hot.float() @ (t_BGD + self.head_modulation[i]) for i in range(2)
      )
      return dense(
        self.head, plain_norm(x).float() * (1 + scale) + shift, torch.float32
      )

  return Network()


def set_params(network, arrays, config: dit.DiTConfig) -> None:
  """Our params into it; queries and keys have the even channels of a head first."""
  K = config.width // config.heads
  with torch.no_grad():
    for name, param in network.named_parameters():
      *where, leaf = name.split(".")
      index = int(where.pop(1)) if where[:1] == ["blocks"] else None
      leaf = {"weight": "kernel"}.get(leaf, leaf)
      value = arrays["/".join(("params", *where, leaf))]
      value = value if index is None else value[index]
      if where and where[-1] in ("query", "key", "query_norm", "key_norm"):
        value = np.asarray(layers.in_halves(value, K))
      value = value.T if leaf == "kernel" else value
      param.copy_(torch.from_numpy(np.ascontiguousarray(value)))
