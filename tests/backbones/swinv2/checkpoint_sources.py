"""SwinV2 checkpoints under the names of each public source, written from the published tables of names.

Names in `frozen_vision.convert` are written the other way round and are not used here.
"""

import re

import numpy as np

from frozen_vision.backbones.swinv2 import windows as window_lib

State = dict[str, np.ndarray]


def timm(embed_dim: int, depths, heads, *, classes: int = 1000, extra_norm: int = 0) -> State:
  """timm's state dict with arrays that take no memory; the shapes are the published ones."""
  state = {
    "patch_embed.proj.weight": (embed_dim, 3, 4, 4),
    "patch_embed.proj.bias": (embed_dim,),
    "patch_embed.norm.weight": (embed_dim,),
    "patch_embed.norm.bias": (embed_dim,),
  }
  for s, (depth, h) in enumerate(zip(depths, heads)):
    d = embed_dim * 2**s
    if s:
      state |= {
        f"layers.{s}.downsample.reduction.weight": (d, 2 * d),
        f"layers.{s}.downsample.norm.weight": (d,),
        f"layers.{s}.downsample.norm.bias": (d,),
      }
    for b in range(depth):
      names = {
        "attn.logit_scale": (h, 1, 1),
        "attn.q_bias": (d,),
        "attn.v_bias": (d,),
        "attn.cpb_mlp.0.weight": (512, 2),
        "attn.cpb_mlp.0.bias": (512,),
        "attn.cpb_mlp.2.weight": (h, 512),
        "attn.qkv.weight": (3 * d, d),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "norm1.weight": (d,),
        "norm1.bias": (d,),
        "mlp.fc1.weight": (4 * d, d),
        "mlp.fc1.bias": (4 * d,),
        "mlp.fc2.weight": (d, 4 * d),
        "mlp.fc2.bias": (d,),
        "norm2.weight": (d,),
        "norm2.bias": (d,),
      }
      if extra_norm and (b + 1) % extra_norm == 0:
        names |= {"enorm.weight": (d,), "enorm.bias": (d,)}
      state |= {f"layers.{s}.blocks.{b}.{name}": shape for name, shape in names.items()}
  last = embed_dim * 2 ** (len(depths) - 1)
  state |= {
    "norm.weight": (last,),
    "norm.bias": (last,),
    "head.fc.weight": (classes, last),
    "head.fc.bias": (classes,),
  }
  return {key: np.broadcast_to(np.float32(0), shape) for key, shape in state.items()}


def microsoft(state: State, windows=None, pretrained=None) -> State:
  """Microsoft's: merging at the end of a stage, buffers with the coordinates."""
  state = {
    re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key).replace(
      "head.fc.", "head."
    ): value
    for key, value in state.items()
  }
  return state | _buffers(state, windows, pretrained) if windows else state


def feature_distillation(state: State) -> State:
  """A student of Feature Distillation: SimMIM's names, a projector, and its teacher, a first Swin."""
  student = {key: value for key, value in simmim(state).items() if key.startswith("encoder.")}
  student = {key: value for key, value in student.items() if not key.endswith("mask_token")}
  teacher = {
    "feature_model.patch_embed.proj.weight": np.ones((4, 3, 4, 4), np.float32),
    "feature_model.layers.0.blocks.0.attn.relative_position_bias_table": np.ones((9, 1), np.float32),
    "feature_model.layers.0.blocks.0.attn.relative_position_index": np.ones((4, 4), np.int64),
    "feature_model.norm.weight": np.ones(8, np.float32),
  }
  projector = {"decoder.0.weight": np.ones((8, 16, 1), np.float32), "decoder.0.bias": np.ones(8, np.float32)}
  return student | projector | teacher


def simmim(state: State) -> State:
  """SimMIM's pretraining: an encoder without a classifier, a decoder of pixels, the older name of the MLP."""
  state = {
    f"encoder.{key}".replace("cpb_mlp", "rpe_mlp"): value
    for key, value in microsoft(state).items()
    if not key.startswith("head.")
  }
  state |= {
    "encoder.mask_token": np.zeros((1, 1, 8), np.float32),
    "decoder.0.weight": np.zeros((3072, 8, 1, 1)),
    "decoder.0.bias": np.zeros(3072),
  }
  return state | {"encoder.layers.0.blocks.1.attn_mask": np.zeros((4, 16, 16))}


_TRANSFORMERS = (
  (r"patch_embed\.proj", "embeddings.patch_embeddings.projection"),
  (r"patch_embed\.norm", "embeddings.norm"),
  (r"attn\.cpb_mlp", "attention.self.continuous_position_bias_mlp"),
  (r"attn\.logit_scale", "attention.self.logit_scale"),
  (r"attn\.q_bias", "attention.self.query.bias"),
  (r"attn\.v_bias", "attention.self.value.bias"),
  (r"attn\.proj", "attention.output.dense"),
  (r"mlp\.fc1", "intermediate.dense"),
  (r"mlp\.fc2", "output.dense"),
  (r"norm1", "layernorm_before"),
  (r"norm2", "layernorm_after"),
  (r"^norm\.", "layernorm."),
  (r"^layers", "encoder.layers"),
)


def transformers(state: State, *, prefix: str = "swinv2.") -> State:
  """Swinv2ForImageClassification's; with an empty prefix and no head, Swinv2Model's."""
  found = {}
  for key, value in microsoft(state).items():
    if key.startswith("head."):
      found[key.replace("head.", "classifier.")] = value
      continue
    for old, new in _TRANSFORMERS:
      key = re.sub(old, new, key)
    if "attn.qkv." in key:
      for index, part in enumerate(("query", "key", "value")):
        size = value.shape[0] // 3
        name = prefix + key.replace("attn.qkv", f"attention.self.{part}")
        found[name] = value[index * size : (index + 1) * size]
    else:
      found[prefix + key] = value
  return found


def torchvision(state: State, windows) -> State:
  """torchvision's: one Sequential, a bias for q, k and v in one."""
  found = {}
  state = microsoft(state)
  for key, value in (state | _buffers(state, windows, windows)).items():
    key = key.replace("patch_embed.proj", "features.0.0").replace("patch_embed.norm", "features.0.2")
    key = re.sub(r"layers\.(\d)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", key)
    key = re.sub(r"layers\.(\d)\.downsample", lambda m: f"features.{2 * int(m[1]) + 2}", key)
    key = key.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
    if key.endswith("v_bias"):
      continue
    if key.endswith("q_bias"):
      name = re.sub(r"features\.(\d)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.", key)
      v = state[name.replace("q_b", "v_b")]
      # What stands in the place of the keys is set to zero in every forward pass.
      key, value = key.replace("q_bias", "qkv.bias"), np.concatenate([value, np.full_like(value, 7), v])
    found[key] = value.reshape(-1) if key.endswith("relative_position_index") else value
  return found


def _buffers(state: State, windows, pretrained) -> State:
  found = {}
  for key in state:
    if not key.endswith("attn.logit_scale"):
      continue
    stage = int(key.split(".")[1])
    window = (windows[stage],) * 2
    place = key.removesuffix("logit_scale")
    table = window_lib.position_coordinates(window, (pretrained or windows)[stage])
    found[place + "relative_coords_table"] = table.reshape(1, 2 * window[0] - 1, 2 * window[0] - 1, 2)
    found[place + "relative_position_index"] = np.asarray(window_lib.position_index(window), np.int64)
  return found
