"""States to save."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from frozen_vision.runs import checkpoints as checkpoint

META = dict(config=dict(steps=7, name="x"), feature_key="abc", examples=56)


class _Head(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(3, 4, rngs=rngs)
    self.rest = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])


def make(seed=0):
  """A state of every kind of leaf."""
  head = nnx.state(_Head(nnx.Rngs(seed)))
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return dict(
    trainable=head,
    ema=jax.tree.map(lambda x: x + 1, head),
    opt_state=optimizer.init(head),
    key=jax.random.key(seed),
    keys=jax.random.split(jax.random.key(seed, impl="rbg"), 4),
    half=(jnp.arange(8) + seed).astype(jnp.bfloat16),
    nothing=jnp.zeros((0, 3)),
    step=jnp.int32(seed),
    epoch=seed,
    rate=0.1 + seed,
    ids=np.array([2**40 + seed]),
    big=np.int64(2**50 + seed),
  )


def abstract(state, sharding=None):
  """Shapes in the place of its jax arrays."""

  def shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(lambda x: shape(x) if isinstance(x, jax.Array) else x, state)


def save(tmp_path, *steps, **kwargs):
  """Saves checkpoints of `make(step)`."""
  with checkpoint.Checkpoints(tmp_path, **kwargs) as checkpoints:
    for step in steps:
      checkpoints.save(step, make(step), META)
