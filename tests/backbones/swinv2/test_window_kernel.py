"""The kernel of attention in windows, interpreted and compiled, against the plain form."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones import base, families
from frozen_vision.backbones.swinv2 import model as swinv2
from frozen_vision.backbones.swinv2 import window_kernel, windows
from frozen_vision.devices import sharding
from frozen_vision.files import tensors
from frozen_vision.freezing import feature_key
from frozen_vision.planning import machines
from tests import random_backbones

_ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture
def interpreted(monkeypatch):
  monkeypatch.setattr(window_kernel, "INTERPRET", True)


def _inputs(size, window, heads, head_channels, dtype=jnp.float32, batch=2):
  """(queries, keys and values; scale; table) as NumPy draws them."""
  rng = np.random.default_rng(0)
  sides = [2 * min(window, length) - 1 for length in size]
  return (
    jnp.asarray(rng.standard_normal((batch, *size, 3 * heads * head_channels)), dtype),
    jnp.asarray(np.exp(rng.standard_normal(heads) + 1), jnp.float32),
    jnp.asarray(3 * rng.standard_normal((heads, *sides)), jnp.float32),
  )


def _plain(qkv, scale, table, *, window, shifted):
  def attention(x, found, regions):
    bias = windows.pair_bias(table.reshape(len(table), -1).T, found)
    return windows.cosine_attention(x, found, scale, bias, regions)

  return windows.attend_in_windows(qkv, window, shifted, attention, len(table))


def _on_chip(qkv, scale, table, *, window, shifted):
  def attention(x, found, shift):
    return windows.attention_on_chip(x, found, scale, table, shift)

  return windows.attend_on_chip(qkv, window, shifted, attention)


def _output_and_gradients(function, inputs):
  def loss(*inputs):
    y = function(*inputs)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

  gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
  return y, gradients


# Windows in which the queries take one step and several; whose columns fill registers and do not; maps that
# are padded; a shift along both axes, along one (the map has one window along the other) and none; heads that
# fill registers, and one and three that do not.
@pytest.mark.parametrize(
  "size, window, heads, head_channels, shifted",
  [
    ((16, 16), 8, 4, 32, True),
    ((16, 24), 8, 4, 32, False),
    ((10, 13), 6, 3, 32, True),
    ((5, 13), 7, 1, 64, True),
  ],
)
def test_output_and_gradients_are_those_of_the_plain_form(
  interpreted, monkeypatch, size, window, heads, head_channels, shifted
):
  monkeypatch.setattr(window_kernel, "_MOST_QUERIES", 32)
  assert window_kernel._rows_at_once((8, 8)) == 4
  inputs = _inputs(size, window, heads, head_channels)
  options = dict(window=window, shifted=shifted)
  wanted, wanted_gradients = _output_and_gradients(functools.partial(_plain, **options), inputs)
  found, gradients = _output_and_gradients(functools.partial(_on_chip, **options), inputs)
  np.testing.assert_allclose(found, wanted, atol=5e-6)
  for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
    scale = np.abs(wanted_gradient).max()
    assert scale > 0.01
    np.testing.assert_allclose(gradient / scale, wanted_gradient / scale, atol=1e-5)


def test_bfloat16(interpreted):
  inputs, options = _inputs((16, 24), 8, 8, 16, jnp.bfloat16, batch=1), dict(window=8, shifted=True)
  wanted = jax.jit(functools.partial(_plain, **options))(*inputs)
  found = jax.jit(functools.partial(_on_chip, **options))(*inputs)
  assert found.dtype == jnp.bfloat16
  # One unit in the last place, of a few: sums are in another order.
  np.testing.assert_allclose(found, wanted, rtol=2**-7, atol=2**-9)
  assert np.mean(np.asarray(found) == np.asarray(wanted)) > 0.98


@functools.cache
def _backbone(attention):
  config = swinv2.SwinV2Config(32, (2,), (1,), (4,), (3,), residual_norm_init=1.0, attention=attention)
  return random_backbones.fill(base.abstract(swinv2.SwinV2, config))


def test_backbones_give_the_same_features(interpreted):
  plain, by_kernel = _backbone("xla"), _backbone("pallas")
  images = jnp.asarray(np.random.default_rng(0).standard_normal((1, 20, 30, 3)), jnp.float32)
  features = jax.jit(lambda module, images: module(images))
  wanted = features(plain, images)
  for module in (by_kernel, random_backbones.fold(by_kernel)):
    assert "pallas_call" in str(jax.make_jaxpr(lambda module, x: module(x))(module, images))
    for found, level in zip(features(module, images), wanted, strict=True):
      assert np.abs(found - level).max() <= 1e-5 * np.abs(level).max()


def test_it_is_no_property_of_weights(tmp_path):
  plain, by_kernel = _backbone("xla"), _backbone("pallas")
  assert feature_key.feature_key(plain, "abc") == feature_key.feature_key(by_kernel, "abc")
  families.save_backbone(by_kernel, tmp_path / "small.safetensors", name="small")
  assert "attention" not in tensors.open_safetensors(tmp_path / "small.safetensors")[1]["config"]
  assert families.load_backbone(tmp_path / "small.safetensors").config == plain.config
  assert families.load_backbone(tmp_path / "small.safetensors", attention="pallas").config == by_kernel.config


def test_what_it_cannot_do_is_said():
  with pytest.raises(ValueError, match="attention is 'cuda'; known: xla, pallas"):
    dataclasses.replace(_backbone("xla").config, attention="cuda")
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  for platform in ("cpu", "cuda"):
    traced = jax.jit(lambda module, images: module(images)).trace(_backbone("pallas"), images)
    with pytest.raises(NotImplementedError, match=f"compiled for {platform}. Give .*attention=xla"):
      traced.lower(lowering_platforms=(platform,))
  for size, window, heads, head_channels, dtype, reason in (
    ((8, 8), 4, 2, 8, jnp.float32, "heads have 8 channels; it takes 16, 32"),
    ((8, 8), 4, 2, 24, jnp.float32, "heads have 24 channels"),
    ((8, 8), 4, 2, 32, jnp.float16, "bfloat16 or float32, not in float16"),
    ((128, 128), 128, 4, 32, jnp.bfloat16, "128 x 128 cells needs .* MiB on the chip, and 48"),
  ):
    inputs = _inputs(size, window, heads, head_channels, dtype)
    with pytest.raises(ValueError, match=f"'pallas'.*{reason}.*attention=xla"):
      jax.eval_shape(functools.partial(_on_chip, window=window, shifted=False), *inputs)
    assert not windows.fits_on_chip((window, window), head_channels, dtype)
  for window in (7, 16, 32, 40, 56):
    assert windows.fits_on_chip((window, window), 32, jnp.bfloat16), window


_ON_EIGHT_DEVICES = """
import functools
import jax
import numpy as np
from frozen_vision.backbones.swinv2 import window_kernel
from frozen_vision.devices import sharding
from tests.backbones.swinv2 import test_window_kernel as cases

