"""Writes what a plain mask decoder in PyTorch gives, and its gradients; needs PyTorch, not JAX.

  python tests/references/plain_mask_decoder.py FOLDER [SEED]

An independent implementation of PMT's decoder on four taps of a ViT without prefix tokens, in training. Its
`plain_mask_decoder.npz` holds classes and masks of all predictions (`classes`, `masks`: every second row and
column), and the gradients (`grad.NAME`) of both, weighted by `weight.classes` and `weight.masks`. Weights and
inputs come from their names (`tests/golden_values.py`); `plain_mask_decoder.json` has the shapes.
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

SIZES = dict(batch=2, grid=[3, 4], channels=16, heads=2, mlp_dim=12, queries=5, blocks=2, classes=4)


def _mlp(*sizes):
  layers = [nn.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:])]
  return nn.Sequential(*[module for layer in layers for module in (layer, nn.GELU())][:-1])


class Lateral(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.norm, self.mlp = nn.BatchNorm2d(width), _mlp(width, width // 2, width)
    self.scale = nn.Parameter(torch.ones(width))

  def forward(self, x):
    x = self.norm(x).permute(0, 2, 3, 1)
    return self.scale * (x + self.mlp(x))


class Block(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.query, self.value, self.output = (nn.Linear(width, width) for _ in range(3))
    self.key = nn.Linear(width, width, bias=False)
    self.scale1, self.scale2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
    self.mlp = _mlp(width, SIZES["mlp_dim"], width)

  def forward(self, x, angles, mask):
    y = self.norm1(x)
    query, key, value = (
      part(y).unflatten(-1, (SIZES["heads"], -1)).transpose(1, 2)
      for part in (self.query, self.key, self.value)
    )
    query, key = _turned(query, angles), _turned(key, angles)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    x = x + self.scale1 * self.output((weights @ value).transpose(1, 2).flatten(2))
    return x + self.scale2 * self.mlp(self.norm2(x))


def _turned(x, angles):
  """Rotates pairs (i, i + d/2) of the channels of the patches, which come last."""
  queries, patches = x[:, :, : -len(angles)], x[:, :, -len(angles) :]
  a, b = patches.chunk(2, dim=-1)
  cosine, sine = angles.cos(), angles.sin()
  return torch.cat([queries, torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)], dim=2)


def _angles(height, width, channels):
  """[patches, channels / 2]: rows, then columns."""
  periods = 100.0 ** (torch.arange(channels // 4, dtype=torch.float32) / (channels // 4))
  axes = [2 * math.pi * (2 * (torch.arange(n) + 0.5) / n - 1)[:, None] / periods for n in (height, width)]
  return torch.cat(
    [axes[0].repeat_interleave(width, dim=0), axes[1].repeat(height, 1)],
    dim=-1,
  )


class Upscale(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.deconvolution = nn.ConvTranspose2d(width, width, 2, 2)
    self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
    self.norm = nn.LayerNorm(width, eps=1e-6)

  def forward(self, x):
    x = self.depthwise(functional.gelu(self.deconvolution(x)))
    return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Decoder(nn.Module):
  def __init__(self):
    super().__init__()
    width = SIZES["channels"]
    self.laterals = nn.ModuleList([Lateral(width) for _ in range(4)])
    self.query_features = nn.Parameter(torch.zeros(SIZES["queries"], width))
    self.blocks = nn.ModuleList([Block(width) for _ in range(SIZES["blocks"])])
    self.norm = nn.LayerNorm(width)
    self.upscale = nn.ModuleList([Upscale(width) for _ in range(2)])
    self.mask_mlp = _mlp(width, width, width, width)
    self.classes = nn.Linear(width, SIZES["classes"] + 1)

  def predict(self, x):
    x, count = self.norm(x), SIZES["queries"]
    map_ = x[:, count:].transpose(1, 2).unflatten(2, SIZES["grid"])
    for upscale in self.upscale:
      map_ = upscale(map_)
    return self.classes(x[:, :count]), torch.einsum("bqc,bchw->bqhw", self.mask_mlp(x[:, :count]), map_)

  def forward(self, taps):
    summed = sum(lateral(tap) for lateral, tap in zip(self.laterals, taps)).flatten(1, 2)
    x = torch.cat([self.query_features.expand(len(summed), -1, -1), summed], dim=1)
    angles = _angles(*SIZES["grid"], SIZES["channels"] // SIZES["heads"])
    predictions = [self.predict(x)]
    for block in self.blocks:
      count = SIZES["queries"]
      mask = torch.ones(len(x), x.shape[1], x.shape[1], dtype=torch.bool)
      masks = functional.interpolate(predictions[-1][1], SIZES["grid"], mode="bilinear")
      mask[:, :count, count:] = masks.flatten(2) > 0
      x = block(x, angles, mask)
      predictions.append(self.predict(x))
    return [torch.stack(parts) for parts in zip(*predictions)]


def _fill(module, seed):
  """Gives every parameter the values of its name, and returns the shapes and scales."""
  spec = {}
  for name, parameter in module.named_parameters():
    if parameter.ndim == 1:
      offset = 0.0 if name.endswith("bias") else 1.0
      spec[name] = dict(shape=list(parameter.shape), scale=0.3, offset=offset)
    else:
      scale = 1.0 if name == "query_features" else 1 / math.sqrt(parameter[0].numel())
      spec[name] = dict(shape=list(parameter.shape), scale=scale, offset=0.0)
    with torch.no_grad():
      parameter.copy_(torch.from_numpy(golden_values.values(seed, name, **spec[name])))
  return spec


def main(folder, seed=0):
  decoder = Decoder()
  spec = _fill(decoder, seed)

  def value(name, *shape):
    return torch.from_numpy(golden_values.values(seed, name, shape))

  shape = (SIZES["batch"], SIZES["channels"], *SIZES["grid"])
  taps = [value(f"tap.{i}", *shape).requires_grad_() for i in range(4)]
  classes, masks = decoder(taps)
  weighted = classes * value("weight.classes", *classes.shape), masks * value("weight.masks", *masks.shape)
  sum(x.sum() for x in weighted).backward()
  arrays = {"classes": classes, "masks": masks[..., ::2, ::2]}
  arrays |= {f"grad.tap.{i}": tap.grad for i, tap in enumerate(taps)}
  arrays |= {f"grad.{name}": parameter.grad for name, parameter in decoder.named_parameters()}
  path = pathlib.Path(folder) / "plain_mask_decoder"
  np.savez_compressed(
    path.with_suffix(".npz"), **{name: array.detach().numpy() for name, array in arrays.items()}
  )
  path.with_suffix(".json").write_text(json.dumps(dict(seed=seed, **SIZES, state_dict=spec)) + "\n")


if __name__ == "__main__":
  main(sys.argv[1], *map(int, sys.argv[2:]))
