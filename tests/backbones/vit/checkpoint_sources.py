"""Weights of a ViT under the names and in the layouts of public checkpoints, for files that tests write.

They are the names of the references' own state dicts (`test_parity.py` loads those); nothing here reads the
tables that it tests.
"""

import numpy as np

Arrays = dict[str, np.ndarray]


def meta(weights: Arrays, config, *, registers: str = "register_tokens", packed: bool = True) -> Arrays:
  """Meta's own: DINO, MAE, DINOv2 (`packed` SwiGLU), DINOv3 (`storage_tokens`, periods, a masked bias)."""
  state = _stem(weights, config, "patch_embed.proj", "cls_token", "pos_embed")
  if "registers" in weights:
    state[registers] = weights["registers"][None]
  if "periods" in weights:
    state["rope_embed.periods"] = weights["periods"]
  state |= _norm(weights, "norm", "norm")
  for i, block in _blocks(weights, config):
    place = f"blocks.{i}."
    state[place + "attn.qkv.weight"] = block["attn/qkv/kernel"].T
    if "attn/q_bias" in block:
      missing = np.full_like(block["attn/q_bias"], np.nan)  # as Meta's are before the mask makes them zero
      state[place + "attn.qkv.bias"] = np.concatenate(
        [block.get(f"attn/{part}_bias", missing) for part in "qkv"]
      )
      if "attn/k_bias" not in block:
        state[place + "attn.qkv.bias_mask"] = np.zeros_like(state[place + "attn.qkv.bias"])
    state |= _norm(block, "norm1", place + "norm1") | _norm(block, "norm2", place + "norm2")
    state |= _linear(block, "attn/proj", place + "attn.proj")
    for number in (1, 2):
      if f"scale{number}/scale" in block:
        state[place + f"ls{number}.gamma"] = block[f"scale{number}/scale"]
    if config.mlp == "mlp":
      state |= _linear(block, "mlp/fc1", place + "mlp.fc1") | _linear(block, "mlp/fc2", place + "mlp.fc2")
    elif packed:
      state |= _packed(block, place + "mlp.w12") | _linear(block, "mlp/down", place + "mlp.w3")
    else:
      for ours, theirs in (("gate", "w1"), ("up", "w2"), ("down", "w3")):
        state |= _linear(block, f"mlp/{ours}", f"{place}mlp.{theirs}")
  return state


def feature_distillation(weights: Arrays, config, *, teacher: str | None = "dino") -> Arrays:
  """A student of Feature Distillation beside its teacher and projector; without `teacher`, SimMIM's ViT."""
  state = _stem(weights, config, "patch_embed.proj", "cls_token", "pos_embed") | _norm(
    weights, "norm", "norm"
  )
  table = weights["relative_positions"]
  state["rel_pos_bias.relative_position_bias_table"] = table
  cells = config.position_grid**2 + 1
  state["rel_pos_bias.relative_position_index"] = np.zeros((cells, cells), np.int64)
  for i, block in _blocks(weights, config):
    place = f"blocks.{i}."
    state[place + "attn.qkv.weight"] = block["attn/qkv/kernel"].T
    state |= {f"{place}attn.{part}_bias": block[f"attn/{part}_bias"] for part in "qv"}
    state |= {f"{place}gamma_{number}": block[f"scale{number}/scale"] for number in (1, 2)}
    for ours, theirs in (("attn/proj", "attn.proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")):
      state |= _linear(block, ours, place + theirs)
    state |= _norm(block, "norm1", place + "norm1") | _norm(block, "norm2", place + "norm2")
  state = {f"encoder.{key}": array for key, array in state.items()}
  shapes = {"decoder.0.weight": (8, config.embed_dim, 1), "decoder.0.bias": (8,)}
  projector = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
  if teacher is None:
    return state | projector | {"encoder.mask_token": np.ones((1, 1, config.embed_dim), np.float32)}
  names = {
    "dino": ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight"),
    "clip": (
      "logit_scale",
      "visual.ln_pre.weight",
      "visual.conv1.weight",
      "transformer.resblocks.0.ln_1.bias",
    ),
  }[teacher]
  return state | projector | {f"feature_model.{name}": np.ones(3, np.float32) for name in names}