window_kernel.INTERPRET = True
inputs = cases._inputs((8, 8), 4, 4, 32, batch=8)
options = dict(window=4, shifted=True)
wanted, wanted_gradients = cases._output_and_gradients(functools.partial(cases._plain, **options), inputs)
mesh = sharding.make_mesh(4, 2)
places = sharding.batch_sharding(mesh), *[sharding.replicated(mesh)] * 2
with jax.set_mesh(mesh):
  placed = [jax.device_put(x, place) for x, place in zip(inputs, places)]
  run = functools.partial(cases._on_chip, **options)
  jaxpr = str(jax.make_jaxpr(run)(*placed))
  found, gradients = cases._output_and_gradients(run, placed)
assert "shard_map" in jaxpr and "grid=(1, 1, 2, 2, 1)" in jaxpr.replace("\\n", " "), jaxpr
assert found.sharding.is_equivalent_to(places[0], 4), found.sharding
for one, other in zip((found, *gradients), (wanted, *wanted_gradients), strict=True):
  other = np.asarray(other)
  np.testing.assert_allclose(one / abs(other).max(), other / abs(other).max(), atol=1e-5)
print("equal")
"""


def test_on_eight_devices_each_attends_in_its_own_images():
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)}
  result = subprocess.run(
    [sys.executable, "-c", _ON_EIGHT_DEVICES], env=environment, cwd=_ROOT, capture_output=True, text=True
  )
  assert result.stdout.strip() == "equal", result.stderr


@pytest.fixture
def chips(monkeypatch):
  """Four v5e chips to compile for. libtpu ends a process that has flags for CPU."""
  pytest.importorskip("libtpu")
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  return machines.describe("v5e:2x2").devices


def _compiled(function, shapes, mesh):
  whole, batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  inputs = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    for x, place in zip(shapes, (batch, whole, whole), strict=True)
  ]
  with jax.set_mesh(mesh):
    return jax.jit(function).lower(*inputs).compile()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_compiled_for_a_tpu_no_scores_reach_its_memory(chips, dtype):
  mesh, options = sharding.make_mesh(devices=chips[:1]), dict(window=32, shifted=True)
  inputs = jax.eval_shape(lambda: _inputs((64, 64), 32, 4, 32, dtype, batch=1))
  plain, by_kernel = (
    _compiled(functools.partial(function, **options), inputs, mesh) for function in (_plain, _on_chip)
  )
  scores = 4 * 4 * 32**4 * 4  # bytes of float32 of four windows and heads
  assert plain.memory_analysis().temp_size_in_bytes > scores
  assert by_kernel.memory_analysis().temp_size_in_bytes < scores / 8
  assert by_kernel.cost_analysis()["flops"] > 4 * 4 * 32**4 * 4 * 32


def test_compiled_for_tpus_each_attends_in_its_own_images(chips):
  """In windows of 20 columns, which fill no registers, and with three heads."""
  inputs = jax.eval_shape(lambda: _inputs((40, 40), 20, 3, 32, jnp.bfloat16, batch=4))
  program = _compiled(
    functools.partial(_on_chip, window=20, shifted=True), inputs, sharding.make_mesh(devices=chips)
  )
  text = program.as_text()
  assert "attention_in_windows" in text
  assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
