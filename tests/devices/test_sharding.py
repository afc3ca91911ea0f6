"""How leaves are sharded over meshes; meshes at work are in test_processes.py and tests/mesh_run.py."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
import numpy as np
import optax
import pytest

from frozen_vision.backbones import families
from frozen_vision.backbones.swinv2 import model as swinv2
from frozen_vision.devices import sharding
from frozen_vision.layers import storage

_RULES = {"backbone": swinv2.SwinV2.sharding_rules}


def _mesh(data, model):
  return AbstractMesh((data, model), sharding.AXES, axis_types=(AxisType.Auto,) * 2)


def _folded_state(name, kind, **overrides):
  class Model(nnx.Module):
    def __init__(self, backbone):
      self.backbone = nnx.data(backbone)

  config = families.backbone_config(name, **overrides)
  backbone = families.abstract_backbone(name, **overrides)
  assert backbone.config == config
  return nnx.state(Model(storage.shapes(backbone, storage=kind)))


def _bytes(state, shardings=None):
  total = 0
  places = dict(nnx.to_flat_state(shardings)) if shardings is not None else {}
  for path, leaf in nnx.to_flat_state(state):
    shape = leaf.shape if shardings is None else places[path].get_value().shard_shape(tuple(leaf.shape))
    total += math.prod(shape) * np.dtype(leaf.dtype).itemsize
  return total


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_the_giant_is_spread_evenly_over_1_to_256_devices(kind):
  state = _folded_state("swinv2_g", kind, window_size=32, pretrained_window_sizes=(12, 12, 12, 6))
  whole = _bytes(state)
  assert whole > (5.9e9 if kind == "bfloat16" else 2.9e9)
  for devices in (1, 2, 4, 8, 16, 32, 64, 128, 256):
    groups = 2 ** (devices.bit_length() // 2)
    for mesh in {(devices, 1), (1, devices), (groups, devices // groups)}:
      held = _bytes(state, sharding.frozen_shardings(state, _mesh(*mesh), rules=_RULES))
      assert whole / devices <= held <= 1.05 * whole / devices, (mesh, held, whole / devices)
  in_groups = _bytes(state, sharding.frozen_shardings(state, _mesh(4, 8), over="model", rules=_RULES))
  assert whole / 8 <= in_groups <= 1.05 * whole / 8


def test_the_scanned_axis_stays_whole_and_small_leaves_too():
  state = _folded_state("swinv2_t", "float32")
  stacked = 0
  for path, leaf in nnx.to_flat_state(sharding.frozen_shardings(state, _mesh(2, 2), rules=_RULES)):
    spec = leaf.get_value().spec
    if "repeated" in path:
      stacked += 1
      assert not spec or spec[0] is None, (path, spec)
    if path[-1] == "kernel" and path[1] == "stages" and path[2] >= 2:  # those of the first stages are small
      assert spec and spec[-1] == sharding.AXES, (path, spec)
  assert stacked > 10


def test_a_large_leaf_without_a_rule_is_an_error():
  def unknown(size):
    return nnx.State({"backbone": {"odd": nnx.Param(jax.ShapeDtypeStruct((size,), jnp.float32))}})

  with pytest.raises(ValueError, match="No rule .* backbone/odd"):
    sharding.frozen_shardings(unknown(2**20), _mesh(2, 1), rules=_RULES)
  ((_, leaf),) = nnx.to_flat_state(sharding.frozen_shardings(unknown(4), _mesh(2, 1), rules=_RULES))
  assert leaf.get_value().spec == PartitionSpec()
  with pytest.raises(ValueError, match="config.mesh.frozen is 'data'"):
    sharding.frozen_shardings(unknown(4), _mesh(2, 1), over="data")


def test_wrong_meshes_and_batches_are_said():
  with pytest.raises(ValueError, match="3 devices, but there are 1"):
    sharding.make_mesh(3, 1)
  with pytest.raises(ValueError, match="expected positive numbers"):
    sharding.make_mesh(-1, 0)
  with pytest.raises(ValueError, match="2 devices, but there are 1"):
    sharding.make_mesh(-1, 2)
  mesh = sharding.make_mesh()
  assert dict(mesh.shape) == {"data": 1, "model": 1}
  sharding.check_batch(6, mesh, "batch_size", 3)
  with pytest.raises(ValueError, match=r"config.batch_size is 4; expected a multiple of 3 .*such as 3"):
    sharding.check_batch(4, mesh, "batch_size", 3)


def test_moments_of_a_large_head_can_be_sharded_and_its_parameters_stay_replicated():
  trainable = nnx.State(
    {
      "head": {
        "kernel": nnx.Param(jax.ShapeDtypeStruct((3, 512, 1000), jnp.float32)),  # 1000 has no 16 pieces
        "odd": nnx.Param(jax.ShapeDtypeStruct((999, 999), jnp.float32)),
        "bias": nnx.Param(jax.ShapeDtypeStruct((16,), jnp.float32)),
      }
    }
  )
  state = dict(
    trainable=trainable,
    opt_state=jax.eval_shape(optax.adam(1e-3).init, trainable),
    ema=trainable,
    step=jax.ShapeDtypeStruct((), jnp.int32),
  )
  mesh, wanted = _mesh(8, 2), {"kernel": PartitionSpec(None, sharding.AXES, None)}
  found = sharding.state_shardings(state, mesh, rules=_RULES, optimizer="sharded")
  specs = {}
  for path, place in jax.tree.flatten_with_path(found)[0]:
    part, name = path[0].key, next((str(key.key) for key in path if getattr(key, "key", "") in wanted), "")
    assert place.spec == (PartitionSpec() if part == "trainable" else wanted.get(name, PartitionSpec())), path
    specs.setdefault((part, name), []).append(place.spec)
  assert {key: len(values) for key, values in specs.items() if key[1]} == {
    ("trainable", "kernel"): 1,
    ("opt_state", "kernel"): 2,
    ("ema", "kernel"): 1,
  }
  with pytest.raises(ValueError, match="config.mesh.optimizer is 'whole'; known: replicated, sharded"):
    sharding.state_shardings(state, mesh, rules=_RULES, optimizer="whole")


def test_heads_are_whole_and_open_blocks_are_spread_with_their_moments():
  trainable = nnx.State(
    {
      "head": {"kernel": nnx.Param(jnp.zeros((8, 8)))},
      "backbone": {"block": {"kernel": nnx.Param(jnp.zeros((8, 16))), "bias": nnx.Param(jnp.zeros(16))}},
    }
  )
  state = dict(
    trainable=trainable, opt_state=optax.adam(1e-3).init(trainable), ema=trainable, step=jnp.zeros(())
  )
  found = sharding.state_shardings(state, _mesh(2, 2), rules=_RULES)
  kernels = [
    (jax.tree_util.keystr(path), place.spec)
    for path, place in jax.tree.flatten_with_path(found)[0]
    if "kernel" in jax.tree_util.keystr(path)
  ]
  assert len(kernels) == 8  # parameters, two moments and the average, of both
  for path, spec in kernels:
    assert spec == (PartitionSpec(None, sharding.AXES) if "backbone" in path else PartitionSpec()), path
