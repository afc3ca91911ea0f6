"""Names of a ViT's parameters in PyTorch checkpoints, one table per layout, and which layout a file has."""

from collections.abc import Mapping
import dataclasses

from frozen_vision.backbones.vit.checkpoint_keys_flax import BIG_VISION, VISION_TRANSFORMER
from frozen_vision.backbones.vit.checkpoint_layout import (
  CONV,
  half,
  LAST_TWO_THIRDS,
  LAST_TWO_THIRDS_BIAS,
  Layout,
  LINEAR,
  merged,
  Names,
  PATCHES_ONLY,
  SAME,
  SPLIT_QKV,
  third,
  TOKEN,
  TOKENS,
)


def _norm(ours: str, *theirs: str) -> Names:
  return {
    f"{ours}/{leaf}": tuple(((f"{name}.{suffix}",), SAME) for name in theirs)
    for leaf, suffix in (("scale", "weight"), ("bias", "bias"))
  }


def _linear(ours: str, *theirs: str) -> Names:
  return {
    f"{ours}/kernel": tuple(((f"{name}.weight",), LINEAR) for name in theirs),
    f"{ours}/bias": tuple(((f"{name}.bias",), SAME) for name in theirs),
  }


def _linear_halves(ours: str, theirs: str, index: int) -> Names:
  return {
    f"{ours}/kernel": (((f"{theirs}.weight",), half(index, of_matrix=True)),),
    f"{ours}/bias": (((f"{theirs}.bias",), half(index, of_matrix=False)),),
  }


_PACKED_QKV: Names = {
  "attn/qkv/kernel": ((("attn.qkv.weight",), LINEAR),),
  "attn/q_bias": ((("attn.q_bias",), SAME), (("attn.qkv.bias",), third(0))),
  "attn/k_bias": ((("attn.qkv.bias",), third(1)),),
  "attn/v_bias": ((("attn.v_bias",), SAME), (("attn.qkv.bias",), third(2))),
}

# Meta's .pth (DINO, MAE, DeiT, DINOv2, DINOv3) and timm, whose names grew from DeiT's; SimMIM's and Feature
# Distillation's ViTs, below `encoder.`.
TIMM = Layout(
  name="Meta, timm, SimMIM or Feature Distillation",
  marker="blocks.0.norm1.weight",
  stem=merged(
    {
      "cls_token": ((("cls_token",), TOKEN),),
      "registers": tuple(((f"{name}_tokens",), TOKENS) for name in ("register", "storage"))
      + ((("reg_token",), TOKENS),),
      "positions": ((("pos_embed",), TOKENS), (("pos_embed",), PATCHES_ONLY)),
      "periods": ((("rope_embed.periods",), SAME),),
      "relative_positions": ((("rel_pos_bias.relative_position_bias_table",), SAME),),
      "patch_embed/proj/kernel": ((("patch_embed.proj.weight",), CONV),),
      "patch_embed/proj/bias": ((("patch_embed.proj.bias",), SAME),),
      "attention_pool/probe": ((("attn_pool.latent",), TOKEN),),
    },
    _norm("pre_norm", "norm_pre"),
    _norm("norm", "norm"),
    _linear("attention_pool/query", "attn_pool.q"),
    _linear("attention_pool/key_value", "attn_pool.kv"),
    _linear("attention_pool/proj", "attn_pool.proj"),
    _norm("attention_pool/norm", "attn_pool.norm"),
    _linear("attention_pool/mlp/fc1", "attn_pool.mlp.fc1"),
    _linear("attention_pool/mlp/fc2", "attn_pool.mlp.fc2"),
  ),
  block=merged(
    _norm("norm1", "norm1"),
    _PACKED_QKV,
    _linear("attn/proj", "attn.proj"),
    {"scale1/scale": ((("ls1.gamma",), SAME), (("gamma_1",), SAME))},
    _norm("norm2", "norm2"),
    _linear("mlp/fc1", "mlp.fc1"),
    _linear("mlp/fc2", "mlp.fc2"),
    _linear("mlp/gate", "mlp.w1", "mlp.fc1_g"),  # DINOv3: Meta, timm
    _linear("mlp/up", "mlp.w2", "mlp.fc1_x"),
    _linear_halves("mlp/gate", "mlp.w12", 0),  # DINOv2: Meta
    _linear_halves("mlp/up", "mlp.w12", 1),
    _linear_halves("mlp/gate", "mlp.fc1", 0),  # and timm
    _linear_halves("mlp/up", "mlp.fc1", 1),
    _linear("mlp/down", "mlp.w3", "mlp.fc2"),
    {"scale2/scale": ((("ls2.gamma",), SAME), (("gamma_2",), SAME))},
  ),
  block_prefix="blocks.{b}.",
  ignored=(
    r"mask_token",
    r"blocks\.\d+\.attn\.qkv\.bias_mask",  # which part of DINOv3's bias is zero
    r"(local_cls_norm|head|head_dist|pre_logits|fc_norm|dino_head|ibot_head|projectors)\..*",
    r"decoder_.*",  # MAE's
    # Of SimMIM and Feature Distillation: a buffer, the projector, and the teacher with all of its parts.
    r"rel_pos_bias\.relative_position_index|decoder\.0\.(weight|bias)|feature_model\..*",
  ),
)

