"""What tasks share: the backbone of a config, and paths that must exist."""

import os
import pathlib
from typing import Any

from flax import nnx
import jax.numpy as jnp
import ml_collections

from frozen_vision.backbones import build
from frozen_vision.backbones import named_weights


_HOW_TO_GET_WEIGHTS = (
    "Download a SwinV2 checkpoint (Microsoft's, SimMIM's, timm's or transformers'; SwinV2-G was never published) and "
    "write it in our format with python -m frozen_vision.convert SOURCE FILE, or give it as it is with "
    "--config.backbone.weights=SOURCE; or give the name of published weights, such as "
    "--config.backbone.weights=swinv2_base_window12_192_22k, to have them fetched; "
    "--config.backbone.weights=random trains on a random backbone.")


def backbone_config() -> ml_collections.ConfigDict:
  """Options of the backbone."""
  return ml_collections.ConfigDict(dict(
      name="swinv2_nano",
      # shipped: the weights inside the package; init: as initialised for training; random: the same with the
      # norms that end residual branches at one, since a SwinV2 as initialised is the identity in every block;
      # a name of backbones/named_weights.py, fetched once; or a file, ours or a public SwinV2 checkpoint.
      weights="shipped",
      dtype="float32",
      # Where nothing of it trains: position biases, logit scales and biases are computed once, blocks scanned.
      fold=True,
      overrides=ml_collections.ConfigDict(dict(), type_safe=False),  # fields of SwinV2Config
  ))


def build_backbone(config: ml_collections.ConfigDict) -> nnx.Module:
  """The backbone that `config.backbone` names, with its weights.

  Raises:
    FileNotFoundError: no such weights.
    ValueError: an unknown name or option; weights of another network than the one that is named.
  """
  options = config.backbone
  overrides = _overrides(config)
  dtype = jnp.dtype(options.dtype)
  if options.weights in ("random", "init"):
    if options.weights == "random":
      overrides.setdefault("residual_norm_init", 1.0)
    return build.build_backbone(
        options.name, dtype=dtype, rngs=nnx.Rngs(config.seed), **overrides)
  source = options.name
  if options.weights in named_weights.TABLE:
    source = options.weights
  elif options.weights != "shipped":
    source = existing_path(options.weights, "backbone.weights", _HOW_TO_GET_WEIGHTS)
  backbone = build.load_backbone(source, dtype=dtype, **overrides)
  named = build.backbone_config(options.name, **overrides)
  for field in ("embed_dim", "depths", "num_heads", "extra_norm_interval"):
    found, wanted = getattr(backbone.config, field), getattr(named, field)
    if found != wanted:
      raise ValueError(
          f"config.backbone.weights: {source} holds a network with {field} = {found}, but "
          f"config.backbone.name = {options.name} has {wanted}. Give the weights of that backbone, or the name of "
          "the backbone of these weights.")
  return backbone


def _overrides(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Fields of the backbone's config that `config.backbone.overrides` replaces."""
  return {
      key: tuple(value) if isinstance(value, (list, tuple)) else value
      for key, value in config.backbone.overrides.items()
  }


def existing_path(path: str | os.PathLike, option: str, how: str = "") -> pathlib.Path:
  """The path, if it exists.

  Raises:
    FileNotFoundError: names the option, the absolute path that was looked at, and `how` to get it.
  """
  found = pathlib.Path(path).expanduser()
  if not found.exists():
    raise FileNotFoundError(
        f"config.{option}: {found.absolute()} does not exist. "
        f"{how or 'Give an existing path with --config.' + option + '=PATH.'}")
  return found


def layer_of(path: str, config: ml_collections.ConfigDict) -> int:
  """Depth of a parameter for layer-wise decay: 0 is the patch embedding, the last the head.

  As SimMIM's finetuning: blocks count from 1, and a merging shares the depth of the block before it.
  """
  depths = build.backbone_config(config.backbone.name, **_overrides(config)).depths
  parts = path.split("/")
  if parts[:2] == ["backbone", "patch_embed"]:
    return 0
  if parts[:2] == ["backbone", "stages"]:
    stage = int(parts[2])
    if parts[3] == "downsample":
      return sum(depths[:stage + 1])
    return sum(depths[:stage]) + int(parts[4]) + 1
  return sum(depths) + 1
