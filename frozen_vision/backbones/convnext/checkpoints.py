"""Public ConvNeXt checkpoints: Meta's, timm's, torchvision's and transformers' names."""

from collections.abc import Mapping, Sequence
import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Layout:
  """Names of one kind of checkpoint.

  In names, `{s}` is the stage, `{i}` the block, `{even}` 2s and `{odd}` 2s + 1.

  Attributes:
    source: whose it is.
    stem: {our layer of the stem: theirs}.
    downsample: {our layer of a later downsampling: theirs}.
    block: the start of a block's names.
    layers: {our layer of a block: theirs}; LayerScale is a parameter, not a layer with a weight.
    norm: the final norm.
    publishes: what the names of the rows with such checkpoints start with.
  """

  source: str
  stem: Mapping[str, str]
  downsample: Mapping[str, str]
  block: str
  layers: Mapping[str, str]
  norm: str
  publishes: tuple[str, ...] = ("convnext_",)

  def name(self, ours: str) -> str:
    """Their name of one of our variables."""
    parts = ours.split("/")
    leaf = checkpoint.TORCH_LEAVES[parts[-1]]
    if parts[0] == "norm":
      return f"{self.norm}.{leaf}"
    stage = int(parts[1])
    numbers = dict(s=stage, even=2 * stage, odd=2 * stage + 1)
    if parts[2] == "downsample":
      layers = self.downsample if stage else self.stem
      return f"{layers[parts[3]]}.{leaf}".format(**numbers)
    layer = "/".join(parts[4:-1])
    name = f"{self.block}.{self.layers[layer]}".format(i=parts[3], **numbers)
    return name if layer == "scale" else f"{name}.{leaf}"

  @property
  def marker(self) -> str:
    """The name of the first depthwise kernel, which tells one layout from another."""
    return self.name("stages/0/blocks/0/depthwise/kernel")


META = Layout(
  source="Meta",
  stem={"proj": "downsample_layers.0.0", "norm": "downsample_layers.0.1"},
  downsample={"norm": "downsample_layers.{s}.0", "proj": "downsample_layers.{s}.1"},
  block="stages.{s}.{i}",
  layers={
    "depthwise": "dwconv",
    "norm": "norm",
    "mlp/fc1": "pwconv1",
    "mlp/fc2": "pwconv2",
    "scale": "gamma",
  },
  norm="norm",
  publishes=("convnext_", "dinov3_convnext_"),
)
TIMM = Layout(
  source="timm",
  stem={"proj": "stem.0", "norm": "stem.1"},
  downsample={"norm": "stages.{s}.downsample.0", "proj": "stages.{s}.downsample.1"},
  block="stages.{s}.blocks.{i}",
  layers={
    "depthwise": "conv_dw",
    "norm": "norm",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
    "scale": "gamma",
  },
  norm="head.norm",
  publishes=("convnext_", "dinov3_convnext_"),
)
# Stages and downsamplings stand in one list: stem, stage 0, downsampling 1, stage 1, ...
TORCHVISION = Layout(
  source="torchvision",
  stem={"proj": "features.0.0", "norm": "features.0.1"},
  downsample={"norm": "features.{even}.0", "proj": "features.{even}.1"},
  block="features.{odd}.{i}",
  layers={
    "depthwise": "block.0",
    "norm": "block.2",
    "mlp/fc1": "block.3",
    "mlp/fc2": "block.5",
    "scale": "layer_scale",
  },
  norm="classifier.0",
)
TRANSFORMERS = Layout(
  source="transformers",
  stem={
    "proj": "convnext.embeddings.patch_embeddings",
    "norm": "convnext.embeddings.layernorm",
  },
  downsample={
    "norm": "convnext.encoder.stages.{s}.downsampling_layer.0",
    "proj": "convnext.encoder.stages.{s}.downsampling_layer.1",
  },
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
TRANSFORMERS_DINOV3 = Layout(
  source="transformers",
  stem={"proj": "stages.0.downsample_layers.0", "norm": "stages.0.downsample_layers.1"},
  downsample={"norm": "stages.{s}.downsample_layers.0", "proj": "stages.{s}.downsample_layers.1"},
  block="stages.{s}.layers.{i}",
  layers={
    "depthwise": "depthwise_conv",
    "norm": "layer_norm",
    "mlp/fc1": "pointwise_conv1",
    "mlp/fc2": "pointwise_conv2",
    "scale": "gamma",
  },
  norm="layer_norm",
  publishes=("dinov3_convnext_",),
)
LAYOUTS = (META, TIMM, TORCHVISION, TRANSFORMERS, TRANSFORMERS_DINOV3)


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
    name: the row of `VARIANTS`; needed for Meta's own names and timm's, which DINOv3 shares.
    others: names in the file that are no tensors.
    overrides: fields of `ConvNeXtConfig` that carry no weights.

  Raises:
    ValueError: keys that are missing, unexpected or of another shape; all are listed.
  """
  del others
  tensors = _without_model(tensors)
  layout = _layout_of(tensors)
  row = checkpoint.choose_row(
    _rows(layout), lambda config: _fits(config, layout, tensors), path=path, name=name
  )
  config = VARIANTS[row].replace(**overrides)
  module = base.abstract(ConvNeXt, config)
  return checkpoint.map_convolutional(
    module, tensors, layout.name, _IGNORED, path=path, source=layout.source, name=row
  )


def recognises(tensors: Mapping[str, LazyTensor]) -> bool:
  """Whether the names are those of a known layout."""
  return _layout_of(_without_model(tensors)) is not None


def _without_model(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
  """The tensors without `model.`, which newer versions of transformers put before DINOv3's stages."""
  return {key.removeprefix("model."): tensor for key, tensor in tensors.items()}


def _layout_of(tensors: Mapping[str, LazyTensor]) -> Layout | None:
  for layout in LAYOUTS:
    if layout.marker in tensors and tensors[layout.marker].shape[1:] == (1, 7, 7):
      return layout
  return None


def _rows(layout: Layout) -> dict[str, ConvNeXtConfig]:
  """The rows that a source publishes."""
  return {row: config for row, config in VARIANTS.items() if row.startswith(layout.publishes)}


def _fits(config: ConvNeXtConfig, layout: Layout, tensors: Mapping[str, LazyTensor]) -> bool:
  """Whether the file has the blocks and channels of a row."""
  blocks = [(stage, index) for stage, depth in enumerate(config.depths) for index in range(depth)]
  kernels = sum(tensor.shape[1:] == (1, 7, 7) for tensor in tensors.values())
  names = {layout.name(f"stages/{s}/blocks/{i}/depthwise/kernel"): config.channels[s] for s, i in blocks}
  return kernels == len(names) and all(
    name in tensors and tensors[name].shape[0] == channels for name, channels in names.items()
  )
