"""Backbones by name, and their weights on disk."""

from collections.abc import Mapping
import dataclasses
import difflib
import json
import os
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from frozen_vision.backbones.swinv2 import model as swinv2
from frozen_vision.backbones.swinv2 import published as named_weights
from frozen_vision.files import tensors
from frozen_vision.freezing import partition

_SHIPPED = pathlib.Path(__file__).resolve().parent / "weights"
# What the images of every backbone here are normalised with (ImageNet's statistics, RGB in 0..1).
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def backbone_config(name: str, **overrides: Any) -> swinv2.SwinV2Config:
  """The row of the table of variants, with fields replaced.

  Raises:
    ValueError: a name or a field that does not exist; the message lists those that do.
  """
  if name not in swinv2.VARIANTS:
    raise ValueError(_unknown("backbone", name, swinv2.VARIANTS))
  return replace(swinv2.VARIANTS[name], overrides)


def replace(config: swinv2.SwinV2Config, overrides: dict[str, Any]) -> swinv2.SwinV2Config:
  """The config with fields replaced; `window_size=24` stands for that window in every stage."""
  changes = _tuples(overrides)
  if isinstance(changes.get("window_size"), int):
    changes["window_sizes"] = (changes.pop("window_size"),) * len(changes.get("depths", config.depths))
  fields = [field.name for field in dataclasses.fields(swinv2.SwinV2Config)]
  for key in changes:
    if key not in fields:
      raise ValueError(_unknown("backbone option", key, fields))
  return dataclasses.replace(config, **changes)


def build_backbone(name: str, *, dtype: Any = jnp.float32, rngs: nnx.Rngs, **overrides: Any) -> swinv2.SwinV2:
  """A backbone with random weights.

  Args:
    name: a row of `swinv2.VARIANTS`.
    dtype: of the matrix products; norms, softmax and cosine similarity stay float32.
    overrides: fields of `SwinV2Config`, such as `window_sizes`; `window_size=24` is for all stages.
  """
  return swinv2.SwinV2(backbone_config(name, **overrides), dtype=dtype, rngs=rngs)


def save_backbone(
  backbone: swinv2.SwinV2, path: str | os.PathLike, *, name: str, dtype: Any = np.float32
) -> str:
  """Writes a `.safetensors` file that `load_backbone` reads.

  The file remembers the shape of the network, and the fingerprint of what is written, that is, of the
  weights rounded to `dtype`; it is returned too.
  """
  leaves = {
    key: tensors.LazyTensor(leaf.shape, leaf.dtype, lambda leaf=leaf: np.asarray(leaf))
    for key, leaf in partition.flatten(nnx.state(backbone, nnx.Param)).items()
  }
  return write_leaves(leaves, path, name=name, config=backbone.config, dtype=dtype)


def write_leaves(
  leaves: Mapping[str, tensors.LazyTensor],
  path: str | os.PathLike,
  *,
  name: str,
  config: swinv2.SwinV2Config,
  dtype: Any = np.float32,
) -> str:
  """`save_backbone` of weights that are read one at a time, under the paths of our parameters."""
  metadata = {"format": tensors.FORMAT, "name": name, "config": json.dumps(dataclasses.asdict(config))}
  return tensors.write(path, leaves, metadata=metadata, dtype=dtype)


@dataclasses.dataclass
class BackboneFile:
  """A backbone whose weights are still on disk.

  Attributes:
    module: the network, with shapes in the place of weights.
    leaves: its weights by path, read one at a time.
    path: the file.
    fingerprint: of the weights, if the file says it; what is read is checked against it.
  """

  module: swinv2.SwinV2
  leaves: Mapping[str, tensors.LazyTensor]
  path: pathlib.Path
  fingerprint: str | None
  _digests: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

  def load(self) -> swinv2.SwinV2:
    """The whole network, float32."""
    graphdef, state = nnx.split(self.module)
    return nnx.merge(graphdef, tensors.fill(state, self.leaves, self.path, fingerprint=self.fingerprint))

  def read(self, prefix: str, module: nnx.Module) -> nnx.Module:
    """A part of the network with its weights on the host: float32 numpy arrays.

    Args:
      prefix: its path, such as `stages/2/blocks/5`.
      module: `self.module`'s part at that path.
    """
    graphdef, state = nnx.split(module)
    digests = None if self.fingerprint is None else self._digests
    return nnx.merge(graphdef, tensors.read(state, self.leaves, prefix=prefix, digests=digests))

  def check(self) -> None:
    """Raises a ValueError if what `read` gave, all in all, are not the weights that the file says it has."""
    if self.fingerprint is not None:
      tensors.check_fingerprint(self._digests, self.fingerprint, self.path)


