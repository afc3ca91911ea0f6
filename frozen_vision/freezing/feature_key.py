"""The identity of a frozen backbone's features: a head fits no others."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp

from frozen_vision.backbones import base

# Fields of keys that the first edition wrote, and what they are called now.
_RENAMED = {"held_as": "storage"}
# Fields that are younger than some checkpoints, with the values that all backbones had before.
_ADDED = {"input_scale": 1.0}


def feature_key(
  backbone: base.Backbone,
  fingerprint: str,
  *,
  storage: str = "float32",
  folded: bool = True,
  levels: int | None = None,
) -> dict[str, Any]:
  """Everything that changes a frozen backbone's features, as JSON.

  Args:
    fingerprint: of all its variables as they were loaded (`files.trees.fingerprint`).
    storage: how its matrices are stored, one of `layers.storage.KINDS`.
    folded: whether its folded program computes the features.
    levels: how many of the feature levels are read; all by default.
  """
  preprocessing = dataclasses.asdict(backbone.preprocessing)
  return {
    "weights": fingerprint,
    **backbone.feature_options(),
    "strides": [spec.stride for spec in backbone.feature_specs[:levels]],
    **{name: list(value) if isinstance(value, tuple) else value for name, value in preprocessing.items()},
    "dtype": jnp.dtype(backbone.dtype).name,
    "storage": describe_storage(storage, folded=folded),
  }


def describe_storage(storage: str, *, folded: bool) -> str:
  """How frozen weights are stored, in words.

  Rounded, norms and position biases of a module are others than those that folding keeps in float32.
  """
  return storage if folded or storage == "float32" else f"{storage}, unfolded"


def current(key: Mapping[str, Any] | None) -> dict[str, Any] | None:
  """A key of a checkpoint as it would be written today, so that it can be compared; None stays None."""
  if key is None:
    return None
  renamed = {_RENAMED.get(name, name): value for name, value in key.items()}
  return renamed | {name: value for name, value in _ADDED.items() if name not in renamed}
