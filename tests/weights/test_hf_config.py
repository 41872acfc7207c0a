"""config.json of published models, as they are published, and our configs."""

import pytest

from sora_jax.models.vae_config import LATENT_STATS
from sora_jax.weights import hf_config

WAN_DIFFUSERS = {
  "_class_name": "WanTransformer3DModel",
  "_diffusers_version": "0.33.0.dev0",
  "added_kv_proj_dim": None,
  "attention_head_dim": 128,
  "cross_attn_norm": True,
  "eps": 1e-06,
  "ffn_dim": 8960,
  "freq_dim": 256,
  "image_dim": None,
  "in_channels": 16,
  "num_attention_heads": 12,
  "num_layers": 30,
  "out_channels": 16,
  "patch_size": [1, 2, 2],
  "qk_norm": "rms_norm_across_heads",
  "rope_max_seq_len": 1024,
  "text_dim": 4096,
}
WAN_ORIGINAL = {
  "_class_name": "WanModel",
  "_diffusers_version": "0.33.0",
  "dim": 3072,
  "eps": 1e-06,
  "ffn_dim": 14336,
  "freq_dim": 256,
  "in_dim": 48,
  "model_type": "ti2v",
  "num_heads": 24,
  "num_layers": 30,
  "out_dim": 48,
  "text_len": 512,
}
VAE_22 = {
  "_class_name": "AutoencoderKLWan",
  "_diffusers_version": "0.35.0.dev0",
  "attn_scales": [],
  "base_dim": 160,
  "clip_output": False,
  "decoder_base_dim": 256,
  "dim_mult": [1, 2, 4, 4],
  "dropout": 0.0,
  "in_channels": 12,
  "is_residual": True,
  "latents_mean": list(LATENT_STATS["wan2.2"][0]),
  "latents_std": list(LATENT_STATS["wan2.2"][1]),
  "num_res_blocks": 2,
  "out_channels": 12,
  "patch_size": 2,
  "scale_factor_spatial": 16,
  "scale_factor_temporal": 4,
  "temperal_downsample": [False, True, True],
  "z_dim": 48,
}
VAE_21 = {  # as the first releases of diffusers wrote it
  "_class_name": "AutoencoderKLWan",
  "_diffusers_version": "0.33.0.dev0",
  "attn_scales": [],
  "base_dim": 96,
  "dim_mult": [1, 2, 4, 4],
  "dropout": 0.0,
  "num_res_blocks": 2,
  "temperal_downsample": [False, True, True],
  "z_dim": 16,
}
UMT5 = {
  "architectures": ["UMT5EncoderModel"],
  "classifier_dropout": 0.0,
  "d_ff": 10240,
  "d_kv": 64,
  "d_model": 4096,
  "decoder_start_token_id": 0,
  "dense_act_fn": "gelu_new",
  "dropout_rate": 0.1,
  "eos_token_id": 1,
  "feed_forward_proj": "gated-gelu",
  "initializer_factor": 1.0,
  "is_encoder_decoder": True,
  "is_gated_act": True,
  "layer_norm_epsilon": 1e-06,
  "model_type": "umt5",
  "num_decoder_layers": 24,
  "num_heads": 64,
  "num_layers": 24,
  "output_past": True,
  "pad_token_id": 0,
  "relative_attention_max_distance": 128,
  "relative_attention_num_buckets": 32,
  "scalable_attention": True,
  "tie_word_embeddings": False,
  "tokenizer_class": "T5Tokenizer",
  "torch_dtype": "bfloat16",
  "transformers_version": "4.48.0.dev0",
  "use_cache": True,
  "vocab_size": 256384,
}
CASES = {
  "wan2.1-t2v-1.3b": (WAN_DIFFUSERS, "diffusers"),
  "wan2.2-ti2v-5b": (WAN_ORIGINAL, "original"),
  "wan2.2": (VAE_22, "diffusers"),
  "wan2.1": (VAE_21, "diffusers"),
  "umt5-xxl": (UMT5, "diffusers"),
}


