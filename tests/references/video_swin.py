"""Writes outputs of torchvision's Swin models; needs PyTorch, not JAX.

  python tests/references/video_swin.py FOLDER          # what tests compare with live
  python tests/references/video_swin.py --golden FILE   # tests/golden/swin2d.npz

Live: `swin3d_t.pth` (random weights), and `clips.npz` with clips [b, t, h, w, 3], features after the last
norm and logits for four shapes. Golden: a small 2D Swin whose weights follow tests/golden_values.py.
"""

import pathlib
import sys

import numpy as np
import torch

try:
  import torchvision  # noqa: F401
except RuntimeError:  # a torchvision without its compiled operators, which Swin does not need
  _LIBRARY = torch.library.Library("torchvision", "DEF")
  for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
    del sys.modules[_name]

from torchvision.models import swin_transformer
from torchvision.models.video import swin3d_t

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests import golden_values  # numpy alone

# Windows whole, shrunk in time, shrunk in space, shrunk in both; padding of patches and of windows.
SHAPES = ((1, 16, 112, 112), (1, 8, 96, 64), (1, 21, 60, 90), (2, 5, 50, 38))


def live(folder: pathlib.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  torch.manual_seed(0)
  model = swin3d_t(weights=None).eval()
  for key, parameter in model.named_parameters():
    with torch.no_grad():
      if "norm" in key or key.endswith("bias"):
        parameter.add_(torch.randn_like(parameter) * 0.1)
      elif key.endswith("position_bias_table"):
        parameter.copy_(torch.randn_like(parameter) * 0.5)
  arrays = {}
  for index, (b, t, h, w) in enumerate(SHAPES):
    clips = torch.randn(b, 3, t, h, w)
    with torch.no_grad():
      features = model.norm(model.features(model.patch_embed(clips)))
      arrays[f"logits{index}"] = model(clips).numpy()
    arrays[f"clips{index}"] = clips.permute(0, 2, 3, 4, 1).numpy()
    arrays[f"features{index}"] = features.numpy()
  torch.save(model.state_dict(), folder / "swin3d_t.pth")
  np.savez(folder / "clips.npz", **arrays)


def golden(path: pathlib.Path) -> None:
  """Window 4 on images of 64 px: maps of 16, 8 and 4, all of whole windows."""
  model = swin_transformer.SwinTransformer(
    [4, 4], 16, [2, 2, 1], [1, 2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=5
  ).eval()
  state = {}
  for key, value in model.state_dict().items():
    if key.endswith("relative_position_index"):
      continue
    is_norm = "norm" in key or key.startswith("features.0.2")
    scale = 0.1 if value.ndim == 1 else 0.5 if key.endswith("table") else 0.5 * value[0].numel() ** -0.5
    offset = float(is_norm and key.endswith("weight"))
    state[key] = torch.from_numpy(golden_values.values(0, key, tuple(value.shape), scale, offset))
  model.load_state_dict(state, strict=False)
  images = golden_values.values(0, "images", (2, 3, 64, 64))
  with torch.no_grad():
    features = model.norm(model.features(torch.from_numpy(images)))
    logits = model.head(features.mean((1, 2)))
    # How the released code resizes a table of biases, for another window.
    table = state["features.1.0.attn.relative_position_bias_table"]
    grid = table.T.reshape(1, -1, 7, 7)
    resized = {
      f"bias_window{window}": torch.nn.functional.interpolate(
        grid, size=(2 * window - 1,) * 2, mode="bicubic"
      )
      .reshape(grid.shape[1], -1)
      .T.numpy()
      for window in (3, 7)
    }
  np.savez_compressed(
    path,
    features=features.numpy(),
    logits=logits.numpy(),
    **resized,
    names=np.array(list(state)),
    shapes=np.array([str(tuple(v.shape)) for v in state.values()]),
  )


if __name__ == "__main__":
  if sys.argv[1] == "--golden":
    golden(pathlib.Path(sys.argv[2]))
  else:
    live(pathlib.Path(sys.argv[1]))
