"""Public ConvNeXt checkpoints: Meta's (DINOv3's too), timm's, torchvision's and transformers' names."""

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import Any

from frozen_vision.backbones import base, checkpoint
from frozen_vision.backbones.convnext.architecture import ConvNeXtConfig, VARIANTS
from frozen_vision.backbones.convnext.model import ConvNeXt
from frozen_vision.files.tensors import LazyTensor

_IGNORED: checkpoint.Ignored = (
  (r"head\.(fc\.)?(weight|bias)", "classifier"),
  (r"classifier(\.2)?\.(weight|bias)", "classifier"),
  (r"norms\.3\.(weight|bias)", "the final norm a second time"),
  (r"mask_token", "mask token of the pretraining"),
)
_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def map_tensors(
  tensors: Mapping[str, LazyTensor],
  path: pathlib.Path,
  *,
  name: str | None = None,
  others: Sequence[str] = (),
  **overrides: Any,
) -> checkpoint.Checkpoint:
  """A public ConvNeXt mapped onto our variables.

  Args:
    tensors: of the file, by name.
    path: the file, for errors.
    name: the row of `VARIANTS`; needed for Meta's own names, which DINOv3 shares.
    others: names in the file that are no tensors.
    overrides: fields of `ConvNeXtConfig` that carry no weights.

  Raises:
    ValueError: keys that are missing, unexpected or of another shape; all are listed.
  """
  del others
  source, naming = _SOURCES[_source_of(tensors)]
  row = checkpoint.choose_row(
    _rows(source), lambda config: _fits(config, naming, tensors), path=path, name=name
  )
  config = VARIANTS[row].replace(**overrides)
  module = base.abstract(ConvNeXt, config)
  return checkpoint.map_convolutional(module, tensors, naming, _IGNORED, path=path, source=source, name=row)


def recognises(tensors: Mapping[str, LazyTensor]) -> bool:
  """Whether the names are those of a known layout."""
  return _source_of(tensors) is not None


def _name(
  ours: str,
  *,
  downsample: tuple[str, str],
  block: str,
  layers: Mapping[str, str],
  norm: str,
  stem: Any = None,
) -> str:
  """A name by the pieces of a layout.

  Args:
    downsample: names of a downsampling's norm and convolution; `{s}` is the stage.
    block: the start of a block's names; `{s}` and `{i}` are the stage and the block.
    layers: {our layer of a block: theirs}.
    norm: the final norm.
    stem: names of the stem's convolution and norm, where they are not those of a downsampling 0.
  """
  parts = ours.split("/")
  leaf = _LEAF[parts[-1]]
  if parts[0] == "norm":
    return f"{norm}.{leaf}"
  stage = int(parts[1])
  if parts[2] == "downsample":
    norm_name, conv_name = downsample
    if stage == 0:
      conv_name, norm_name = stem
    return f"{(norm_name if parts[3] == 'norm' else conv_name).format(s=stage)}.{leaf}"
  start = block.format(s=stage, i=parts[3])
  layer = "/".join(parts[4:-1])
  theirs = layers[layer]
  return f"{start}.{theirs}" if layer == "scale" else f"{start}.{theirs}.{leaf}"


def _meta(ours: str) -> str:
  return _name(
    ours,
    stem=("downsample_layers.0.0", "downsample_layers.0.1"),
    downsample=("downsample_layers.{s}.0", "downsample_layers.{s}.1"),
    block="stages.{s}.{i}",
    layers={
      "depthwise": "dwconv",
      "norm": "norm",
      "mlp/fc1": "pwconv1",
      "mlp/fc2": "pwconv2",
      "scale": "gamma",
    },
    norm="norm",
  )


def _timm(ours: str) -> str:
  return _name(
    ours,
    stem=("stem.0", "stem.1"),
    downsample=("stages.{s}.downsample.0", "stages.{s}.downsample.1"),
    block="stages.{s}.blocks.{i}",
    layers={
      "depthwise": "conv_dw",
      "norm": "norm",
      "mlp/fc1": "mlp.fc1",
      "mlp/fc2": "mlp.fc2",
      "scale": "gamma",
    },
    norm="head.norm",
  )


def _torchvision(ours: str) -> str:
  # Stages and downsamplings stand in one list: stem, stage 0, downsampling 1, stage 1, ...
  parts = ours.split("/")
  at = 2 * int(parts[1]) + (parts[2] != "downsample") if parts[0] == "stages" else 0
  return _name(
    ours,
    stem=("features.0.0", "features.0.1"),
    downsample=(f"features.{at}.0", f"features.{at}.1"),
    block=f"features.{at}.{{i}}",
    layers={
      "depthwise": "block.0",
      "norm": "block.2",
      "mlp/fc1": "block.3",
      "mlp/fc2": "block.5",
      "scale": "layer_scale",
    },
    norm="classifier.0",
  )


def _transformers(ours: str) -> str:
  return _name(
    ours,
    stem=("convnext.embeddings.patch_embeddings", "convnext.embeddings.layernorm"),
    downsample=(
      "convnext.encoder.stages.{s}.downsampling_layer.0",
      "convnext.encoder.stages.{s}.downsampling_layer.1",
    ),
    block="convnext.encoder.stages.{s}.layers.{i}",
    layers={
      "depthwise": "dwconv",
      "norm": "layernorm",
      "mlp/fc1": "pwconv1",
      "mlp/fc2": "pwconv2",
      "scale": "layer_scale_parameter",
    },
    norm="convnext.layernorm",
  )


# {the name of the first depthwise kernel, by which a layout is told: (whose it is, names)}
_SOURCES: dict[str, tuple[str, Callable[[str], str]]] = {
  "stages.0.0.dwconv.weight": ("Meta", _meta),
  "stages.0.blocks.0.conv_dw.weight": ("timm", _timm),
  "features.1.0.block.0.weight": ("torchvision", _torchvision),
  "convnext.encoder.stages.0.layers.0.dwconv.weight": ("transformers", _transformers),
}


def _source_of(tensors: Mapping[str, LazyTensor]) -> str | None:
  depthwise = [key for key in _SOURCES if key in tensors and tensors[key].shape[1:] == (1, 7, 7)]
  return depthwise[0] if depthwise else None


def _rows(source: str) -> dict[str, ConvNeXtConfig]:
  """The rows that a source publishes; torchvision has no DINOv3, and transformers' has other names."""
  dinov3 = source in ("Meta", "timm")
  return {row: config for row, config in VARIANTS.items() if dinov3 or not row.startswith("dinov3")}


def _fits(config: ConvNeXtConfig, naming: Callable[[str], str], tensors: Mapping[str, LazyTensor]) -> bool:
  """Whether the file has the blocks and channels of a row."""
  blocks = [(stage, index) for stage, depth in enumerate(config.depths) for index in range(depth)]
  kernels = sum(tensor.shape[1:] == (1, 7, 7) for tensor in tensors.values())
  names = {naming(f"stages/{s}/blocks/{i}/depthwise/kernel"): config.channels[s] for s, i in blocks}
  return kernels == len(names) and all(
    name in tensors and tensors[name].shape[0] == channels for name, channels in names.items()
  )
