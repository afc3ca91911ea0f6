"""Mask2Former against transformers' with the same points: predictions, matching, losses and gradients."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads.mask2former import checkpoints as convert
from frozen_vision.heads.mask2former import criterion as criterion_lib
from frozen_vision.heads.mask2former.config import Mask2FormerConfig
from frozen_vision.heads.mask2former.mask2former import Mask2Former
from tests import golden_mask2former, golden_values

RELATIVE = 1e-4  # of an array's largest magnitude
_FIELDS = (
  "hidden_dim",
  "mask_dim",
  "num_heads",
  "encoder_layers",
  "encoder_ffn_dim",
  "decoder_layers",
  "decoder_ffn_dim",
  "num_queries",
  "num_classes",
  "num_points",
)


class Reference:
  """Their arrays, and ours from the same weights, features and points."""

  def __init__(self, folder):
    self.spec = spec = json.loads((folder / "mask2former_training.json").read_text())
    self.arrays = np.load(folder / "mask2former_training.npz")
    self.config = config = Mask2FormerConfig(input_norm=False, **{name: spec[name] for name in _FIELDS})
    seed, (height, width) = spec["seed"], spec["image"]
    specs = [FeatureSpec(4 << i, c) for i, c in enumerate(spec["channels"])]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Mask2Former(specs, config, rngs=nnx.Rngs(0))))
    head = nnx.merge(graphdef, convert.convert(golden_values.state_dict(spec), state))
    features = tuple(
      golden_values.values(
        seed, f"features.{i}", (3, s.channels, height // s.stride, width // s.stride)
      ).transpose(0, 2, 3, 1)
      for i, s in enumerate(specs)
    )
    classes = self.arrays["segment_labels"]
    targets = criterion_lib.Targets(
      jnp.asarray(self.arrays["labels"]), jnp.asarray(classes, jnp.int32), jnp.asarray(classes >= 0)
    )
    n, segments = config.num_points, classes.shape[1]
    shapes = dict(
      matching=(3, n, 2),
      candidates=(3, segments, config.num_candidates, 2),
      others=(3, segments, n - config.num_important, 2),
    )
    points = criterion_lib.Points(
      **{
        name: jnp.stack(
          [golden_values.uniform(seed, f"{name}.{i}", shape) for i in range(config.num_predictions)]
        )
        for name, shape in shapes.items()
      }
    )

    def total(features):
      predictions = head(features)
      losses, matches = criterion_lib.criterion(predictions, targets, config, points)
      masks = jnp.stack([predictions.mask_logits(i) for i in range(config.num_predictions)])
      loss = sum(losses[name].sum() for name in ("class", "mask", "dice"))
      return loss, (predictions.class_logits, masks, losses, matches)

    @jax.jit
    def run(features):
      (loss, outputs), gradients = jax.value_and_grad(total, has_aux=True)(features)
      return loss, outputs, gradients, head.predict_semantic(features, (height, width))

    self.loss, outputs, self.gradients, self.semantic = jax.tree.map(np.asarray, run(features))
    self.class_logits, self.mask_logits, self.losses, self.matches = outputs


_LOADED: dict[str, Reference] = {}


@pytest.fixture(params=golden_mask2former.KINDS)
def reference(request, tmp_path_factory):
  if request.param not in _LOADED:
    _LOADED[request.param] = Reference(golden_mask2former.folder(request.param, tmp_path_factory))
  return _LOADED[request.param]


def check(actual, expected, name=""):
  assert actual.shape == expected.shape, name
  np.testing.assert_allclose(actual, expected, rtol=0, atol=RELATIVE * np.abs(expected).max(), err_msg=name)


def test_predictions(reference):
  for i in range(reference.config.num_predictions):
    check(reference.class_logits[i], reference.arrays[f"class_logits.{i}"], f"class_logits.{i}")
    check(reference.mask_logits[i][:, :, ::4, ::4], reference.arrays[f"mask_logits.{i}"], f"mask_logits.{i}")


def test_assignments(reference):
  """Image 1 has no segment; image 2 has eight, for six queries."""
  matches = reference.matches
  found = np.where(matches.matched, matches.query, -1)
  for i in range(reference.config.num_predictions):
    np.testing.assert_array_equal(found[i], reference.arrays[f"assigned.{i}"], err_msg=str(i))
  np.testing.assert_array_equal(matches.matched.sum(-1), [[3, 0, 6]] * reference.config.num_predictions)


def test_losses(reference):
  for name in ("class", "mask", "dice"):
    check(reference.losses[name], reference.arrays[f"losses.{name}"], name)
  check(reference.loss, reference.arrays["loss"])


def test_gradients(reference):
  """Gradients of the sum of all losses for the features of every level, through everything that trains."""
  for i, gradient in enumerate(reference.gradients):
    theirs = reference.arrays[f"gradient.{i}"]
    assert np.abs(theirs).max() > 0
    check(np.moveaxis(gradient, -1, 1)[:, :, ::2, ::2], theirs, f"level {i}")


def test_semantic_scores(reference):
  scores = np.moveaxis(reference.semantic, -1, 1)
  check(scores[:, :, 1::4, 2::4], reference.arrays["semantic"])
