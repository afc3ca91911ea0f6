"""Public SwinV2 weights by name."""

from frozen_vision.backbones.published import NamedWeights

_RELEASE = "https://github.com/SwinTransformer/storage/releases/download/v2.0.0"


def _microsoft(variant: str, file: str, parameters: int) -> NamedWeights:
  return NamedWeights(variant, f"{_RELEASE}/{file}.pth", parameters)


# The files that MODELHUB.md of github.com/microsoft/Swin-Transformer lists. 22k: 21841 classes of
# ImageNet-22K, pretrained at 192 px; 22kto1k_ft: the same, fine-tuned on the 1000 classes of ImageNet-1K; the
# others were trained on ImageNet-1K alone. Names are those of the files without their "patch4".
TABLE: dict[str, NamedWeights] = {
  "swinv2_tiny_window8_256": _microsoft("swinv2_t", "swinv2_tiny_patch4_window8_256", 28_347_154),
  "swinv2_tiny_window16_256": _microsoft("swinv2_t", "swinv2_tiny_patch4_window16_256", 28_347_154),
  "swinv2_small_window8_256": _microsoft("swinv2_s", "swinv2_small_patch4_window8_256", 49_728_418),
  "swinv2_small_window16_256": _microsoft("swinv2_s", "swinv2_small_patch4_window16_256", 49_728_418),
  "swinv2_base_window8_256": _microsoft("swinv2_b", "swinv2_base_patch4_window8_256", 87_918_816),
  "swinv2_base_window16_256": _microsoft("swinv2_b", "swinv2_base_patch4_window16_256", 87_918_816),
  "swinv2_base_window12_192_22k": _microsoft("swinv2_b", "swinv2_base_patch4_window12_192_22k", 109_280_841),
  "swinv2_base_window12to16_192to256_22kto1k_ft": _microsoft(
    "swinv2_b", "swinv2_base_patch4_window12to16_192to256_22kto1k_ft", 87_918_816
  ),
  "swinv2_base_window12to24_192to384_22kto1k_ft": _microsoft(
    "swinv2_b", "swinv2_base_patch4_window12to24_192to384_22kto1k_ft", 87_918_816
  ),
  "swinv2_large_window12_192_22k": _microsoft(
    "swinv2_l", "swinv2_large_patch4_window12_192_22k", 228_772_549
  ),
  "swinv2_large_window12to16_192to256_22kto1k_ft": _microsoft(
    "swinv2_l", "swinv2_large_patch4_window12to16_192to256_22kto1k_ft", 196_739_932
  ),
  "swinv2_large_window12to24_192to384_22kto1k_ft": _microsoft(
    "swinv2_l", "swinv2_large_patch4_window12to24_192to384_22kto1k_ft", 196_739_932
  ),
}
