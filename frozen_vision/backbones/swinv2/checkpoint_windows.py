"""The windows a public SwinV2 was trained with; they decide its numbers and are rarely among its weights."""

from collections.abc import Mapping
import json
import pathlib
import re

import ml_dtypes
import numpy as np

from frozen_vision.backbones.swinv2 import windows as backbone_windows
from frozen_vision.files.tensors import LazyTensor

Windows = tuple[tuple[int, ...], tuple[int, ...]]
# swinv2_base_patch4_window12to16_192to256_22kto1k_ft, swinv2-tiny-patch4-window8-256,
# swinv2_large_window12_192.ms_in22k, and SimMIM's swinv2_base__img192_window12__800ep.
_NAME = re.compile(r"window(\d+)(?:to(\d+))?[_-](\d+)(?:to(\d+))?(?!\d)")
_SIMMIM_NAME = re.compile(r"img(\d+)_window(\d+)(?!\d)")


def effective(window: int, image_size: int, stages: int) -> tuple[int, ...]:
  """Windows per stage at a square image: no larger than the map, as in the released code."""
  return tuple(min(window, image_size // (4 * 2**stage)) for stage in range(stages))


def of_buffers(tensors: Mapping[str, LazyTensor], stages: Mapping[str, int], count: int) -> Windows | None:
  """Windows from the coordinates that some checkpoints hold.

  Args:
    tensors: of the checkpoint.
    stages: {prefix of a block's names: its stage}.
    count: number of stages.

  Returns:
    (windows, pretrained windows), or None where a stage holds no `relative_coords_table`.

  Raises:
    ValueError: coordinates that are not those of SwinV2 as released.
  """
  windows, pretrained = [0] * count, [0] * count
  for key, tensor in tensors.items():
    if not key.endswith(".relative_coords_table"):
      continue
    stage = next((stage for prefix, stage in stages.items() if key.startswith(prefix)), None)
    if stage is None or windows[stage]:
      continue
    table = np.asarray(tensor.read(), np.float32)
    side = table.shape[1] if table.ndim == 4 else 0
    window, trained = (side + 1) // 2, 0
    if window > 1:
      step = float(table[0, window, window, 0])  # log2(8 / (trained - 1) + 1) / 3 at a distance of one cell.
      trained = round(1 + 8 / (8**step - 1)) if step > 0 else 0
    expected = backbone_windows.position_coordinates((window, window), trained) if window > 0 else np.zeros(0)
    # A model saved in half precision has rounded coordinates too, of values up to 2.
    tolerance = max(1e-4, 2 * float(ml_dtypes.finfo(tensor.dtype).eps))
    if table.shape != (1, side, side, 2) or np.abs(table.reshape(-1, 2) - expected).max() > tolerance:
      raise ValueError(
        f"{key} {table.shape} does not hold SwinV2's log-spaced coordinates "
        "(log2(8 d / (window - 1) + 1) / 3); weights trained with others cannot be used."
      )
    windows[stage], pretrained[stage] = window, trained or window
  return (tuple(windows), tuple(pretrained)) if all(windows) else None


def of_surroundings(path: pathlib.Path, count: int) -> Windows | None:
  """Windows from a `config.json` beside the file (timm's or transformers'), or from its name or folder."""
  texts = [part for part in reversed(path.parts)]
  config = path.parent / "config.json"
  if config.is_file():
    try:
      options = json.loads(config.read_text())
    except ValueError as error:
      raise ValueError(f"{config} beside the weights is not JSON: {error}.") from error
    if isinstance(options.get("window_size"), int) and isinstance(options.get("image_size"), int):
      windows = effective(options["window_size"], options["image_size"], count)
      pretrained = options.get("pretrained_window_sizes") or (0,) * count
      return windows, tuple(p or w for p, w in zip(pretrained, windows, strict=True))
    texts.insert(0, str(options.get("architecture", "")))
  for text in texts:
    if match := _NAME.search(text):
      before, window, image_before, image = (int(g) if g else None for g in match.groups())
      windows = effective(window or before, image or image_before, count)
      return windows, effective(before, image_before, count) if window else windows
    if match := _SIMMIM_NAME.search(text):
      windows = effective(int(match[2]), int(match[1]), count)
      return windows, windows
  return None
