"""Writes what two steps of DINO give in PyTorch; needs PyTorch, not JAX.

  python tests/references/self_distillation.py FILE.npz

An independent implementation of github.com/facebookresearch/dino around a linear encoder of mean colours: a
head with weight-normalised prototypes of trained lengths, which stay as they are in the first step; two
global and three smaller local crops; centered and sharpened targets whose temperature grows; plain gradient
steps of size 0.5; and a teacher that follows with a growing momentum. The file holds the crops of every step,
losses, centers, parameters before and after, the teacher's afterwards, and the gradients of the first step.
"""

import copy
import math
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional

_WIDTH, _HIDDEN, _BOTTLENECK, _PROTOTYPES, _BATCH, _LOCAL, _STEPS = 8, 16, 6, 10, 4, 3, 4
_STUDENT, _TEACHER, _CENTER_MOMENTUM, _MOMENTUM, _RATE = 0.1, (0.04, 0.07), 0.9, 0.9, 0.5


class Network(nn.Module):
  def __init__(self):
    super().__init__()
    self.encoder = nn.Linear(3, _WIDTH)
    self.mlp = nn.Sequential(
      nn.Linear(_WIDTH, _HIDDEN),
      nn.GELU(),
      nn.Linear(_HIDDEN, _HIDDEN),
      nn.GELU(),
      nn.Linear(_HIDDEN, _BOTTLENECK),
    )
    self.weight_v = nn.Parameter(torch.randn(_PROTOTYPES, _BOTTLENECK))
    self.weight_g = nn.Parameter(torch.ones(_PROTOTYPES, 1))

  def forward(self, crops):
    x = torch.cat([crop.mean(dim=(1, 2)) for crop in crops])  # images of any size
    x = functional.normalize(self.mlp(self.encoder(x)), dim=-1)
    return x @ (self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True)).T


def main(path):
  torch.manual_seed(0)
  student = Network()
  teacher = copy.deepcopy(student).requires_grad_(False)
  center = torch.zeros(1, _PROTOTYPES)
  arrays = {}

  def keep(prefix, parameters):
    arrays.update({f"{prefix}.{name}": x.detach().clone() for name, x in parameters})

  keep("before", student.named_parameters())
  for step in range(2):
    crops = [torch.randn(_BATCH, 2, 2, 3) for _ in range(2)] + [
      torch.randn(_BATCH, 1, 1, 3) for _ in range(_LOCAL)
    ]
    temperature = _TEACHER[0] + (_TEACHER[1] - _TEACHER[0]) * min(step / 2, 1)
    seen = teacher(crops[:2])
    targets = functional.softmax((seen - center) / temperature, dim=-1).chunk(2)
    predicted = (student(crops) / _STUDENT).chunk(len(crops))
    terms = [
      torch.sum(-target * functional.log_softmax(logits, dim=-1), dim=-1).mean()
      for i, target in enumerate(targets)
      for j, logits in enumerate(predicted)
      if i != j
    ]
    loss = sum(terms) / len(terms)
    center = _CENTER_MOMENTUM * center + (1 - _CENTER_MOMENTUM) * seen.mean(dim=0, keepdim=True)
    student.zero_grad()
    loss.backward()
    if step == 0:
      keep("grad", ((name, x.grad) for name, x in student.named_parameters()))
    momentum = 1 - 0.5 * (1 + math.cos(math.pi * step / _STEPS)) * (1 - _MOMENTUM)
    with torch.no_grad():
      for name, x in student.named_parameters():
        if step or not name.startswith("weight_"):
          x.sub_(_RATE * x.grad)
      for old, new in zip(teacher.parameters(), student.parameters()):
        old.copy_(momentum * old + (1 - momentum) * new)
    arrays |= {
      f"first.{step}": crops[0],
      f"second.{step}": crops[1],
      f"local.{step}": torch.stack(crops[2:], 1),
    }
    arrays |= {f"loss.{step}": loss, f"center.{step}": center[0]}
  keep("after", student.named_parameters())
  keep("teacher", teacher.named_parameters())
  np.savez_compressed(path, **{name: np.asarray(x.detach()) for name, x in arrays.items()})


if __name__ == "__main__":
  main(sys.argv[1])