_CLIP_TEXT = (
  r"transformer\..*|text\..*|token_embedding\.weight|positional_embedding|ln_final\..*|text_projection(\..*)?",
  r"logit_scale|logit_bias|input_resolution|context_length|vocab_size",
)
OPEN_CLIP = Layout(
  name="OpenCLIP",
  marker="ln_pre.weight",
  stem=merged(
    {
      "cls_token": ((("class_embedding",), SAME),),
      "positions": ((("positional_embedding",), SAME),),
      "patch_embed/proj/kernel": ((("conv1.weight",), CONV),),
    },
    _norm("pre_norm", "ln_pre"),
    _norm("norm", "ln_post"),
  ),
  block=merged(
    _norm("norm1", "ln_1"),
    {
      "attn/qkv/kernel": ((("attn.in_proj_weight",), LINEAR),),
      **{f"attn/{p}_bias": ((("attn.in_proj_bias",), third(i)),) for i, p in enumerate("qkv")},
    },
    _linear("attn/proj", "attn.out_proj"),
    _norm("norm2", "ln_2"),
    _linear("mlp/fc1", "mlp.c_fc"),
    _linear("mlp/fc2", "mlp.c_proj"),
  ),
  block_prefix="transformer.resblocks.{b}.",
  ignored=(r"(visual\.)?proj", *_CLIP_TEXT),
)


def _parts(module: str, names: tuple[str, str, str]) -> Names:
  """Queries, keys and values that are stored apart."""
  return {
    "attn/qkv/kernel": ((tuple(f"{module}.{part}.weight" for part in names), SPLIT_QKV),),
    **{f"attn/{p}_bias": (((f"{module}.{part}.bias",), SAME),) for p, part in zip("qkv", names)},
  }


_PROJ = ("q_proj", "k_proj", "v_proj")
_QUERY = ("query", "key", "value")

# transformers' CLIP and SigLIP.
HF_CLIP = Layout(
  name="transformers (CLIP, SigLIP)",
  marker="embeddings.patch_embedding.weight",
  stem=merged(
    {
      "cls_token": ((("embeddings.class_embedding",), SAME),),
      "positions": ((("embeddings.position_embedding.weight",), SAME),),
      "patch_embed/proj/kernel": ((("embeddings.patch_embedding.weight",), CONV),),
      "patch_embed/proj/bias": ((("embeddings.patch_embedding.bias",), SAME),),
      "attention_pool/probe": ((("head.probe",), TOKEN),),
      "attention_pool/query/kernel": ((("head.attention.in_proj_weight",), third(0, of_matrix=True)),),
      "attention_pool/query/bias": ((("head.attention.in_proj_bias",), third(0)),),
      "attention_pool/key_value/kernel": ((("head.attention.in_proj_weight",), LAST_TWO_THIRDS),),
      "attention_pool/key_value/bias": ((("head.attention.in_proj_bias",), LAST_TWO_THIRDS_BIAS),),
    },
    _norm("pre_norm", "pre_layrnorm"),
    _norm("norm", "post_layernorm"),
    _linear("attention_pool/proj", "head.attention.out_proj"),
    _norm("attention_pool/norm", "head.layernorm"),
    _linear("attention_pool/mlp/fc1", "head.mlp.fc1"),
    _linear("attention_pool/mlp/fc2", "head.mlp.fc2"),
  ),
  block=merged(
    _norm("norm1", "layer_norm1"),
    _parts("self_attn", _PROJ),
    _linear("attn/proj", "self_attn.out_proj"),
    _norm("norm2", "layer_norm2"),
    _linear("mlp/fc1", "mlp.fc1"),
    _linear("mlp/fc2", "mlp.fc2"),
  ),
  block_prefix="encoder.layers.{b}.",
  ignored=(
    r"(vision_model\.)?embeddings\.position_ids",
    r"text_model\..*|(visual|text)_projection\.weight|logit_scale|logit_bias",
  ),
)

