"""Backbones by name, of every family, and their weights on disk."""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

from flax import nnx
import jax.numpy as jnp
import numpy as np

from frozen_vision import messages
from frozen_vision.backbones import base
from frozen_vision.backbones.checkpoint import Checkpoint
from frozen_vision.backbones.convnext import architecture as convnext_architecture
from frozen_vision.backbones.convnext import checkpoints as convnext_checkpoints
from frozen_vision.backbones.convnext import model as convnext
from frozen_vision.backbones.efficientnet import checkpoints as efficientnet_checkpoints
from frozen_vision.backbones.efficientnet import model as efficientnet
from frozen_vision.backbones.efficientnet import published as efficientnet_published
from frozen_vision.backbones.published import HubWeights, NamedWeights, PackagedWeights
from frozen_vision.backbones.resnet import checkpoints as resnet_checkpoints
from frozen_vision.backbones.resnet import model as resnet
from frozen_vision.backbones.swinv2 import checkpoints as swinv2_checkpoints
from frozen_vision.backbones.swinv2 import config as swinv2_config
from frozen_vision.backbones.swinv2 import model as swinv2
from frozen_vision.backbones.swinv2 import published as swinv2_published
from frozen_vision.backbones.vit import checkpoints as vit_checkpoints
from frozen_vision.backbones.vit import config as vit_config
from frozen_vision.backbones.vit import model as vit
from frozen_vision.backbones.vit import published as vit_published
from frozen_vision.files import checkpoint_file, formats, tensors, trees

