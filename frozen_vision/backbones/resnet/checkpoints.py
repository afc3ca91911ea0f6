"""Public ResNet checkpoints: torchvision's and timm's names, and those of self-supervised pretraining.

Self-supervised checkpoints keep a torchvision ResNet below a prefix, beside projection heads, momentum
encoders and queues. `PREFIXES` names the encoder that is taken, and `IGNORED` what may be left over.
"""

from collections.abc import Mapping, Sequence
import pathlib
import re
from typing import Any

from frozen_vision.backbones import base, checkpoint
from frozen_vision.backbones.resnet.model import ResNet, ResNetConfig, VARIANTS
from frozen_vision.files.tensors import LazyTensor

# Prefixes of the encoder's names; the first that a file has is taken. `module.` may stand before each
# (DistributedDataParallel).
PREFIXES = (
  "encoder_q.",  # MoCo v1 and v2, PCL
  "base_encoder.",  # MoCo v3
  "encoder.",  # InsDis, PIRL, InfoMin
  "backbone.",  # DINO, Barlow Twins, VICReg
  "online_encoder.",  # BYOL
  "",
)
IGNORED: checkpoint.Ignored = (
  (r"(.*\.)?num_batches_tracked", "batches counted by BatchNorm, of no use in inference"),
  (r"(fc|head|last_linear)\..*", "classifier or projection head"),
  (r"(encoder_q|base_encoder|encoder|backbone|online_encoder)\.(fc|head|last_linear)\..*", "projection head"),
  (
    r"(encoder_k|momentum_encoder|target_encoder|encoder_jig|model_ema)\..*",
    "momentum encoder or second branch",
  ),
  (r"(queue|queue2|queue_ptr|index_queue|memory.*|logit_scale)", "queue or memory bank"),
  (
    r"(projection_head|projector|predictor|prototypes|mlp|head_jig|jig.*|online_predictor|online_projector|bn)(\d*)\..*",
    "projection head, predictor or prototypes",
  ),
)


def map_tensors(
  tensors: Mapping[str, LazyTensor],
  path: pathlib.Path,
  *,
  name: str | None = None,
  others: Sequence[str] = (),
  **overrides: Any,
) -> checkpoint.Checkpoint:
  """A public ResNet mapped onto our variables.

  Args:
    tensors: of the file, by name.
    path: the file, for errors.
    name: the row of `VARIANTS`; needed where several rows have the sizes of the file.
    others: names in the file that are no tensors.
    overrides: fields of `ResNetConfig` that carry no weights.

  Raises:
    ValueError: keys that are missing, unexpected or of another shape; all are listed.
  """
  del others
  tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
  prefix = next((prefix for prefix in PREFIXES if _is_resnet(tensors, prefix)), "")
  depths = _depths(tensors, prefix)
  sizes = {key.removeprefix(prefix): tensor.shape for key, tensor in tensors.items()}
  row = checkpoint.choose_row(VARIANTS, lambda config: _fits(config, depths, sizes), path=path, name=name)
  config = VARIANTS[row].replace(**overrides)
  module = base.abstract(ResNet, config)
  return checkpoint.map_convolutional(
    module,
    tensors,
    lambda ours: prefix + torch_name(ours, config),
    IGNORED,
    path=path,
    source=f"torchvision or timm, below {prefix!r}" if prefix else "torchvision or timm",
    name=row,
  )


def recognises(tensors: Mapping[str, LazyTensor]) -> bool:
  """Whether some prefix leads to the names of a ResNet."""
  names = {key.removeprefix("module.") for key in tensors}
  return any(_is_resnet(names, prefix) for prefix in PREFIXES)


def torch_name(ours: str, config: ResNetConfig) -> str:
  """Torchvision's (and for ResNet-RS timm's) name of one of our variables."""
  parts = ours.split("/")
  if parts[0] == "stem":
    conv, norm = _stem_names(config)[parts[1]]
  else:
    block = f"layer{int(parts[1]) + 1}.{parts[3]}"
    parts = parts[3:]
    match parts[1]:
      case "shortcut":
        at = 1 if config.pooled_shortcut else 0  # timm puts the average pool first in the sequence
        conv, norm = f"{block}.downsample.{at}", f"{block}.downsample.{at + 1}"
      case "squeeze" | "excite" as part:
        conv, norm = f"{block}.se.fc{1 if part == 'squeeze' else 2}", ""
      case part:
        conv, norm = f"{block}.{part}", f"{block}.bn{part.removeprefix('conv')}"
  return checkpoint.convolution_leaf(conv, norm, parts[2:])


def _stem_names(config: ResNetConfig) -> dict[str, tuple[str, str]]:
  """{convolution of our stem: (its name, its norm's name)}."""
  if config.deep_stem:
    names = {"conv1": ("conv1.0", "conv1.1"), "conv2": ("conv1.3", "conv1.4"), "conv3": ("conv1.6", "bn1")}
  else:
    names = {"conv1": ("conv1", "bn1")}
  return names | {"pool": ("maxpool.0", "maxpool.1")}


def _is_resnet(names: Any, prefix: str) -> bool:
  return f"{prefix}layer1.0.conv1.weight" in names and f"{prefix}layer4.0.conv2.weight" in names


def _depths(names: Any, prefix: str) -> tuple[int, ...]:
  """Blocks per stage."""
  blocks = [re.match(rf"{re.escape(prefix)}layer(\d)\.(\d+)\.conv1\.weight", name) for name in names]
  counts = [0] * 4
  for found in filter(None, blocks):
    counts[int(found[1]) - 1] = max(counts[int(found[1]) - 1], int(found[2]) + 1)
  return tuple(counts)


def _fits(config: ResNetConfig, depths: tuple[int, ...], sizes: Mapping[str, tuple[int, ...]]) -> bool:
  """Whether the file has the blocks, widths and parts of a row."""
  first = config.block(0, 0)["conv1"]
  return (
    config.depths == depths
    and sizes.get("layer1.0.conv1.weight") == (first.outputs, first.inputs, first.size, first.size)
    and config.bottleneck == ("layer1.0.conv3.weight" in sizes)
    and config.deep_stem == ("conv1.0.weight" in sizes)
    and bool(config.squeeze) == ("layer1.0.se.fc1.weight" in sizes)
  )
