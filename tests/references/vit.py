"""Writes checkpoints and outputs of timm's and transformers' ViTs; needs them and PyTorch, not JAX.

  python tests/references/vit.py FOLDER

For every case of `_CASES`: `CASE.pth` (torch.save of the state dict) or, of full sizes, `CASE.safetensors`;
`CASE/`, as the library itself saves a model; `CASE.json` with the row and options that it stands for;
`CASE.npz` with images of three sizes and, for each, the tokens after every block and after the last norm, and
the pooled vector. `counts.json` has numbers of parameters of full sizes, `resize.npz` maps resized by
`torch.nn.functional.interpolate` (committed as `tests/golden/bicubic.npz`), `sine.npz` MAE's positions.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from torch.nn import functional

try:
  import torchvision  # noqa: F401
except RuntimeError:  # a torchvision without its compiled operators, which a ViT does not need
  _LIBRARY = torch.library.Library("torchvision", "DEF")
  for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
    del sys.modules[_name]

from safetensors.torch import save_file
import timm
import transformers
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

_GRID = 3
_SMALL = dict(embed_dim=48, depth=4, num_heads=4)
_ANTIALIAS = dict(position_resize="bicubic_antialias")
_BY_SIZE = dict(position_resize="bicubic")

# name of the case -> (row, model, what differs from the row, options of the model)
_TIMM = {
  "deit": ("deit_vits16", "vit_small_patch16_224", _ANTIALIAS, {}),
  "augreg": ("augreg_vits16", "vit_small_patch16_224", _ANTIALIAS, {}),
  "dino8": ("dino_vits8", "vit_small_patch8_224", _ANTIALIAS, {}),
  "mae14": ("mae_vith14", "vit_huge_patch14_224", _ANTIALIAS, {}),
  "dinov2": ("dinov2_vits14", "vit_small_patch14_dinov2", _ANTIALIAS, {}),
  "dinov2_reg4": ("dinov2_vits14_reg4", "vit_small_patch14_reg4_dinov2", _ANTIALIAS, {}),
  "dinov2_g": ("dinov2_vitg14", "vit_giant_patch14_dinov2", _ANTIALIAS | dict(mlp_dim=128), {}),
  "dinov3": ("dinov3_vits16", "vit_small_patch16_dinov3", {}, {}),
  "dinov3_qkvb": ("dinov3_vits16", "vit_small_patch16_dinov3_qkvb", {}, {}),
  "dinov3_plus": ("dinov3_vits16plus", "vit_small_plus_patch16_dinov3_qkvb", {}, {}),
  "clip": ("clip_vitb16", "vit_base_patch16_clip_quickgelu_224", _ANTIALIAS, {}),
  "openclip": ("openclip_vitb32", "vit_base_patch32_clip_224", _ANTIALIAS, {}),
  "siglip": ("siglip_vitb16", "vit_base_patch16_siglip_224", _ANTIALIAS | dict(activation="gelu"), {}),
  "siglip2": ("siglip2_vitso400m16", "vit_so400m_patch16_siglip_256", _ANTIALIAS, dict(mlp_ratio=2.0)),
}
_TRANSFORMERS = {
  "deit": ("deit_vits16", "ViT", _BY_SIZE | dict(norm_epsilon=1e-12), {}),
  "dinov2": ("dinov2_vits14", "Dinov2", _BY_SIZE, dict(patch_size=14, mlp_ratio=2)),
  "dinov2_reg4": ("dinov2_vits14_reg4", "Dinov2WithRegisters", {}, dict(patch_size=14, mlp_ratio=2)),
  "dinov2_g": (
    "dinov2_vitg14",
    "Dinov2",
    _BY_SIZE | dict(mlp_dim=64),
    dict(patch_size=14, use_swiglu_ffn=True, mlp_ratio=2),
  ),
  "dinov3": ("dinov3_vits16", "DINOv3ViT", {}, dict(num_register_tokens=4)),
  "dinov3_7b": (
    "dinov3_vit7b16",
    "DINOv3ViT",
    {},
    dict(num_register_tokens=4, use_gated_mlp=True, query_bias=False, value_bias=False, hidden_act="silu"),
  ),
  "clip": ("clip_vitb16", "CLIPVision", _BY_SIZE, dict(patch_size=16)),
  "siglip2": ("siglip2_vitb16", "SiglipVision", {}, dict(patch_size=16)),
}
# Full widths and depths, random weights: one image of the native size each.
_FULL = {
  "timm-full_dinov2": ("dinov2_vits14", "vit_small_patch14_dinov2", _ANTIALIAS, 518),
  "timm-full_dinov2_reg4": ("dinov2_vits14_reg4", "vit_small_patch14_reg4_dinov2", {}, 518),
  "timm-full_dinov3": ("dinov3_vits16", "vit_small_patch16_dinov3_qkvb", {}, 256),
  "timm-full_dinov3_plus": ("dinov3_vits16plus", "vit_small_plus_patch16_dinov3_qkvb", {}, 256),
  "timm-full_clip": ("clip_vitb16", "vit_base_patch16_clip_quickgelu_224", _ANTIALIAS, 224),
  "transformers-full_siglip2": ("siglip2_vitb16", "SiglipVision", {}, 224),
}
_COUNTED = {  # on the meta device: nothing is allocated
  "deit_vitl16": "vit_large_patch16_224",
  "mae_vith14": "vit_huge_patch14_224",
  "dinov2_vitb14": "vit_base_patch14_dinov2",
  "dinov2_vitg14": "vit_giant_patch14_dinov2",
  "dinov3_vitb16": "vit_base_patch16_dinov3_qkvb",
  "dinov3_vitl16": "vit_large_patch16_dinov3_qkvb",
  "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3_qkvb",
  "dinov3_vit7b16": "vit_7b_patch16_dinov3",
  "openclip_vitl14": "vit_large_patch14_clip_224",
  "siglip2_vitso400m14": "vit_so400m_patch14_siglip_224",
  "siglip2_vitg16": "vit_giantopt_patch16_siglip_256",
}


def _build_timm(model_name, **options):
  model = timm.create_model(model_name, num_classes=0, dynamic_img_size=True, **options)
  return model, _run_timm


def _build_transformers(kind, image_size, **options):
  config = getattr(transformers, f"{kind}Config")(image_size=image_size, **options)
  return getattr(transformers, f"{kind}Model")(config), _run_transformers


def _run_timm(model, images):
  has_prefix = model.num_prefix_tokens > 0
  tokens, blocks = model.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=has_prefix)
  if has_prefix:
    blocks = [torch.cat([prefix, patches], 1) for patches, prefix in blocks]
  pool = getattr(model, "attn_pool", None)
  return blocks, tokens, tokens[:, 0] if pool is None else pool(tokens)


def _run_transformers(model, images):
  resizes = type(model).__name__[:4] in ("ViTM", "CLIP", "Sigl")
  options = dict(interpolate_pos_encoding=True) if resizes else {}
  outputs = model(pixel_values=images, output_hidden_states=True, **options)
  norm = next(
    module
    for name, module in model.named_modules()
    if name.split(".")[-1] in ("post_layernorm", "layernorm", "norm")
  )
  blocks = outputs.hidden_states[1:]
  tokens = norm(blocks[-1])
  pools = type(model).__name__.startswith("Siglip")
  return blocks, tokens, outputs.pooler_output if pools else tokens[:, 0]


def _randomise(model, full):
  for key, parameter in model.named_parameters():
    with torch.no_grad():
      norm = parameter.ndim == 1 and "norm" in key and key.endswith("weight")
      wide = parameter.ndim > 1 and full
      scale = parameter[0].numel() ** -0.5 if wide else 0.2
      parameter.copy_(torch.randn_like(parameter) * scale + float(norm))


def _write(folder, name, row, overrides, model, run, sizes, full=False):
  model.eval()
  _randomise(model, full)
  state = {key: value.contiguous() for key, value in model.state_dict().items()}
  if full:
    save_file(state, folder / f"{name}.safetensors")
  else:
    torch.save(state, folder / f"{name}.pth")
    (folder / name).mkdir()
    if name.startswith("timm"):
      timm.models.save_for_hf(model, folder / name, model_config={}, safe_serialization=True)
    else:
      model.save_pretrained(folder / name, max_shard_size="100KB")
  arrays = {}
  for index, size in enumerate(sizes):
    images = torch.randn(1 if full else 2, 3, *size)
    with torch.no_grad():
      blocks, tokens, pooled = run(model, images)
    arrays[f"{index}.images"] = images.permute(0, 2, 3, 1).numpy()
    arrays |= {f"{index}.block{number}": block.numpy() for number, block in enumerate(blocks)}
    arrays |= {f"{index}.tokens": tokens.numpy(), f"{index}.embed": pooled.numpy()}
  np.savez(folder / f"{name}.npz", **arrays)
  (folder / f"{name}.json").write_text(json.dumps(dict(row=row, overrides=overrides, sizes=len(sizes))))


def _cases(folder):
  for case, (row, model_name, overrides, options) in _TIMM.items():
    patch = timm.create_model(model_name, num_classes=0, depth=1).patch_embed.patch_size[0]
    sizes = [(patch * rows, patch * columns) for rows, columns in ((_GRID, _GRID), (5, 5), (4, 6))]
    model, run = _build_timm(model_name, img_size=sizes[0], **_SMALL, **options)
    hidden = dict(mlp_dim=int(_SMALL["embed_dim"] * options.get("mlp_ratio", 4)))
    _write(folder, f"timm-{case}", row, _SMALL | hidden | overrides, model, run, sizes)
  for case, (row, kind, overrides, options) in _TRANSFORMERS.items():
    hidden = {} if "mlp_ratio" in options else dict(intermediate_size=96)
    shape = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, **hidden)
    patch = options.get("patch_size", 16)
    sizes = [(patch * rows, patch * columns) for rows, columns in ((_GRID, _GRID), (5, 5), (4, 6))]
    model, run = _build_transformers(kind, patch * _GRID, **shape, **options)
    overrides = _SMALL | dict(mlp_dim=96) | overrides
    _write(folder, f"transformers-{case}", row, overrides, model, run, sizes)


def _full_cases(folder):
  for name, (row, model_name, overrides, size) in _FULL.items():
    if name.startswith("timm"):
      model, run = _build_timm(model_name)
    else:
      model, run = _build_transformers(model_name, size, patch_size=16)
    _write(folder, name, row, overrides, model, run, [(size, size)], full=True)


def _counts():
  with torch.device("meta"):
    models = {row: timm.create_model(name, num_classes=0) for row, name in _COUNTED.items()}
    config = transformers.DINOv3ViTConfig(
      hidden_size=1024,
      intermediate_size=4096,
      num_hidden_layers=24,
      num_attention_heads=16,
      num_register_tokens=4,
      use_gated_mlp=True,
    )
    models["dinov3_vitl16plus"] = transformers.DINOv3ViTModel(config)
  return {
    row: sum(p.numel() for key, p in model.named_parameters() if not key.endswith("mask_token"))
    for row, model in models.items()
  }


def resized():
  """A map [7, 5, 2] as `interpolate` resizes it, by kind and size."""
  map_ = np.random.default_rng(0).standard_normal((7, 5, 2)).astype(np.float32)
  x = torch.from_numpy(map_).permute(2, 0, 1)[None]
  arrays = dict(map=map_)
  for size in ((7, 5), (11, 13), (3, 4), (14, 2)):
    for kind, options in (
      ("bicubic", dict(size=size)),
      ("bicubic_antialias", dict(size=size, antialias=True)),
      ("bicubic_scale", dict(scale_factor=((size[0] + 0.1) / 7, (size[1] + 0.1) / 5))),
    ):
      y = functional.interpolate(x, mode="bicubic", align_corners=False, **options)
      arrays[f"{kind}.{size[0]}x{size[1]}"] = y[0].permute(1, 2, 0).numpy()
  return arrays


def main(folder: pathlib.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  torch.manual_seed(0)
  _cases(folder)
  _full_cases(folder)
  (folder / "counts.json").write_text(json.dumps(_counts()))
  np.savez(folder / "resize.npz", **resized())
  config = transformers.ViTMAEConfig(
    hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, image_size=80
  )
  embeddings = ViTMAEEmbeddings(config)
  embeddings.initialize_weights()
  table = embeddings.position_embeddings[0].detach().numpy()
  np.savez(folder / "sine.npz", table=table)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
