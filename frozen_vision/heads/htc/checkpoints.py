"""Published mmdet heads as ours: HTC, Cascade Mask R-CNN and Mask R-CNN with an FPN.

The names are those of mmdet 2 and 3. Every key is used or named as ignored, every parameter of our
neck and head is filled, or there is one error that lists all that is wrong.

  state = mmdet.convert(mmdet.read_state_dict("htc_r50_fpn_1x_coco.pth"), nnx.state(detector))
  nnx.update(detector, state)

`python -m frozen_vision.convert --head-of=mmdet SOURCE FILE` writes what `head_arrays` gives, for
`config.detection.init.path`.
"""

from collections.abc import Mapping, Sequence
import math
import os
import re
from typing import NamedTuple

from flax import nnx
import jax.numpy as jnp
import numpy as np

from frozen_vision.files import checkpoint_file, keys, tensors, trees
from frozen_vision.files.layouts import conv, Layout, linear, pointwise, vector


def _deconv(x: np.ndarray) -> np.ndarray | None:
  return x.transpose(2, 3, 0, 1) if x.ndim == 4 else None  # PyTorch: IOHW


def _roi_linear(channels: int) -> Layout:
  """The first layer on flattened roi features: channels come first there, last here."""

  def layout(x: np.ndarray) -> np.ndarray | None:
    side = math.isqrt(x.shape[1] // channels) if x.ndim == 2 else 0
    if not side or x.shape[1] != channels * side**2:
      return None
    x = x.reshape(x.shape[0], channels, side, side).transpose(2, 3, 1, 0)
    return x.reshape(-1, x.shape[-1])

  return layout


_BOX = r"roi_head\.bbox_head\.(\d+)"
_MASK = r"roi_head\.mask_head\.(\d+)"
_SEMANTIC = r"roi_head\.semantic_head"

# (pattern of mmdet's module, our module, layout of its weight). Biases are vectors. `None` is the
# layout that depends on the channels of the roi features. A head without stages, as Mask R-CNN
# has it, counts as stage 0.
TABLE: tuple[tuple[str, str, Layout | None], ...] = (
  # Norms of the levels of a Swin backbone; ours are in the neck (FPN's `input_norm`).
  (r"backbone\.norm(\d+)", "neck/norms/{0}", vector),
  (r"neck\.lateral_convs\.(\d+)\.conv", "neck/laterals/{0}", pointwise),
  (r"neck\.fpn_convs\.(\d+)\.conv", "neck/outputs/{0}", conv),
  (r"rpn_head\.rpn_conv", "head/rpn/conv", conv),
  (r"rpn_head\.rpn_cls", "head/rpn/objectness", pointwise),
  (r"rpn_head\.rpn_reg", "head/rpn/deltas", pointwise),
  (_BOX + r"\.shared_convs\.(\d+)\.conv", "head/box_heads/{0}/convs/{1}/conv", conv),
  (_BOX + r"\.shared_convs\.(\d+)\.gn", "head/box_heads/{0}/convs/{1}/norm", vector),
  (_BOX + r"\.shared_fcs\.(0)", "head/box_heads/{0}/fcs/{1}", None),
  (_BOX + r"\.shared_fcs\.([1-9]\d*)", "head/box_heads/{0}/fcs/{1}", linear),
  (_BOX + r"\.fc_cls", "head/box_heads/{0}/classes", linear),
  (_BOX + r"\.fc_reg", "head/box_heads/{0}/boxes", linear),
  (_MASK + r"\.convs\.(\d+)\.conv", "head/mask_heads/{0}/convs/{1}", conv),
  (_MASK + r"\.conv_res\.conv", "head/mask_heads/{0}/flow", pointwise),
  (_MASK + r"\.upsample", "head/mask_heads/{0}/upsample", _deconv),
  (_MASK + r"\.conv_logits", "head/mask_heads/{0}/logits", pointwise),
  (
    _SEMANTIC + r"\.lateral_convs\.(\d+)\.conv",
    "head/semantic_head/laterals/{0}",
    pointwise,
  ),
  (_SEMANTIC + r"\.convs\.(\d+)\.conv", "head/semantic_head/convs/{0}", conv),
  (_SEMANTIC + r"\.conv_embedding\.conv", "head/semantic_head/embedding", pointwise),
  (_SEMANTIC + r"\.conv_logits", "head/semantic_head/logits", pointwise),
)

# Not ours to fill: the backbone but for the norms that the table names (ours are loaded on their
# own), and the constants of the input pipeline.
IGNORED = (r"backbone\.(?!norm\d+\.).*", r"data_preprocessor\.(mean|std)")


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The tensors of an mmdet checkpoint; nothing else in it is read or run.

  Args:
    path: what `files.checkpoint_file.open_checkpoint` takes.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: another kind of file, a damaged one, or one without a dictionary of tensors.
  """
  return checkpoint_file.open_checkpoint(path).read_all()


class Leaves(NamedTuple):
  """An mmdet state dict in our names and layouts.

  Attributes:
    arrays: {our path: array}; None where the shape is none of such a layer.
    sources: {our path: the source's key}.
    ignored: keys that are not for the neck and head (`IGNORED`).
    unexpected: keys that the table does not know, or has filled already.
  """

  arrays: dict[str, np.ndarray | None]
  sources: dict[str, str]
  ignored: list[str]
  unexpected: list[str]


def leaves(state_dict: Mapping[str, np.ndarray]) -> Leaves:
  """Sorts a state dict by the table, whatever detector it will serve."""
  found = Leaves({}, {}, [], [])
  for name, value in state_dict.items():
    if any(re.fullmatch(pattern, name) for pattern in IGNORED):
      found.ignored.append(name)
      continue
    path, layout = _place(name, state_dict)
    if path is None or path in found.arrays:
      found.unexpected.append(name)
      continue
    found.arrays[path] = layout(np.asarray(value))
    found.sources[path] = name
  return found


def head_arrays(state_dict: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
  """({our path: array} of the whole neck and head, keys that were ignored).

  Raises:
    ValueError: keys without a counterpart, or of a shape that no such layer has; all are listed.
  """
  found = leaves(state_dict)

  report = _unplaced(found, state_dict)
  for path, array in found.arrays.items():
    if array is None:
      name = found.sources[path]
      report.add_misshaped(name, np.shape(state_dict[name]), f"one for {path}")
  problem = "The state dict is none of an mmdet detector with an FPN and HTC's parts"
  report.check(problem)
  if not found.arrays:
    raise ValueError(f"{problem}; its {len(state_dict)} keys begin with {sorted(state_dict)[:5]}.")
  return found.arrays, found.ignored


def convert(
  state_dict: Mapping[str, np.ndarray],
  detector_state: nnx.State,
  *,
  keep: Sequence[str] = (),
) -> nnx.State:
  """Our state with the neck and head of an mmdet detector.

  The head must be configured as the source's: stages, class-specific or shared box regression,
  box convolutions, semantic branch, number of classes. A backbone whose levels end without norms,
  such as ResNet, needs a neck with `input_norm=False`.

  Args:
    state_dict: PyTorch names and layouts, of `read_state_dict`.
    detector_state: of a module with parts `neck` (FPN) and `head` (HTC); leaves may be abstract.
      What is below neither of the two stays as it is.
    keep: regular expressions of our paths that keep their values; what the source has for them is
      dropped. For other classes: (r"head/box_heads/.*/(classes|boxes)/.*",
      r"head/(mask_heads|semantic_head)/.*logits/.*").

  Returns:
    A state of the same structure, neck and head in the dtypes of `detector_state`.

  Raises:
    ValueError: lists all parameters of ours without a source, all keys without a counterpart, and all
      shapes that do not fit. Or the state is not of such a detector.
  """
  flat = nnx.to_flat_state(detector_state)
  ours = {trees.path_string(path): leaf for path, leaf in flat}
  if "neck/laterals/0/kernel" not in ours or "head/rpn/conv/kernel" not in ours:
    raise ValueError(
      "mmdet heads need a detector with parts `neck` (an FPN) and `head` (an HTC), found parts"
      f" {sorted({path.split('/')[0] for path in ours})}"
      + (" and another neck." if any(path.startswith("neck/") for path in ours) else ".")
    )
  kept = {path for path in ours if any(re.fullmatch(pattern, path) for pattern in keep)}
  wanted = {path for path in ours if path.startswith(("neck/", "head/"))} - kept
  found = leaves(state_dict)

  report = _unplaced(found, state_dict)
  filled = {}
  for path, array in found.arrays.items():
    name = found.sources[path]
    if path in wanted:
      filled[path] = array
      shape = tuple(ours[path].shape)
      if array is None or array.shape != shape:
        report.add_misshaped(name, np.shape(state_dict[name]), f"one for {path} {shape}")
    elif path not in kept:
      report.add_unexpected(name, np.shape(state_dict[name]))
  for path, leaf in ours.items():
    if path in wanted and path not in filled:
      report.add_missing(path, tuple(leaf.shape))
  hints = []
  if any(line.startswith("missing neck/norms/") for line in report.missing):
    hints.append(
      "The backbone of the source ends without norms per level: build the neck with input_norm=False "
      "(config.detection.neck.input_norm)."
    )
  report.check(
    "The mmdet state dict does not fit the detector. Configure the neck and head as the source's, or name in "
    "`keep` what should keep its own values",
    hints,
  )
  for path, array in filled.items():
    tensors.check_finite(path, array, "The mmdet state dict")
  return nnx.from_flat_state(
    [
      (path, leaf.replace(jnp.asarray(filled[name], leaf.dtype)) if name in filled else leaf)
      for (path, leaf), name in zip(flat, ours)
    ]
  )


def _place(name: str, state_dict: Mapping[str, np.ndarray]) -> tuple[str | None, Layout]:
  """(our path, layout) of a source key; the path is None if the table has none."""
  module, _, kind = name.rpartition(".")
  numbered = re.sub(r"^(roi_head\.(?:bbox|mask)_head)\.(?!\d+\.)", r"\1.0.", module)
  for pattern, ours, layout in TABLE:
    match = re.fullmatch(pattern, numbered)
    if match is None or kind not in ("weight", "bias"):
      continue
    path = ours.format(*match.groups())
    if kind == "bias":
      return f"{path}/bias", vector
    if layout is None:
      layout = _roi_linear(_roi_channels(state_dict, head=module.rpartition(".shared_fcs")[0]))
    return f"{path}/{'scale' if layout is vector else 'kernel'}", layout
  return None, vector


def _roi_channels(state_dict: Mapping[str, np.ndarray], head: str) -> int:
  """Channels of what the first fully connected layer of a box head sees; 1 where nothing tells."""
  # All convolutions of a box head have the same number; without any, it is the pyramid's.
  for name, axis in ((f"{head}.shared_convs.0.conv.weight", 0), ("rpn_head.rpn_conv.weight", 1)):
    if np.ndim(state_dict.get(name)) == 4:
      return state_dict[name].shape[axis]
  return 1


def _unplaced(found: Leaves, state_dict: Mapping[str, np.ndarray]) -> keys.KeyReport:
  """A report of the keys that the table does not know."""
  report = keys.KeyReport()
  for name in found.unexpected:
    report.add_unexpected(name, np.shape(state_dict[name]))
  return report
