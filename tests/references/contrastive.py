"""Writes what two steps of MoCo v3 give in PyTorch; needs PyTorch, not JAX.

  python tests/references/contrastive.py FILE.npz

An independent implementation of github.com/facebookresearch/moco-v3 around a linear encoder: projector and
predictor with BatchNorm, a momentum encoder that is moved before it makes keys, symmetric InfoNCE, and plain
gradient steps of size 0.5 in between. The file holds both views of every step, parameters, momentum
parameters and losses before and after, and the gradients of the first step.
"""

import copy
import math
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional

_PIXELS, _WIDTH, _HIDDEN, _CHANNELS, _BATCH, _STEPS = 12, 8, 16, 6, 8, 4
_TEMPERATURE, _FIRST, _RATE = 0.2, 0.9, 0.5


def mlp(*sizes):
  layers = []
  for inputs, outputs in zip(sizes, sizes[1:]):
    is_last = len(layers) == 3 * (len(sizes) - 2)
    layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, affine=not is_last)]
    layers += [] if is_last else [nn.ReLU()]
  return nn.Sequential(*layers)


def info_nce(query, key):
  query, key = functional.normalize(query, dim=1), functional.normalize(key, dim=1)
  logits = query @ key.T / _TEMPERATURE
  return functional.cross_entropy(logits, torch.arange(len(query))) * 2 * _TEMPERATURE


def main(path):
  torch.manual_seed(0)
  encoder = nn.Sequential(nn.Linear(_PIXELS, _WIDTH), mlp(_WIDTH, _HIDDEN, _HIDDEN, _CHANNELS))
  predictor = mlp(_CHANNELS, _HIDDEN, _CHANNELS)
  slow = copy.deepcopy(encoder)
  trained = {f"encoder.{name}": x for name, x in encoder.named_parameters()}
  trained |= {f"predictor.{name}": x for name, x in predictor.named_parameters()}
  arrays = {}

  def keep(prefix, named):
    arrays.update({f"{prefix}.{name}": x.detach().clone() for name, x in named.items()})

  keep("before", trained)
  for step in range(2):
    first, second = torch.randn(2, _BATCH, _PIXELS)
    queries = [predictor(encoder(x)) for x in (first, second)]
    momentum = 1 - 0.5 * (1 + math.cos(math.pi * step / _STEPS)) * (1 - _FIRST)
    with torch.no_grad():
      for old, new in zip(slow.parameters(), encoder.parameters()):
        old.copy_(old * momentum + new * (1 - momentum))
      keys = [slow(x) for x in (first, second)]
    loss = info_nce(queries[0], keys[1]) + info_nce(queries[1], keys[0])
    for x in trained.values():
      x.grad = None
    loss.backward()
    arrays |= {f"first.{step}": first, f"second.{step}": second, f"loss.{step}": loss}
    if step == 0:
      keep("grad", {name: x.grad for name, x in trained.items()})
    with torch.no_grad():
      for x in trained.values():
        x.sub_(_RATE * x.grad)
  keep("after", trained)
  keep("momentum", dict(slow.named_parameters()))
  np.savez_compressed(path, **{name: np.asarray(x.detach()) for name, x in arrays.items()})


if __name__ == "__main__":
  main(sys.argv[1])
