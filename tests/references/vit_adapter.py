"""Writes what a ViT adapter without injectors in PyTorch gives, and its gradients; needs PyTorch, not JAX.

  python tests/references/vit_adapter.py FOLDER [SEED]

An independent implementation of the adapter of DINOv3's segmentation code: a convolutional branch on the
image, whose cells read four maps of a ViT by deformable attention. `vit_adapter.npz` holds, in training, the
four levels (`output.i`), the statistics of the BatchNorms afterwards (`state.NAME`), and the gradients
(`grad.NAME`) of the levels weighted by `weight.i`; then the levels by those statistics (`inference.i`).
Weights and inputs come from their names (`tests/golden_values.py`); `vit_adapter.json` has the shapes.

The gradient of a sample's place jumps at the centre of a cell, so the seed is the first from SEED on, in
steps of 100, with which no sample is too near to one.
"""

import json
import math
import pathlib
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests import golden_values

SIZES = dict(image=[64, 64], channels=16, prior_channels=4, num_heads=2, num_points=3, batch=2)
_MARGIN = 1e-5  # cells


def _block(inputs, outputs, stride):
  conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
  return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Attention(nn.Module):
  """Deformable attention over one map."""

  def __init__(self):
    super().__init__()
    width, self.heads, self.points = SIZES["channels"], SIZES["num_heads"], SIZES["num_points"]
    self.offsets = nn.Linear(width, self.heads * self.points * 2)
    self.weights = nn.Linear(width, self.heads * self.points)
    self.value = nn.Linear(width, width // 2)
    self.output = nn.Linear(width // 2, width)

  def forward(self, queries, places, map_):
    b, n, _ = queries.shape
    h, w = map_.shape[1:3]
    values = self.value(map_).unflatten(-1, (self.heads, -1))  # b h w heads d
    values = values.permute(0, 3, 4, 1, 2).flatten(0, 1)
    shift = self.offsets(queries).view(b, n, self.heads, self.points, 2)
    where = places[None, :, None, None] + shift / torch.tensor([w, h])
    cells = (where * torch.tensor([w, h]) - 0.5).detach()
    self.margin = float((cells - cells.round()).abs().min())
    where = (2 * where - 1).transpose(1, 2).flatten(0, 1)  # b*heads n points 2
    samples = functional.grid_sample(values, where, align_corners=False)  # b*heads d n points
    share = (
      self.weights(queries).view(b, n, self.heads, self.points).softmax(-1).transpose(1, 2).flatten(0, 1)
    )
    read = (samples * share[:, None]).sum(-1).unflatten(0, (b, self.heads))  # b heads d n
    return self.output(read.permute(0, 3, 1, 2).flatten(2))


class Extractor(nn.Module):
  def __init__(self):
    super().__init__()
    width = SIZES["channels"]
    self.query_norm, self.feature_norm, self.ffn_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
    self.attention = Attention()
    self.fc1, self.fc2 = nn.Linear(width, width // 4), nn.Linear(width // 4, width)
    self.depthwise = nn.Conv2d(width // 4, width // 4, 3, padding=1, groups=width // 4)

  def forward(self, x, places, map_, sizes):
    x = x + self.attention(self.query_norm(x), places, self.feature_norm(map_))
    parts = self.fc1(self.ffn_norm(x)).split([h * w for h, w in sizes], dim=1)
    parts = [
      self.depthwise(part.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
      for part, size in zip(parts, sizes)
    ]
    return x + self.fc2(functional.gelu(torch.cat(parts, dim=1)))


class Adapter(nn.Module):
  def __init__(self):
    super().__init__()
    p, width = SIZES["prior_channels"], SIZES["channels"]
    self.stem = nn.Sequential(_block(3, p, 2), _block(p, p, 1), _block(p, p, 1), nn.MaxPool2d(3, 2, 1))
    self.stages = nn.ModuleList([_block(p, 2 * p, 2), _block(2 * p, 4 * p, 2), _block(4 * p, 4 * p, 2)])
    self.projections = nn.ModuleList([nn.Conv2d(n, width, 1) for n in (p, 2 * p, 4 * p, 4 * p)])
    self.level_embed = nn.Parameter(torch.zeros(3, width))
    self.extractors = nn.ModuleList([Extractor() for _ in range(6)])
    self.up = nn.ConvTranspose2d(width, width, 2, 2)
    self.norms = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(4)])

  def forward(self, image, taps):
    maps = [self.stem(image)]
    for stage in self.stages:
      maps.append(stage(maps[-1]))
    maps = [project(x) for project, x in zip(self.projections, maps)]
    sizes = [x.shape[2:] for x in maps[1:]]
    x = torch.cat(
      [x.flatten(2).transpose(1, 2) + embed for x, embed in zip(maps[1:], self.level_embed)], dim=1
    )
    places = torch.cat([torch.cartesian_prod(*[(torch.arange(n) + 0.5) / n for n in s]) for s in sizes])
    for extractor, tap in zip(self.extractors, [*taps, taps[3], taps[3]]):
      x = extractor(x, places.flip(-1), tap.permute(0, 2, 3, 1), sizes)
    parts = x.transpose(1, 2).split([h * w for h, w in sizes], dim=2)
    levels = [part.unflatten(2, size) for part, size in zip(parts, sizes)]
    levels = [maps[0] + self.up(levels[0]), *levels]
    levels = [
      x + functional.interpolate(tap, x.shape[2:], mode="bilinear", align_corners=False)
      for x, tap in zip(levels, taps)
    ]
    return [norm(x) for norm, x in zip(self.norms, levels)]


def _fill(module, seed):
  """Gives every parameter the values of its name, and returns the shapes and scales."""
  spec = {}
  for name, parameter in module.named_parameters():
    if parameter.ndim == 1:
      is_scale = name.endswith("weight")
      spec[name] = dict(shape=list(parameter.shape), scale=0.3, offset=1.0 if is_scale else 0.0)
    else:
      scale = 0.5 / math.sqrt(parameter[0].numel()) if name != "level_embed" else 1.0
      spec[name] = dict(shape=list(parameter.shape), scale=scale, offset=0.0)
    with torch.no_grad():
      parameter.copy_(torch.from_numpy(golden_values.values(seed, name, **spec[name])))
  return spec


def main(folder, seed=0):
  adapter = Adapter()
  spec = _fill(adapter, seed)
  b, width, (height, breadth) = SIZES["batch"], SIZES["channels"], SIZES["image"]

  def value(name, *shape):
    return torch.from_numpy(golden_values.values(seed, name, shape))

  image = value("image", b, 3, height, breadth)
  taps = [value(f"tap.{i}", b, width, height // 16, breadth // 16).requires_grad_() for i in range(4)]
  outputs = adapter(image, taps)
  if min(extractor.attention.margin for extractor in adapter.extractors) < _MARGIN:
    return main(folder, seed + 100)
  sum((output * value(f"weight.{i}", *output.shape)).sum() for i, output in enumerate(outputs)).backward()
  arrays = {f"output.{i}": output for i, output in enumerate(outputs)}
  arrays |= {f"grad.tap.{i}": tap.grad for i, tap in enumerate(taps)}
  arrays |= {f"grad.{name}": parameter.grad for name, parameter in adapter.named_parameters()}
  # PyTorch's running variance is the batch's times n / (n - 1); ours, as Flax's, is the batch's own.
  arrays |= {f"state.{name}": buffer.clone() for name, buffer in adapter.named_buffers() if "mean" in name}
  adapter.eval()
  arrays |= {f"inference.{i}": output for i, output in enumerate(adapter(image, taps))}
  arrays |= {f"state.{name}": buffer for name, buffer in adapter.named_buffers() if "var" in name}
  path = pathlib.Path(folder) / "vit_adapter"
  np.savez_compressed(
    path.with_suffix(".npz"), **{name: array.detach().numpy() for name, array in arrays.items()}
  )
  path.with_suffix(".json").write_text(json.dumps(dict(seed=seed, **SIZES, state_dict=spec)) + "\n")


if __name__ == "__main__":
  main(sys.argv[1], *map(int, sys.argv[2:]))
