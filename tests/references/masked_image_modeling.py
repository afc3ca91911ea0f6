"""Writes what a step of SimMIM gives in PyTorch, and its gradients; needs PyTorch and timm, not JAX.

  python tests/references/masked_image_modeling.py FILE.npz

timm's SwinV2 with a mask token in its stem, a decoder of one layer, and l1 on masked pixels, which are
normalised by the mean and deviation of the window around each. Everything but the SwinV2 is an independent
writing of github.com/microsoft/Swin-Transformer, models/simmim.py: local means are plain loops, and the
decoder's squares are put together one by one. The file holds images, mask, every parameter by name, targets,
the loss with and without normalised targets, and `grad.*` of the former.
"""

import sys

import numpy as np
import torch

try:
  import torchvision  # noqa: F401
except RuntimeError:  # a torchvision without its compiled operators, which SwinV2 does not need
  _LIBRARY = torch.library.Library("torchvision", "DEF")
  for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
    del sys.modules[_name]

from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

_SIDE, _PATCH, _STRIDE, _WINDOW, _WIDTH = 32, 8, 8, 15, 8


class Masked(nn.Module):
  def __init__(self):
    super().__init__()
    self.encoder = SwinTransformerV2(
      img_size=_SIDE, window_size=4, embed_dim=_WIDTH, depths=(2, 1), num_heads=(1, 2), num_classes=0
    )
    self.mask_token = nn.Parameter(torch.zeros(_WIDTH))
    self.decoder = nn.Conv2d(2 * _WIDTH, _STRIDE**2 * 3, 1)

  def forward(self, images, mask):
    x = self.encoder.patch_embed(images)  # NHWC
    cells = mask.repeat_interleave(_PATCH // 4, 1).repeat_interleave(_PATCH // 4, 2)[..., None].float()
    x = x * (1 - cells) + self.mask_token * cells
    x = self.encoder.norm(self.encoder.layers(x)).permute(0, 3, 1, 2)
    squares = self.decoder(x)
    rows = []
    for row in range(squares.shape[2]):
      parts = [squares[:, :, row, column] for column in range(squares.shape[3])]
      rows.append(torch.cat([part.reshape(-1, 3, _STRIDE, _STRIDE) for part in parts], dim=3))
    return torch.cat(rows, dim=2)


def normalised(images):
  """Pixels by mean and unbiased deviation of the window around each, cut off at the edges."""
  found = torch.zeros_like(images)
  for row in range(_SIDE):
    for column in range(_SIDE):
      top, left = max(row - _WINDOW // 2, 0), max(column - _WINDOW // 2, 0)
      part = images[:, :, top : row + _WINDOW // 2 + 1, left : column + _WINDOW // 2 + 1].flatten(2).double()
      value = (images[:, :, row, column] - part.mean(2)) / (part.var(2) + 1e-6).sqrt()
      found[:, :, row, column] = value
  return found


def masked_l1(predicted, target, mask):
  pixels = mask.repeat_interleave(_PATCH, 1).repeat_interleave(_PATCH, 2)[:, None].float()
  return ((predicted - target).abs() * pixels).sum() / (pixels.sum() + 1e-5) / 3


def main(path):
  torch.manual_seed(0)
  model = Masked().eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      is_scale = "norm" in name and "weight" in name
      parameter.copy_(0.2 * torch.randn_like(parameter) + float(is_scale) + 2 * float("logit_scale" in name))
  images = torch.randn(2, 3, _SIDE, _SIDE)
  mask = torch.rand(2, _SIDE // _PATCH, _SIDE // _PATCH) < 0.6
  predicted, target = model(images, mask), normalised(images)
  loss = masked_l1(predicted, target, mask)
  loss.backward()
  arrays = {"images": images, "mask": mask, "target": target, "loss": loss}
  arrays["plain_loss"] = masked_l1(predicted, images, mask)
  for name, parameter in model.named_parameters():
    arrays |= {f"parameter.{name}": parameter, f"grad.{name}": parameter.grad}
  np.savez_compressed(path, **{name: tensor.detach().numpy() for name, tensor in arrays.items()})


if __name__ == "__main__":
  main(sys.argv[1])
