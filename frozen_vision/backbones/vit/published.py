"""Public ViT weights by name: the repositories of the Hugging Face Hub that hold them."""

from collections.abc import Mapping

from frozen_vision.backbones.published import HubWeights
from frozen_vision.backbones.vit.config import HALF


def _rows(licence: str, repositories: Mapping[str, str]) -> dict[str, HubWeights]:
  """Weights that are called as their row is."""
  return {row: HubWeights(row, repository, licence) for row, repository in repositories.items()}


def _dinov3(size: str) -> str:
  return f"facebook/dinov3-{size}-pretrain-lvd1689m"


# Gated, under Meta's DINOv3 licence: fetching them needs an account that has accepted it.
_DINOV3 = _rows(
  "DINOv3 License",
  {
    f"dinov3_{size}": _dinov3(size)
    for size in ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16")
  },
)

TABLE: dict[str, HubWeights] = {
  **_rows(
    "Apache-2.0",
    {
      "deit_vits16": "timm/deit_small_patch16_224.fb_in1k",
      "deit_vitb16": "timm/deit_base_patch16_224.fb_in1k",
      "augreg_vits16": "timm/vit_small_patch16_224.augreg_in21k",
      "augreg_vitb16": "timm/vit_base_patch16_224.augreg_in21k",
      "augreg_vitb8": "timm/vit_base_patch8_224.augreg_in21k",
      "augreg_vitl16": "timm/vit_large_patch16_224.augreg_in21k",
      "dino_vits16": "timm/vit_small_patch16_224.dino",
      "dino_vits8": "timm/vit_small_patch8_224.dino",
      "dino_vitb16": "timm/vit_base_patch16_224.dino",
      "dino_vitb8": "timm/vit_base_patch8_224.dino",
      "dinov2_vits14": "facebook/dinov2-small",
      "dinov2_vitb14": "facebook/dinov2-base",
      "dinov2_vitl14": "facebook/dinov2-large",
      "dinov2_vitg14": "facebook/dinov2-giant",
      "dinov2_vits14_reg4": "facebook/dinov2-with-registers-small",
      "dinov2_vitb14_reg4": "facebook/dinov2-with-registers-base",
      "dinov2_vitl14_reg4": "facebook/dinov2-with-registers-large",
      "dinov2_vitg14_reg4": "facebook/dinov2-with-registers-giant",
      "siglip_vitb16": "google/siglip-base-patch16-224",
      "siglip_vitl16": "google/siglip-large-patch16-256",
      "siglip_vitso400m14": "google/siglip-so400m-patch14-224",
      "siglip2_vitb16": "google/siglip2-base-patch16-224",
      "siglip2_vitl16": "google/siglip2-large-patch16-256",
      "siglip2_vitso400m14": "google/siglip2-so400m-patch14-224",
      "siglip2_vitso400m16": "google/siglip2-so400m-patch16-256",
      "siglip2_vitg16": "google/siglip2-giant-opt-patch16-256",
    },
  ),
  **_rows(
    "CC-BY-NC-4.0",
    {
      "mae_vitb16": "timm/vit_base_patch16_224.mae",
      "mae_vitl16": "timm/vit_large_patch16_224.mae",
      "mae_vith14": "timm/vit_huge_patch14_224.mae",
    },
  ),
  **_rows(
    "MIT",
    {
      "clip_vitb32": "timm/vit_base_patch32_clip_224.openai",
      "clip_vitb16": "timm/vit_base_patch16_clip_224.openai",
      "clip_vitl14": "timm/vit_large_patch14_clip_224.openai",
      "openclip_vitb32": "timm/vit_base_patch32_clip_224.laion2b",
      "openclip_vitb16": "timm/vit_base_patch16_clip_224.laion2b",
    },
  ),
  # LAION's L/14 was trained on images of mean and deviation 0.5, unlike the others.
  "openclip_vitl14": HubWeights(
    "openclip_vitl14", "timm/vit_large_patch14_clip_224.laion2b", "MIT", dict(mean=HALF, std=HALF)
  ),
  **_DINOV3,
}
