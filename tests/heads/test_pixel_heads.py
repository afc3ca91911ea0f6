"""The linear head and UPerNet: what they compute, their losses, and UPerNet against transformers' own."""

import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads import linear, pixel_classification, upernet
from frozen_vision.ops import resize
from tests import golden_values, reference_scripts

_TESTS = pathlib.Path(__file__).resolve().parent.parent
_SPECS = tuple(FeatureSpec(stride, channels) for stride, channels in ((4, 6), (8, 10), (16, 12), (32, 8)))
_IMAGE = (48, 80)  # no multiple of 32: the last level reaches beyond it


def make_features(seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(2, *(-(-side // spec.stride) for side in _IMAGE), spec.channels) for spec in _SPECS]
  return [rng.standard_normal(shape).astype(np.float32) * 3 for shape in shapes]


def make_batch(seed=0, classes=5):
  rng = np.random.default_rng(seed)
  labels = rng.choice(np.array([*range(classes), 255], np.uint8), (2, *_IMAGE))
  return {"labels": labels}


def test_linear_is_one_layer_on_normed_upsampled_concatenated_levels():
  head = linear.LinearHead(_SPECS, linear.LinearConfig(5, levels=(3, 0, 1)), rngs=nnx.Rngs(0))
  for norm in head.norms:
    norm.scale.set_value(jnp.asarray(np.random.default_rng(1).standard_normal(norm.scale.shape), jnp.float32))
  head.layers[0].bias.set_value(jnp.arange(5.0))
  features = make_features()
  columns = []
  for level, norm in zip((0, 1, 3), head.norms):
    x = features[level]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * np.asarray(norm.scale)
    columns.append(resize.upsample(x, _SPECS[level].stride // 4, (12, 20)))
  kernel = np.concatenate([np.asarray(layer.kernel) for layer in head.layers])
  wanted = np.concatenate(columns, axis=-1) @ kernel + np.arange(5)
  found = jax.jit(lambda x: head(x))(features)
  assert found.shape == (2, 12, 20, 5) and head.stride == 4
  np.testing.assert_allclose(found, wanted, atol=2e-5)
  bare = linear.LinearHead(_SPECS, linear.LinearConfig(5, input_norm=False), rngs=nnx.Rngs(0))
  assert not bare.norms and len(bare.layers) == 4


def test_cross_entropy_counts_labelled_pixels_only():
  logits = np.random.default_rng(0).standard_normal((2, 12, 20, 5)).astype(np.float32)
  labels = make_batch()["labels"]
  labels[0, :20] = 255
  loss, accuracy = jax.jit(lambda *x: pixel_classification.cross_entropy(*x, stride=4))(logits, labels)
  full = np.asarray(resize.upsample(logits, 4, _IMAGE), np.float64)
  log_probabilities = full - np.log(np.exp(full).sum(-1, keepdims=True))
  known = labels != 255
  picked = np.take_along_axis(log_probabilities, np.where(known, labels, 0)[..., None].astype(int), -1)[
    ..., 0
  ]
  assert loss == pytest.approx(-picked[known].mean(), rel=1e-5)
  assert accuracy == pytest.approx((full.argmax(-1) == labels)[known].mean(), abs=1e-6)
  nothing, _ = pixel_classification.cross_entropy(logits, np.full_like(labels, 255), stride=4)
  assert nothing == 0
  probabilities = pixel_classification.probabilities(logits, _IMAGE, stride=4)
  np.testing.assert_allclose(probabilities, np.exp(log_probabilities), atol=1e-5)


def _upernet(**options):
  config = upernet.UPerNetConfig(5, channels=8, auxiliary_channels=8, norm_groups=4, **options)
  return upernet.UPerNet(_SPECS, config, rngs=nnx.Rngs(0))


def test_upernet_losses_and_their_gradient():
  head = _upernet()
  features, batch = make_features(), make_batch()
  graphdef, state = nnx.split(head)

  @jax.jit
  def run(state, features, batch, rng):
    def loss(state):
      losses, metrics = nnx.merge(graphdef, state).losses(features, batch, rng)
      return sum(losses.values()), (losses, metrics)

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(state)
    return *found, gradient, nnx.merge(graphdef, state).predict_semantic(features, _IMAGE)

  losses, metrics, gradient, scores = run(state, features, batch, jax.random.key(0))
  assert set(losses) == {"loss_ce", "loss_auxiliary"} and set(metrics) == {"pixel_accuracy"}
  # As initialised the classes are nearly equally probable.
  assert losses["loss_ce"] == pytest.approx(np.log(5), rel=0.05)
  assert losses["loss_auxiliary"] == pytest.approx(0.4 * np.log(5), rel=0.05)
  still = [path for path, leaf in nnx.to_flat_state(gradient) if not np.any(leaf.get_value())]
  assert not still, still
  assert scores.shape == (2, *_IMAGE, 5)
  np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-5)
  other = run(state, features, batch, jax.random.key(1))[0]
  assert other["loss_ce"] != losses["loss_ce"]  # dropout


def test_dropout_drops_whole_channels():
  head = _upernet(dropout=0.5, auxiliary_weight=0.0)
  x = jnp.ones((3, 4, 5, 64))
  dropped = np.asarray(head._drop(x, jax.random.key(0)))
  assert set(np.unique(dropped)) == {0.0, 2.0} and (dropped == dropped[:, :1, :1]).all()
  assert head._drop(x, None) is x
  losses, _ = jax.eval_shape(head.losses, make_features(), make_batch(), jax.random.key(0))
  assert set(losses) == {"loss_ce"}


def test_levels_that_do_not_exist_are_named():
  with pytest.raises(ValueError, match=r"levels \(1, 4\); expected different ones of 0 to 3"):
    linear.LinearHead(_SPECS, linear.LinearConfig(5, levels=(1, 4)), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="auxiliary head on level -5"):
    _upernet(auxiliary_level=-5)


def _our_weights(head, weights):
  """Fills the head from transformers' names, every one of them."""
  left = dict(weights)

  def fill(module, prefix):
    module.conv.kernel.set_value(jnp.asarray(left.pop(f"{prefix}.conv.weight").transpose(2, 3, 1, 0)))
    module.norm.scale.set_value(jnp.asarray(left.pop(f"{prefix}.batch_norm.weight")))
    module.norm.bias.set_value(jnp.asarray(left.pop(f"{prefix}.batch_norm.bias")))

  def fill_classifier(module, prefix):
    module.kernel.set_value(jnp.asarray(left.pop(f"{prefix}.weight")[:, :, 0, 0].T))
    module.bias.set_value(jnp.asarray(left.pop(f"{prefix}.bias")))

  for i, pool in enumerate(head.pools):
    fill(pool, f"decode_head.psp_modules.{i}.1")
  for ours, theirs in (("laterals", "lateral_convs"), ("outputs", "fpn_convs")):
    for i, module in enumerate(getattr(head, ours)):
      fill(module, f"decode_head.{theirs}.{i}")
  fill(head.bottleneck, "decode_head.bottleneck")
  fill(head.fusion, "decode_head.fpn_bottleneck")
  fill(head.auxiliary, "auxiliary_head.convs.0")
  fill_classifier(head.classifier, "decode_head.classifier")
  fill_classifier(head.auxiliary_classifier, "auxiliary_head.classifier")
  assert not left, sorted(left)


def _compare(folder):
  spec = json.loads((folder / "upernet.json").read_text())
  specs = [FeatureSpec(stride, channels) for stride, channels in zip(spec["strides"], spec["channels"])]
  config = upernet.UPerNetConfig(
    spec["num_labels"],
    channels=spec["hidden_size"],
    pool_scales=tuple(spec["pool_scales"]),
    norm_groups=spec["groups"],
    auxiliary_channels=spec["auxiliary_channels"],
    input_norm=False,
  )
  head = upernet.UPerNet(specs, config, rngs=nnx.Rngs(0))
  _our_weights(head, golden_values.state_dict(spec))
  shapes = [(2, s.channels, *(side // s.stride for side in spec["image"])) for s in specs]
  features = [
    golden_values.values(spec["seed"], f"features.{i}", shape).transpose(0, 2, 3, 1)
    for i, shape in enumerate(shapes)
  ]
  graphdef, state = nnx.split(head)
  run = jax.jit(
    lambda state, x: (nnx.merge(graphdef, state)(x), nnx.merge(graphdef, state).auxiliary_logits(x))
  )
  wanted = np.load(folder / "upernet.npz")
  for found, name in zip(run(state, features), ("decode_head", "auxiliary_head")):
    reference = wanted[name].transpose(0, 2, 3, 1)
    assert found.shape == reference.shape
    np.testing.assert_allclose(found, reference, atol=1e-5 * np.abs(reference).max())


def test_upernet_equals_transformers():
  _compare(_TESTS / "golden")


def test_upernet_equals_transformers_with_other_weights(tmp_path):
  reference_scripts.run("upernet.py", tmp_path, "1", packages=("torch", "transformers"))
  _compare(tmp_path)
