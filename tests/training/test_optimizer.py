"""Optimizers from config: schedules, decay, clipping, layer-wise rates."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frozen_vision.backbones import base, families
from frozen_vision.backbones.vit import model as vit
from frozen_vision.backbones.vit.config import ViTConfig
from frozen_vision.config import OptimizerOptions
from frozen_vision.files import trees
from frozen_vision.freezing import prepare
from frozen_vision.runs import state_leaves
from frozen_vision.tasks import masked_image_modeling
from frozen_vision.training import optimizer


def _config(**changes):
  return dataclasses.replace(OptimizerOptions(), **changes)


def _rates(steps, at, **changes):
  rate = optimizer.schedule(_config(learning_rate=2.0, **changes), steps)
  return [float(rate(step)) for step in at]


def test_schedules():
  assert _rates(100, (0, 50, 99, 100), schedule="constant") == [2.0] * 4
  np.testing.assert_allclose(
    _rates(110, (0, 5, 10, 60, 110), schedule="cosine", warmup_steps=10), [0, 1, 2, 1, 0], atol=1e-6
  )
  np.testing.assert_allclose(
    _rates(100, (0, 100), schedule="cosine", final_fraction=0.1), [2, 0.2], rtol=1e-6
  )
  np.testing.assert_allclose(
    _rates(110, (5, 10, 60, 110), schedule="linear", warmup_steps=10, final_fraction=0.5),
    [1, 2, 1.5, 1],
    rtol=1e-6,
  )
  # Steps count from the start of the run, the warm-up included.
  np.testing.assert_allclose(
    _rates(100, (4, 10, 69, 70, 89, 90, 99), schedule="steps", warmup_steps=8, decay_at=(70, 90)),
    [1, 2, 2, 0.2, 0.2, 0.02, 0.02],
    rtol=1e-6,
  )


def test_unknown_names_list_the_known_ones(without_type_checks):
  with pytest.raises(ValueError, match="'cosin'; known: cosine, linear, steps, constant"):
    optimizer.schedule(_config(schedule="cosin"), 10)
  with pytest.raises(ValueError, match="'lamb'; known: adamw, muon, sgd"):
    _build(_config(name="lamb"), {"a": jnp.ones(2)})


class _Params(nnx.Module):
  def __init__(self, values):
    for name, value in values.items():
      setattr(self, name, nnx.Param(value))


def _build(config, values, layer_of=lambda path: 0, steps=10):
  params = nnx.state(_Params(values))
  return optimizer.build(config, steps=steps, trainable=params, layer_of=layer_of), params


def _updates(tx, params, grads):
  grads = jax.tree.map(jnp.copy, nnx.state(_Params(grads)))
  updates, _ = tx.update(grads, tx.init(params), params)
  return {path: np.asarray(value) for path, value in trees.flatten(updates).items()}


def test_no_decay_on_biases_norms_position_bias_and_scales():
  # More than ten blocks, so that paths sorted as text would show.
  depths = (1, 1, 12, 1)
  module = nnx.eval_shape(
    lambda: families.build_backbone("swinv2_nano", rngs=nnx.Rngs(0), depths=depths, extra_norm_interval=6)
  )
  params = nnx.state(module, nnx.Param)
  mask = optimizer.decay_mask(params)
  assert jax.tree.structure(mask) == jax.tree.structure(params)
  found, _ = state_leaves.flatten(mask)  # by the tree's own paths
  assert len(found) == len(jax.tree.leaves(params))
  for path, decays in found.items():
    assert decays == (path.endswith("/kernel") and "position_bias" not in path), path
  assert sum("position_bias" in path and path.endswith("kernel") for path in found) == 2 * sum(depths)
  jax.tree.map(lambda leaf, decays: None if leaf.ndim > 1 else _require(not decays), params, mask)


def _require(condition):
  assert condition


def test_of_what_pretraining_adds_tables_of_positions_alone_decay():
  config = ViTConfig(16, 1, 2, positions="relative", layer_scale=True)
  model = prepare.prepare(
    lambda backbone: nnx.eval_shape(lambda: masked_image_modeling.MaskedModel(backbone, rngs=nnx.Rngs(0))),
    base.abstract(vit.ViT, config),
    trainable=(".*",),
  )
  found, _ = state_leaves.flatten(optimizer.decay_mask(model.trainable, model.no_weight_decay))
  assert not found["mask_token"] and not found["backbone/cls_token"]
  assert found["backbone/relative_positions"]  # as in the released code of feature distillation
  assert found["decoder/kernel"] and not found["backbone/blocks/0/scale1/scale"]


def test_decay_is_decoupled_and_masked():
  tx, params = _build(
    _config(name="adamw", learning_rate=0.5, weight_decay=0.1, schedule="constant"),
    {"kernel": jnp.full((2, 2), 4.0), "bias": jnp.full(2, 4.0)},
  )
  updates = _updates(tx, params, {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)})
  np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 4, rtol=1e-6)
  np.testing.assert_array_equal(updates["bias"], 0)


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
  rng = np.random.default_rng(0)
  grads = {
    "kernel": rng.normal(size=(4, 9)),
    "position_bias_kernel": rng.normal(size=(4, 9)),
    "conv_kernel": rng.normal(size=(3, 3, 2, 4)),
    "bias": rng.normal(size=9),
  }
  settings = dict(learning_rate=0.5, weight_decay=0.1, schedule="constant")
  params = {name: np.ones_like(value) for name, value in grads.items()}
  found, adamw = (
    _updates(*_build(_config(name=name, **settings), params), grads) for name in ("muon", "adamw")
  )
  # Five rounds of the quintic act on the singular values alone; the scale is that of arXiv 2502.16982.
  left, values, right = np.linalg.svd(grads["kernel"], full_matrices=False)
  values = values / np.linalg.norm(values)
  for _ in range(5):
    values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
  wanted = -0.5 * (0.2 * 9**0.5 * (left * values) @ right + 0.1)
  np.testing.assert_allclose(found["kernel"], wanted, rtol=0, atol=1e-5)
  for name in ("position_bias_kernel", "conv_kernel", "bias"):
    np.testing.assert_array_equal(found[name], adamw[name])


def test_weight_decay_grows_along_half_a_cosine():
  found = optimizer.weight_decay(_config(weight_decay=0.04, final_weight_decay=0.4), 10)
  np.testing.assert_allclose([found(step) for step in (0, 5, 10)], [0.04, 0.22, 0.4], rtol=1e-6)
  assert optimizer.weight_decay(_config(weight_decay=0.04), 10) == 0.04


def test_delayed_parameters_begin_as_if_the_first_gradient_came_late():
  rng = np.random.default_rng(0)
  values = {name: rng.normal(size=(4, 6)).astype(np.float32) for name in ("first", "second")}
  gradients = [{name: rng.normal(size=(4, 6)).astype(np.float32) for name in values} for _ in range(4)]

  def run(steps, skipped, **changes):
    options = dict(schedule="constant", weight_decay=0.5, learning_rate=0.1) | changes
    tx, params = _build(_config(**options), values)
    state = tx.init(params)
    for gradient in gradients[skipped : skipped + steps]:
      updates, state = tx.update(nnx.state(_Params(gradient)), state, params)
      params = optax.apply_updates(params, updates)
    return trees.flatten(params)

  for name in ("adamw", "muon", "sgd"):
    delay = dict(delayed=("second",), delay_steps=2)
    np.testing.assert_array_equal(run(2, 0, name=name, **delay)["second"], values["second"])
    found, at_once, late = run(4, 0, name=name, **delay), run(4, 0, name=name), run(2, 2, name=name)
    np.testing.assert_allclose(found["first"], at_once["first"], rtol=1e-5)
    np.testing.assert_allclose(found["second"], late["second"], rtol=1e-5)
    assert np.abs(found["second"] - at_once["second"]).max() > 0.01
  with pytest.raises(ValueError, match="optimizer.delayed has 'third', which matches no parameter"):
    run(1, 0, delayed=("third",), delay_steps=2)
  with pytest.raises(ValueError, match=r"delayed is \(\) and delay_steps 2; give both or none"):
    _config(delay_steps=2)


def test_each_gradient_is_clipped_by_its_own_norm():
  options = dict(name="sgd", learning_rate=1.0, weight_decay=0.0, schedule="constant", momentum=0.0)
  tx, params = _build(
    _config(**options, clip_norm=1.0, clip_each=True), {"a": jnp.zeros(2), "b": jnp.zeros(2)}
  )
  updates = _updates(tx, params, {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.3, 0.4])})
  np.testing.assert_allclose(updates["a"], [-0.6, -0.8], rtol=1e-5)
  np.testing.assert_allclose(updates["b"], [-0.3, -0.4], rtol=1e-5)


def test_clipping_is_by_the_global_norm():
  tx, params = _build(
    _config(
      name="sgd", learning_rate=1.0, weight_decay=0.0, schedule="constant", clip_norm=1.0, momentum=0.0
    ),
    {"a": jnp.zeros(1), "b": jnp.zeros(1)},
  )
  updates = _updates(tx, params, {"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)})
  np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6, -0.8], rtol=1e-6)
  updates = _updates(tx, params, {"a": jnp.full(1, 0.3), "b": jnp.full(1, 0.4)})
  np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.3, -0.4], rtol=1e-6)


def test_sgd_as_pytorch_has_it():
  """Nesterov momentum, decay in the gradient, a cosine: parameters that torch.optim.SGD 2.x gave."""
  tx, params = _build(
    _config(name="sgd", learning_rate=0.1, weight_decay=0.5, momentum=0.9, nesterov=True, l2=True),
    {"bias": jnp.full(1, 2.0)},
    steps=4,
  )
  state, found = tx.init(params), []
  for grad in (1.0, -0.5, 0.25, 3.0):
    updates, state = tx.update(jax.tree.map(lambda leaf: jnp.full_like(leaf, grad), params), state, params)
    params = optax.apply_updates(params, updates)
    found.append(float(jax.tree.leaves(params)[0][0]))
  np.testing.assert_allclose(found, [1.62, 1.43145001, 1.25425112, 1.11934507], rtol=1e-6)


@pytest.mark.parametrize("option", ["nesterov", "l2"])
def test_options_of_sgd_are_refused_for_others(option):
  with pytest.raises(
    ValueError, match=f"OptimizerOptions.{option} is of sgd alone; optimizer.name is 'adamw'"
  ):
    _config(**{option: True})


def test_layer_decay_multiplies_rate_and_decay():
  depths = {"stem": 0, "middle": 2, "head": 3}
  tx, params = _build(
    _config(
      name="sgd", learning_rate=1.0, weight_decay=0.5, schedule="constant", momentum=0.0, layer_decay=0.5
    ),
    {name: jnp.full((1, 1), 2.0) for name in depths},
    layer_of=depths.get,
  )
  updates = _updates(tx, params, {name: jnp.ones((1, 1)) for name in depths})
  for name, factor in {"stem": 1 / 8, "middle": 1 / 2, "head": 1}.items():
    np.testing.assert_allclose(updates[name], -2 * factor, rtol=1e-6)


def test_layers_of_the_backbone_count_from_the_stem_to_the_head():
  backbone = nnx.eval_shape(
    lambda: families.build_backbone("swinv2_nano", depths=(1, 1, 2, 1), rngs=nnx.Rngs(0))
  )

  class Model(nnx.Module):
    def __init__(self, backbone):
      self.backbone, self.head = backbone, nnx.Linear(2, 2, rngs=nnx.Rngs(0))

  depth = prepare.prepare(Model, backbone, trainable=(".*",)).layer_of
  assert depth("backbone/patch_embed/proj/kernel") == 0
  assert depth("backbone/stages/0/blocks/0/attn/qkv/kernel") == 1
  assert depth("backbone/stages/0/downsample/reduction/kernel") == 1
  assert depth("backbone/stages/2/blocks/1/mlp/fc1/bias") == 4
  assert depth("backbone/stages/2/downsample/norm/scale") == 4
  assert depth("backbone/stages/3/blocks/0/norm1/scale") == 5
  for path in ("backbone/norm/scale", "neck/lateral/0/kernel", "head/kernel"):
    assert depth(path) == 6


def test_adam_is_optax_adam():
  tx, params = _build(
    _config(name="adamw", learning_rate=0.1, weight_decay=0.0, schedule="constant", b1=0.8, b2=0.9),
    {"a": jnp.ones((2, 2))},
  )
  reference = optax.adam(0.1, b1=0.8, b2=0.9)
  state, wanted_state = tx.init(params), reference.init(params)
  for scale in (1.0, -3.0, 0.5):
    grads = jax.tree.map(lambda leaf: scale * leaf, params)
    updates, state = tx.update(grads, state, params)
    wanted, wanted_state = reference.update(grads, wanted_state, params)
    for found, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(wanted)):
      np.testing.assert_allclose(found, expected, rtol=1e-6)
