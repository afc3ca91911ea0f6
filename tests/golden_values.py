"""Weights and inputs of the golden files, generated from their names (tests/golden/README.md)."""

import zlib

import numpy as np


def values(seed: int, name: str, shape, scale: float = 1.0, offset: float = 0.0) -> np.ndarray:
  """The float32 array that the rule of the golden files assigns to `name`."""
  rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
  return (rng.standard_normal(shape) * scale).astype(np.float32) + np.float32(offset)


def uniform(seed: int, name: str, shape) -> np.ndarray:
  """A float32 array in [0, 1) of the same rule, such as points of an image."""
  return np.random.default_rng([seed, zlib.crc32(name.encode())]).random(shape, np.float32)


def state_dict(spec: dict) -> dict[str, np.ndarray]:
  """All weights of a golden `.json`: {state-dict name: array in PyTorch layout}."""
  weights = {}
  for name, entry in spec["state_dict"].items():
    weights[name] = values(spec["seed"], name, entry["shape"], entry["scale"], entry["offset"])
    if entry.get("exp"):  # a variance
      weights[name] = np.exp(weights[name])
  return weights
