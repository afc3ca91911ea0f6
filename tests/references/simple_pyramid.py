"""Writes what a simple feature pyramid in PyTorch gives, and its gradients; needs PyTorch, not JAX.

  python tests/references/simple_pyramid.py FILE.npz

An independent implementation of detectron2's `SimpleFeaturePyramid` (arXiv 2203.16527): of one map of stride
16, maps of strides 4 to 64. The file holds the map, every parameter by name, the five outputs, a weight for
each of them and the gradients of the weighted sum.
"""

import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional

_WIDTH, _CHANNELS, _SIZE = 8, 6, (4, 6)


class ChannelNorm(nn.Module):
  """LayerNorm over the channels of NCHW maps."""

  def __init__(self, channels):
    super().__init__()
    self.norm = nn.LayerNorm(channels, eps=1e-6)

  def forward(self, x):
    return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _level(width, *before):
  return nn.Sequential(
    *before,
    nn.Conv2d(width, _CHANNELS, 1, bias=False),
    ChannelNorm(_CHANNELS),
    nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False),
    ChannelNorm(_CHANNELS),
  )


class Pyramid(nn.Module):
  def __init__(self):
    super().__init__()
    half, quarter = _WIDTH // 2, _WIDTH // 4
    self.levels = nn.ModuleList(
      [
        _level(
          quarter,
          nn.ConvTranspose2d(_WIDTH, half, 2, stride=2),
          ChannelNorm(half),
          nn.GELU(),
          nn.ConvTranspose2d(half, quarter, 2, stride=2),
        ),
        _level(half, nn.ConvTranspose2d(_WIDTH, half, 2, stride=2)),
        _level(_WIDTH),
        _level(_WIDTH, nn.MaxPool2d(2, stride=2)),
      ]
    )

  def forward(self, x):
    maps = [level(x) for level in self.levels]
    return [*maps, functional.max_pool2d(maps[-1], 1, stride=2)]


def main(path):
  torch.manual_seed(0)
  pyramid = Pyramid()
  for name, parameter in pyramid.named_parameters():
    with torch.no_grad():
      parameter.copy_(0.3 * torch.randn_like(parameter) + float("norm.weight" in name))
  map_ = torch.randn(2, _WIDTH, *_SIZE, requires_grad=True)
  outputs = pyramid(map_)
  weights = [torch.randn_like(output) for output in outputs]
  sum((output * weight).sum() for output, weight in zip(outputs, weights)).backward()
  arrays = {"map": map_, "grad.map": map_.grad}
  for name, parameter in pyramid.named_parameters():
    arrays |= {f"parameter.{name}": parameter, f"grad.{name}": parameter.grad}
  for index, (output, weight) in enumerate(zip(outputs, weights)):
    arrays |= {f"output.{index}": output, f"weight.{index}": weight}
  np.savez_compressed(path, **{name: tensor.detach().numpy() for name, tensor in arrays.items()})


if __name__ == "__main__":
  main(sys.argv[1])
