"""Names of SwinV2's parameters in public checkpoints: one table per source."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import re

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """How one of our parameters is made of the arrays of a source.

  Attributes:
    shapes: from our shape to those of the sources.
    apply: from the sources to our array.
  """

  shapes: Callable[[Shape], list[Shape]]
  apply: Callable[..., np.ndarray]


_SAME = Transform(lambda s: [s], lambda x: x)
# Linear layers: PyTorch keeps (out, in).
_LINEAR = Transform(lambda s: [s[::-1]], lambda x: x.T)
# The 4 x 4 convolution, (c, 3, 4, 4), as the matrix product it is: rows ordered row, column, colour.
_PATCHES = Transform(lambda s: [(s[1], 3, 4, 4)], lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]))
_PER_HEAD = Transform(lambda s: [(s[0], 1, 1)], lambda x: x.reshape(-1))
_SPLIT_QKV = Transform(lambda s: [(s[0], s[0])] * 3, lambda q, k, v: np.concatenate([q, k, v], axis=0).T)
# torchvision stores a bias of the keys too, and sets it to zero in every forward pass.
_Q_OF_QKV = Transform(lambda s: [(3 * s[0],)], lambda x: x[: x.size // 3])
_V_OF_QKV = Transform(lambda s: [(3 * s[0],)], lambda x: x[2 * (x.size // 3) :])

# {our name: (their names, transform)}
Names = dict[str, tuple[tuple[str, ...], Transform]]


def _norms(**names: str) -> Names:
  return {
    f"{ours}/{leaf}": ((f"{theirs}.{suffix}",), _SAME)
    for ours, theirs in names.items()
    for leaf, suffix in (("scale", "weight"), ("bias", "bias"))
  }


def _linears(**names: str) -> Names:
  return {
    f"{ours.replace('__', '/')}/{leaf}": ((f"{theirs}.{suffix}",), transform)
    for ours, theirs in names.items()
    for leaf, suffix, transform in (("kernel", "weight", _LINEAR), ("bias", "bias", _SAME))
  }


def _position_bias(mlp: str) -> Names:
  return {
    "attn/position_bias/fc1/kernel": ((f"{mlp}.0.weight",), _LINEAR),
    "attn/position_bias/fc1/bias": ((f"{mlp}.0.bias",), _SAME),
    "attn/position_bias/fc2/kernel": ((f"{mlp}.2.weight",), _LINEAR),
  }


@dataclasses.dataclass(frozen=True)
class Source:
  """Names of one kind of checkpoint.

  Attributes:
    stem, block, downsample: our names, below the patch embedding and the top, a block, a merging.
    block_prefix, downsample_prefix: where a block or merging lies, from stage `s`, block `b`, `t` = s + 1,
      `odd` = 2s + 1 and `even` = 2s + 2.
    head: kernel and bias of the classifier.
    ignored: patterns of whole names that carry nothing a backbone needs.
    maps_hold_windows: the implementation agrees with SwinV2 only where every map is a multiple of its window.
  """

  name: str
  stem: Names
  block: Names
  downsample: Names
  block_prefix: str
  downsample_prefix: str
  head: tuple[str, str]
  ignored: tuple[str, ...]
  maps_hold_windows: bool = False

  def names(self, ours: str) -> tuple[tuple[str, ...], Transform]:
    """Their names of our parameter, and the transform."""
    parts = ours.split("/")
    if parts[0] != "stages":
      return self.stem[ours]
    s = int(parts[1])
    places = dict(s=s, t=s + 1, odd=2 * s + 1, even=2 * s + 2)
    if parts[2] == "downsample":
      names, transform = self.downsample["/".join(parts[3:])]
      prefix = self.downsample_prefix.format(**places)
    else:
      names, transform = self.block["/".join(parts[4:])]
      prefix = self.block_prefix.format(b=parts[3], **places)
    return tuple(prefix + name for name in names), transform

  def blocks(self, keys: Iterable[str]) -> dict[tuple[int, int], set[str]]:
    """{(stage, block): their names below it} of a checkpoint's keys."""
    pattern = re.escape(self.block_prefix)
    pattern = pattern.replace(r"\{s\}", r"(?P<s>\d+)").replace(r"\{b\}", r"(?P<b>\d+)")
    pattern = re.compile(pattern.replace(r"\{odd\}", r"(?P<odd>\d*[13579])") + "(.*)")
    found: dict[tuple[int, int], set[str]] = {}
    for key in keys:
      match = pattern.fullmatch(key)
      if match:
        places = match.groupdict()
        stage = (int(places["odd"]) - 1) // 2 if "odd" in places else int(places["s"])
        found.setdefault((stage, int(places["b"])), set()).add(match.groups()[-1])
    return found


_BUFFERS = r".*\.(relative_coords_table|relative_position_index|attn_mask)"
# Of masked image modelling and feature distillation: token, decoder, and the teacher with all of its parts.
_PRETEXT = (r"(encoder\.)?mask_token", r"decoder\..*", r"feature_model\..*")
_MERGING: Names = {"reduction/kernel": (("reduction.weight",), _LINEAR), **_norms(norm="norm")}


