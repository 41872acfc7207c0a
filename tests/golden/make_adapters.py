"""Makes adapters.npz: what diffusers and PEFT make of the files of adapter_cases.

  python tests/golden/make_adapters.py

Of each file that they read, the change of every tensor of a tiny Wan transformer that
has one. Made with diffusers 0.42.1, peft 0.21.2, torch 2.14.1. diffusers does not read
some of the names (it wants a prefix or all layers), and leaves out changes of norms.
"""

import json
import pathlib
import tempfile

import adapter_cases
import ml_dtypes
import numpy as np
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import save_file

TORCH = {
  np.dtype(ml_dtypes.bfloat16): torch.bfloat16,
  np.dtype(ml_dtypes.float8_e4m3fn): torch.float8_e4m3fn,
  np.dtype(ml_dtypes.float8_e5m2): torch.float8_e5m2,
}


def to_torch(value):
  value = np.ascontiguousarray(value)
  if value.dtype in TORCH:
    return torch.from_numpy(value.astype(np.float32)).to(TORCH[value.dtype])
  return torch.from_numpy(value).clone()


def by_peft(model, case):
  """The model with a file of PEFT, which adapter_config.json describes."""
  settings = {k: v for k, v in case.beside.items() if k != "target_modules"}
  config = LoraConfig(target_modules=["blocks.0.attn1.to_q"], **settings)
  model = inject_adapter_in_model(config, model)
  tensors = {
    k.removeprefix("base_model.model."): to_torch(v) for k, v in case.tensors.items()
  }
  set_peft_model_state_dict(model, tensors)
  for module in list(model.modules()):
    if hasattr(module, "merge") and hasattr(module, "lora_A"):
      module.merge()
  return model


def by_diffusers(model, case):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "x.safetensors"
    tensors = {name: to_torch(value) for name, value in case.tensors.items()}
    save_file(tensors, path, {"format": "pt", **(case.metadata or {})})
    state, metadata = WanPipeline.lora_state_dict(
      folder, weight_name=path.name, return_lora_metadata=True
    )
    WanPipeline.load_lora_into_transformer(state, model, metadata=metadata)
  model.fuse_lora()
  return model


def main():
  made = {}
  for name, case in adapter_cases.read_cases().items():
    torch.manual_seed(0)
    model = WanTransformer3DModel(**adapter_cases.SIZES)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
      model = (by_peft if case.beside else by_diffusers)(model, case)
    except Exception as error:  # noqa: BLE001
      print(f"{name}: not read: {type(error).__name__}: {str(error)[:150]}")
      continue
    after = {
      k.replace(".base_layer", ""): v for k, v in model.state_dict().items()
      if "lora_" not in k
    }  # fmt: skip
    changes = {k: (v.double() - before[k].double()).numpy() for k, v in after.items()}
    changes = {k: v for k, v in changes.items() if np.abs(v).max() > 0}
    wanted = case.changes
    worst = max(
      (np.abs(changes.get(k, 0) - wanted.get(k, 0)).max() for k in changes | wanted),
      default=0,
    )
    print(f"{name}: {sorted(changes)}, {worst:.1e} from the test's own")
    made |= {f"{name}|{k}": v.astype(np.float32) for k, v in changes.items()}
  np.savez_compressed(pathlib.Path(__file__).with_name("adapters.npz"), **made)
  print(json.dumps({"cases": len({k.split("|")[0] for k in made})}))


if __name__ == "__main__":
  main()
