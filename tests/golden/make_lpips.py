"""Makes lpips.npz from torchmetrics' LPIPS, with random weights.

Made with torch 2.13.0 and torchmetrics on CPU, float32. torchmetrics takes VGG16 from
torchvision, of which there is no build beside this torch: a stand-in has its layers
(arXiv:1409.1556, configuration D) at an eighth of the width, and all heads are as wide.
"""

import importlib
import pathlib
import sys
import types

import numpy as np
import torch
from random_weights import random_tensor

WIDTHS = (8, 16, 32, 64, 64)
CASES = {"square": (2, 32, 32), "wide": (1, 16, 57), "tall": (3, 50, 23)}


def vgg16(weights=None):
  layers, fan_in = [], 3
  for i, (width, depth) in enumerate(zip(WIDTHS, (2, 2, 3, 3, 3), strict=True)):
    if i:
      layers.append(torch.nn.MaxPool2d(2, 2))
    for _ in range(depth):
      layers += [torch.nn.Conv2d(fan_in, width, 3, padding=1), torch.nn.ReLU()]
      fan_in = width
  return types.SimpleNamespace(features=torch.nn.Sequential(*layers))


def main():
  lpips = importlib.import_module("torchmetrics.functional.image.lpips")
  # Only now: with it in place torchmetrics would import more of torchvision.
  stand_in = types.ModuleType("torchvision")
  stand_in.models = types.SimpleNamespace(vgg16=vgg16)
  sys.modules["torchvision"] = stand_in
  lpips._TORCHVISION_AVAILABLE = True
  model = lpips._LPIPS(pretrained=False, net="vgg", pnet_rand=True)
  model.lins = torch.nn.ModuleList()
  for i, width in enumerate(WIDTHS):
    head = lpips.NetLinLayer(width, use_dropout=True)
    setattr(model, f"lin{i}", head)
    model.lins.append(head)
  model.eval()
  golden = {}
  with torch.no_grad():
    for name, value in model.state_dict().items():
      if not name.startswith("lins."):
        value.copy_(torch.from_numpy(random_tensor(name, value.shape)))
        if name.startswith("lin"):
          value.abs_()  # the authors' heads have no negative weights
    for number, (case, (B, H, W)) in enumerate(CASES.items()):
      rng = np.random.default_rng(number)
      x, y = rng.uniform(-1, 1, (2, B, 3, H, W)).astype(np.float32)
      distance = model(torch.from_numpy(x), torch.from_numpy(y))
      golden[f"{case}_x"], golden[f"{case}_y"] = x, y
      golden[f"{case}_distance"] = distance.numpy().reshape(B)
  golden["names"] = [n for n in model.state_dict() if not n.startswith("lins.")]
  np.savez_compressed(pathlib.Path(__file__).parent / "lpips.npz", **golden)


if __name__ == "__main__":
  main()
