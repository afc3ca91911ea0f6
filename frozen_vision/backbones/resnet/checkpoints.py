"""Public ResNet checkpoints: torchvision's and timm's, those of self-supervised pretraining, Model Garden's.

Most self-supervised checkpoints keep a torchvision ResNet below a prefix, beside projection heads, momentum
encoders and queues; the PyTorch conversion of SimCLR v2 and TensorFlow's Model Garden have names of their
own. `LAYOUTS` says what each calls the encoder and what may be left over.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
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


def garden_name(ours: str, config: ResNetConfig) -> str:
  """The name of one of our variables in a checkpoint of TensorFlow's Model Garden, below the backbone.

  Keras counts the layers that have weights: those of the stem one by one, then the blocks.
  """
  parts = ours.split("/")
  stem = list(config.stem())
  if parts[0] == "stem":
    layer, parts = 2 * stem.index(parts[1]), parts[2:]
    path = f"layer_with_weights-{layer + (parts[0] == 'norm')}"
  else:
    layer = 2 * len(stem) + sum(config.depths[: int(parts[1])]) + int(parts[3])
    path, name, parts = f"layer_with_weights-{layer}/", parts[4], parts[5:]
    match name, parts[0]:
      case "shortcut", "norm":
        path += "_norm0"
      case "shortcut", _:
        path += "_shortcut1" if config.pooled_shortcut else "_shortcut"
      case "squeeze" | "excite", _:
        path += f"_squeeze_excitation/_se_{'reduce' if name == 'squeeze' else 'expand'}"
      case _, "norm":
        path += f"_norm{name.removeprefix('conv')}"
      case _:
        path += f"_{name}"
  leaf = parts[-1]
  return f"{path}/{_GARDEN_LEAVES[leaf] if parts[0] == 'norm' else leaf}"


_GARDEN_LEAVES = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}


@dataclasses.dataclass(frozen=True)
class Layout:
  """Names of one kind of checkpoint, after `module.` (DistributedDataParallel).

  Attributes:
    source: whose it is.
    prefix: of the encoder's names.
    beside: what may stand beside the encoder: (pattern of the name, why it is ignored).
    naming: gives their name, without the prefix, of one of our variables.
    block: pattern of the name, without the prefix, of the first kernel of a block.
    options: fields of `ResNetConfig` that these weights need.
  """

  source: str
  prefix: str = ""
  beside: checkpoint.Ignored = ()
  naming: Callable[[str, ResNetConfig], str] = torch_name
  block: str = r"layer\d\.\d+\.conv1\.weight"
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def name(self, ours: str, config: ResNetConfig) -> str:
    """Their name of one of our variables."""
    return self.prefix + self.naming(ours, config)

  @property
  def ignored(self) -> checkpoint.Ignored:
    """The names that no variable is made of."""
    classifier = (rf"{re.escape(self.prefix)}fc\..*", "classifier or projection head")
    return (_COUNTED, classifier, *self.beside)

  def num_blocks(self, names: Iterable[str]) -> int:
    """How many blocks a file has; 0 if it is of another layout."""
    return sum(re.fullmatch(re.escape(self.prefix) + self.block, name) is not None for name in names)


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
  Layout(
    "SimCLR v2's conversion",
    naming=simclr_v2_name,
    block=r"net\.\d+\.blocks\.\d+\.net\.0\.weight",
    options=SIMCLR_IMAGES,
  ),
  Layout(
    "TensorFlow's Model Garden",
    "backbone/",
    (
      (r".*/\.OPTIMIZER_SLOT/.*", "slot of an optimizer"),
      (r"(model|head|decoder|optimizer)/.*", "what stands on the backbone, or its optimizer"),
      (r"(global_step|save_counter|_CHECKPOINTABLE_OBJECT_GRAPH)", "record of the training"),
    ),
    naming=garden_name,
    block=r"layer_with_weights-\d+/_conv1/kernel",
    options=dict(same_padding=True, pool_every_shortcut=True),
  ),
)
_GARDEN = LAYOUTS[-1]


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
  if layout is None:
    raise ValueError(f"{path} has keys of no known ResNet; they begin with {sorted(tensors)[:5]}.")
  if layout is _GARDEN:
    tensors = {key: _in_torch_layout(tensor) for key, tensor in tensors.items()}
  row = checkpoint.choose_row(VARIANTS, lambda config: _fits(config, layout, tensors), path=path, name=name)
  needed = dict(layout.options)
  if layout is _GARDEN and VARIANTS[row].squeeze:
    needed["activation"] = "swish"  # of its ResNet-RS configs; its other ResNets have relu
  config = VARIANTS[row].replace(**{**needed, **overrides})
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
    if not layout.num_blocks(tensors):
      return False
    is_told = bool(layout.prefix) or not layout.beside
    return is_told or any(re.fullmatch(name, key) for name, _ in layout.beside for key in tensors)

  return next(filter(fits, LAYOUTS), None)


def _fits(config: ResNetConfig, layout: Layout, tensors: Mapping[str, LazyTensor]) -> bool:
  """Whether the file has the blocks of a row, and the first convolutions of its stem and of every stage."""
  kernels = {"stem/conv1/kernel": config.stem()["conv1"]}
  for stage, depth in enumerate(config.depths):
    for index in {0, depth - 1}:
      kernels[f"stages/{stage}/blocks/{index}/conv1/kernel"] = config.block(stage, index)["conv1"]
  shapes = {
    layout.name(ours, config): (spec.outputs, spec.inputs, spec.size, spec.size)
    for ours, spec in kernels.items()
  }
  return layout.num_blocks(tensors) == sum(config.depths) and all(
    name in tensors and tensors[name].shape == shape for name, shape in shapes.items()
  )


def _in_torch_layout(tensor: LazyTensor) -> LazyTensor:
  """A kernel of TensorFlow's, HWIO, as PyTorch has them, OIHW; anything else as it is."""
  if len(tensor.shape) != 4:
    return tensor
  height, width, inputs, outputs = tensor.shape
  shape = (outputs, inputs, height, width)
  return LazyTensor(shape, tensor.dtype, lambda: tensor.read().transpose(3, 2, 0, 1))
