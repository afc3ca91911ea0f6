"""BiFPN against a reference in plain loops; published parameter counts."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.necks import bifpn, build, fpn

SPECS = (FeatureSpec(4, 3), FeatureSpec(8, 4), FeatureSpec(16, 5))
SIZES = ((9, 7), (5, 4), (3, 2))


def _features(seed=0):
  rng = np.random.default_rng(seed)
  return tuple(
    rng.standard_normal((2, *size, s.channels)).astype(np.float32) for size, s in zip(SIZES, SPECS)
  )


def _randomise(module, seed=0):
  """Every parameter drawn anew, so that no zero bias or weight of one hides a mistake."""
  rng = np.random.default_rng(seed)
  graphdef, state = nnx.split(module)

  def draw(x):
    return jnp.asarray(rng.normal(0.3, 0.5, x.shape), jnp.float32)

  return nnx.merge(graphdef, jax.tree.map(draw, state))


def _size(module):
  return sum(x.size for x in jax.tree.leaves(nnx.state(module)))


# The reference: float64, one cell at a time, one image [h, w, c].


def _pool(x):
  height, width = x.shape[:2]
  out = np.empty(((height + 1) // 2, (width + 1) // 2, x.shape[2]))
  for i, j in np.ndindex(out.shape[:2]):
    out[i, j] = x[max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2].max((0, 1))
  return out


def _nearest(x, size):
  out = np.empty((*size, x.shape[2]))
  for i, j in np.ndindex(size):
    out[i, j] = x[i * x.shape[0] // size[0], j * x.shape[1] // size[1]]
  return out


def _conv3(x, kernel):
  padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
  out = np.zeros((*x.shape[:2], kernel.shape[-1]))
  for i, j in np.ndindex(x.shape[:2]):
    patch = padded[i : i + 3, j : j + 3]
    if kernel.shape[2] == 1:  # depthwise
      out[i, j] = (patch * kernel[:, :, 0]).sum((0, 1))
    else:
      out[i, j] = np.einsum("yxc,yxcd->d", patch, kernel)
  return out


def _group_norm(x, norm):
  out = np.empty_like(x)
  size = x.shape[-1] // 32
  for start in range(0, x.shape[-1], size):
    part = x[..., start : start + size]
    out[..., start : start + size] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
  return out * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def _finish(x, conv, norm):
  if norm is None:
    return x + np.asarray(conv.bias[...], float)
  assert conv.bias is None
  return _group_norm(x, norm)


def _fuse(fusion, maps):
  weights = np.maximum(np.asarray(fusion.weights[...], float), 0)
  x = sum(w * m for w, m in zip(weights, maps, strict=True)) / (weights.sum() + 1e-4)
  x = x / (1 + np.exp(-x))
  kernel = np.asarray(fusion.conv.kernel[...], float)
  if fusion.depthwise is not None:
    x = _conv3(x, np.asarray(fusion.depthwise.kernel[...], float))
    x = x @ kernel[0, 0]
  else:
    x = _conv3(x, kernel)
  return _finish(x, fusion.conv, fusion.norm)


def _reference(neck, features):
  levels = [np.asarray(x, float) for x in features]
  levels += [_pool(levels[-1])]
  p = [
    x
    if lateral is None
    else _finish(x @ np.asarray(lateral.conv.kernel[...], float), lateral.conv, lateral.norm)
    for x, lateral in zip(levels, neck.laterals, strict=True)
  ]
  for block in neck.blocks:  # written out for four levels: mid 0..2, out 0..3
    mid2 = _fuse(block.top_down[2], [p[2], _nearest(p[3], p[2].shape[:2])])
    mid1 = _fuse(block.top_down[1], [p[1], _nearest(mid2, p[1].shape[:2])])
    out0 = _fuse(block.top_down[0], [p[0], _nearest(mid1, p[0].shape[:2])])
    out1 = _fuse(block.bottom_up[0], [_pool(out0), mid1, p[1]])
    out2 = _fuse(block.bottom_up[1], [_pool(out1), mid2, p[2]])
    out3 = _fuse(block.bottom_up[2], [_pool(out2), p[3]])
    p = [out0, out1, out2, out3]
  return p


@pytest.mark.parametrize(
  "channels, repeats, separable, norm",
  [(4, 2, False, "none"), (4, 1, True, "none"), (64, 1, True, "group")],
)
def test_equals_the_loop(channels, repeats, separable, norm):
  neck = _randomise(
    bifpn.BiFPN(
      SPECS,
      channels,
      num_levels=4,
      repeats=repeats,
      separable=separable,
      norm=norm,
      input_norm=False,
      rngs=nnx.Rngs(0),
    )
  )
  features = _features()
  outputs = jax.jit(neck.__call__)(features)
  assert [x.shape for x in outputs] == [(2, *s, channels) for s in (*SIZES, (2, 1))]
  assert neck.feature_specs == tuple(FeatureSpec(s, channels) for s in (4, 8, 16, 32))
  for image in range(2):
    expected = _reference(neck, [x[image] for x in features])
    for ours, theirs in zip(outputs, expected, strict=True):
      np.testing.assert_allclose(ours[image], theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("separable, millions", [(False, 4.7227), (True, 0.5468)])
def test_parameters_of_a_repeat(separable, millions):
  """The counts of the facts about the frozen study: 256 channels, 5 levels, group norm."""
  specs = tuple(FeatureSpec(4 * 2**i, 256) for i in range(4))

  def size(repeats):
    return _size(
      nnx.eval_shape(
        lambda: bifpn.BiFPN(specs, repeats=repeats, separable=separable, input_norm=False, rngs=nnx.Rngs(0))
      )
    )

  assert round(size(1) / 1e6, 4) == millions  # no laterals: all levels have 256 channels
  assert round((size(3) - size(2)) / 1e6, 4) == millions


def test_laterals_where_channels_differ():
  specs = tuple(FeatureSpec(4 * 2**i, 128 * 2**i) for i in range(4))  # SwinV2-B
  neck = nnx.eval_shape(lambda: bifpn.BiFPN(specs, rngs=nnx.Rngs(0)))
  assert [x is not None for x in neck.laterals] == [True, False, True, True, True]
  # The added level is the last one, pooled, with a lateral of its own.
  expected = 256 * (128 + 512 + 1024 + 1024) + 4 * 2 * 256
  assert _size(neck.laterals) == expected
  assert _size(neck.norms) == 2 * (128 + 256 + 512 + 1024)


def test_every_parameter_gets_a_gradient():
  neck = bifpn.BiFPN(SPECS[:2], 32, num_levels=3, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(neck)

  @jax.jit
  def gradient(params):
    def loss(params):
      outputs = nnx.merge(graphdef, params)(_features()[:2])
      return sum((x**2 * (i + jnp.sin(x))).sum() for i, x in enumerate(outputs))

    return jax.grad(loss)(params)

  flat = nnx.to_flat_state(gradient(params))
  assert all(np.isfinite(g[...]).all() for _, g in flat)
  assert not ["/".join(map(str, p)) for p, g in flat if not np.any(g[...])]


def test_weights_that_are_all_negative_stay_finite():
  fusion = bifpn.Fusion(2, 4, separable=False, norm="none", dtype=jnp.float32, rngs=nnx.Rngs(0))
  fusion.weights[...] = jnp.asarray([-1.0, -2.0])
  x = jnp.ones((1, 3, 3, 4))
  assert not fusion(x, x).any()


def test_input_norm_and_bfloat16():
  neck = bifpn.BiFPN(SPECS, 32, num_levels=4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(neck))} == {jnp.dtype("float32")}
  assert {x.dtype for x in jax.eval_shape(neck, _features())} == {jnp.dtype("bfloat16")}
  neck = bifpn.BiFPN(SPECS[:1], 32, num_levels=2, rngs=nnx.Rngs(0))
  x = _features()[0]
  run = jax.jit(neck.__call__)
  for ours, scaled in zip(run((100 * x,)), run((10000 * x,)), strict=True):
    np.testing.assert_allclose(ours, scaled, atol=1e-3)


def test_build_neck():
  def make(name, **options):
    return nnx.eval_shape(lambda: build.build_neck(name, SPECS, channels=32, rngs=nnx.Rngs(0), **options))

  plain = make("fpn", num_levels=4)
  assert isinstance(plain, fpn.FPN) and len(plain.feature_specs) == 4
  neck = make("bifpn", repeats=3, separable=True, norm="none", input_norm=False)
  assert isinstance(neck, bifpn.BiFPN) and len(neck.blocks) == 3 and not neck.norms
  assert neck.blocks[0].top_down[0].depthwise is not None
  assert neck.blocks[0].top_down[0].norm is None
  with pytest.raises(ValueError, match="'pafpn' is unknown; known: fpn, bifpn"):
    make("pafpn")


@pytest.mark.usefixtures("without_type_checks")
def test_errors_name_what_was_found():
  def build_(**options):
    return bifpn.BiFPN(SPECS, **(dict(rngs=nnx.Rngs(0)) | options))

  with pytest.raises(ValueError, match="num_levels=2 outputs for 3 backbone levels"):
    build_(num_levels=2)
  with pytest.raises(ValueError, match="repeats=0"):
    build_(repeats=0)
  with pytest.raises(ValueError, match="'batch'; known: group, none"):
    build_(norm="batch")
  with pytest.raises(ValueError, match="40 channels do not divide into 32 groups"):
    build_(channels=40)
  neck = nnx.eval_shape(build_)
  with pytest.raises(ValueError, match=r"channels \[3, 4\], was built for \[3, 4, 5\]"):
    neck(_features()[:2])
  small = (*_features()[:2], np.zeros((2, 2, 2, 5), np.float32))
  with pytest.raises(ValueError, match=r"\(5, 4\), \(2, 2\)\]; expected each to be half"):
    neck(small)
