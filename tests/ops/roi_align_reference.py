"""RoIAlign as float64 loops over bins and samples: what the vectorised one is compared with."""

import math

import numpy as np


def bilinear(image: np.ndarray, y: float, x: float) -> np.ndarray:
  """Sample of image [h, w, c] at (y, x), with the border rule of mmcv and torchvision."""
  height, width = image.shape[:2]
  if y < -1 or y > height or x < -1 or x > width:
    return np.zeros(image.shape[2])
  y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
  top, left = int(y), int(x)
  bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
  v, u = y - top, x - left
  return (
    (1 - v) * (1 - u) * image[top, left]
    + (1 - v) * u * image[top, right]
    + v * (1 - u) * image[bottom, left]
    + v * u * image[bottom, right]
  )


def roi_align(image, roi, scale, size, ratio=None, max_samples=None) -> np.ndarray:
  """One roi (xyxy, input pixels) from image [h, w, c]: [size, size, c]."""
  image = np.asarray(image, np.float64)
  x1, y1, x2, y2 = (float(v) * scale - 0.5 for v in roi)
  counts, steps = [], []
  for extent in (max(y2 - y1, 0.0), max(x2 - x1, 0.0)):
    count = ratio if ratio else max(math.ceil(extent / size), 1)
    counts.append(min(count, max_samples) if max_samples and not ratio else count)
    steps.append(extent / size)
  out = np.zeros((size, size, image.shape[2]))
  for p in range(size):
    for q in range(size):
      for i in range(counts[0]):
        for j in range(counts[1]):
          y = y1 + p * steps[0] + (i + 0.5) * steps[0] / counts[0]
          x = x1 + q * steps[1] + (j + 0.5) * steps[1] / counts[1]
          out[p, q] += bilinear(image, y, x)
  return out / (counts[0] * counts[1])


def odd_rois(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
  """`count` >= 12 rois [count, 4]: random ones, some beyond the image, and special cases."""
  corner = rng.uniform(-0.2, 0.9, (count, 2)) * [width, height]
  sides = np.exp(rng.uniform(np.log(2), np.log(width), (count, 2)))
  rois = np.concatenate([corner, corner + sides], axis=1)
  special = [
    (0, 0, width, height),  # the whole image
    (-width, -height, 2 * width, 2 * height),  # three times the image
    (2 * width, 2 * height, 3 * width, 3 * height),  # outside
    (8, 8, 8 + 28, 8 + 56),  # whole numbers of samples per bin: 28 / 4 / 7 = 1
    (4, 12, 4 + 56, 12 + 28),
    (10.3, 20.6, 10.3, 20.6),  # a point
    (10.3, 20.6, 30.1, 20.6),  # a line
    (0, 5.2, width, 7.9),  # as flat as can be
    (3.1, 0, 5.0, height),
    (0, 0, 0, 0),  # padding
  ]
  rois[: len(special)] = special
  return rois.astype(np.float32)