_HF_STEM = merged(
  {
    "cls_token": ((("embeddings.cls_token",), TOKEN),),
    "registers": ((("embeddings.register_tokens",), TOKENS),),
    "positions": ((("embeddings.position_embeddings",), TOKENS),),
    "patch_embed/proj/kernel": (
      (("embeddings.patch_embeddings.projection.weight",), CONV),
      (("embeddings.patch_embeddings.weight",), CONV),
    ),
    "patch_embed/proj/bias": (
      (("embeddings.patch_embeddings.projection.bias",), SAME),
      (("embeddings.patch_embeddings.bias",), SAME),
    ),
  },
  _norm("norm", "layernorm", "norm"),
)
_HF_IGNORED = (
  r"(.*\.)?embeddings\.mask_token",
  r"(.*\.)?(classifier|pooler|decoder|lm_head)\..*",
)


def _hf(name: str, marker: str, block: Names, block_prefix: str) -> Layout:
  return Layout(name, marker, _HF_STEM, block, block_prefix, _HF_IGNORED)


# transformers' ViT, DeiT and MAE, as published, and as transformers 5 has them in memory.
_HF_VIT_OLD = _hf(
  "transformers (ViT)",
  "encoder.layer.0.layernorm_before.weight",
  merged(
    _norm("norm1", "layernorm_before"),
    _parts("attention.attention", _QUERY),
    _linear("attn/proj", "attention.output.dense"),
    _norm("norm2", "layernorm_after"),
    _linear("mlp/fc1", "intermediate.dense"),
    _linear("mlp/fc2", "output.dense"),
  ),
  "encoder.layer.{b}.",
)
_HF_VIT = _hf(
  "transformers (ViT)",
  "layers.0.layernorm_before.weight",
  merged(
    _norm("norm1", "layernorm_before"),
    _parts("attention", _PROJ),
    _linear("attn/proj", "attention.o_proj"),
    _norm("norm2", "layernorm_after"),
    _linear("mlp/fc1", "mlp.fc1"),
    _linear("mlp/fc2", "mlp.fc2"),
  ),
  "layers.{b}.",
)
# transformers' DINOv2, both of its kinds.
_HF_DINOV2 = _hf(
  "transformers (DINOv2)",
  "encoder.layer.0.layer_scale1.lambda1",
  merged(
    _norm("norm1", "norm1"),
    _parts("attention.attention", _QUERY),
    _parts("attention", _PROJ),
    _linear("attn/proj", "attention.output.dense", "attention.o_proj"),
    {f"scale{i}/scale": (((f"layer_scale{i}.lambda1",), SAME),) for i in (1, 2)},
    _norm("norm2", "norm2"),
    _linear("mlp/fc1", "mlp.fc1"),
    _linear("mlp/fc2", "mlp.fc2"),
    _linear("mlp/gate", "mlp.gate_proj"),
    _linear("mlp/up", "mlp.up_proj"),
    _linear("mlp/down", "mlp.down_proj", "mlp.weights_out"),
    _linear_halves("mlp/gate", "mlp.weights_in", 0),
    _linear_halves("mlp/up", "mlp.weights_in", 1),
  ),
  "encoder.layer.{b}.",
)


def _hf_dinov3(block_prefix: str) -> Layout:
  return _hf(
    "transformers (DINOv3)",
    block_prefix.format(b=0) + "layer_scale1.lambda1",
    merged(
      _norm("norm1", "norm1"),
      _parts("attention", _PROJ),
      _linear("attn/proj", "attention.o_proj"),
      {f"scale{i}/scale": (((f"layer_scale{i}.lambda1",), SAME),) for i in (1, 2)},
      _norm("norm2", "norm2"),
      _linear("mlp/fc1", "mlp.up_proj"),
      _linear("mlp/fc2", "mlp.down_proj"),
      _linear("mlp/gate", "mlp.gate_proj"),
      _linear("mlp/up", "mlp.up_proj"),
      _linear("mlp/down", "mlp.down_proj"),
    ),
    block_prefix,
  )


# Layouts, and the prefixes that they are found below.
_LAYOUTS: tuple[tuple[Layout, tuple[str, ...]], ...] = (
  (TIMM, ("", "backbone.", "module.", "teacher.backbone.", "encoder.")),
  (OPEN_CLIP, ("visual.", "")),
  (HF_CLIP, ("vision_model.", "", "vision_model.vision_model.")),
  (_HF_VIT_OLD, ("", "vit.", "deit.")),
  (_HF_VIT, ("", "vit.", "deit.")),
  (_HF_DINOV2, ("", "dinov2.", "dinov2_with_registers.")),
  (_hf_dinov3("layer.{b}."), ("", "dinov3_vit.")),
  (_hf_dinov3("model.layer.{b}."), ("", "dinov3_vit.")),
  (BIG_VISION, ("params/img/", "params/", "")),
  (VISION_TRANSFORMER, ("", "opt/target/")),
)


def detect(keys: Mapping) -> Layout | None:
  """The layout of a checkpoint with these keys, or None."""
  for layout, prefixes in _LAYOUTS:
    for prefix in prefixes:
      if prefix + layout.marker in keys:
        return dataclasses.replace(layout, prefix=prefix)
  return None
