"""Writes what two repeats of NAS-FPN in PyTorch give, and gradients; needs PyTorch, not JAX.

  python tests/references/nas_fpn.py FILE.npz

An independent implementation of TensorFlow Model Garden's `NASFPN` (arXiv 1904.07392), node by node: of maps
of strides 8, 16 and 32, maps of strides 8 to 128, in training. The file holds the maps, every parameter by
name, the five outputs, a weight for each of them, the gradients of the weighted sum, and the running
statistics after it.
"""

import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional

_INPUTS, _CHANNELS, _SIZE, _REPEATS = (5, 8, 6), 8, (16, 32), 2


def _norm() -> nn.Module:
  return nn.BatchNorm2d(_CHANNELS, eps=1e-4, momentum=0.003)


class Repeat(nn.Module):
  def __init__(self):
    super().__init__()
    self.convs = nn.ModuleList([nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1) for _ in range(7)])
    self.norms = nn.ModuleList([_norm() for _ in range(7)])

  def forward(self, p3, p4, p5, p6, p7):
    def up(x, factor):
      return functional.interpolate(x, scale_factor=factor, mode="nearest")

    def down(x, factor):
      return functional.max_pool2d(x, factor)

    def attend(coarse, fine):
      return coarse + fine * torch.sigmoid(coarse.amax((2, 3), keepdim=True))

    def node(number, x):
      return self.norms[number](self.convs[number](functional.relu(x)))

    first4 = node(0, attend(up(p6, 4), p4))
    second4 = node(1, p4 + first4)
    out3 = node(2, p3 + up(second4, 2))
    out4 = node(3, second4 + down(out3, 2))
    out5 = node(4, attend(down(out4, 2), down(out3, 4)) + p5)
    out7 = node(5, attend(down(out5, 4), down(second4, 8)) + p7)
    out6 = node(6, attend(up(out7, 2), down(out5, 2)))
    return out3, out4, out5, out6, out7


class NASFPN(nn.Module):
  def __init__(self):
    super().__init__()
    # The middle level has the right number of channels, and no lateral.
    self.laterals = nn.ModuleList([nn.Conv2d(_INPUTS[i], _CHANNELS, 1) for i in (0, 2)])
    self.lateral_norms = nn.ModuleList([_norm() for _ in range(2)])
    self.repeats = nn.ModuleList([Repeat() for _ in range(_REPEATS)])

  def forward(self, c3, c4, c5):
    p3 = self.lateral_norms[0](self.laterals[0](c3))
    p5 = self.lateral_norms[1](self.laterals[1](c5))
    p6 = functional.max_pool2d(p5, 2)
    maps = (p3, c4, p5, p6, functional.max_pool2d(p6, 2))
    for repeat in self.repeats:
      maps = repeat(*maps)
    return maps


def main(path):
  torch.manual_seed(0)
  neck = NASFPN().train()
  for name, parameter in neck.named_parameters():
    with torch.no_grad():
      parameter.copy_(0.2 * torch.randn_like(parameter) + float("norms" in name and "weight" in name))
  height, width = _SIZE
  maps = [
    torch.randn(2, channels, height // 2**i, width // 2**i, requires_grad=True)
    for i, channels in enumerate(_INPUTS)
  ]
  outputs = neck(*maps)
  weights = [torch.randn_like(output) for output in outputs]
  sum((output * weight).sum() for output, weight in zip(outputs, weights)).backward()
  arrays = {f"map.{i}": map_ for i, map_ in enumerate(maps)}
  arrays |= {f"grad.map.{i}": map_.grad for i, map_ in enumerate(maps)}
  for name, parameter in neck.named_parameters():
    arrays |= {f"parameter.{name}": parameter, f"grad.{name}": parameter.grad}
  for name, buffer in neck.named_buffers():
    if "running" in name:
      arrays[f"buffer.{name}"] = buffer
  for index, (output, weight) in enumerate(zip(outputs, weights)):
    arrays |= {f"output.{index}": output, f"weight.{index}": weight}
  np.savez_compressed(path, **{name: tensor.detach().numpy() for name, tensor in arrays.items()})


if __name__ == "__main__":
  main(sys.argv[1])
