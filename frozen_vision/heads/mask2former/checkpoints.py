"""Published Mask2Former heads as ours: transformers' names, and those of the official (detectron2) code.

Every key is used or named as ignored, every parameter of our head is filled, or there is one error that lists
all that is wrong.

  state = mask2former.convert(mask2former.read_state_dict("model.safetensors"), nnx.state(head))
  nnx.update(head, state)
"""

from collections.abc import Iterator, Mapping, Sequence
import os
import re

from flax import nnx
import jax.numpy as jnp
import numpy as np

from frozen_vision.files import checkpoint_file, keys, tensors, trees
from frozen_vision.files.layouts import conv, Layout, linear, pointwise, vector


def _table(x: np.ndarray) -> np.ndarray | None:
  return x if x.ndim == 2 else None


_NORMS = r"model\.pixel_level_module\.encoder\.hidden_states_norms"
_PIXEL = r"model\.pixel_level_module\.decoder"
_ENCODER = _PIXEL + r"\.encoder\.layers\.(\d+)"
_DECODER = r"model\.transformer_module\.decoder"
_LAYER = _DECODER + r"\.layers\.(\d+)"
_OFFICIAL_PIXEL = r"sem_seg_head\.pixel_decoder"
_OFFICIAL_ENCODER = _OFFICIAL_PIXEL + r"\.transformer\.encoder\.layers\.(\d+)"
_OFFICIAL = r"sem_seg_head\.predictor"
_SELF = _OFFICIAL + r"\.transformer_self_attention_layers\.(\d+)"
_CROSS = _OFFICIAL + r"\.transformer_cross_attention_layers\.(\d+)"
_FFN = _OFFICIAL + r"\.transformer_ffn_layers\.(\d+)"