def _microsoft(
  name: str, *, prefix: str = "", mlp: str = "cpb_mlp", shifted: bool = False, head: str = "head"
) -> Source:
  stem: Names = {
    "patch_embed/proj/kernel": (("patch_embed.proj.weight",), _PATCHES),
    "patch_embed/proj/bias": (("patch_embed.proj.bias",), _SAME),
    **_norms(**{"patch_embed/norm": "patch_embed.norm", "norm": "norm"}),
  }
  return Source(
    name=name,
    stem={ours: (tuple(prefix + key for key in theirs), t) for ours, (theirs, t) in stem.items()},
    block={
      "attn/qkv/kernel": (("attn.qkv.weight",), _LINEAR),
      "attn/q_bias": (("attn.q_bias",), _SAME),
      "attn/v_bias": (("attn.v_bias",), _SAME),
      "attn/logit_scale": (("attn.logit_scale",), _PER_HEAD),
      **_position_bias(f"attn.{mlp}"),
      **_linears(attn__proj="attn.proj", mlp__fc1="mlp.fc1", mlp__fc2="mlp.fc2"),
      **_norms(norm1="norm1", norm2="norm2", extra_norm="enorm"),
    },
    downsample=_MERGING,
    block_prefix=prefix + "layers.{s}.blocks.{b}.",
    downsample_prefix=prefix + ("layers.{t}.downsample." if shifted else "layers.{s}.downsample."),
    head=(f"{prefix}{head}.weight", f"{prefix}{head}.bias"),
    ignored=(_BUFFERS, *_PRETEXT),
  )


def _transformers(prefix: str) -> Source:
  patches = f"{prefix}embeddings.patch_embeddings.projection"
  return Source(
    name="transformers",
    stem={
      "patch_embed/proj/kernel": ((f"{patches}.weight",), _PATCHES),
      "patch_embed/proj/bias": ((f"{patches}.bias",), _SAME),
      **_norms(**{"patch_embed/norm": f"{prefix}embeddings.norm", "norm": f"{prefix}layernorm"}),
    },
    block={
      "attn/qkv/kernel": (
        tuple(f"attention.self.{part}.weight" for part in ("query", "key", "value")),
        _SPLIT_QKV,
      ),
      "attn/q_bias": (("attention.self.query.bias",), _SAME),
      "attn/v_bias": (("attention.self.value.bias",), _SAME),
      "attn/logit_scale": (("attention.self.logit_scale",), _PER_HEAD),
      **_position_bias("attention.self.continuous_position_bias_mlp"),
      **_linears(attn__proj="attention.output.dense", mlp__fc1="intermediate.dense", mlp__fc2="output.dense"),
      **_norms(norm1="layernorm_before", norm2="layernorm_after"),
    },
    downsample=_MERGING,
    block_prefix=prefix + "encoder.layers.{s}.blocks.{b}.",
    downsample_prefix=prefix + "encoder.layers.{s}.downsample.",
    head=("classifier.weight", "classifier.bias"),
    ignored=(_BUFFERS, r"(swinv2\.)?embeddings\.mask_token", r"decoder\..*", r"hidden_states_norms\..*"),
  )


_TORCHVISION = Source(
  name="torchvision",
  stem={
    "patch_embed/proj/kernel": (("features.0.0.weight",), _PATCHES),
    "patch_embed/proj/bias": (("features.0.0.bias",), _SAME),
    **_norms(**{"patch_embed/norm": "features.0.2", "norm": "norm"}),
  },
  block={
    "attn/qkv/kernel": (("attn.qkv.weight",), _LINEAR),
    "attn/q_bias": (("attn.qkv.bias",), _Q_OF_QKV),
    "attn/v_bias": (("attn.qkv.bias",), _V_OF_QKV),
    "attn/logit_scale": (("attn.logit_scale",), _PER_HEAD),
    **_position_bias("attn.cpb_mlp"),
    **_linears(attn__proj="attn.proj", mlp__fc1="mlp.0", mlp__fc2="mlp.3"),
    **_norms(norm1="norm1", norm2="norm2"),
  },
  downsample=_MERGING,
  block_prefix="features.{odd}.{b}.",
  downsample_prefix="features.{even}.",
  head=("head.weight", "head.bias"),
  ignored=(_BUFFERS,),
  maps_hold_windows=True,
)


def detect(keys: Sequence[str] | set[str]) -> Source | None:
  """The kind of checkpoint that has these keys, or None."""
  keys = set(keys)
  if "features.0.0.weight" in keys:
    return _TORCHVISION
  for prefix in ("swinv2.", ""):
    if f"{prefix}embeddings.patch_embeddings.projection.weight" in keys:
      return _transformers(prefix)
  mlp = "rpe_mlp" if any(".rpe_mlp." in key for key in keys) else "cpb_mlp"
  if "encoder.patch_embed.proj.weight" in keys:
    has_teacher = any(key.startswith("feature_model.") for key in keys)
    return _microsoft("Feature Distillation" if has_teacher else "SimMIM", prefix="encoder.", mlp=mlp)
  if "patch_embed.proj.weight" not in keys:
    return None
  # Microsoft merges at the end of a stage, timm at the beginning of the next; their other names are equal.
  if any(key.startswith("layers.0.downsample.") for key in keys) or mlp == "rpe_mlp":
    return _microsoft("Microsoft", mlp=mlp)
  if any(re.match(r"layers\.\d+\.downsample\.", key) for key in keys):
    return _microsoft("timm", shifted=True, head="head.fc")
  return _microsoft("Microsoft")
