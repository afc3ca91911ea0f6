"""NAS-FPN equals an independent PyTorch implementation, gradients and running statistics included."""

import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.files import trees
from frozen_vision.necks import build, nas_fpn

_GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "nas_fpn.npz"
_SPECS = tuple(FeatureSpec(stride, channels) for stride, channels in ((4, 3), (8, 5), (16, 8), (32, 6)))


def _from_torch(path, golden, kind):
  """A variable or gradient of ours, as the reference has it."""
  layer, leaf = path.rsplit("/", 1)
  layer = layer.replace("laterals/2", "laterals/1").replace("lateral_norms/2", "lateral_norms/1")
  layer = layer.replace("blocks/", "repeats/").replace("/", ".")
  leaf = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}.get(leaf, leaf)
  array = golden[f"{kind}.{layer}.{leaf}"]
  match array.ndim:
    case 4 if layer.startswith("laterals"):
      return array[:, :, 0, 0].T
    case 4:
      return array.transpose(2, 3, 1, 0)
  return array


def _assert_close(found, wanted, name, rounding=0.0):
  assert found.shape == wanted.shape
  assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max() + rounding, name


def test_outputs_gradients_and_statistics():
  golden = np.load(_GOLDEN)
  neck = nas_fpn.NASFPN(_SPECS, 8, repeats=2, rngs=nnx.Rngs(0))
  graphdef, params, rest = nnx.split(neck, nnx.Param, ...)
  flat = nnx.to_flat_state(params)
  assert len(flat) == sum(key.startswith("parameter.") for key in golden)
  params = nnx.from_flat_state(
    [
      (path, leaf.replace(jnp.asarray(_from_torch(trees.path_string(path), golden, "parameter"))))
      for path, leaf in flat
    ]
  )
  maps = [golden[f"map.{level}"].transpose(0, 2, 3, 1) for level in range(3)]
  weights = [golden[f"weight.{level}"].transpose(0, 2, 3, 1) for level in range(5)]

  def loss(params, maps, rest):
    neck = nnx.merge(graphdef, params, rest, copy=True)
    unread = jnp.zeros((2, 32, 64, 3))
    outputs = neck([unread, *maps])
    statistics = nnx.state(neck, nnx.BatchStat)
    return sum(jnp.sum(output * weight) for output, weight in zip(outputs, weights)), (outputs, statistics)

  gradients, (outputs, statistics) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, maps, rest)
  for level, output in enumerate(outputs):
    _assert_close(output, golden[f"output.{level}"].transpose(0, 2, 3, 1), level)
  for level, gradient in enumerate(gradients[1]):
    _assert_close(gradient, golden[f"grad.map.{level}"].transpose(0, 2, 3, 1), level)
  for name, gradient in trees.flatten(gradients[0]).items():
    # A bias before a BatchNorm has no effect: its gradient is rounding on both sides.
    rounding = 1e-4 if name.endswith("bias") and "norms" not in name else 0.0
    _assert_close(gradient, _from_torch(name, golden, "grad"), name, rounding)
  found = trees.flatten(statistics)
  assert len(found) == sum(key.startswith("buffer.") for key in golden)
  for name, value in found.items():
    if name.endswith("mean"):  # PyTorch's running variances are unbiased, TensorFlow's and ours are not
      _assert_close(value, _from_torch(name, golden, "buffer"), name)


def test_strides_sizes_and_parameters():
  specs = [FeatureSpec(4 * 2**level, 256 * 2**level) for level in range(4)]
  neck = nnx.eval_shape(lambda: build.build_neck("nas_fpn", specs, rngs=nnx.Rngs(0)))
  assert [spec.stride for spec in neck.feature_specs] == [8, 16, 32, 64, 128]
  count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(neck, nnx.Param)))
  repeats = 5 * 7 * (9 * 256 * 256 + 256 + 2 * 256)
  laterals = (512 + 1024 + 2048) * 256 + 3 * (256 + 2 * 256)
  assert count == repeats + laterals
  small = nas_fpn.NASFPN(_SPECS, 8, repeats=1, rngs=nnx.Rngs(0))
  small.eval()
  maps = [jnp.zeros((1, -(-90 // spec.stride), -(-130 // spec.stride), spec.channels)) for spec in _SPECS]
  shapes = [map_.shape for map_ in jax.eval_shape(small, maps)]
  assert shapes == [(1, -(-90 // stride), -(-130 // stride), 8) for stride in (8, 16, 32, 64, 128)]


def test_what_is_refused():
  def build_(specs=_SPECS, **options):
    return build.build_neck("nas_fpn", specs, rngs=nnx.Rngs(0), **options)

  with pytest.raises(ValueError, match=r"strides \[16, 16\]; expected .*A plain ViT needs a simple_pyramid"):
    build_([FeatureSpec(16, 8)] * 2)
  with pytest.raises(ValueError, match=r"strides \[4, 8, 32\]; expected"):
    build_([FeatureSpec(4, 8), FeatureSpec(8, 8), FeatureSpec(32, 8)])
  with pytest.raises(ValueError, match="repeats=0"):
    build_(repeats=0)
  with pytest.raises(ValueError, match="40 channels do not divide into 32 groups"):
    build_(channels=40, norm="group")
  with pytest.raises(ValueError, match="activation is 'mish'; known: gelu"):
    build_(activation="mish")
  with pytest.raises(TypeError, match="separable"):
    build_(separable=True)
