"""Public EfficientNet checkpoints: timm's names, torchvision's, and those of the Lite packages."""

from collections.abc import Callable, Mapping, Sequence
import functools
import pathlib
from typing import Any

from frozen_vision.backbones import base, checkpoint
from frozen_vision.backbones.efficientnet.model import EfficientNet, EfficientNetConfig, VARIANTS
from frozen_vision.files.tensors import LazyTensor

_IGNORED: checkpoint.Ignored = (
  (r".*num_batches_tracked", "batches counted by BatchNorm, of no use in inference"),
  (r"(classifier|classifier\.1|_fc|fc)\.(weight|bias)", "classifier"),
)


def map_tensors(
  tensors: Mapping[str, LazyTensor],
  path: pathlib.Path,
  *,
  name: str | None = None,
  others: Sequence[str] = (),
  **overrides: Any,
) -> checkpoint.Checkpoint:
  """A public EfficientNet mapped onto our variables.

  Args:
    tensors: of the file, by name.
    path: the file, for errors.
    name: the row of `VARIANTS`; needed for timm's B0 to B7, whose padding the names do not tell.
    others: names in the file that are no tensors.
    overrides: fields of `EfficientNetConfig` that carry no weights.

  Raises:
    ValueError: keys that are missing, unexpected or of another shape; all are listed.
  """
  del others
  source, naming = _SOURCES[_source_of(tensors)]
  shapes = {key: tensor.shape for key, tensor in tensors.items()}
  rows = {
    row: config
    for row, config in VARIANTS.items()
    if source != "torchvision" or not (config.same_padding or config.lite)
  }
  row = checkpoint.choose_row(
    rows, functools.partial(_fits, naming=naming, shapes=shapes), path=path, name=name
  )
  config = VARIANTS[row].replace(**overrides)
  module = base.abstract(EfficientNet, config)
  return checkpoint.map_convolutional(
    module,
    tensors,
    lambda ours: naming(ours, config),
    _IGNORED,
    path=path,
    source=source,
    name=row,
  )


def recognises(tensors: Mapping[str, LazyTensor]) -> bool:
  """Whether the names are those of a known layout."""
  return _source_of(tensors) is not None


def timm_name(ours: str, config: EfficientNetConfig) -> str:
  """timm's name of one of our variables."""
  parts = ours.split("/")
  if parts[0] == "stem":
    return checkpoint.convolution_leaf("conv_stem", "bn1", parts[2:])
  if parts[0] == "head":
    return checkpoint.convolution_leaf("conv_head", "bn2", parts[2:])
  stage, index, layer = int(parts[1]), parts[3], parts[4]
  block = f"blocks.{stage}.{index}"
  expands = "expand" in config.block(stage, int(index))
  names = (
    {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "project": ("conv_pwl", "bn3")}
    if expands
    else {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
  ) | {"squeeze": ("se.conv_reduce", ""), "excite": ("se.conv_expand", "")}
  conv, norm = names[layer]
  return f"{block}.{checkpoint.convolution_leaf(conv, norm, parts[5:])}"


def torchvision_name(ours: str, config: EfficientNetConfig) -> str:
  """torchvision's name of one of our variables."""
  parts = ours.split("/")
  if parts[0] == "stem":
    return f"features.0.{checkpoint.convolution_leaf('0', '1', parts[2:])}"
  if parts[0] == "head":
    return f"features.{len(config.stage_depths()) + 1}.{checkpoint.convolution_leaf('0', '1', parts[2:])}"
  stage, index, layer = int(parts[1]), int(parts[3]), parts[4]
  order = ["expand"] if "expand" in config.block(stage, index) else []
  order += ["depthwise", "squeeze", "project"]
  block = f"features.{stage + 1}.{index}.block.{order.index('squeeze' if layer == 'excite' else layer)}"
  if layer in ("squeeze", "excite"):
    return f"{block}.{checkpoint.convolution_leaf('fc1' if layer == 'squeeze' else 'fc2', '', parts[5:])}"
  return f"{block}.{checkpoint.convolution_leaf('0', '1', parts[5:])}"


def flat_name(ours: str, config: EfficientNetConfig) -> str:
  """The name of one of our variables in ports that number all blocks, such as the Lite packages."""
  parts = ours.split("/")
  if parts[0] == "stem":
    return checkpoint.convolution_leaf("_conv_stem", "_bn0", parts[2:])
  if parts[0] == "head":
    return checkpoint.convolution_leaf("_conv_head", "_bn1", parts[2:])
  block = f"_blocks.{sum(config.stage_depths()[: int(parts[1])]) + int(parts[3])}"
  conv, norm = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "squeeze": ("_se_reduce", ""),
    "excite": ("_se_expand", ""),
    "project": ("_project_conv", "_bn2"),
  }[parts[4]]
  return f"{block}.{checkpoint.convolution_leaf(conv, norm, parts[5:])}"


# {the name of the first depthwise kernel, by which a layout is told: (whose it is, names)}
_SOURCES = {
  "blocks.0.0.conv_dw.weight": ("timm", timm_name),
  "_blocks.0._depthwise_conv.weight": ("a port with numbered blocks", flat_name),
  "features.1.0.block.0.0.weight": ("torchvision", torchvision_name),
}


def _source_of(tensors: Mapping[str, LazyTensor]) -> str | None:
  depthwise = [key for key in _SOURCES if key in tensors and tensors[key].shape[1] == 1]
  return depthwise[0] if depthwise else None


def _fits(
  config: EfficientNetConfig, *, naming: Callable[..., str], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
  """Whether the file has the convolutions and channels of a row."""
  blocks = [(stage, index) for stage, depth in enumerate(config.stage_depths()) for index in range(depth)]
  convolutions = 2 + sum(len(config.block(*block)) for block in blocks)
  if convolutions != sum(len(shape) == 4 for shape in shapes.values()):
    return False
  for stage, index in blocks:
    spec = config.block(stage, index)["project"]
    name = naming(f"stages/{stage}/blocks/{index}/project/kernel", config)
    if shapes.get(name) != (spec.outputs, spec.inputs, 1, 1):
      return False
  return True
