"""Writes checkpoints and outputs of torchvision's, timm's and transformers' convolutional networks.

  python tests/references/convnets.py FOLDER

Needs them and PyTorch, not JAX. For every case of `_CASES`: `CASE.safetensors`, the state dict with random
weights and BatchNorm statistics far from (0, 1); `CASE.json` with the row that it stands for; `CASE.npz` with
images of three sizes, [2, h, w, 3], and for each the maps of strides 4 to 32, [2, h, w, c].

ConvNeXts drop what is left of an image whose size is no multiple of 32; ours go over all of it. So theirs get
images with zeros added at the bottom and the right, and cells that lie in the zeros alone are taken away.
"""

from collections.abc import Callable, Sequence
import json
import pathlib
import sys

import numpy as np
import torch
from torch import nn

try:
  import torchvision
except RuntimeError:  # a torchvision without its compiled operators, which these networks do not need
  _LIBRARY = torch.library.Library("torchvision", "DEF")
  for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
    del sys.modules[_name]
  import torchvision

from safetensors.torch import save_file
import timm
import transformers

# Native to small images; odd; not square and no multiple of 32.
_SIZES = ((64, 64), (95, 95), (64, 106))
_STRIDES = (4, 8, 16, 32)


def _torchvision(name: str) -> nn.Module:
  return getattr(torchvision.models, name)(weights=None)


def _timm(name: str) -> nn.Module:
  return timm.create_model(name, num_classes=0)


def _dinov3() -> nn.Module:
  return transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig())


def _convnext() -> nn.Module:
  return transformers.ConvNextModel(transformers.ConvNextConfig())


# name of the case -> (our row, makes the network, the layers whose outputs are levels)
_CASES: dict[str, tuple[str, Callable[[], nn.Module], Sequence[str]]] = {
  "torchvision-resnet18": (
    "resnet18",
    lambda: _torchvision("resnet18"),
    ["layer1", "layer2", "layer3", "layer4"],
  ),
  "torchvision-resnet50": (
    "resnet50",
    lambda: _torchvision("resnet50"),
    ["layer1", "layer2", "layer3", "layer4"],
  ),
  "torchvision-efficientnet_b0": (
    "efficientnet_b0",
    lambda: _torchvision("efficientnet_b0"),
    ["features.2", "features.3", "features.5", "features.7"],
  ),
  "torchvision-convnext_tiny": (
    "convnext_tiny",
    lambda: _torchvision("convnext_tiny"),
    ["features.1", "features.3", "features.5", "features.7"],
  ),
  "timm-resnetrs50": ("resnet_rs50", lambda: _timm("resnetrs50"), ["layer1", "layer2", "layer3", "layer4"]),
  "timm-tf_efficientnet_b1": (
    "tf_efficientnet_b1",
    lambda: _timm("tf_efficientnet_b1"),
    ["blocks.1", "blocks.2", "blocks.4", "blocks.6"],
  ),
  "timm-tf_efficientnet_lite1": (
    "efficientnet_lite1",
    lambda: _timm("tf_efficientnet_lite1"),
    ["blocks.1", "blocks.2", "blocks.4", "blocks.6"],
  ),
  "timm-convnext_tiny": ("convnext_tiny", lambda: _timm("convnext_tiny"), [f"stages.{s}" for s in range(4)]),
  "transformers-convnext_tiny": (
    "convnext_tiny",
    _convnext,
    [f"encoder.stages.{s}" for s in range(4)],
  ),
  "transformers-dinov3_convnext_tiny": (
    "dinov3_convnext_tiny",
    _dinov3,
    [f"model.stages.{s}" for s in range(4)],
  ),
}


def _randomise(network: nn.Module, seed: int) -> None:
  """Draws everything that initialisation leaves at 0 or 1, so that each variable has an effect."""
  generator = torch.Generator().manual_seed(seed)

  def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
    tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

  with torch.no_grad():
    for name, parameter in network.named_parameters():
      if parameter.ndim == 1:
        uniform(parameter, *((-0.2, 0.2) if name.endswith("bias") else (0.5, 1.5)))
      elif name.endswith(("gamma", "layer_scale")):
        uniform(parameter, 0.1, 0.3)
    for name, buffer in network.named_buffers():
      if name.endswith("running_mean"):
        uniform(buffer, -0.5, 0.5)
      elif name.endswith("running_var"):
        uniform(buffer, 0.5, 3.0)


def _levels(network: nn.Module, layers: Sequence[str], images: torch.Tensor) -> list[np.ndarray]:
  """Outputs of the layers, [b, h, w, c]."""
  found: dict[str, torch.Tensor] = {}
  modules = dict(network.named_modules())

  def keep(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
      found[name] = output if isinstance(output, torch.Tensor) else output[0]

    return hook

  handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
  with torch.no_grad():
    network(images)
  for handle in handles:
    handle.remove()
  return [found[name].permute(0, 2, 3, 1).contiguous().numpy() for name in layers]


def main(folder: pathlib.Path) -> None:
  for index, (case, (row, make, layers)) in enumerate(_CASES.items()):
    torch.manual_seed(index)
    network = make().eval()
    _randomise(network, index)
    prefix = "convnext." if case == "transformers-convnext_tiny" else ""  # as a classifier saves it
    state = {prefix + name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / f"{case}.safetensors")
    (folder / f"{case}.json").write_text(json.dumps(dict(row=row, sizes=len(_SIZES))))
    arrays = {}
    for number, size in enumerate(_SIZES):
      images = torch.randn(2, 3, *size)
      arrays[f"{number}.images"] = images.permute(0, 2, 3, 1).numpy()
      if "convnext" in case:
        images = nn.functional.pad(images, (0, -size[1] % 32, 0, -size[0] % 32))
      for stride, level in zip(_STRIDES, _levels(network, layers, images), strict=True):
        height, width = (-(-length // stride) for length in size)
        arrays[f"{number}.{stride}"] = level[:, :height, :width]
    np.savez(folder / f"{case}.npz", **arrays)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
