"""Names of a ViT's parameters in Google's npz: big_vision (SigLIP) and vision_transformer (AugReg)."""

import numpy as np

from frozen_vision.backbones.vit.checkpoint_layout import (
  CONV_HWIO,
  Layout,
  merged,
  Names,
  SAME,
  TOKEN,
  TOKENS,
  Transform,
)

_PARTS = ("query", "key", "value")
_OUT = Transform(lambda s, c: [(c.num_heads, c.head_dim, s[1])], lambda x: x.reshape(-1, x.shape[-1]))


def _flax_attention(module: str) -> Names:
  def joined(parts):
    return Transform(
      lambda s, c: [(s[0], c.num_heads, c.head_dim)] * parts,
      lambda *x: np.concatenate([y.reshape(y.shape[0], -1) for y in x], axis=1),
    )

  def biases(parts):
    return Transform(
      lambda s, c: [(c.num_heads, c.head_dim)] * parts, lambda *x: np.concatenate([y.reshape(-1) for y in x])
    )

  return {
    "qkv/kernel": ((tuple(f"{module}/{part}/kernel" for part in _PARTS), joined(3)),),
    **{f"{p}_bias": (((f"{module}/{part}/bias",), biases(1)),) for p, part in zip("qkv", _PARTS)},
    "query/kernel": (((f"{module}/query/kernel",), joined(1)),),
    "query/bias": (((f"{module}/query/bias",), biases(1)),),
    "key_value/kernel": ((tuple(f"{module}/{part}/kernel" for part in _PARTS[1:]), joined(2)),),
    "key_value/bias": ((tuple(f"{module}/{part}/bias" for part in _PARTS[1:]), biases(2)),),
    "proj/kernel": (((f"{module}/out/kernel",), _OUT),),
    "proj/bias": (((f"{module}/out/bias",), SAME),),
  }


def _flax_dense(ours: str, theirs: str) -> Names:
  return {f"{ours}/{leaf}": (((f"{theirs}/{leaf}",), SAME),) for leaf in ("kernel", "bias")}


def _flax_norm(ours: str, theirs: str) -> Names:
  return {f"{ours}/{leaf}": (((f"{theirs}/{leaf}",), SAME),) for leaf in ("scale", "bias")}


def _below(place: str, names: Names) -> Names:
  return {f"{place}/{ours}": alternatives for ours, alternatives in names.items()}


def _flax(name: str, marker: str, norm1: str, attn: str, norm2: str, mlp: str, positions: str) -> Layout:
  pool = "MAPHead_0"
  return Layout(
    name=name,
    marker=marker,
    stem=merged(
      {
        "cls_token": ((("cls",), TOKEN),),
        "positions": (((positions,), TOKENS),),
        "patch_embed/proj/kernel": ((("embedding/kernel",), CONV_HWIO),),
        "patch_embed/proj/bias": ((("embedding/bias",), SAME),),
        "attention_pool/probe": (((f"{pool}/probe",), TOKEN),),
      },
      _below("attention_pool", _flax_attention(f"{pool}/MultiHeadDotProductAttention_0")),
      _flax_norm("attention_pool/norm", f"{pool}/LayerNorm_0"),
      _flax_dense("attention_pool/mlp/fc1", f"{pool}/MlpBlock_0/Dense_0"),
      _flax_dense("attention_pool/mlp/fc2", f"{pool}/MlpBlock_0/Dense_1"),
      _flax_norm("norm", "Transformer/encoder_norm"),
    ),
    block=merged(
      _flax_norm("norm1", norm1),
      _below("attn", _flax_attention(attn)),
      _flax_norm("norm2", norm2),
      _flax_dense("mlp/fc1", f"{mlp}/Dense_0"),
      _flax_dense("mlp/fc2", f"{mlp}/Dense_1"),
    ),
    block_prefix="Transformer/encoderblock_{b}/",
    ignored=(r"(.*/)?(head|pre_logits)/(kernel|bias)", r"params/(txt/.*|t|b)", r"opt/.*"),
  )


# Google's npz: big_vision (SigLIP), and the older vision_transformer (AugReg).
BIG_VISION = _flax(
  "big_vision",
  "pos_embedding",
  "LayerNorm_0",
  "MultiHeadDotProductAttention_0",
  "LayerNorm_1",
  "MlpBlock_0",
  "pos_embedding",
)
VISION_TRANSFORMER = _flax(
  "vision_transformer",
  "Transformer/posembed_input/pos_embedding",
  "LayerNorm_0",
  "MultiHeadDotProductAttention_1",
  "LayerNorm_2",
  "MlpBlock_3",
  "Transformer/posembed_input/pos_embedding",
)
