"""Writes checkpoints and outputs of timm, transformers and torchvision; needs them and PyTorch, not JAX.

  python tests/references/swinv2.py FOLDER

For every case: `CASE.pth` (torch.save, of small networks only) and `CASE.safetensors`, and `CASE.npz` with
the depths, images [b, h, w, 3], the raw output of every stage [b, h, w, c] and the logits. `shapes.json` has
names and shapes of the full sizes.
"""

import json
import pathlib
import sys

import numpy as np
import torch

try:
  import torchvision  # noqa: F401
except RuntimeError:  # a torchvision without its compiled operators, which SwinV2 does not need
  _LIBRARY = torch.library.Library("torchvision", "DEF")
  for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
    del sys.modules[_name]

from safetensors.torch import save_file
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from transformers import Swinv2Config, Swinv2ForImageClassification

_SHAPE = dict(embed_dim=16, depths=(2, 1, 2, 1), num_heads=(1, 2, 4, 8))
_SIZES = {  # embed_dim, depths, heads
  "swinv2_t": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
  "swinv2_s": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
  "swinv2_b": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
  "swinv2_l": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


# Widths and heads of the published networks at images and windows that they are used at: T as it is, the
# others with fewer blocks, since the blocks of a stage are alike and a full L at 384 px is 231 GFLOP.
_FULL_CASES = {  # (embed_dim, depths, heads), image, window, pretrained windows
  "t_window8_256": (_SIZES["swinv2_t"], 256, 8, (0,) * 4),
  "s_window16_256": ((96, (2, 2, 4, 2), (3, 6, 12, 24)), 256, 16, (0,) * 4),
  "b_window12to16_192to256": ((128, (2, 2, 4, 2), (4, 8, 16, 32)), 256, 16, (12, 12, 12, 6)),
  "l_window12to24_192to384": ((192, (2, 2, 2, 2), (6, 12, 24, 48)), 384, 24, (12, 12, 12, 6)),
}
_FULL_SOURCES = {
  "t_window8_256": ("timm", "transformers", "torchvision"),
  "s_window16_256": ("timm",),
  "b_window12to16_192to256": ("timm", "transformers"),
  "l_window12to24_192to384": ("timm",),
}


def _timm(image, window, pretrained, embed_dim, depths, num_heads, classes=5):
  return SwinTransformerV2(
    img_size=image,
    window_size=window,
    pretrained_window_sizes=pretrained,
    embed_dim=embed_dim,
    depths=depths,
    num_heads=num_heads,
    num_classes=classes,
  )


def _transformers(image, window, pretrained, embed_dim, depths, num_heads, classes=5):
  return Swinv2ForImageClassification(
    Swinv2Config(
      image_size=image,
      window_size=window,
      pretrained_window_sizes=list(pretrained),
      embed_dim=embed_dim,
      depths=list(depths),
      num_heads=list(num_heads),
      num_labels=classes,
      drop_path_rate=0.0,
    )
  )


def _torchvision(window, embed_dim, depths, num_heads, classes=5):
  return SwinTransformer(
    [4, 4],
    embed_dim,
    list(depths),
    list(num_heads),
    [window, window],
    stochastic_depth_prob=0.0,
    num_classes=classes,
    block=SwinTransformerBlockV2,
    downsample_layer=PatchMergingV2,
  )


def _run_timm(model, images):
  features, x = [], model.patch_embed(images)
  for layer in model.layers:
    x = layer(x)
    features.append(x)
  return features, model.forward_head(model.norm(x))


def _run_transformers(model, images):
  encoder = model.swinv2.encoder
  x, (height, width) = model.swinv2.embeddings(images)
  features = []
  for layer in encoder.layers:
    x, before, sizes = layer(x, (height, width))
    features.append(before.reshape(x.shape[0], height, width, -1))
    height, width = sizes[-2:]
  return features, model(images).logits


def _run_torchvision(model, images):
  features, x = [], images
  for index, layer in enumerate(model.features):
    x = layer(x)
    if index % 2:
      features.append(x)
  return features, model(images)


def main(folder: pathlib.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  torch.manual_seed(0)
  cases = {}
  for name, build, run in (("timm", _timm, _run_timm), ("transformers", _transformers, _run_transformers)):
    cases |= {
      # Late maps are smaller than windows.
      f"{name}-window8_128": (build(128, 8, (0,) * 4, **_SHAPE), run, 128),
      f"{name}-window6to8_96to128": (build(128, 8, (6, 6, 6, 3), **_SHAPE), run, 128),
      f"{name}-window16_128": (build(128, 16, (0,) * 4, **_SHAPE), run, 128),
      f"{name}-window12to24_192to192": (build(192, 24, (12, 12, 12, 6), **_SHAPE), run, 192),
    }
  # With padding: 112 and 136.
  cases["transformers-window4_112"] = (_transformers(112, 4, (0,) * 4, **_SHAPE), _run_transformers, 112)
  cases["torchvision-window4_128"] = (_torchvision(4, **_SHAPE), _run_torchvision, 128)
  cases["torchvision-window4_136"] = (_torchvision(4, **_SHAPE), _run_torchvision, 136)
  for case, ((embed_dim, depths, heads), image, window, pretrained) in _FULL_CASES.items():
    shape = dict(embed_dim=embed_dim, depths=depths, num_heads=heads)
    for source in _FULL_SOURCES[case]:
      match source:
        case "timm":
          model, run = _timm(image, window, pretrained, **shape), _run_timm
        case "transformers":
          model, run = _transformers(image, window, pretrained, **shape), _run_transformers
        case "torchvision":
          model, run = _torchvision(window, **shape), _run_torchvision
      cases[f"{source}-{case}"] = (model, run, image)
  for name, (model, run, image) in cases.items():
    is_small = name.split("-")[1] not in _FULL_CASES
    model.eval()
    for key, parameter in model.named_parameters():
      with torch.no_grad():
        norm = parameter.ndim == 1 and key.endswith("weight")
        wide = parameter.ndim > 1 and not is_small and not key.endswith("logit_scale")
        scale = parameter[0].numel() ** -0.5 if wide else 0.2
        parameter.copy_(torch.randn_like(parameter) * scale + float(norm))
        if key.endswith("logit_scale"):
          parameter.add_(2.3)
          if name.endswith("-window8_128"):
            parameter.view(-1)[0] = 6.0  # beyond the largest allowed; it amplifies rounding a hundred times
    images = torch.randn(1, 3, image, image)
    with torch.no_grad():
      features, logits = run(model, images)
    if is_small:
      torch.save(model.state_dict(), folder / f"{name}.pth")
    save_file(
      {key: value.contiguous() for key, value in model.state_dict().items()}, folder / f"{name}.safetensors"
    )
    arrays = {f"stage{index}": feature.numpy() for index, feature in enumerate(features)}
    depths = _SHAPE["depths"] if is_small else _FULL_CASES[name.split("-")[1]][0][1]
    np.savez(
      folder / f"{name}.npz",
      depths=depths,
      images=images.permute(0, 2, 3, 1).numpy(),
      logits=logits.numpy(),
      **arrays,
    )
  shapes = {}
  with torch.device("meta"):
    for variant, (embed_dim, depths, heads) in _SIZES.items():
      shape = dict(embed_dim=embed_dim, depths=depths, num_heads=heads, classes=1000)
      models = {
        "timm": _timm(256, 8, (0,) * 4, **shape),
        "transformers": _transformers(256, 8, (0,) * 4, **shape),
      }
      try:
        models["torchvision"] = _torchvision(8, **shape)
      except RuntimeError:
        pass  # it fills its coordinates in place
      for source, model in models.items():
        shapes[f"{source}-{variant}"] = {key: list(value.shape) for key, value in model.state_dict().items()}
  (folder / "shapes.json").write_text(json.dumps(shapes))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