def timm(weights: Arrays, config) -> Arrays:
  """timm's VisionTransformer, and its Eva for rotary positions."""
  eva = config.positions == "rotary"
  state = meta(weights, config, registers="reg_token")
  state.pop("rope_embed.periods", None)
  if eva:
    for key in [key for key in state if ".ls" in key]:
      state[key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = state.pop(key)
    for key in [key for key in state if "qkv.bias" in key]:
      bias = state.pop(key)
      if key.endswith("qkv.bias"):
        q, _, v = np.split(bias, 3)
        place = key.removesuffix("qkv.bias")
        state |= {place + "q_bias": q, place + "v_bias": v}
  for key in [key for key in state if ".w12." in key or ".w3." in key]:
    array = state.pop(key)
    if ".w3." in key:
      state[key.replace("w3", "fc2")] = array
    elif eva:
      gate, up = np.split(array, 2)
      state |= {key.replace("w12", "fc1_g"): gate, key.replace("w12", "fc1_x"): up}
    else:
      state[key.replace("w12", "fc1")] = array
  if config.registers and not eva:  # the class token's position is added to it
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
  if config.pre_norm:
    state |= _norm(weights, "pre_norm", "norm_pre")
  if config.pooling == "attention":
    state["attn_pool.latent"] = weights["attention_pool/probe"][None, None]
    for ours, theirs in (("query", "q"), ("key_value", "kv"), ("proj", "proj"), ("mlp/fc1", "mlp.fc1")):
      state |= _linear(weights, f"attention_pool/{ours}", f"attn_pool.{theirs}")
    state |= _linear(weights, "attention_pool/mlp/fc2", "attn_pool.mlp.fc2")
    state |= _norm(weights, "attention_pool/norm", "attn_pool.norm")
  return state


def open_clip(weights: Arrays, config) -> Arrays:
  """The visual tower of OpenCLIP's and OpenAI's CLIP, beside a text tower."""
  state = {
    "visual.class_embedding": weights["cls_token"],
    "visual.positional_embedding": weights["positions"],
    "visual.conv1.weight": _conv(weights, config),
    "visual.proj": np.zeros((config.embed_dim, 8), np.float32),
    "transformer.resblocks.0.ln_1.weight": np.ones(8, np.float32),
    "token_embedding.weight": np.zeros((10, 8), np.float32),
    "positional_embedding": np.zeros((7, 8), np.float32),
    "ln_final.weight": np.ones(8, np.float32),
    "text_projection": np.zeros((8, 8), np.float32),
    "logit_scale": np.ones((), np.float32),
  }
  state |= _norm(weights, "pre_norm", "visual.ln_pre") | _norm(weights, "norm", "visual.ln_post")
  for i, block in _blocks(weights, config):
    place = f"visual.transformer.resblocks.{i}."
    state |= _norm(block, "norm1", place + "ln_1") | _norm(block, "norm2", place + "ln_2")
    state[place + "attn.in_proj_weight"] = block["attn/qkv/kernel"].T
    state[place + "attn.in_proj_bias"] = np.concatenate([block[f"attn/{part}_bias"] for part in "qkv"])
    state |= _linear(block, "attn/proj", place + "attn.out_proj")
    state |= _linear(block, "mlp/fc1", place + "mlp.c_fc") | _linear(block, "mlp/fc2", place + "mlp.c_proj")
  return state


def transformers_clip(weights: Arrays, config) -> Arrays:
  """transformers' CLIPModel or SiglipModel, as published."""
  place = "vision_model."
  state = _stem(weights, config, f"{place}embeddings.patch_embedding", "", "")
  state = {key: array for key, array in state.items() if key}
  state[f"{place}embeddings.position_embedding.weight"] = weights["positions"]
  state |= {
    "logit_scale": np.ones((), np.float32),
    "text_model.final_layer_norm.weight": np.ones(8, np.float32),
  }
  if config.class_token:
    state[f"{place}embeddings.class_embedding"] = weights["cls_token"]
    state["visual_projection.weight"] = np.zeros((8, config.embed_dim), np.float32)
    state |= _norm(weights, "pre_norm", f"{place}pre_layrnorm")
  else:
    state |= _hf_pool(weights, f"{place}head.")
  state |= _norm(weights, "norm", f"{place}post_layernorm")
  for i, block in _blocks(weights, config):
    inner = f"{place}encoder.layers.{i}."
    state |= _norm(block, "norm1", inner + "layer_norm1") | _norm(block, "norm2", inner + "layer_norm2")
    state |= _apart(block, [f"{inner}self_attn.{part}_proj" for part in "qkv"])
    state |= _linear(block, "attn/proj", inner + "self_attn.out_proj")
    state |= _linear(block, "mlp/fc1", inner + "mlp.fc1") | _linear(block, "mlp/fc2", inner + "mlp.fc2")
  return state


def transformers_vit(weights: Arrays, config) -> Arrays:
  """transformers' ViTForImageClassification, as published."""
  state = _hf_stem(weights, config, "vit.embeddings.patch_embeddings.projection", "vit.")
  state |= _norm(weights, "norm", "vit.layernorm")
  state |= {"classifier.weight": np.zeros((5, config.embed_dim), np.float32)}
  for i, block in _blocks(weights, config):
    place = f"vit.encoder.layer.{i}."
    state |= _norm(block, "norm1", place + "layernorm_before")
    state |= _norm(block, "norm2", place + "layernorm_after")
    state |= _apart(block, [f"{place}attention.attention.{part}" for part in ("query", "key", "value")])
    state |= _linear(block, "attn/proj", place + "attention.output.dense")
    state |= _linear(block, "mlp/fc1", place + "intermediate.dense")
    state |= _linear(block, "mlp/fc2", place + "output.dense")
  return state


def transformers_dino(weights: Arrays, config) -> Arrays:
  """transformers' Dinov2Model, Dinov2WithRegistersModel and DINOv3ViTModel, as published."""
  third = config.positions == "rotary"
  patches = "embeddings.patch_embeddings" + ("" if third else ".projection")
  state = _hf_stem(weights, config, patches, "")
  state |= _norm(weights, "norm", "norm" if third else "layernorm")
  state["embeddings.mask_token"] = np.zeros((1, config.embed_dim), np.float32)
  for i, block in _blocks(weights, config):
    place = f"layer.{i}." if third else f"encoder.layer.{i}."
    state |= _norm(block, "norm1", place + "norm1") | _norm(block, "norm2", place + "norm2")
    names = (
      ("q_proj", "k_proj", "v_proj") if third else ("attention.query", "attention.key", "attention.value")
    )
    state |= _apart(block, [f"{place}attention.{name}" for name in names])
    state |= _linear(block, "attn/proj", place + ("attention.o_proj" if third else "attention.output.dense"))
    for number in (1, 2):
      state[f"{place}layer_scale{number}.lambda1"] = block[f"scale{number}/scale"]
    if config.mlp == "swiglu" and not third:
      state |= _packed(block, place + "mlp.weights_in") | _linear(
        block, "mlp/down", place + "mlp.weights_out"
      )
      continue
    plain = dict(fc1="up_proj", fc2="down_proj") if third else dict(fc1="fc1", fc2="fc2")
    gated = dict(gate="gate_proj", up="up_proj", down="down_proj")
    for ours, theirs in (gated if config.mlp == "swiglu" else plain).items():
      state |= _linear(block, f"mlp/{ours}", f"{place}mlp.{theirs}")
  return state


def big_vision(weights: Arrays, config, *, scanned: bool) -> Arrays:
  """big_vision's SigLIP; `scanned` blocks have a leading axis. A text tower lies beside it."""
  heads, dim = config.num_heads, config.head_dim
  top = "params/img/"
  state = {
    top + "embedding/kernel": weights["patch_embed/proj/kernel"].reshape(
      config.patch_size, config.patch_size, 3, -1
    ),
    top + "embedding/bias": weights["patch_embed/proj/bias"],
    top + "pos_embedding": weights["positions"][None],
    top + "Transformer/encoder_norm/scale": weights["norm/scale"],
    top + "Transformer/encoder_norm/bias": weights["norm/bias"],
    top + "MAPHead_0/probe": weights["attention_pool/probe"][None, None],
    "params/txt/Embed_0/embedding": np.zeros((4, 8), np.float32),
    "params/t": np.ones(1, np.float32),
  }
  pool = {key.removeprefix("attention_pool/"): array for key, array in weights.items() if "_pool/" in key}
  kernels = [pool["query/kernel"], *np.split(pool["key_value/kernel"], 2, axis=1)]
  biases = [pool["query/bias"], *np.split(pool["key_value/bias"], 2)]
  state |= _flax_attention(
    f"{top}MAPHead_0/MultiHeadDotProductAttention_0/", pool, "", kernels, biases, heads, dim
  )
  state |= _flax(pool, "norm", f"{top}MAPHead_0/LayerNorm_0") | _flax_mlp(pool, f"{top}MAPHead_0/MlpBlock_0")
  blocks = []
  for _, block in _blocks(weights, config):
    kernels = np.split(block["attn/qkv/kernel"], 3, axis=1)
    biases = [block[f"attn/{part}_bias"] for part in "qkv"]
    attention = _flax_attention(
      "MultiHeadDotProductAttention_0/", block, "attn/", kernels, biases, heads, dim
    )
    norms = _flax(block, "norm1", "LayerNorm_0") | _flax(block, "norm2", "LayerNorm_1")
    blocks.append(attention | norms | _flax_mlp(block, "MlpBlock_0"))
  for key in blocks[0]:
    if scanned:
      state[f"{top}Transformer/encoderblock/{key}"] = np.stack([block[key] for block in blocks])
    else:
      state |= {f"{top}Transformer/encoderblock_{i}/{key}": block[key] for i, block in enumerate(blocks)}
  return state


def _flax_attention(place, arrays, ours, kernels, biases, heads, dim) -> Arrays:
  state = {f"{place}out/kernel": arrays[f"{ours}proj/kernel"].reshape(heads, dim, -1)}
  state[f"{place}out/bias"] = arrays[f"{ours}proj/bias"]
  for part, kernel, bias in zip(("query", "key", "value"), kernels, biases):
    state[f"{place}{part}/kernel"] = kernel.reshape(-1, heads, dim)
    state[f"{place}{part}/bias"] = bias.reshape(heads, dim)
  return state


def _flax(arrays: Arrays, ours: str, theirs: str) -> Arrays:
  return {f"{theirs}/{leaf}": arrays[f"{ours}/{leaf}"] for leaf in ("scale", "bias")}


def _flax_mlp(arrays: Arrays, theirs: str) -> Arrays:
  return {
    f"{theirs}/Dense_{i}/{leaf}": arrays[f"mlp/fc{i + 1}/{leaf}"]
    for i in (0, 1)
    for leaf in ("kernel", "bias")
  }


def _stem(weights: Arrays, config, patches: str, token: str, positions: str) -> Arrays:
  state = {f"{patches}.weight": _conv(weights, config)}
  if config.patch_bias:
    state[f"{patches}.bias"] = weights["patch_embed/proj/bias"]
  if config.class_token:
    state[token] = weights["cls_token"][None, None]
  if "positions" in weights:
    state[positions] = weights["positions"][None]
  return state


def _hf_stem(weights: Arrays, config, patches: str, place: str) -> Arrays:
  state = _stem(
    weights, config, patches, f"{place}embeddings.cls_token", f"{place}embeddings.position_embeddings"
  )
  if "registers" in weights:
    state["embeddings.register_tokens"] = weights["registers"][None]
  return state


def _hf_pool(weights: Arrays, place: str) -> Arrays:
  kernels = [weights[f"attention_pool/{part}/kernel"] for part in ("query", "key_value")]
  biases = [weights[f"attention_pool/{part}/bias"] for part in ("query", "key_value")]
  state = {f"{place}probe": weights["attention_pool/probe"][None, None]}
  state[f"{place}attention.in_proj_weight"] = np.concatenate(kernels, axis=1).T
  state[f"{place}attention.in_proj_bias"] = np.concatenate(biases)
  state |= _linear(weights, "attention_pool/proj", f"{place}attention.out_proj")
  state |= _norm(weights, "attention_pool/norm", f"{place}layernorm")
  state |= _linear(weights, "attention_pool/mlp/fc1", f"{place}mlp.fc1")
  return state | _linear(weights, "attention_pool/mlp/fc2", f"{place}mlp.fc2")


def _conv(weights: Arrays, config) -> np.ndarray:
  kernel = weights["patch_embed/proj/kernel"]
  return kernel.reshape(config.patch_size, config.patch_size, 3, -1).transpose(3, 2, 0, 1)


def _blocks(weights: Arrays, config):
  for i in range(config.depth):
    place = f"blocks/{i}/"
    yield i, {key.removeprefix(place): array for key, array in weights.items() if key.startswith(place)}


def _norm(arrays: Arrays, ours: str, theirs: str) -> Arrays:
  return {f"{theirs}.weight": arrays[f"{ours}/scale"], f"{theirs}.bias": arrays[f"{ours}/bias"]}


def _linear(arrays: Arrays, ours: str, theirs: str) -> Arrays:
  return {f"{theirs}.weight": arrays[f"{ours}/kernel"].T, f"{theirs}.bias": arrays[f"{ours}/bias"]}


def _packed(block: Arrays, theirs: str) -> Arrays:
  parts = [_linear(block, f"mlp/{half}", theirs) for half in ("gate", "up")]
  return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _apart(block: Arrays, names: list[str]) -> Arrays:
  state = {f"{n}.weight": k.T for n, k in zip(names, np.split(block["attn/qkv/kernel"], 3, axis=1))}
  return state | {
    f"{name}.bias": block[f"attn/{part}_bias"]
    for name, part in zip(names, "qkv")
    if f"attn/{part}_bias" in block
  }
