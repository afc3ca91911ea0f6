"""Writes losses, gradients and detections of a RetinaNet head in PyTorch; needs PyTorch, not JAX.

  python tests/references/retinanet.py FILE.npz

An independent implementation of Model Garden's RetinaNet head and losses on mmdet's anchors: two levels, two
convolutions with a BatchNorm for each level, three classes, in training; an image without objects is in the
batch. The file holds the maps, the truth, every parameter by name, anchors, logits and deltas, the two
losses, the gradients of their sum, and detections after NMS in a plain loop.
"""

import math
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional

_CHANNELS, _WIDTH, _CLASSES = 6, 8, 3
_STRIDES, _SIZE = (8, 16), (64, 96)
_SCALES, _RATIOS = (2.0, 3.0), (0.5, 1.0, 2.0)
_ANCHORS = len(_SCALES) * len(_RATIOS)
_CONTENT = ((64, 96), (50, 70), (64, 90))  # of each image


class Tower(nn.Module):
  def __init__(self, outputs):
    super().__init__()
    self.convs = nn.ModuleList(
      [nn.Conv2d(inputs, _WIDTH, 3, padding=1, bias=False) for inputs in (_CHANNELS, _WIDTH)]
    )
    self.norms = nn.ModuleList(
      [nn.ModuleList([nn.BatchNorm2d(_WIDTH, eps=1e-3) for _ in _STRIDES]) for _ in range(2)]
    )
    self.outputs = nn.Conv2d(_WIDTH, outputs, 3, padding=1)

  def forward(self, x, level):
    for conv, norms in zip(self.convs, self.norms):
      x = functional.relu(norms[level](conv(x)))
    x = self.outputs(x)
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, x.shape[1] // _ANCHORS)


def anchors_of(height, width, stride):
  found = []
  for row in range(height):
    for column in range(width):
      for ratio in _RATIOS:
        for scale in _SCALES:
          w, h = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
          x, y = column * stride, row * stride
          found.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
  return torch.tensor(found)


def iou(a, b):
  left = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
  top = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
  shared = left * top
  return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def match(anchors, boxes, content):
  """Index of the object of every anchor; -1 for background, -2 for those that are left out."""
  table = [[iou(anchor, box) for box in boxes] for anchor in anchors.tolist()]
  usable = [(a[0] + a[2]) / 2 < content[1] and (a[1] + a[3]) / 2 < content[0] for a in anchors.tolist()]
  found = []
  for row, use in zip(table, usable):
    best = max(row, default=0.0)
    found.append(-2 if not use else row.index(best) if best >= 0.5 else -1 if best < 0.4 else -2)
  for index in range(len(boxes)):
    most = max(row[index] for row, use in zip(table, usable) if use)
    for at, (row, use) in enumerate(zip(table, usable)):
      if use and row[index] == most:
        found[at] = index
  return found


def encode(anchor, box):
  (ax, ay, aw, ah), (bx, by, bw, bh) = (
    ((r[0] + r[2]) / 2, (r[1] + r[3]) / 2, r[2] - r[0], r[3] - r[1]) for r in (anchor, box)
  )
  return torch.tensor([(bx - ax) / aw, (by - ay) / ah, math.log(bw / aw), math.log(bh / ah)])


def decode(anchor, delta, content):
  ax, ay = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
  aw, ah = anchor[2] - anchor[0], anchor[3] - anchor[1]
  x, y, w, h = ax + aw * delta[0], ay + ah * delta[1], aw * math.exp(delta[2]), ah * math.exp(delta[3])
  height, width = content
  box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
  return [min(max(value, 0.0), limit) for value, limit in zip(box, (width, height, width, height))]


def losses(logits, deltas, anchors, truth):
  targets, weights, box_loss, positives = torch.zeros_like(logits), torch.ones_like(logits), 0.0, 0
  for image, (boxes, labels) in enumerate(truth):
    for at, index in enumerate(match(anchors, boxes, _CONTENT[image])):
      if index == -2:
        weights[image, at] = 0
      elif index >= 0:
        positives += 1
        targets[image, at, labels[index]] = 1
        wanted = encode(anchors[at].tolist(), boxes[index])
        box_loss = box_loss + functional.huber_loss(deltas[image, at], wanted, delta=0.1)
  right = torch.sigmoid(logits) * targets + (1 - torch.sigmoid(logits)) * (1 - targets)
  alpha = 0.25 * targets + 0.75 * (1 - targets)
  entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
  focal = (weights * alpha * (1 - right) ** 1.5 * entropy).sum()
  return focal / (positives + 1), 50 * box_loss / (positives + 1)


def detections(logits, deltas, anchors, content):
  """(box, score, class) after NMS at 0.5 per class, from a score of 0.05 on, best first."""
  pairs = []
  for at, row in enumerate(torch.sigmoid(logits).tolist()):
    box = decode(anchors[at].tolist(), deltas[at].tolist(), content)
    if box[2] > box[0] and box[3] > box[1]:
      pairs += [(score, label, box) for label, score in enumerate(row) if score > 0.05]
  kept = []
  for score, label, box in sorted(pairs, key=lambda pair: -pair[0]):
    if all(label != other or iou(box, b) <= 0.5 for _, other, b in kept):
      kept.append((score, label, box))
  return kept


def main(path):
  torch.manual_seed(0)
  head = nn.ModuleDict({"classes": Tower(_ANCHORS * _CLASSES), "boxes": Tower(_ANCHORS * 4)}).train()
  for name, parameter in head.named_parameters():
    with torch.no_grad():
      parameter.copy_(0.15 * torch.randn_like(parameter) + float("norms" in name and "weight" in name))
  maps = [
    torch.randn(3, _CHANNELS, _SIZE[0] // stride, _SIZE[1] // stride, requires_grad=True)
    for stride in _STRIDES
  ]
  anchors = torch.cat([anchors_of(*map_.shape[2:], stride) for map_, stride in zip(maps, _STRIDES)])
  truth = [
    ([[4.0, 6.0, 30.0, 20.0], [20.0, 8.0, 40.0, 50.0]], [2, 0]),
    ([], []),
    ([[60.0, 31.0, 69.0, 44.0]], [1]),
  ]
  logits, deltas = (
    torch.cat([head[name](map_, level) for level, map_ in enumerate(maps)], 1)
    for name in ("classes", "boxes")
  )
  class_loss, box_loss = losses(logits, deltas, anchors, truth)
  (class_loss + box_loss).backward()
  arrays = {"anchors": anchors, "logits": logits, "deltas": deltas, "class": class_loss, "box": box_loss}
  for level, map_ in enumerate(maps):
    arrays |= {f"map.{level}": map_, f"grad.map.{level}": map_.grad}
  for name, parameter in head.named_parameters():
    arrays |= {f"parameter.{name}": parameter, f"grad.{name}": parameter.grad}
  arrays = {name: tensor.detach().numpy() for name, tensor in arrays.items()}
  arrays["content"] = np.array(_CONTENT)
  for image, (boxes, labels) in enumerate(truth):
    arrays |= {f"boxes.{image}": np.array(boxes).reshape(-1, 4), f"labels.{image}": np.array(labels, int)}
    found = detections(logits[image].detach(), deltas[image].detach(), anchors, _CONTENT[image])
    arrays[f"found.{image}"] = np.array([[score, label, *box] for score, label, box in found], np.float32)
  np.savez_compressed(path, **arrays)


if __name__ == "__main__":
  main(sys.argv[1])
