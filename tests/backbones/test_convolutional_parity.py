"""ResNets, EfficientNets and ConvNeXts against torchvision, timm and transformers, on checkpoints they wrote.

They run in this interpreter if it has them, or in $FROZEN_VISION_REFERENCE_PYTHON; otherwise these tests are
skipped, and those of golden outputs and of files in each layout remain.
"""

import json

import jax
import numpy as np
import pytest

from frozen_vision.backbones import families
from tests import reference_scripts

pytestmark = pytest.mark.slow

_PACKAGES = ("torch", "torchvision", "timm", "transformers")
_CASES = (
  "torchvision-resnet18",
  "torchvision-resnet50",
  "torchvision-efficientnet_b0",
  "torchvision-convnext_tiny",
  "timm-resnetrs50",
  "timm-tf_efficientnet_b1",
  "timm-tf_efficientnet_lite1",
  "timm-convnext_tiny",
  "transformers-convnext_tiny",
  "transformers-dinov3_convnext_tiny",
)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
  folder = tmp_path_factory.mktemp("references")
  return reference_scripts.run("convnets.py", folder, packages=_PACKAGES)


@pytest.mark.parametrize("case", _CASES)
def test_every_level_at_three_sizes(references, case):
  spec = json.loads((references / f"{case}.json").read_text())
  wanted = np.load(references / f"{case}.npz")
  backbone = families.load_backbone(references / f"{case}.safetensors", name=spec["row"])
  backbone.eval()
  run = jax.jit(lambda module, x: module(x))
  folded = jax.jit(lambda folded, x: folded(x))
  for number in range(spec["sizes"]):
    images = wanted[f"{number}.images"]
    for program, weights, tolerance in (
      (run, backbone, 1e-5),
      (folded, backbone.fold(storage="float32"), 2e-5),
    ):
      levels = program(weights, images)
      for found, level in zip(levels, backbone.feature_specs, strict=True):
        reference = wanted[f"{number}.{level.stride}"]
        assert found.shape == reference.shape
        error = np.abs(found - reference).max() / np.abs(reference).max()
        assert error <= tolerance, (number, level.stride, error)