def load_backbone(
  source: str | os.PathLike, name: str | None = None, *, dtype: Any = jnp.float32, **overrides: Any
) -> swinv2.SwinV2:
  """A backbone with its weights.

  Args:
    source: a file written by `save_backbone`; or a public SwinV2 checkpoint, `.safetensors` or `.pth`, of
      Microsoft, SimMIM, timm, transformers or torchvision (see `convert.swinv2.open_checkpoint`); or the name
      of weights that ship with the package (`swinv2_nano`) or are published (`named_weights.TABLE`): those
      are fetched once, into the folder $FROZEN_VISION_CACHE.
    name: the variant that the weights must be; None takes what they are.
    dtype: of the matrix products; the parameters stay float32 (`freeze.cast` changes them).
    overrides: fields of `SwinV2Config` that carry no weights, such as `window_sizes`.

  Raises:
    FileNotFoundError: no such file, and no weights of that name.
    ConnectionError: published weights that are not in the cache and cannot be fetched.
    ValueError: not such a file, or keys or shapes that are not those of the network; all are listed.
  """
  return open_backbone(source, name, dtype=dtype, **overrides).load()


def open_backbone(
  source: str | os.PathLike, name: str | None = None, *, dtype: Any = jnp.float32, **overrides: Any
) -> BackboneFile:
  """As `load_backbone`, without reading a weight yet."""
  path = pathlib.Path(source)
  if not path.suffix and not path.exists():
    path = _SHIPPED / f"{source}.safetensors"
    if not path.exists() and os.fspath(source) in named_weights.TABLE:
      path = named_weights.local_path(os.fspath(source))
      name = name or named_weights.TABLE[os.fspath(source)].variant
  if not path.is_file():
    shipped = sorted(p.stem for p in _SHIPPED.glob("*.safetensors"))
    what = "is a directory" if path.is_dir() else "does not exist"
    raise FileNotFoundError(
      f"Backbone weights {os.fspath(source)!r}: {path} {what}. Give a .safetensors file that "
      "frozen_vision.save_backbone wrote, a public SwinV2 checkpoint (.safetensors, .pth), or the name of "
      f"shipped weights: {shipped}, or of published ones: {sorted(named_weights.TABLE)}."
    )
  tensors.check_file(path)
  leaves, header = {}, {}
  if path.suffix == ".safetensors":
    leaves, header = tensors.open_safetensors(path)
  if header.get("format") == tensors.FORMAT:
    if name not in (None, header["name"]):
      raise ValueError(f"{path} holds a {header['name']}, expected a {name}.")
    config = replace(swinv2.SwinV2Config(**_tuples(json.loads(header["config"]))), overrides)
  else:
    from frozen_vision.backbones.swinv2 import checkpoints as convert  # it imports this module.

    checkpoint = convert.open_checkpoint(path, name, **overrides)
    leaves, config = checkpoint.leaves, checkpoint.config
  module = nnx.eval_shape(lambda: swinv2.SwinV2(config, dtype=dtype, rngs=nnx.Rngs(0)))
  tensors.check_shapes(nnx.state(module), leaves, path)
  return BackboneFile(module, leaves, path, header.get("fingerprint"))


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
  return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def feature_key(backbone: swinv2.SwinV2, fingerprint: str, *, levels: int | None = None) -> dict[str, Any]:
  """What identifies the features of a frozen backbone: a head fits no others.

  Args:
    fingerprint: `freeze.fingerprint` of the weights as loaded.
    levels: how many of the feature levels are read; all by default.
  """
  config = backbone.config
  return {
    "weights": fingerprint,
    "window_sizes": list(config.window_sizes),
    "pretrained_window_sizes": list(config.pretrained_window_sizes),
    "strides": [spec.stride for spec in backbone.feature_specs[:levels]],
    "mean": list(IMAGE_MEAN),
    "std": list(IMAGE_STD),
    "padding": "bottom-right zeros, then shift",
    "dtype": jnp.dtype(backbone.dtype).name,
  }


def normalise(images: jax.Array, image_size: jax.Array | None = None) -> jax.Array:
  """uint8 RGB to what the backbones were trained on; padding becomes 0, the mean colour.

  Args:
    images: [b, h, w, 3] uint8.
    image_size: [b, 2] int32 (height, width) of the content at the top left; None if all is content.

  Returns:
    [b, h, w, 3] float32.
  """
  x = (images.astype(jnp.float32) / 255 - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(IMAGE_STD)
  if image_size is None:
    return x
  rows = jnp.arange(images.shape[1])[None, :] < image_size[:, :1]
  columns = jnp.arange(images.shape[2])[None, :] < image_size[:, 1:]
  return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], x, 0)


def _unknown(kind: str, name: str, known: Any) -> str:
  close = difflib.get_close_matches(name, list(known), n=1)
  hint = f" Did you mean {close[0]!r}?" if close else ""
  return f"Unknown {kind} {name!r}; known: {sorted(known)}.{hint}"
