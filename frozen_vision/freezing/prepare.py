"""Backbones that finished heads stand on: each loaded once, and folded once."""

import dataclasses
import json
import os
from typing import Any

from flax import nnx
import jax.numpy as jnp

from frozen_vision.backbones import base, families
from frozen_vision.config import Config
from frozen_vision.files import trees
from frozen_vision.freezing import feature_key, partition
from frozen_vision.options import to_dict
from frozen_vision.tasks import common


@dataclasses.dataclass(frozen=True)
class FrozenBackbone:
  """A backbone whose weights nothing changes.

  Attributes:
    module: the canonical one.
    held: what predicts: `module` folded, or as it is.
    key: identifies its features.
  """

  module: base.Backbone
  held: Any
  key: dict[str, Any]


class Backbones:
  """Loads each backbone once and folds it once, however many heads stand on it.

  Args:
    given: weights that heads shall take in the place of those that their configs name: whatever
      `load_backbone` reads, or a backbone itself. None: as the configs say.

  Raises:
    ValueError: what is no backbone as `load_backbone` gives it.
  """

  def __init__(self, given: str | os.PathLike | nnx.Module | None = None):
    if not (given is None or isinstance(given, (str, os.PathLike, base.Backbone))):
      raise ValueError(
        f"The backbone is a {type(given).__name__}; give the canonical one, as frozen_vision.load_backbone "
        "returns it. It is folded here."
      )
    self._given = given
    self._modules: dict[str, tuple[base.Backbone, str]] = {}
    self._held: dict[str, Any] = {}

  @property
  def has_given(self) -> bool:
    return self._given is not None

  def of(self, config: Config, *, given: bool = False) -> FrozenBackbone:
    """The backbone of a run's config; with `given`, its options on the given weights.

    A given module keeps its own windows and dtype.
    """
    options = config.backbone
    if given and isinstance(self._given, nnx.Module):
      source = "given"
    else:
      parts = [os.fspath(self._given) if given else None, to_dict(options)]
      # Weights by chance depend on the seed too.
      source = json.dumps(parts + [config.seed] * (options.weights in ("init", "random")))
    if source not in self._modules:
      if source == "given":
        module = self._given
      elif given:
        module = families.load_backbone(self._given, dtype=jnp.dtype(options.dtype), **options.overrides)
      else:
        module = common.build_backbone(config)
      self._modules[source] = module, partition.fingerprint(trees.weights(module))
    module, fingerprint = self._modules[source]
    storage = config.frozen_dtype
    key = feature_key.feature_key(module, fingerprint, storage=storage, folded=options.fold)
    name = f"{source} {key['storage']} {options.fold}"
    if name not in self._held:
      if options.fold:
        self._held[name] = module.fold(storage=storage)
      else:
        graphdef, state = nnx.split(module)
        self._held[name] = nnx.merge(graphdef, partition.cast(state, jnp.dtype(storage)))
    return FrozenBackbone(module, self._held[name], key)
