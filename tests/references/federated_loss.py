"""Writes federated and class-balanced losses of rois and their gradients; needs PyTorch, not JAX.

  python tests/references/federated_loss.py FILE.npz

An independent implementation, roi by roi and class by class: binary cross-entropies of the classes that count
(those drawn for the batch, those that an image was searched for in vain, and a roi's own; not those of which
an image marks some objects only), divided by the number of rois; and the cross-entropy of a softmax whose
rois weigh (1 - beta) / (1 - beta^n) of their class.
"""

import sys

import numpy as np
import torch
from torch.nn import functional

_IMAGES, _ROIS, _CLASSES, _BETA = 2, 7, 6, 0.99


def federated(logits, labels, valid, drawn, negative, not_exhaustive):
  total, count = 0.0, 0
  for image in range(_IMAGES):
    for roi in range(_ROIS):
      if not valid[image, roi]:
        continue
      count += 1
      for label in range(_CLASSES):
        own = int(labels[image, roi]) == label
        if not own and (label in not_exhaustive[image] or label not in drawn | negative[image]):
          continue
        wanted = torch.tensor(1.0 if own else 0.0)
        total = total + functional.binary_cross_entropy_with_logits(logits[image, roi, label], wanted)
  return total / count


def balanced(logits, labels, valid, objects):
  weights = [(1 - _BETA) / (1 - _BETA**n) for n in objects]
  mean = sum(weights) / len(weights)
  total = 0.0
  for image, roi in np.argwhere(valid):
    label = int(labels[image, roi])
    weight = weights[label] / mean if label < _CLASSES else 1.0
    total = total - weight * torch.log_softmax(logits[image, roi], -1)[label]
  return total / int(valid.sum())


def main(path):
  rng = np.random.default_rng(0)
  logits = torch.tensor(
    rng.standard_normal((_IMAGES, _ROIS, _CLASSES + 1)).astype(np.float32), requires_grad=True
  )
  labels = np.array([[0, 0, 6, 6, 3, 6, 2], [6, 6, 3, 6, 6, 1, 5]], np.int32)
  valid = np.array([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0]], bool)
  negative, not_exhaustive = [{4}, {0, 2}], [{0}, {5, 1}]
  drawn, objects = {0, 1, 3, 5}, np.array([900, 100, 3, 40, 1, 7])
  arrays = {"logits": logits.detach().numpy(), "labels": labels, "valid": valid, "objects": objects}
  for name, found in (
    ("federated", federated(logits, labels, valid, drawn, negative, not_exhaustive)),
    ("balanced", balanced(logits, labels, valid, objects)),
  ):
    [gradient] = torch.autograd.grad(found, logits)
    arrays |= {name: found.detach().numpy(), f"grad.{name}": gradient.numpy()}
  for name, sets in (("drawn", [drawn]), ("negative", negative), ("not_exhaustive", not_exhaustive)):
    arrays[name] = np.array([[label in one for label in range(_CLASSES)] for one in sets])
  arrays["drawn"] = arrays["drawn"][0]
  np.savez_compressed(path, **arrays)


if __name__ == "__main__":
  main(sys.argv[1])
