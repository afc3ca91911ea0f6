"""Public ResNet checkpoints: torchvision's and timm's names, and those of self-supervised pretraining.

Most self-supervised checkpoints keep a torchvision ResNet below a prefix, beside projection heads, momentum
encoders and queues; the PyTorch conversion of SimCLR v2 has names of its own. `LAYOUTS` says what each calls
the encoder and what may be left over.
"""

from collections.abc import Callable, Container, Mapping, Sequence
import dataclasses
import itertools
import pathlib
import re
from typing import Any

from frozen_vision.backbones import base, checkpoint
from frozen_vision.backbones.resnet.model import ResNet, ResNetConfig, SIMCLR_IMAGES, VARIANTS
from frozen_vision.files.tensors import LazyTensor

_COUNTED = (r"(.*\.)?num_batches_tracked", "batches counted by BatchNorm, of no use in inference")


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


def simclr_v2_name(ours: str, config: ResNetConfig) -> str:
  """The name of one of our variables in the PyTorch conversion of SimCLR v2 (Separius/SimCLRv2-Pytorch)."""
  parts = ours.split("/")
  if parts[0] == "stem":
    conv, norm = "net.0.0", "net.0.1.0"
  else:
    block = f"net.{int(parts[1]) + 1}.blocks.{parts[3]}"
    parts = parts[3:]
    if parts[1] == "shortcut":
      conv, norm = f"{block}.projection.shortcut", f"{block}.projection.bn.0"
    else:
      at = 2 * int(parts[1].removeprefix("conv")) - 2
      conv, norm = f"{block}.net.{at}", f"{block}.net.{at + 1}.0"
  return checkpoint.convolution_leaf(conv, norm, parts[2:])


@dataclasses.dataclass(frozen=True)
class Layout:
  """Names of one kind of checkpoint, after `module.` (DistributedDataParallel).

  Attributes:
    source: whose it is.
    prefix: of the encoder's names.
    beside: what may stand beside the encoder: (pattern of the name, why it is ignored).
    naming: gives their name, without the prefix, of one of our variables.
    options: fields of `ResNetConfig` that these weights need.
  """

  source: str
  prefix: str = ""
  beside: checkpoint.Ignored = ()
  naming: Callable[[str, ResNetConfig], str] = torch_name
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def name(self, ours: str, config: ResNetConfig) -> str:
    """Their name of one of our variables."""
    return self.prefix + self.naming(ours, config)

  @property
  def ignored(self) -> checkpoint.Ignored:
    """The names that no variable is made of."""
    classifier = (rf"{re.escape(self.prefix)}fc\..*", "classifier or projection head")
    return (_COUNTED, classifier, *self.beside)

  def depths(self, names: Container[str]) -> tuple[int, ...]:
    """How many blocks each stage of a file has; zeros if the file is of another layout."""
    config = VARIANTS["resnet50"]

    def has(stage: int, block: int) -> bool:
      return self.name(f"stages/{stage}/blocks/{block}/conv1/kernel", config) in names

    return tuple(
      next(block for block in itertools.count() if not has(stage, block))
      for stage in range(len(config.depths))
    )


_HEAD = "projection head"
LAYOUTS = (
  Layout(
    "MoCo v1 or v2, or PCL",
    "encoder_q.",
    ((r"encoder_k\..*", "momentum encoder"), (r"(queue|queue_ptr)", "queue")),
  ),
  Layout(
    "MoCo v3",
    "base_encoder.",
    ((r"momentum_encoder\..*", "momentum encoder"), (r"predictor\..*", "predictor")),
  ),
  Layout("InsDis, PIRL or InfoMin", "encoder.", ((r"(head|head_jig)\..*", _HEAD),)),
  Layout(
    "DINO, Barlow Twins or VICReg",
    "backbone.",
    ((r"(head|projector)\..*", _HEAD), (r"bn\.(running_mean|running_var)", "norm of the embeddings")),
  ),
  Layout(
    "BYOL (byol-pytorch)",
    "online_encoder.net.",
    (
      (r"online_encoder\.projector\..*", _HEAD),
      (r"online_predictor\..*", "predictor"),
      (r"target_encoder\..*", "momentum encoder"),
    ),
  ),
  Layout(
    "SwAV, DeepCluster-v2 or SeLa",
    beside=((r"projection_head\..*", _HEAD), (r"prototypes\..*", "prototypes")),
  ),
  Layout("torchvision or timm"),
  Layout("SimCLR v2's conversion", naming=simclr_v2_name, options=SIMCLR_IMAGES),
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
  layout = _layout_of(tensors)
  row = checkpoint.choose_row(VARIANTS, lambda config: _fits(config, layout, tensors), path=path, name=name)
  config = VARIANTS[row].replace(**{**layout.options, **overrides})
  return checkpoint.map_convolutional(
    base.abstract(ResNet, config),
    tensors,
    lambda ours: layout.name(ours, config),
    layout.ignored,
    path=path,
    source=layout.source,
    name=row,
  )


def recognises(tensors: Mapping[str, LazyTensor]) -> bool:
  """Whether the names are those of a known layout."""
  return _layout_of({key.removeprefix("module."): tensor for key, tensor in tensors.items()}) is not None


def _layout_of(tensors: Mapping[str, LazyTensor]) -> Layout | None:
  """The layout of the names; one without a prefix is told by what stands beside the encoder."""

  def fits(layout: Layout) -> bool:
    if not all(layout.depths(tensors)):
      return False
    is_told = bool(layout.prefix) or not layout.beside
    return is_told or any(re.fullmatch(name, key) for name, _ in layout.beside for key in tensors)

  return next(filter(fits, LAYOUTS), None)


def _fits(config: ResNetConfig, layout: Layout, tensors: Mapping[str, LazyTensor]) -> bool:
  """Whether the file has the blocks of a row, and the first convolutions of its stem and blocks."""
  first = {"stem/conv1/kernel": config.stem()["conv1"]}
  first |= {"stages/0/blocks/0/conv1/kernel": config.block(0, 0)["conv1"]}
  kernels = {layout.name(ours, config): spec for ours, spec in first.items()}
  return config.depths == layout.depths(tensors) and all(
    name in tensors and tensors[name].shape == (spec.outputs, spec.inputs, spec.size, spec.size)
    for name, spec in kernels.items()
  )
