"""The compiled steps of training and evaluation, as pure functions of pytrees."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from frozen_vision.freezing import partition
from frozen_vision.tasks import base

State = dict[str, Any]


def device_batch(batch: base.Batch) -> base.Batch:
  """The part of a batch that the compiled steps read: 64-bit ids stay on the host, where they are exact."""
  return {name: value for name, value in batch.items() if value.dtype.itemsize < 8}


def init_state(trainable: nnx.State, tx: optax.GradientTransformation, *, seed: int, ema: bool) -> State:
  """Everything that changes while training, and all that a checkpoint holds."""
  state = {
    "trainable": trainable,
    "opt_state": tx.init(trainable),
    "step": jnp.zeros((), jnp.int32),
    "key": jax.random.key(seed),
  }
  if ema:
    state["ema"] = jax.tree.map(jnp.copy, trainable)
  return state


def backbone_is_frozen(trainable: nnx.State) -> bool:
  return not any(path.startswith("backbone/") for path in partition.flatten(trainable))


def make_train_step(
  task: base.Task,
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  *,
  phase: Any = None,
  accumulate: int = 1,
  ema_decay: float = 0.0,
  frozen_pass: bool,
  given_features: bool = False,
) -> Any:
  """train_step(state, frozen, batch[, features]) -> (state, scalars), to be jitted.

  Args:
    phase: the task's static setting.
    accumulate: micro-batches per update, of every so many-th example, which leaves each on its device;
      gradients are averaged.
    ema_decay: of the average of the trainable parameters; 0 for none. The first updates use
      (1 + step) / (10 + step) where that is smaller, so that the start is forgotten.
    frozen_pass: the backbone is wholly frozen, so its features are computed outside of the gradient.
    given_features: the step takes the features as an argument (then `accumulate` must be 1).
  """
  if given_features and accumulate != 1:
    raise ValueError("A step on given features does not accumulate; use accumulate=1.")

  def gradients(trainable, frozen, batch, features, rng):
    if features is None and frozen_pass:
      features = task.frozen_features(nnx.merge(graphdef, trainable, frozen), batch)

    def loss_fn(trainable):
      return task.loss(nnx.merge(graphdef, trainable, frozen), batch, features, rng, phase)

    (loss, scalars), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
    return grads, {"loss": loss, **scalars}

  def train_step(state: State, frozen: nnx.State, batch: base.Batch, features=None):
    trainable = state["trainable"]
    rng = jax.random.fold_in(state["key"], state["step"])
    if accumulate == 1:
      grads, scalars = gradients(trainable, frozen, batch, features, rng)
    else:
      micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)

      def add(total, indexed):
        index, batch = indexed
        new = gradients(trainable, frozen, batch, None, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, total, new), None

      shapes = jax.eval_shape(
        lambda batch: gradients(trainable, frozen, batch, None, rng), jax.tree.map(lambda x: x[0], micro)
      )
      zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
      total, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), micro))
      grads, scalars = jax.tree.map(lambda leaf: leaf / accumulate, total)
    updates, opt_state = tx.update(grads, state["opt_state"], trainable)
    new = dict(
      state, trainable=optax.apply_updates(trainable, updates), opt_state=opt_state, step=state["step"] + 1
    )
    if "ema" in state:
      step = state["step"].astype(jnp.float32)
      decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
      new["ema"] = jax.tree.map(
        lambda old, leaf: decay * old + (1 - decay) * leaf, state["ema"], new["trainable"]
      )
    return new, {**scalars, "grad_norm": optax.tree.norm(grads)}

  return train_step


def make_predict_step(task: base.Task, graphdef: nnx.GraphDef, *, frozen_pass: bool) -> Any:
  """predict_step(trainable, frozen, batch) -> predictions, to be jitted."""

  def predict_step(trainable: nnx.State, frozen: nnx.State, batch: base.Batch):
    model = nnx.merge(graphdef, trainable, frozen)
    features = task.frozen_features(model, batch) if frozen_pass else None
    return task.predict(model, batch, features)

  return predict_step