# (pattern of the source's module, our module, layout of its weight). Biases are vectors. {1} in our names is
# a number that counts from 1 in the source.
TABLE: tuple[tuple[str, str, Layout], ...] = (
  # transformers. The norms are those of a Swin backbone's levels; ours are in the head (`input_norm`).
  (_NORMS + r"\.stage(\d+)", "pixel_decoder/norms/{1}", vector),
  (_PIXEL + r"\.input_projections\.(\d+)\.0", "pixel_decoder/inputs/{0}/conv", pointwise),
  (_PIXEL + r"\.input_projections\.(\d+)\.1", "pixel_decoder/inputs/{0}/norm", vector),
  (_ENCODER + r"\.self_attn\.sampling_offsets", "pixel_decoder/layers/{0}/offsets", linear),
  (_ENCODER + r"\.self_attn\.attention_weights", "pixel_decoder/layers/{0}/weights", linear),
  (_ENCODER + r"\.self_attn\.value_proj", "pixel_decoder/layers/{0}/value", linear),
  (_ENCODER + r"\.self_attn\.output_proj", "pixel_decoder/layers/{0}/output", linear),
  (_ENCODER + r"\.self_attn_layer_norm", "pixel_decoder/layers/{0}/norm", vector),
  (_ENCODER + r"\.fc1", "pixel_decoder/layers/{0}/ffn/hidden", linear),
  (_ENCODER + r"\.fc2", "pixel_decoder/layers/{0}/ffn/output", linear),
  (_ENCODER + r"\.final_layer_norm", "pixel_decoder/layers/{0}/ffn/norm", vector),
  (_PIXEL + r"\.adapter_(\d+)\.0", "pixel_decoder/laterals/{1}/conv", pointwise),
  (_PIXEL + r"\.adapter_(\d+)\.1", "pixel_decoder/laterals/{1}/norm", vector),
  (_PIXEL + r"\.layer_(\d+)\.0", "pixel_decoder/outputs/{1}/conv", conv),
  (_PIXEL + r"\.layer_(\d+)\.1", "pixel_decoder/outputs/{1}/norm", vector),
  (_PIXEL + r"\.mask_projection", "pixel_decoder/mask_features", pointwise),
  (_LAYER + r"\.self_attn\.q_proj", "transformer_decoder/layers/{0}/self_attention/query", linear),
  (_LAYER + r"\.self_attn\.k_proj", "transformer_decoder/layers/{0}/self_attention/key", linear),
  (_LAYER + r"\.self_attn\.v_proj", "transformer_decoder/layers/{0}/self_attention/value", linear),
  (_LAYER + r"\.self_attn\.out_proj", "transformer_decoder/layers/{0}/self_attention/output", linear),
  (_LAYER + r"\.self_attn_layer_norm", "transformer_decoder/layers/{0}/self_attention/norm", vector),
  (_LAYER + r"\.cross_attn\.out_proj", "transformer_decoder/layers/{0}/cross_attention/output", linear),
  (_LAYER + r"\.cross_attn_layer_norm", "transformer_decoder/layers/{0}/cross_attention/norm", vector),
  (_LAYER + r"\.fc1", "transformer_decoder/layers/{0}/ffn/hidden", linear),
  (_LAYER + r"\.fc2", "transformer_decoder/layers/{0}/ffn/output", linear),
  (_LAYER + r"\.final_layer_norm", "transformer_decoder/layers/{0}/ffn/norm", vector),
  (_DECODER + r"\.layernorm", "transformer_decoder/norm", vector),
  (_DECODER + r"\.mask_predictor\.mask_embedder\.(\d+)\.0", "transformer_decoder/mask_mlp/{0}", linear),
  (r"class_predictor", "transformer_decoder/classes", linear),
  # The official code.
  (r"backbone\.norm(\d+)", "pixel_decoder/norms/{0}", vector),
  (_OFFICIAL_PIXEL + r"\.input_proj\.(\d+)\.0", "pixel_decoder/inputs/{0}/conv", pointwise),
  (_OFFICIAL_PIXEL + r"\.input_proj\.(\d+)\.1", "pixel_decoder/inputs/{0}/norm", vector),
  (_OFFICIAL_ENCODER + r"\.self_attn\.sampling_offsets", "pixel_decoder/layers/{0}/offsets", linear),
  (_OFFICIAL_ENCODER + r"\.self_attn\.attention_weights", "pixel_decoder/layers/{0}/weights", linear),
  (_OFFICIAL_ENCODER + r"\.self_attn\.value_proj", "pixel_decoder/layers/{0}/value", linear),
  (_OFFICIAL_ENCODER + r"\.self_attn\.output_proj", "pixel_decoder/layers/{0}/output", linear),
  (_OFFICIAL_ENCODER + r"\.norm1", "pixel_decoder/layers/{0}/norm", vector),
  (_OFFICIAL_ENCODER + r"\.linear1", "pixel_decoder/layers/{0}/ffn/hidden", linear),
  (_OFFICIAL_ENCODER + r"\.linear2", "pixel_decoder/layers/{0}/ffn/output", linear),
  (_OFFICIAL_ENCODER + r"\.norm2", "pixel_decoder/layers/{0}/ffn/norm", vector),
  (_OFFICIAL_PIXEL + r"\.adapter_(\d+)", "pixel_decoder/laterals/{1}/conv", pointwise),
  (_OFFICIAL_PIXEL + r"\.adapter_(\d+)\.norm", "pixel_decoder/laterals/{1}/norm", vector),
  (_OFFICIAL_PIXEL + r"\.layer_(\d+)", "pixel_decoder/outputs/{1}/conv", conv),
  (_OFFICIAL_PIXEL + r"\.layer_(\d+)\.norm", "pixel_decoder/outputs/{1}/norm", vector),
  (_OFFICIAL_PIXEL + r"\.mask_features", "pixel_decoder/mask_features", pointwise),
  (_SELF + r"\.self_attn\.out_proj", "transformer_decoder/layers/{0}/self_attention/output", linear),
  (_SELF + r"\.norm", "transformer_decoder/layers/{0}/self_attention/norm", vector),
  (
    _CROSS + r"\.multihead_attn\.out_proj",
    "transformer_decoder/layers/{0}/cross_attention/output",
    linear,
  ),
  (_CROSS + r"\.norm", "transformer_decoder/layers/{0}/cross_attention/norm", vector),
  (_FFN + r"\.linear1", "transformer_decoder/layers/{0}/ffn/hidden", linear),
  (_FFN + r"\.linear2", "transformer_decoder/layers/{0}/ffn/output", linear),
  (_FFN + r"\.norm", "transformer_decoder/layers/{0}/ffn/norm", vector),
  (_OFFICIAL + r"\.decoder_norm", "transformer_decoder/norm", vector),
  (_OFFICIAL + r"\.mask_embed\.layers\.(\d+)", "transformer_decoder/mask_mlp/{0}", linear),
  (_OFFICIAL + r"\.class_embed", "transformer_decoder/classes", linear),
)

# (pattern of a whole key, our parameter): tables of embeddings.
EMBEDDINGS: tuple[tuple[str, str], ...] = (
  (_PIXEL + r"\.level_embed", "pixel_decoder/level_embed"),
  (r"model\.transformer_module\.queries_embedder\.weight", "transformer_decoder/query_positions"),
  (r"model\.transformer_module\.queries_features\.weight", "transformer_decoder/query_features"),
  (r"model\.transformer_module\.level_embed\.weight", "transformer_decoder/level_embed"),
  (_OFFICIAL_PIXEL + r"\.transformer\.level_embed", "pixel_decoder/level_embed"),
  (_OFFICIAL + r"\.query_embed\.weight", "transformer_decoder/query_positions"),
  (_OFFICIAL + r"\.(?:query_feat|static_query)\.weight", "transformer_decoder/query_features"),
  (_OFFICIAL + r"\.level_embed\.weight", "transformer_decoder/level_embed"),
)

# (pattern of what stands before in_proj_weight and in_proj_bias, our module): query, key and value in one
# array.
ATTENTIONS: tuple[tuple[str, str], ...] = (
  (_LAYER + r"\.cross_attn", "transformer_decoder/layers/{0}/cross_attention"),
  (_CROSS + r"\.multihead_attn", "transformer_decoder/layers/{0}/cross_attention"),
  (_SELF + r"\.self_attn", "transformer_decoder/layers/{0}/self_attention"),
)

