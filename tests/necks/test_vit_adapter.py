"""The adapter of plain ViTs equals an independent implementation, gradients and BatchNorm included."""

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
from frozen_vision.necks import build
from frozen_vision.necks.vit_adapter import ViTAdapter
from tests import golden_values, reference_scripts

_GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
_TINY = dict(prior_channels=4, num_heads=2, num_points=3)
_SPECS = [FeatureSpec(16, 16)] * 4

# From our paths to the names of `tests/references/vit_adapter.py`.
_NAMES = (
  (r"prior/stem/(\d)/norm/", r"stem.\1.1."),
  (r"prior/stem/(\d)/", r"stem.\1.0."),
  (r"prior/stages/(\d)/norm/", r"stages.\1.1."),
  (r"prior/stages/(\d)/", r"stages.\1.0."),
  (r"prior/projections/", "projections/"),
  (r"output_norms/", "norms/"),
  (r"/ffn/", "/"),
)


def _name(path):
  for pattern, name in _NAMES:
    path = re.sub(pattern, name, path)
  path = re.sub(r"(kernel|scale)$", "weight", path)
  return re.sub(r"(norms?\D*\d?|\.1)[./](mean|var)$", r"\1.running_\2", path).replace("/", ".")


def _ours(path, array):
  """An array of the reference in our layout."""
  if array.ndim == 4 and path == "up/kernel":
    return array.transpose(2, 3, 0, 1)
  if array.ndim == 4:
    array = array.transpose(2, 3, 1, 0)
    return array[0, 0] if "projections" in path else array
  return array.T if path.endswith("kernel") else array


def _nhwc(array):
  return array.transpose(0, 2, 3, 1)


@pytest.fixture(params=["committed", "live"])
def golden(request, tmp_path):
  folder = _GOLDEN
  if request.param == "live":
    folder = reference_scripts.run("vit_adapter.py", tmp_path, "1", packages=("torch",))
  return np.load(folder / "vit_adapter.npz"), json.loads((folder / "vit_adapter.json").read_text())


# Gradients that are zero but for rounding: these shift what a BatchNorm centres.
_SHIFTS = ("up/bias", "prior/projections/0/bias")


def _assert_close(found, wanted, scale=None):
  assert found.shape == wanted.shape
  assert np.abs(found - wanted).max() <= 1e-5 * (scale or np.abs(wanted).max())


def _filled(state, arrays):
  """The state with the arrays of the reference, each of which is used."""
  flat = [(path, trees.path_string(path), leaf) for path, leaf in nnx.to_flat_state(state)]
  assert {_name(name) for _, name, _ in flat} == set(arrays)
  return nnx.from_flat_state(
    [(path, leaf.replace(jnp.asarray(_ours(name, arrays[_name(name)])))) for path, name, leaf in flat]
  )


def test_levels_gradients_and_statistics(golden):
  golden, spec = golden
  neck = ViTAdapter(_SPECS, 0, num_levels=4, drop_path=0.0, **_TINY, rngs=nnx.Rngs(0))
  graphdef, parameters, statistics = nnx.split(neck, nnx.Param, ...)
  parameters = _filled(parameters, golden_values.state_dict(spec))
  seed, (height, width), b = spec["seed"], spec["image"], spec["batch"]
  images = _nhwc(golden_values.values(seed, "image", (b, 3, height, width)))
  taps = [_nhwc(golden_values.values(seed, f"tap.{i}", (b, 16, height // 16, width // 16))) for i in range(4)]
  outputs = [golden[f"output.{i}"] for i in range(4)]
  weights = [_nhwc(golden_values.values(seed, f"weight.{i}", x.shape)) for i, x in enumerate(outputs)]

  def loss(parameters, taps):
    neck = nnx.merge(graphdef, parameters, statistics, copy=True)
    levels = neck(taps, images, rng=jax.random.key(0))
    total = sum(jnp.sum(level * weight) for level, weight in zip(levels, weights))
    return total, (levels, nnx.state(neck, nnx.BatchStat))

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  (grads, tap_grads), (levels, changed) = gradients(parameters, taps)
  for level, output in zip(levels, outputs, strict=True):
    _assert_close(level, _nhwc(output))
  for i, grad in enumerate(tap_grads):
    _assert_close(grad, _nhwc(golden[f"grad.tap.{i}"]))
  for path, grad in trees.flatten(grads).items():
    _assert_close(grad, _ours(path, golden[f"grad.{_name(path)}"]), 10.0 if path in _SHIFTS else None)
  running = {key.removeprefix("state."): golden[key] for key in golden if key.startswith("state.")}
  for path, mean in trees.flatten(changed).items():
    if path.endswith("mean"):  # PyTorch's running variances are unbiased, Flax's are not
      _assert_close(mean, running[_name(path)])

  neck = nnx.merge(graphdef, parameters, _filled(statistics, running))
  for i, level in enumerate(jax.jit(neck.__call__)(taps, images)):
    _assert_close(level, _nhwc(golden[f"inference.{i}"]))


def test_any_image_size_and_an_fpn_behind():
  neck = build.build_neck("vit_adapter", _SPECS, channels=8, **_TINY, rngs=nnx.Rngs(0))
  assert [spec.stride for spec in neck.feature_specs] == [4, 8, 16, 32, 64]
  taps = [jnp.zeros((1, 5, 3, 16))] * 4
  levels = jax.eval_shape(neck, taps, jnp.zeros((1, 70, 33, 3)))
  assert [level.shape for level in levels] == [
    (1, 18, 9, 8),
    (1, 9, 5, 8),
    (1, 5, 3, 8),
    (1, 3, 2, 8),
    (1, 2, 1, 8),
  ]


def test_what_is_refused():
  with pytest.raises(ValueError, match=r"maps \[\(14, 8\)\].*expected 4 of stride 16.*stride=16"):
    build.build_neck("vit_adapter", [FeatureSpec(14, 8)], rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="5 levels without an FPN.*levels=4"):
    build.build_neck("vit_adapter", _SPECS, channels=0, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="3 channels of values do not divide into 2 heads"):
    build.build_neck("vit_adapter", [FeatureSpec(16, 6)] * 4, **_TINY, rngs=nnx.Rngs(0))
