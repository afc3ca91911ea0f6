"""Backbones that finished heads stand on: each loaded once, and folded once."""

import dataclasses
import json
import os
from typing import Any

from flax import nnx
import jax.numpy as jnp
import ml_collections

from frozen_vision.backbones import families
from frozen_vision.backbones.swinv2 import folded as fold
from frozen_vision.backbones.swinv2 import model as swinv2
from frozen_vision.freezing import partition
from frozen_vision.tasks import common


@dataclasses.dataclass(frozen=True)
class FrozenBackbone:
  """A backbone whose weights nothing changes.

  Attributes:
    module: the canonical one.
    held: what predicts: `module` folded, or as it is.
    key: identifies its features.
  """

  module: swinv2.SwinV2
  held: Any
  key: dict[str, Any]


class Backbones:
  """Loads each backbone once and folds it once, however many heads stand on it.

  Args:
    given: weights that heads shall take in the place of those that their configs name: whatever
      `load_backbone` reads, or a backbone itself. None: as the configs say.

  Raises:
    ValueError: a module that is not a `SwinV2` as `load_backbone` gives it.
  """

  def __init__(self, given: str | os.PathLike | nnx.Module | None = None):
    if (
      isinstance(given, nnx.Module)
      and not isinstance(given, swinv2.SwinV2)
      or isinstance(given, fold.FoldedSwinV2)
    ):
      raise ValueError(
        f"The backbone is a {type(given).__name__}; give the canonical one, as frozen_vision.load_backbone "
        "returns it. It is folded here."
      )
    self._given = given
    self._modules: dict[str, tuple[swinv2.SwinV2, str]] = {}
    self._held: dict[str, Any] = {}

  @property
  def has_given(self) -> bool:
    return self._given is not None

  def of(self, config: ml_collections.ConfigDict, *, given: bool = False) -> FrozenBackbone:
    """The backbone of a run's config; with `given`, its options on the given weights.

    A given module keeps its own windows and dtype.
    """
    options = config.backbone
    if given and isinstance(self._given, nnx.Module):
      source = "given"
    else:
      parts = [os.fspath(self._given) if given else None, options.to_dict()]
      # Weights by chance depend on the seed too.
      source = json.dumps(parts + [config.seed] * (options.weights in ("init", "random")))
    if source not in self._modules:
      if source == "given":
        module = self._given
      elif given:
        module = families.load_backbone(
          self._given, dtype=jnp.dtype(options.dtype), **common.plain(options.overrides)
        )
      else:
        module = common.build_backbone(config)
      self._modules[source] = module, partition.fingerprint(nnx.state(module, nnx.Param))
    module, fingerprint = self._modules[source]
    held_as = config.frozen_dtype
    key = families.feature_key(module, fingerprint)
    key["held_as"] = fold.describe_held(held_as, folded=options.fold)
    name = f"{source} {key['held_as']} {options.fold}"
    if name not in self._held:
      if options.fold:
        self._held[name] = fold.fold(module, held_as=held_as)
      else:
        graphdef, state = nnx.split(module)
        self._held[name] = nnx.merge(graphdef, partition.cast(state, jnp.dtype(held_as)))
    return FrozenBackbone(module, self._held[name], key)
