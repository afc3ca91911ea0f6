"""Mask2Former against transformers', in float32: every array of tests/golden/mask2former."""

import functools
import json

from flax import nnx
import jax
import numpy as np
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads.mask2former import checkpoints as convert
from frozen_vision.heads.mask2former.config import Mask2FormerConfig
from frozen_vision.heads.mask2former.mask2former import Mask2Former
from tests import golden_values, paths

RELATIVE = 1e-4  # of an array's largest magnitude


class Golden:
  """Reference arrays, and what our head with the reference's weights makes of the same features."""

  def __init__(self, folder):
    self.spec = spec = json.loads((folder / "mask2former.json").read_text())
    self.arrays = np.load(folder / "mask2former.npz")
    shapes = {name: entry["shape"] for name, entry in spec["state_dict"].items()}
    config = Mask2FormerConfig(
      num_classes=spec["labels"],
      num_queries=spec["queries"],
      hidden_dim=spec["feature"],
      mask_dim=spec["feature"],
      num_heads=spec["heads"],
      encoder_layers=spec["encoder_layers"],
      encoder_ffn_dim=shapes["model.pixel_level_module.decoder.encoder.layers.0.fc1.weight"][0],
      decoder_layers=spec["decoder_layers"],
      decoder_ffn_dim=shapes["model.transformer_module.decoder.layers.0.fc1.weight"][0],
      input_norm=False,
    )
    specs = [FeatureSpec(4 * 2**i, c) for i, c in enumerate(spec["channels"])]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Mask2Former(specs, config, rngs=nnx.Rngs(0))))
    head = nnx.merge(graphdef, convert.convert(golden_values.state_dict(spec), state))
    height, width = spec["image"]
    batch = self.arrays["mask_features"].shape[0]
    inputs = [
      golden_values.values(
        spec["seed"], f"features.{i}", (batch, s.channels, height // s.stride, width // s.stride)
      )
      for i, s in enumerate(specs)
    ]
    features = tuple(x.transpose(0, 2, 3, 1) for x in inputs)

    @jax.jit
    def run(features):
      pixels = head.pixel_decoder(features)
      predictions = head.transformer_decoder(pixels)
      masks = [predictions.mask_logits(i) for i in range(config.num_predictions)]
      return pixels, predictions.class_logits, masks

    self.pixels, self.class_logits, self.mask_logits = run(features)


_load = functools.cache(Golden)


@pytest.fixture
def golden():
  return _load(paths.golden_dir())


def check(actual, expected, name):
  actual = np.asarray(actual)
  assert actual.shape == expected.shape, name
  np.testing.assert_allclose(actual, expected, rtol=0, atol=RELATIVE * np.abs(expected).max(), err_msg=name)


def test_pixel_decoder(golden):
  masks = np.moveaxis(golden.pixels.masks, -1, 1)
  check(masks[:, ::4, ::2, ::2], golden.arrays["mask_features"], "mask_features")
  assert len(golden.pixels.levels) == 3
  for i, level in enumerate(golden.pixels.levels):
    check(np.moveaxis(level, -1, 1)[:, ::4], golden.arrays[f"scale{i}"], f"scale{i}")


def test_predictions(golden):
  count = golden.spec["decoder_layers"] + 1
  assert len(golden.class_logits) == len(golden.mask_logits) == count
  for i in range(count):
    check(golden.class_logits[i], golden.arrays[f"class_logits.{i}"], f"class_logits.{i}")
    check(golden.mask_logits[i][:, :, ::2, ::2], golden.arrays[f"mask_logits.{i}"], f"mask_logits.{i}")