# Not ours to fill: the backbone but for the norms that the table names (ours are loaded on their own), the
# constants of the loss and of the input pipeline.
IGNORED = (
  r"model\.pixel_level_module\.encoder\.(?!hidden_states_norms\.).*",
  r"backbone\.(?!norm\d+\.).*",
  r"criterion\.empty_weight",
  r"pixel_(mean|std)",
)


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The tensors of a Mask2Former checkpoint; nothing else in it is read or run.

  The official model zoo's `.pkl` files are pickles of arrays: write theirs (below "model") as safetensors
  first.

  Args:
    path: what `files.checkpoint_file.open_checkpoint` takes.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: another kind of file, or a damaged one.
  """
  return checkpoint_file.open_checkpoint(path).read_all()


def convert(
  state_dict: Mapping[str, np.ndarray], head_state: nnx.State, *, keep: Sequence[str] = ()
) -> nnx.State:
  """Our state with the head of a Mask2Former.

  The head must be configured as the source's: layers, queries, channels, number of classes; and with
  `input_norm` exactly if the source's backbone ends in a norm per level, as its Swin does and its ResNet not.

  Args:
    state_dict: PyTorch names and layouts, of the whole model or of what stands outside its backbone.
    head_state: of our Mask2Former; leaves may be abstract.
    keep: regular expressions of our paths that keep their values; what the source has for them is dropped.
      For other classes: (r"transformer_decoder/classes/.*",); for a backbone with other channels:
      (r"pixel_decoder/(norms|inputs|laterals)/.*",).

  Returns:
    A state of the same structure and dtypes.

  Raises:
    ValueError: lists all parameters of ours without a source, all keys without a counterpart, and all
      shapes that do not fit. Or the state is not of such a head.
  """
  flat = nnx.to_flat_state(head_state)
  leaves = {trees.path_string(path): leaf for path, leaf in flat}
  if "transformer_decoder/query_features" not in leaves:
    found = sorted({path.split("/")[0] for path in leaves})
    raise ValueError(f"Expected the state of a Mask2Former head, found one with {found}.")

  def keeps(path):
    return any(re.fullmatch(pattern, path) for pattern in keep)

  filled: dict[str, np.ndarray] = {}
  report = keys.KeyReport()
  for name, value in state_dict.items():
    if any(re.fullmatch(pattern, name) for pattern in IGNORED):
      continue
    value = np.asarray(value)
    places = list(_places(name, value))
    if places and all(keeps(path) for path, _ in places):
      continue
    if not places or any(path not in leaves or path in filled for path, _ in places):
      report.add_unexpected(name, value.shape)
      continue
    for path, array in places:
      shape = tuple(leaves[path].shape)
      if array is None or array.shape != shape:
        report.add_misshaped(name, value.shape, f"one for {path} {shape}")
        array = np.zeros(0)  # found, so not missing too
      filled[path] = array
  for path, leaf in leaves.items():
    if path not in filled and not keeps(path):
      report.add_missing(path, tuple(leaf.shape))
  report.check(
    "The Mask2Former state dict does not fit the head. Configure the head as the source's, or name in `keep` "
    "what should keep its own values",
    _hints(report),
  )
  for name, array in filled.items():
    tensors.check_finite(name, array, "The Mask2Former state dict")
  return nnx.from_flat_state(
    [
      (path, leaf.replace(jnp.asarray(filled[name], leaf.dtype)) if name in filled else leaf)
      for (path, leaf), name in zip(flat, leaves)
    ]
  )


def _places(name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray | None]]:
  """(our path, our array) of everything that a source key holds; nothing if it is in none of the tables."""
  for pattern, path in EMBEDDINGS:
    if re.fullmatch(pattern, name):
      yield path, _table(value)
      return
  module, _, kind = name.rpartition(".")
  for pattern, ours in ATTENTIONS:
    match = re.fullmatch(pattern, module)
    if match and kind in ("in_proj_weight", "in_proj_bias"):
      layout, leaf = (linear, "kernel") if kind == "in_proj_weight" else (vector, "bias")
      parts = np.split(value, 3) if value.ndim and len(value) % 3 == 0 else [value] * 3
      for part, projection in zip(parts, ("query", "key", "value")):
        yield f"{ours.format(*match.groups())}/{projection}/{leaf}", layout(part)
      return
  for pattern, ours, layout in TABLE:
    match = re.fullmatch(pattern, module)
    if match and kind in ("weight", "bias"):
      number = match.groups()[0] if match.groups() else "0"
      path = ours.format(number, int(number) - 1)
      if kind == "bias":
        yield f"{path}/bias", vector(value)
      else:
        yield f"{path}/{'scale' if layout is vector else 'kernel'}", layout(value)
      return


def _hints(report: keys.KeyReport) -> Iterator[str]:
  """A hint about norms per level, the most frequent difference."""
  if any(line.startswith("missing pixel_decoder/norms/") for line in report.missing):
    yield "The backbone of the source ends without norms per level: build the head with input_norm=False."
  if any(re.match(rf"unexpected (backbone\.norm|{_NORMS})", line) for line in report.unexpected):
    yield "The backbone of the source ends in a norm per level: build the head with input_norm=True."