PublicWeights = NamedWeights | PackagedWeights | HubWeights
_SHIPPED = pathlib.Path(__file__).resolve().parent / "weights"
# Weights that lie in that folder of a checkout, and not in the installed package, which would be too large.
_NOT_INSTALLED = tuple(f"swinv2_nano_{way}" for way in ("simmim", "moco", "fd", "lite0"))
_IN_REPOSITORY = (
  " They do not come with the installed package: take the file of that name from the repository's folder "
  "frozen_vision/backbones/weights, if it is there, and give its path."
)


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture: its sizes, its module, and the public weights it reads.

  Attributes:
    variants: {name of a backbone: its sizes}; names are unique among all families.
    config: the dataclass of sizes.
    module: builds a backbone: `module(config, dtype=dtype, rngs=rngs)`.
    random: fields for random weights that make a network of use as it is, where an initialisation for
      training makes its residual branches zero.
    recognises: whether tensors by name are a public checkpoint of this family; None: there is none.
    map_checkpoint: `map_checkpoint(tensors, path, name=None, others=(), **overrides)` gives a `Checkpoint`;
      `others` are names in the file that are no tensors. Raises a ValueError that lists every key at fault.
    published: {name of public weights: where they are}.
    shapes_tell: shapes and names of a public checkpoint tell its row; where they do not, rows that are alike
      differ in what no checkpoint holds, such as activations or padding.
  """

  variants: Mapping[str, base.BackboneConfig]
  config: type[base.BackboneConfig]
  module: Callable[..., base.Backbone]
  random: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  recognises: Callable[[Mapping[str, tensors.LazyTensor]], bool] | None = None
  map_checkpoint: Callable[..., Checkpoint] | None = None
  published: Mapping[str, PublicWeights] = dataclasses.field(default_factory=dict)
  shapes_tell: bool = True


# The key is what a weights file remembers.
FAMILIES: dict[str, Family] = {
  "swinv2": Family(
    variants=swinv2_config.VARIANTS,
    config=swinv2.SwinV2Config,
    module=swinv2.SwinV2,
    random=dict(residual_norm_init=1.0),
    recognises=swinv2_checkpoints.recognises,
    map_checkpoint=swinv2_checkpoints.map_tensors,
    published=swinv2_published.TABLE,
  ),
  "resnet": Family(
    variants=resnet.VARIANTS,
    config=resnet.ResNetConfig,
    module=resnet.ResNet,
    recognises=resnet_checkpoints.recognises,
    map_checkpoint=resnet_checkpoints.map_tensors,
  ),
  "efficientnet": Family(
    variants=efficientnet.VARIANTS,
    config=efficientnet.EfficientNetConfig,
    module=efficientnet.EfficientNet,
    recognises=efficientnet_checkpoints.recognises,
    map_checkpoint=efficientnet_checkpoints.map_tensors,
    published=efficientnet_published.TABLE,
    shapes_tell=False,
  ),
  "convnext": Family(
    variants=convnext_architecture.VARIANTS,
    config=convnext.ConvNeXtConfig,
    module=convnext.ConvNeXt,
    random=dict(layer_scale=1.0),
    recognises=convnext_checkpoints.recognises,
    map_checkpoint=convnext_checkpoints.map_tensors,
    shapes_tell=False,
  ),
  "vit": Family(
    variants=vit_config.VARIANTS,
    config=vit_config.ViTConfig,
    module=vit.ViT,
    random=dict(layer_scale_init=1.0),
    recognises=vit_checkpoints.recognises,
    map_checkpoint=vit_checkpoints.map_tensors,
    published=vit_published.TABLE,
    shapes_tell=False,
  ),
}


def family_of(name: str) -> Family:
  """The family that a backbone's name belongs to.

  Raises:
    ValueError: an unknown name; the message lists those that are known.
  """
  for family in FAMILIES.values():
    if name in family.variants:
      return family
  raise ValueError(messages.unknown("backbone", name, variants()))


def variants() -> dict[str, base.BackboneConfig]:
  """Every backbone of every family: {name: sizes}."""
  return {name: config for family in FAMILIES.values() for name, config in family.variants.items()}


def published_weights() -> dict[str, PublicWeights]:
  """The public weights of every family by name."""
  return {name: entry for family in FAMILIES.values() for name, entry in family.published.items()}


def shipped_weights() -> list[str]:
  """The names of weights that lie in the package's folder.

  An installed package has those of `swinv2_nano` alone, a checkout of the repository all.
  """
  return sorted(path.stem for path in _SHIPPED.glob("*.safetensors"))


def backbone_config(name: str, **overrides: Any) -> base.BackboneConfig:
  """The row of its family's table, with fields replaced.

  Raises:
    ValueError: a name or a field that does not exist; the message lists those that do.
  """
  return family_of(name).variants[name].replace(**overrides)


def build_backbone(name: str, *, dtype: Any = jnp.float32, rngs: nnx.Rngs, **overrides: Any) -> base.Backbone:
  """A backbone with random weights.

  Args:
    name: a row of a family's table, such as `swinv2_b` (`variants`).
    dtype: of the matrix products; norms and softmax stay float32.
    overrides: fields of the row, such as SwinV2's `window_sizes`.
  """
  return family_of(name).module(backbone_config(name, **overrides), dtype=dtype, rngs=rngs)


def abstract_backbone(name: str, *, dtype: Any = jnp.float32, **overrides: Any) -> base.Backbone:
  """A backbone with shapes in the place of weights (`base.abstract`); arguments as of `build_backbone`."""
  return base.abstract(family_of(name).module, backbone_config(name, **overrides), dtype=dtype)


def fold_backbone(
  backbone: base.Backbone, *, storage: str | None = None, dtype: Any = None, scan: bool = True
) -> base.FoldedBackbone:
  """A frozen backbone as its inference program, which is called like it; see `Backbone.fold`."""
  return backbone.fold(storage=storage, dtype=dtype, scan=scan)


def save_backbone(
  backbone: base.Backbone, path: str | os.PathLike, *, name: str, dtype: Any = np.float32
) -> str:
  """Writes a `.safetensors` file that `load_backbone` reads.

  The file remembers the family, the sizes, and the fingerprint of what is written, that is, of all variables
  rounded to `dtype`; it is returned too.
  """
  leaves = {
    key: tensors.LazyTensor(leaf.shape, leaf.dtype, lambda leaf=leaf: np.asarray(leaf))
    for key, leaf in trees.flatten(trees.weights(backbone)).items()
  }
  return write_leaves(leaves, path, name=name, config=backbone.config, dtype=dtype)


def write_leaves(
  leaves: Mapping[str, tensors.LazyTensor],
  path: str | os.PathLike,
  *,
  name: str,
  config: base.BackboneConfig,
  dtype: Any = np.float32,
) -> str:
  """`save_backbone` of weights that are read one at a time, under the paths of our variables."""
  fields = {
    name: value for name, value in dataclasses.asdict(config).items() if name not in config.computational
  }
  metadata = {
    "format": tensors.FORMAT,
    "family": _key_of(config),
    "name": name,
    "config": json.dumps(fields),
  }
  return tensors.write(path, leaves, metadata=metadata, dtype=dtype)


@dataclasses.dataclass
class BackboneFile:
  """A backbone whose weights are still on disk.

  Attributes:
    module: the network, with shapes in the place of weights.
    leaves: its weights by path, read one at a time.
    path: the file.
    fingerprint: of the weights, if the file says it, as ours do; what is read is checked against it.
  """

  module: base.Backbone
  leaves: Mapping[str, tensors.LazyTensor]
  path: pathlib.Path
  fingerprint: str | None
  _digests: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

  def load(self) -> base.Backbone:
    """The whole network, float32."""
    graphdef, state, rest = nnx.split(self.module, nnx.Not(nnx.RngState), ...)
    filled = tensors.fill(state, self.leaves, self.path, fingerprint=self.fingerprint)
    return nnx.merge(graphdef, filled, rest)

  def read(self, prefix: str, module: nnx.Module) -> nnx.Module:
    """A part of the network with its weights on the host: float32 numpy arrays.

    Args:
      prefix: its path, such as `stages/2/blocks/5`.
      module: `self.module`'s part at that path.
    """
    graphdef, state, rest = nnx.split(module, nnx.Not(nnx.RngState), ...)
    filled = tensors.read(state, self.leaves, prefix=prefix, path=self.path, digests=self._digests)
    return nnx.merge(graphdef, filled, rest)

  def read_fingerprint(self) -> str:
    """The fingerprint of what `read` gave, all in all.

    Raises:
      ValueError: it is not the one that the file says it has.
    """
    if self.fingerprint is not None:
      tensors.check_fingerprint(self._digests, self.fingerprint, self.path)
    return trees.combine_digests(self._digests)


def load_backbone(
  source: str | os.PathLike, name: str | None = None, *, dtype: Any = jnp.float32, **overrides: Any
) -> base.Backbone:
  """A backbone with its weights.

  Args:
    source: a file written by `save_backbone`; or a public checkpoint of some family, `.safetensors`, the
      index of several or their folder, `.pth` or `.npz` (`backbones.swinv2.checkpoints` and
      `backbones.vit.checkpoints` say whose); or the name of weights that ship with the package
      (`swinv2_nano`) or are published (`published_weights`): those are fetched once, into the folder
      $FROZEN_VISION_CACHE or into the Hugging Face Hub's cache.
    name: the variant that the weights must be; None takes what they are.
    dtype: of the matrix products; the parameters stay float32 (`freezing.partition.cast` changes them).
    overrides: fields of the family's sizes that carry no weights, such as SwinV2's `window_sizes`.

  Raises:
    FileNotFoundError: no such file, and no weights of that name.
    ConnectionError: published weights that are not in the cache and cannot be fetched.
    ValueError: not such a file, or keys or shapes that are not those of the network; all are listed.
  """
  return open_backbone(source, name, dtype=dtype, **overrides).load()


def open_backbone(
  source: str | os.PathLike,
  name: str | None = None,
  *,
  prefer: str | None = None,
  dtype: Any = jnp.float32,
  **overrides: Any,
) -> BackboneFile:
  """As `load_backbone`, without reading a weight yet.

  Args:
    prefer: the variant that a public checkpoint is taken for where its shapes fit several.
  """
  path, name, options = _find(source, name)
  overrides = {**options, **overrides}
  file = checkpoint_file.open_checkpoint(path)
  leaves, header, fingerprint = file.tensors, file.metadata, None
  if header.get("format") == tensors.FORMAT:
    family, config = _described(header, name, path)
    config, fingerprint = config.replace(**overrides), header.get("fingerprint")
  else:
    checkpoint = _mapped(file, path, name, prefer, overrides)
    leaves, config = checkpoint.leaves, checkpoint.config
    family = FAMILIES[_key_of(config)]
  module = base.abstract(family.module, config, dtype=dtype)
  tensors.check_shapes(trees.weights(module), leaves, path)
  return BackboneFile(module, leaves, path, fingerprint)


def weights_file(source: str | os.PathLike) -> pathlib.Path:
  """The file, or folder of files, that `load_backbone` reads; published weights are fetched.

  Raises:
    FileNotFoundError, ConnectionError: as `load_backbone` does.
  """
  return _find(source, None)[0]


def open_public(source: str | os.PathLike, name: str | None = None, **overrides: Any) -> Checkpoint:
  """A public checkpoint of some family, mapped onto our variables, without reading a weight yet.

  Arguments and errors are those of `load_backbone`; a file that `save_backbone` wrote is an error too.
  """
  path, name, options = _find(source, name)
  file = checkpoint_file.open_checkpoint(path)
  if file.metadata.get("format") == tensors.FORMAT:
    raise ValueError(f"{path} is a file of frozen_vision already, not a public checkpoint.")
  return _mapped(file, path, name, None, {**options, **overrides})


def _mapped(
  file: checkpoint_file.CheckpointFile,
  path: pathlib.Path,
  name: str | None,
  prefer: str | None,
  overrides: Mapping[str, Any],
) -> Checkpoint:
  """The checkpoint in an open file; `prefer` is the variant where its shapes fit several."""
  family = _recognised(file.tensors, name, path)
  if not family.shapes_tell and prefer in family.variants:
    name = name or prefer
  return family.map_checkpoint(file.tensors, file.path, name=name, others=file.others, **overrides)


def _key_of(config: base.BackboneConfig) -> str:
  """The key of the family that has such sizes."""
  return next(key for key, family in FAMILIES.items() if isinstance(config, family.config))


def _find(source: str | os.PathLike, name: str | None) -> tuple[pathlib.Path, str | None, Mapping[str, Any]]:
  """(the file of weights given by path or by name, the variant they must be, fields of it that they say)."""
  path, text, public = pathlib.Path(source), os.fspath(source), published_weights()
  if not path.suffix and not path.exists():
    path = _SHIPPED / f"{text}.safetensors"
    if not path.exists() and text in public:
      return public[text].local_path(), name or public[text].variant, public[text].options
  is_folder = checkpoint_file.weights_in_folder(path) is not None
  if not is_folder and not checkpoint_file.split_part(path)[0].is_file():
    shipped = shipped_weights()
    what = "is a directory" if path.is_dir() else "does not exist"
    hint = messages.did_you_mean(text, [*shipped, *public])
    raise FileNotFoundError(
      f"Backbone weights {text!r}: {path} {what}. Give a .safetensors file that "
      f"frozen_vision.save_backbone wrote, a public checkpoint (.safetensors, .pth) of {_titles()}, or the "
      f"name of shipped weights: {shipped}, or of published ones: {sorted(public)}.{hint}"
      f"{_IN_REPOSITORY if text in _NOT_INSTALLED else ''}"
    )
  return path, name, {}


def _described(
  header: Mapping[str, str], name: str | None, path: pathlib.Path
) -> tuple[Family, base.BackboneConfig]:
  """(family, sizes) of a file of ours. Files of the first edition name no family: all were SwinV2."""
  if name not in (None, header.get("name")):
    raise ValueError(f"{path} holds a {header.get('name')}, expected a {name}.")
  key = header.get("family", "swinv2")
  if key not in FAMILIES:
    raise ValueError(f"{path}: {messages.unknown('family of backbones', key, FAMILIES)}")
  try:
    return FAMILIES[key], FAMILIES[key].config(**base.tuples(json.loads(header["config"])))
  except (KeyError, TypeError, ValueError, RecursionError) as error:
    raise formats.FileFormatError(path, f"has no sizes of a {key} in its header: {error}.") from error


def _recognised(leaves: Mapping[str, tensors.LazyTensor], name: str | None, path: pathlib.Path) -> Family:
  """The family of a public checkpoint: that of the name, or the one that knows its keys."""
  candidates = [family_of(name)] if name else list(FAMILIES.values())
  candidates = [family for family in candidates if family.map_checkpoint is not None]
  for family in candidates:
    if name or family.recognises(leaves):
      return family
  raise ValueError(
    f"{path} has keys of no known checkpoint of {_titles()} and was not written by "
    f"frozen_vision.save_backbone; its {len(leaves)} keys begin with {sorted(leaves)[:5]}."
  )


def _titles() -> str:
  return " or ".join(key for key, family in FAMILIES.items() if family.map_checkpoint is not None)