@pytest.mark.parametrize("name", CASES)
def test_published_configs_are_our_presets(name):
  config, layout = CASES[name]
  assert hf_config.from_json(config, name) == hf_config.preset(name, layout)


@pytest.mark.parametrize(
  "name",
  ["wan2.1-t2v-14b", "wan2.2-ti2v-5b", "wan2.1", "wan2.2", "umt5-xxl", "t5-v1.1-small"],
)
def test_to_json_and_back(name):
  model = hf_config.preset(name, "diffusers")
  config = hf_config.to_json(model, "bfloat16")
  assert hf_config.from_json(config, name) == model
  if model.network == "text":
    assert config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
  ("config", "changes", "message"),
  [
    (WAN_DIFFUSERS, {"in_channels": 33}, "in_channels is 33 and out_channels 16"),
    (WAN_DIFFUSERS, {"image_dim": 1280}, "added_kv_proj_dim is None, but image_dim is"),
    (WAN_DIFFUSERS, {"image_dim": "a"}, "image_dim is 'a', not a whole number"),
    (WAN_DIFFUSERS, {"vace_layers": [0, 5]}, "with vace_layers is Wan VACE"),
    (
      WAN_DIFFUSERS,
      {"_class_name": "WanVACETransformer3DModel"},
      "is Wan VACE, .* known",
    ),
    (
      WAN_DIFFUSERS,
      {"_class_name": "X3D"},
      "x.json: 'X3D' cannot be imported; known are",
    ),
    (WAN_DIFFUSERS, {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm', only 'rms_"),
    (WAN_DIFFUSERS, {"eps": 1e-5}, "eps is 1e-05"),
    (WAN_DIFFUSERS, {"quantization_config": {}}, "unknown keys .'quantization_con"),
    (WAN_DIFFUSERS, {"ffn_dim": None}, "x.json: ffn_dim is None, not of"),
    (WAN_DIFFUSERS, {"ffn_dim": "8960"}, "ffn_dim is '8960'"),
    (WAN_DIFFUSERS, {"_class_name": "FluxTransformer2DModel"}, "'FluxTransformer2DMo"),
    (WAN_ORIGINAL, {"model_type": "vace"}, "model_type 'vace' is Wan VACE"),
    (WAN_ORIGINAL, {"window_size": [8, 8]}, "window_size is .8, 8."),
    (VAE_22, {"patch_size": None}, "in_channels is 12, but patches of 1x1 .* have 3"),
    (VAE_22, {"latents_std": [1.0]}, "latents_std has 1 of z_dim 48 numbers"),
    (VAE_22, {"scale_factor_spatial": 8}, "scale_factor_spatial is 8, .* 16"),
    (UMT5, {"feed_forward_proj": "relu", "is_gated_act": True}, "'relu', only 'gated"),
    (UMT5, {"model_type": "bert"}, "'bert' cannot be imported"),
  ],
)
def test_what_our_networks_cannot_express(config, changes, message):
  with pytest.raises(ValueError, match=message):
    hf_config.from_json({**config, **changes}, "x.json")


@pytest.mark.parametrize("key", ["num_layers", "text_dim"])
def test_missing_keys(key):
  config = {k: v for k, v in WAN_DIFFUSERS.items() if k != key}
  with pytest.raises(ValueError, match=f"x.json: {key} is missing"):
    hf_config.from_json(config, "x.json")


def test_unknown_preset():
  with pytest.raises(ValueError, match="no preset 'wan3'; there are wan2.1, wan2.2, S"):
    hf_config.preset("wan3", "original")


def test_a_text_encoder_of_one_head_keeps_its_axis():
  sizes = {"num_heads": 1, "d_model": 8, "d_ff": 16, "num_layers": 2, "vocab_size": 300}
  entries = hf_config.from_json({**UMT5, **sizes}, "x.json").entries()
  shapes = {entry.our_shape for entry in entries if "position_bias" in entry.path}
  assert shapes == {(32, 1)}  # as T5Encoder has it
