"""The simple feature pyramid equals an independent PyTorch implementation, gradients included."""

import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.files import trees
from frozen_vision.necks import build
from frozen_vision.necks.simple_pyramid import SimplePyramid

_GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "simple_pyramid.npz"

# From our path to the reference's name (`tests/references/simple_pyramid.py`).
_NAMES = {
  "up4_first": "levels.0.0",
  "up4_norm": "levels.0.1.norm",
  "up4_second": "levels.0.3",
  "up2": "levels.1.0",
  **{
    f"{ours}/{level}": f"levels.{level}.{start + offset}{suffix}"
    for level, start in enumerate((4, 1, 0, 1))
    for offset, (ours, suffix) in enumerate(
      (("laterals", ""), ("lateral_norms", ".norm"), ("outputs", ""), ("output_norms", ".norm"))
    )
  },
}


def _from_torch(path, golden, kind):
  """A parameter or gradient of ours."""
  layer, leaf = path.rsplit("/", 1)
  array = golden[f"{kind}.{_NAMES[layer]}.{'bias' if leaf == 'bias' else 'weight'}"]
  if leaf != "kernel":
    return array
  if layer.startswith("up"):
    return array.transpose(2, 3, 0, 1)
  return array[:, :, 0, 0].T if layer.startswith("laterals") else array.transpose(2, 3, 1, 0)


def test_outputs_and_gradients():
  golden = np.load(_GOLDEN)
  neck = SimplePyramid([FeatureSpec(16, 8)] * 2, 6, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(neck)
  flat = nnx.to_flat_state(state)
  paths = [trees.path_string(path) for path, _ in flat]
  used = {f"{_NAMES[path.rsplit('/', 1)[0]]}" for path in paths}
  assert used == set(_NAMES.values())
  assert len(flat) == sum(key.startswith("parameter.") for key in golden)
  state = nnx.from_flat_state(
    [
      (path, leaf.replace(jnp.asarray(_from_torch(name, golden, "parameter"))))
      for (path, leaf), name in zip(flat, paths)
    ]
  )
  map_ = golden["map"].transpose(0, 2, 3, 1)
  weights = [golden[f"weight.{index}"].transpose(0, 2, 3, 1) for index in range(5)]

  def loss(state, map_):
    outputs = nnx.merge(graphdef, state)([jnp.zeros_like(map_), map_])
    return sum(jnp.sum(output * weight) for output, weight in zip(outputs, weights)), outputs

  (grads, grad_map), outputs = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, map_)
  for index, output in enumerate(outputs):
    _assert_close(output, golden[f"output.{index}"].transpose(0, 2, 3, 1))
  _assert_close(grad_map, golden["grad.map"].transpose(0, 2, 3, 1))
  for name, grad in trees.flatten(grads).items():
    _assert_close(grad, _from_torch(name, golden, "grad"))


def _assert_close(found, wanted):
  assert found.shape == wanted.shape
  assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_strides_and_odd_maps():
  specs = [FeatureSpec(16, 8)] * 4
  neck = build.build_neck("simple_pyramid", specs, channels=4, rngs=nnx.Rngs(0))
  assert [spec.stride for spec in neck.feature_specs] == [4, 8, 16, 32, 64]
  maps = jax.eval_shape(neck, [jnp.zeros((1, 5, 7, 8))] * 4)
  assert [map_.shape for map_ in maps] == [
    (1, 20, 28, 4),
    (1, 10, 14, 4),
    (1, 5, 7, 4),
    (1, 3, 4, 4),
    (1, 2, 2, 4),
  ]


def test_what_is_refused():
  with pytest.raises(ValueError, match="stride of 14 .*build the backbone with stride=16"):
    build.build_neck("simple_pyramid", [FeatureSpec(14, 8)], rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="num_levels=3; expected at least 4"):
    build.build_neck("simple_pyramid", [FeatureSpec(16, 8)], num_levels=3, rngs=nnx.Rngs(0))
  neck = build.build_neck("simple_pyramid", [FeatureSpec(16, 8)] * 2, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="got 1 levels, was built for 2"):
    neck([jnp.zeros((1, 2, 2, 8))])
  with pytest.raises(ValueError, match="known: fpn, bifpn, simple_pyramid"):
    build.build_neck("simple", [FeatureSpec(16, 8)], rngs=nnx.Rngs(0))
