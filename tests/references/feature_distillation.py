"""Writes what a step of feature distillation gives in PyTorch, and its gradients; needs PyTorch, not JAX.

  python tests/references/feature_distillation.py FILE.npz

An independent implementation of github.com/SwinTransformer/Feature-Distillation for a small ViT student:
relative position biases that all blocks share, biases of queries and values alone, LayerScale, a projector on
every token, and smooth l1 (beta 2) to the teacher's tokens after a LayerNorm without parameters. The file
holds images, the teacher's tokens, every parameter by name, the loss, and `grad.*` of it.
"""

import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional

_GRID, _PATCH, _WIDTH, _HEADS, _DEPTH, _TARGET = 3, 4, 12, 2, 2, 10


class Bias(nn.Module):
  """A table of biases by offset, and three of the class token, as BEiT keeps them."""

  def __init__(self):
    super().__init__()
    side = 2 * _GRID - 1
    self.table = nn.Parameter(torch.zeros(side * side + 3, _HEADS))
    index = torch.zeros(_GRID**2 + 1, _GRID**2 + 1, dtype=torch.long)
    for query in range(_GRID**2):
      for key in range(_GRID**2):
        down = query // _GRID - key // _GRID + _GRID - 1
        right = query % _GRID - key % _GRID + _GRID - 1
        index[query + 1, key + 1] = down * side + right
    index[0, :] = side * side  # class token to patch
    index[:, 0] = side * side + 1  # patch to class token
    index[0, 0] = side * side + 2
    self.index = index

  def forward(self):
    return self.table[self.index].permute(2, 0, 1)


class Block(nn.Module):
  def __init__(self):
    super().__init__()
    self.norm1, self.norm2 = (nn.LayerNorm(_WIDTH, eps=1e-6) for _ in range(2))
    self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH, bias=False)
    self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(_WIDTH)) for _ in range(2))
    self.proj = nn.Linear(_WIDTH, _WIDTH)
    self.fc1, self.fc2 = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)
    self.gamma1, self.gamma2 = (nn.Parameter(torch.zeros(_WIDTH)) for _ in range(2))

  def attend(self, x, bias):
    both = torch.cat([self.q_bias, torch.zeros(_WIDTH), self.v_bias])
    parts = functional.linear(x, self.qkv.weight, both)
    query, key, value = parts.reshape(*x.shape[:2], 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
    scores = (query * (_WIDTH // _HEADS) ** -0.5) @ key.transpose(-1, -2) + bias
    return self.proj((scores.softmax(-1) @ value).transpose(1, 2).reshape(x.shape))

  def forward(self, x, bias):
    x = x + self.gamma1 * self.attend(self.norm1(x), bias)
    return x + self.gamma2 * self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Student(nn.Module):
  def __init__(self):
    super().__init__()
    self.patch = nn.Conv2d(3, _WIDTH, _PATCH, stride=_PATCH)
    self.cls_token = nn.Parameter(torch.zeros(1, 1, _WIDTH))
    self.bias = Bias()
    self.blocks = nn.ModuleList([Block() for _ in range(_DEPTH)])
    self.norm = nn.LayerNorm(_WIDTH, eps=1e-6)
    self.decoder = nn.Conv1d(_WIDTH, _TARGET, 1)

  def forward(self, images):
    x = self.patch(images).flatten(2).transpose(1, 2)
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
    for block in self.blocks:
      x = block(x, self.bias())
    return self.decoder(self.norm(x).transpose(1, 2)).transpose(1, 2)


def main(path):
  torch.manual_seed(0)
  student = Student()
  with torch.no_grad():
    for name, parameter in student.named_parameters():
      offset = float("norm" in name and "weight" in name)
      parameter.copy_(0.4 * torch.randn_like(parameter) + offset)
  images = torch.randn(2, 3, _GRID * _PATCH, _GRID * _PATCH)
  teacher = 3 * torch.randn(2, _GRID**2 + 1, _TARGET) + 1
  whiten = nn.LayerNorm(_TARGET, elementwise_affine=False)
  predicted = student(images)
  target = whiten(teacher).detach()
  assert (predicted - target).abs().max() > 2  # both branches of smooth l1
  loss = nn.SmoothL1Loss(beta=2.0)(predicted, target)
  loss.backward()
  arrays = {"images": images, "teacher": teacher, "predicted": predicted, "loss": loss}
  for name, parameter in student.named_parameters():
    arrays |= {f"parameter.{name}": parameter, f"grad.{name}": parameter.grad}
  np.savez_compressed(path, **{name: tensor.detach().numpy() for name, tensor in arrays.items()})


if __name__ == "__main__":
  main(sys.argv[1])
