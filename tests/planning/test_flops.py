"""FLOPs counted from a trace against arithmetic, and against XLA's figure where nothing loops."""

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from frozen_vision.backbones import families
from frozen_vision.layers import storage
from frozen_vision.layers.convolution import MapConv
from frozen_vision.planning import flops


def f32(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
  "function, args, expected",
  [
    (lambda a, b: a @ b, (f32(3, 4, 5), f32(5, 7)), 2 * 3 * 4 * 5 * 7),
    (lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (f32(2, 3, 4), f32(2, 5, 4)), 2 * 2 * 3 * 4 * 5),
    (lambda a: jax.lax.scan(lambda x, _: (x @ x, None), a, length=9)[0], (f32(3, 3),), 9 * 2 * 27),
    (lambda a: jax.jit(jax.checkpoint(lambda x: x @ x))(a), (f32(3, 3),), 2 * 27),
    (lambda a: jax.lax.cond(a.sum() > 0, lambda x: x @ x, lambda x: x, a), (f32(3, 3),), 2 * 27),
    (
      lambda n, a: jax.lax.fori_loop(0, n, lambda _, x: x @ x, a),
      (jax.ShapeDtypeStruct((), int), f32(3, 3)),
      0,
    ),
    (
      lambda n, a: jax.lax.fori_loop(0, 4, lambda _, x: x @ x, a),
      (jax.ShapeDtypeStruct((), int), f32(3, 3)),
      4 * 54,
    ),
    (jnp.sin, (f32(3, 3),), 0),
    (jax.value_and_grad(lambda a, b: (a @ b).sum(), argnums=(0, 1)), (f32(3, 4), f32(4, 5)), 3 * 2 * 60),
  ],
)
def test_arithmetic(function, args, expected):
  assert flops.count(function, *args) == expected


@pytest.mark.parametrize("layer", [nnx.Conv, MapConv])
@pytest.mark.parametrize("groups, kernel", [(1, 1), (1, 3), (8, 3)])
def test_convolutions_and_their_gradients(groups, kernel, layer):
  conv = nnx.eval_shape(
    lambda: layer(8, 16, (kernel, kernel), feature_group_count=groups, use_bias=False, rngs=nnx.Rngs(0))
  )
  graphdef, state = nnx.split(conv)
  forward = 2 * 2 * 10 * 12 * 16 * kernel**2 * 8 // groups

  def run(state, x):
    return nnx.merge(graphdef, state)(x).sum()

  assert flops.count(run, state, f32(2, 10, 12, 8)) == forward
  assert flops.count(jax.grad(run, argnums=(0, 1)), state, f32(2, 10, 12, 8)) == 3 * forward
  for argument in (0, 1):
    assert flops.count(jax.grad(run, argnums=argument), state, f32(2, 10, 12, 8)) == 2 * forward


def test_a_network_without_loops_has_the_flops_that_the_compiler_counts():
  def loss(weights, x):
    for kernel in weights:
      x = jnp.tanh(
        jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
      )
    return jnp.square(x.reshape(x.shape[0], -1) @ jnp.ones((x[0].size, 32))).sum()

  args = [f32(3, 3, 16, 32), f32(1, 1, 32, 64)], f32(2, 18, 18, 16)
  # Before its optimisations: these may choose other forms of the same product.
  analysis = jax.jit(jax.grad(loss)).lower(*args).cost_analysis()
  found = flops.count(jax.grad(loss), *args)
  # It also counts what is done element by element, and leaves out products with padding.
  assert 0.95 < found / analysis["flops"] < 1.05


@pytest.mark.parametrize("kind", ["forward", "gradient", "folded"])
def test_an_unrolled_backbone_has_the_flops_that_the_compiler_counts(kind):
  backbone = nnx.eval_shape(
    lambda: families.build_backbone(
      "swinv2_nano",
      embed_dim=64,
      depths=(1, 1, 1, 1),
      num_heads=(2, 4, 8, 16),
      pretrained_window_sizes=(8, 8, 4, 2),
      rngs=nnx.Rngs(0),
    )
  )
  graphdef, state = nnx.split(backbone)

  def forward(state, images):
    return nnx.merge(graphdef, state)(images)[-1].sum()

  function, argument = {
    "forward": (forward, state),
    "gradient": (jax.grad(forward), state),
    "folded": (lambda folded, images: folded(images)[-1].sum(), storage.shapes(backbone, scan=False)),
  }[kind]
  images = f32(1, 128, 128, 3)
  found = flops.count(function, argument, images)
  # What is done element by element is no product, and is a small part at this width.
  analysis = jax.jit(function).lower(argument, images).cost_analysis()
  assert 0.96 < found / analysis["flops"] < 1


def test_a_scanned_backbone_counts_as_an_unrolled_one():
  backbone = nnx.eval_shape(
    lambda: families.build_backbone(
      "swinv2_nano",
      embed_dim=8,
      num_heads=(1, 2, 4, 8),
      depths=(1, 1, 6, 1),
      pretrained_window_sizes=(8, 8, 4, 2),
      rngs=nnx.Rngs(0),
    )
  )

  def count(scan):
    return flops.count(
      lambda folded, images: folded(images), storage.shapes(backbone, scan=scan), f32(2, 64, 64, 3)
    )

  assert count(True) == count(False) > 0
