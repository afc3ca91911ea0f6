"""timm's models as peers: the same weights and images as ours, eager and compiled by PyTorch."""

from collections.abc import Callable
import importlib
import math
import sys
from typing import Any

import numpy as np

# Buffers that a model computes for itself, or that inference does not read.
COMPUTED = ("relative_coords_table", "relative_position_index", "attn_mask", "num_batches_tracked")
Run = Callable[[int], None]


def why_absent(*, tiny: bool) -> str | None:
  """Why there are no peers to measure; None where there are."""
  try:
    import torch  # heavy, and absent on many machines

    import_timm()
  except (ImportError, OSError) as error:  # OSError: a library of CUDA that does not load
    return f"timm is not measured: {error}."
  if not torch.cuda.is_available() and not tiny:
    return "timm is not measured: PyTorch finds no CUDA device."
  return None


def import_timm() -> Any:
  """timm, also beside a torchvision without compiled operators, of which SwinV2 needs none."""
  import torch

  try:
    importlib.import_module("torchvision")
  except ImportError:
    pass
  except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
      library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
      "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
      "int sampling_ratio, bool aligned) -> Tensor"
    )
    import_timm.library = library  # the operators live as long as it does
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
      del sys.modules[name]
  import timm

  return timm


def swinv2(config: Any, image_size: int, window: int) -> Any:
  """timm's SwinV2 without a classifier.

  Args:
    config: our `SwinV2Config`; timm has no extra norms, and leaves them out.
    image_size: side of the images.
    window: side of the windows, where the maps are as large.
  """
  import_timm()
  from timm.models.swin_transformer_v2 import SwinTransformerV2

  return SwinTransformerV2(
    img_size=image_size,
    window_size=window,
    embed_dim=config.embed_dim,
    depths=config.depths,
    num_heads=config.num_heads,
    num_classes=0,
  ).eval()


def named(name: str, image_size: int) -> Any:
  """timm's model of this name without a classifier; a ViT gives its class token."""
  options = dict(img_size=image_size, global_pool="token") if "vit" in name else {}
  return import_timm().create_model(name, num_classes=0, **options).eval()


class Timm:
  """A module of timm, given random weights and put on the device: images to pooled vectors.

  Args:
    module: of `swinv2` or `named`.
    channels_last: PyTorch keeps channels innermost, as convolutions on a GPU are fastest.
  """

  def __init__(self, module: Any, *, channels_last: bool = False):
    import torch

    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    self._format = torch.channels_last if channels_last else torch.contiguous_format
    self._module = module
    self.state = random_state(self._module)
    missing, unexpected = self._module.load_state_dict(
      {key: torch.from_numpy(value) for key, value in self.state.items()}, strict=False
    )
    if unexpected or any(not key.endswith(COMPUTED) for key in missing):
      raise ValueError(f"timm's names have changed: missing {missing}, unexpected {unexpected}.")
    self._module.to(self.device, torch.bfloat16, memory_format=self._format)

  def images(self, images: np.ndarray) -> Any:
    """[b, h, w, 3] float32 as a tensor on the device."""
    import torch

    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=self._format)
    return tensor.to(self.device, torch.bfloat16)

  def eager(self) -> Callable[[Any], Any]:
    return self._module

  def compiled(self, mode: str | None = None) -> Callable[[Any], Any]:
    """`torch.compile` of static shapes; `mode` such as "max-autotune"."""
    import torch

    return torch.compile(self._module, mode=mode, dynamic=False)

  def runner(self, apply: Callable[[Any], Any], images: Any) -> Run:
    import torch

    def run(times: int) -> None:
      with torch.inference_mode():
        for _ in range(times):
          apply(images)
        self._wait()

    return run

  def output(self, apply: Callable[[Any], Any], images: Any) -> np.ndarray:
    import torch

    with torch.inference_mode():
      return apply(images).float().cpu().numpy()

  def peak_bytes(self, run: Run) -> int | None:
    """Peak bytes of the device's memory while it runs, weights included; None on CPU."""
    import torch

    if self.device == "cpu":
      return None
    torch.cuda.reset_peak_memory_stats()
    run(1)
    return torch.cuda.max_memory_allocated()

  def _wait(self) -> None:
    import torch

    if self.device == "cuda":
      torch.cuda.synchronize()


def release() -> None:
  """Gives what PyTorch keeps of the device back, and forgets what it has compiled."""
  import torch

  torch.compiler.reset()
  if torch.cuda.is_available():
    torch.cuda.empty_cache()


def random_state(module: Any, seed: int = 0) -> dict[str, np.ndarray]:
  """Random weights under timm's names that keep activations at their size; norms near one."""
  rng, state = np.random.default_rng(seed), {}
  for key, value in module.state_dict().items():
    if key.endswith(COMPUTED):
      continue
    value = value.float().numpy()
    draw = rng.standard_normal(value.shape, np.float32)
    if value.ndim > 1 and not key.endswith("logit_scale"):
      value = draw / np.float32(math.sqrt(np.prod(value.shape[1:])))
    elif key.endswith("weight"):
      value = 1 + np.float32(0.1) * draw  # of a norm; as initialised, every block of SwinV2 is the identity
    elif key.endswith("running_var"):
      value = np.exp(np.float32(0.1) * draw)
    elif not key.endswith("logit_scale"):
      value = np.float32(0.1) * draw
    state[key] = np.ascontiguousarray(value, np.float32)
  return state
