"""PyTorch's layouts of a layer's weight as ours, a function each: None for a shape that no such layer has."""

from collections.abc import Callable

import numpy as np

Layout = Callable[[np.ndarray], np.ndarray | None]


def vector(x: np.ndarray) -> np.ndarray | None:
  return x if x.ndim == 1 else None


def linear(x: np.ndarray) -> np.ndarray | None:
  return x.T if x.ndim == 2 else None


def conv(x: np.ndarray) -> np.ndarray | None:
  return x.transpose(2, 3, 1, 0) if x.ndim == 4 else None  # OIHW -> HWIO


def pointwise(x: np.ndarray) -> np.ndarray | None:
  """A 1 x 1 convolution as the matrix product it is."""
  return x[:, :, 0, 0].T if x.ndim == 4 and x.shape[2:] == (1, 1) else None
