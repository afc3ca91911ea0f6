"""The plain mask decoder equals an independent implementation, gradients included; masks are annealed."""

import json
import pathlib
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.files import trees
from frozen_vision.heads.plain_mask_decoder import PlainMaskConfig, PlainMaskDecoder
from tests import golden_values, reference_scripts

_GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
_SPECS = [FeatureSpec(16, 16)] * 4
_TINY = dict(num_classes=4, num_queries=5, blocks=2, num_heads=2, mlp_dim=12)


def _name(path):
  """The name in `tests/references/plain_mask_decoder.py` of one of our paths."""
  path = re.sub(r"(scale\d?)/scale$", r"\1", path)
  path = re.sub(r"mlp/layers/(\d)", lambda match: f"mlp/{2 * int(match[1])}", path)
  path = re.sub(r"(upscale/\d)/kernel$", r"\1/depthwise/weight", path)
  return re.sub(r"(kernel|(?<=norm/)scale|(?<=norm\d/)scale)$", "weight", path).replace("/", ".")


def _ours(path, array):
  if array.ndim == 4:
    return array.transpose(2, 3, 0, 1) if "deconvolution" in path else array.transpose(2, 3, 1, 0)
  return array.T if path.endswith("kernel") else array


def _assert_close(found, wanted):
  assert found.shape == wanted.shape
  assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["committed", "live"])
def test_predictions_and_gradients(kind, tmp_path):
  folder = _GOLDEN
  if kind == "live":
    folder = reference_scripts.run("plain_mask_decoder.py", tmp_path, "1", packages=("torch",))
  golden = np.load(folder / "plain_mask_decoder.npz")
  spec = json.loads((folder / "plain_mask_decoder.json").read_text())
  head = PlainMaskDecoder(_SPECS, PlainMaskConfig(**_TINY), rngs=nnx.Rngs(0))
  graphdef, parameters, rest = nnx.split(head, nnx.Param, ...)
  arrays = golden_values.state_dict(spec)
  flat = [(path, trees.path_string(path), leaf) for path, leaf in nnx.to_flat_state(parameters)]
  assert {_name(name) for _, name, _ in flat} == set(arrays)
  parameters = nnx.from_flat_state(
    [(path, leaf.replace(jnp.asarray(_ours(name, arrays[_name(name)])))) for path, name, leaf in flat]
  )
  seed, shape = spec["seed"], (spec["batch"], 16, *spec["grid"])
  taps = [golden_values.values(seed, f"tap.{i}", shape).transpose(0, 2, 3, 1) for i in range(4)]
  classes, (height, width) = golden["classes"], spec["grid"]
  masks = (*classes.shape[:3], 4 * height, 4 * width)
  weights = [
    golden_values.values(seed, f"weight.{name}", s)
    for name, s in (("classes", classes.shape), ("masks", masks))
  ]

  def loss(parameters, taps):
    predictions = nnx.merge(graphdef, parameters, rest, copy=True)(taps, rng=jax.random.key(0))
    return sum(jnp.sum(x * weight) for x, weight in zip(predictions, weights)), predictions

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  (grads, tap_grads), predictions = gradients(parameters, taps)
  _assert_close(predictions.class_logits, classes)
  _assert_close(predictions.masks[..., ::2, ::2], golden["masks"])
  for i, grad in enumerate(tap_grads):
    _assert_close(grad, golden[f"grad.tap.{i}"].transpose(0, 2, 3, 1))
  for path, grad in trees.flatten(grads).items():
    _assert_close(grad, _ours(path, golden[f"grad.{_name(path)}"]))


def test_fewer_and_fewer_queries_are_confined():
  config = PlainMaskConfig(**_TINY, anneal_starts=(0, 2), anneal_ends=(4, 4))
  head = PlainMaskDecoder(_SPECS, config, rngs=nnx.Rngs(0))
  assert [head._confined(training=True).tolist() for _ in range(5)] == [
    pytest.approx(row) for row in ([1, 1], [0.75**0.9, 1], [0.5**0.9, 1], [0.25**0.9, 0.5**0.9], [0, 0])
  ]
  assert int(head.batches[...]) == 5 and head._confined(training=False).tolist() == [0, 0]
  taps = [jax.random.normal(jax.random.key(i), (1, 2, 2, 16)) for i in range(4)]
  free = head(taps)
  assert free.masks.shape == (1, 1, 5, 8, 8) and free.class_logits.shape == (1, 1, 5, 5)
  confined = PlainMaskDecoder(_SPECS, PlainMaskConfig(**_TINY), rngs=nnx.Rngs(0))(taps)
  assert np.abs(free.class_logits - confined.class_logits).max() > 1e-3
  assert int(head.batches[...]) == 5


def test_what_is_refused():
  with pytest.raises(ValueError, match="of a plain ViT, all alike.*stride=16"):
    PlainMaskDecoder([FeatureSpec(8, 16), FeatureSpec(16, 16)], PlainMaskConfig(), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="16 channels and 3 heads; expected a multiple of four"):
    PlainMaskDecoder(_SPECS, PlainMaskConfig(num_heads=3), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="one of each for the 6 blocks"):
    PlainMaskConfig(anneal_starts=(0,), anneal_ends=(1,))
