"""The compiled steps of training and evaluation, as pure functions of pytrees."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from frozen_vision.tasks import compiled

State = dict[str, Any]
Scalars = dict[str, jax.Array]


def device_batch(batch: compiled.Batch) -> compiled.Batch:
  """The part of a batch that the compiled steps read: 64-bit ids stay on the host, where they are exact."""
  return {name: value for name, value in batch.items() if value.dtype.itemsize < 8}


def init_state(
  trainable: nnx.State,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  ema: bool,
  mutable: nnx.State | None = None,
  task_state: Any = None,
  shardings: Mapping[str, Any] | None = None,
) -> State:
  """Everything that changes while training, and all that a checkpoint holds.

  Args:
    mutable: variables of the trained modules that the forward pass changes, such as BatchNorm's statistics;
      None for none.
    task_state: of `Task.initial_state`.
    shardings: of the result; optimizer state and average are then made where they belong, and never in
      copies on every device.

  Returns:
    `trainable`, `opt_state`, `mutable`, `task` (its own state), `step`, `key`; if asked for, `ema` and
    `ema_mutable`, the averages of `trainable` and `mutable`.
  """

  def made(name: str, function: Callable[[nnx.State], Any]) -> Any:
    if shardings is not None:
      function = jax.jit(function, out_shardings=shardings[name])
    return function(trainable)

  state = {
    "trainable": trainable,
    "opt_state": made("opt_state", tx.init),
    "mutable": nnx.State({}) if mutable is None else mutable,
    "task": task_state,
    "step": jnp.zeros((), jnp.int32),
    "key": jax.random.key(seed),
  }
  if ema:
    state["ema"] = made("ema", functools.partial(jax.tree.map, jnp.copy))
    state["ema_mutable"] = jax.tree.map(jnp.copy, state["mutable"])
  return state


def make_train_step(
  task: compiled.Trained,
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  *,
  phase: Any = None,
  accumulate: int = 1,
  ema_decay: float | Callable[[jax.Array], jax.Array] = 0.0,
  averaged_teacher: bool = False,
  frozen_pass: bool,
  given_features: bool = False,
) -> Callable[..., tuple[State, Scalars]]:
  """train_step(state, frozen, batch[, features]) -> (state, scalars), to be jitted.

  The scalars are `loss`, `loss/NAME` of its terms, the task's metrics and `grad_norm`.

  Args:
    phase: the task's static setting.
    accumulate: micro-batches per update, of every so many-th example, which leaves each on its device;
      gradients are averaged, mutable state passes from one to the next.
    ema_decay: of the average of the trainable parameters; 0 for none. The first updates use
      (1 + step) / (10 + step) where that is smaller, so that the start is forgotten. BatchNorm's statistics
      are averaged alike, as timm's ModelEmaV2 and V3 do: averaged parameters give other activations than the
      newest ones, whose statistics do not fit them. A function gives the decay of every step as it is.
    averaged_teacher: the loss finds the model of the averages, as the step before left them, as
      `model.teacher`.
    frozen_pass: the backbone is wholly frozen, so its features are computed outside of the gradient.
    given_features: the step takes the features as an argument.
  """
  of_batch = _gradients(task, graphdef, phase, frozen_pass=frozen_pass)

  def train_step(
    state: State, frozen: nnx.State, batch: compiled.Batch, features: compiled.Features | None = None
  ) -> tuple[State, Scalars]:
    trainable, changing = state["trainable"], (state["mutable"], state["task"])
    rng = jax.random.fold_in(state["key"], state["step"])
    if given_features and features is None:
      raise TypeError("This step was made with given_features=True: give it the features.")
    teacher = (state["ema"], state["ema_mutable"]) if averaged_teacher else None
    gradients = functools.partial(of_batch, teacher=teacher)
    if accumulate == 1:
      changing, grads, scalars = gradients(trainable, changing, frozen, batch, rng, features)
    else:
      changing, grads, scalars = _accumulated(
        gradients, accumulate, trainable, changing, frozen, batch, rng, features
      )
    updates, opt_state = tx.update(grads, state["opt_state"], trainable)
    new = dict(
      state,
      trainable=optax.apply_updates(trainable, updates),
      opt_state=opt_state,
      mutable=changing[0],
      task=changing[1],
      step=state["step"] + 1,
    )
    if "ema" in state:
      new["ema"] = _average(state["ema"], new["trainable"], state["step"], ema_decay)
      new["ema_mutable"] = _average(state["ema_mutable"], new["mutable"], state["step"], ema_decay)
    return new, {**scalars, "grad_norm": optax.tree.norm(grads)}

  return train_step


def _gradients(
  task: compiled.Trained, graphdef: nnx.GraphDef, phase: Any, *, frozen_pass: bool
) -> Callable[..., Any]:
  """(trainable, changing, frozen, batch, rng, features, teacher) -> (changing, gradients, scalars).

  `changing` is (the model's mutable variables, the task's own state), before and after; `teacher` the
  averages of trainable and mutable variables, where they teach.
  """

  def gradients(
    trainable: nnx.State,
    changing: tuple[nnx.State, Any],
    frozen: nnx.State,
    batch: compiled.Batch,
    rng: jax.Array,
    given: compiled.Features | None = None,
    teacher: tuple[nnx.State, nnx.State] | None = None,
  ) -> tuple[tuple[nnx.State, Any], nnx.State, Scalars]:
    mutable, task_state = changing
    loss_rng, features_rng, prepare_rng = jax.random.split(rng, 3)
    batch = task.prepare(batch, prepare_rng, phase)
    if given is None and frozen_pass:
      given = task.features(nnx.merge(graphdef, trainable, mutable, frozen), batch, None)

    def loss_fn(trainable: nnx.State) -> tuple[jax.Array, tuple[compiled.Losses, nnx.State]]:
      # A copy: the forward pass writes new statistics into its variables, which are read below.
      model = nnx.merge(graphdef, trainable, mutable, frozen, copy=True)
      if teacher is not None:
        model.teacher = nnx.merge(graphdef, *teacher, frozen, copy=True)
      features = task.features(model, batch, features_rng) if given is None else given
      losses = task.loss(model, batch, features, loss_rng, task_state)
      return losses.total, (losses, _same_variables(model, mutable))

    (loss, (losses, changed)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
    terms = {f"loss/{name}": value for name, value in losses.terms.items()}
    return (changed, losses.state), grads, {"loss": loss, **terms, **losses.metrics}

  return gradients


def _same_variables(model: nnx.Module, wanted: nnx.State) -> nnx.State:
  """The variables of a model that a state has, with their present values."""
  variables = dict(nnx.to_flat_state(nnx.state(model)))
  return nnx.from_flat_state([(path, variables[path]) for path, _ in nnx.to_flat_state(wanted)])


def _accumulated(
  gradients: Callable[..., Any],
  parts: int,
  trainable: nnx.State,
  changing: tuple[nnx.State, Any],
  frozen: nnx.State,
  batch: compiled.Batch,
  rng: jax.Array,
  features: compiled.Features | None,
) -> tuple[tuple[nnx.State, Any], nnx.State, Scalars]:
  """Means of gradients and scalars over micro-batches, one after the other."""
  micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), (batch, features))

  def add(carry: tuple[Any, Any], indexed: tuple[jax.Array, Any]) -> tuple[tuple[Any, Any], None]:
    (changing, total), (index, (batch, given)) = carry, indexed
    changing, *new = gradients(trainable, changing, frozen, batch, jax.random.fold_in(rng, index), given)
    return (changing, jax.tree.map(jnp.add, total, tuple(new))), None

  shapes = jax.eval_shape(
    lambda batch, given: gradients(trainable, changing, frozen, batch, rng, given)[1:],
    *jax.tree.map(lambda x: x[0], micro),
  )
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  (changing, total), _ = jax.lax.scan(add, (changing, zeros), (jnp.arange(parts), micro))
  return changing, *jax.tree.map(lambda leaf: leaf / parts, total)


def _average(
  ema: nnx.State, newest: nnx.State, step: jax.Array, ema_decay: float | Callable[[jax.Array], jax.Array]
) -> nnx.State:
  """The average after an update; see `make_train_step`. Of counts, which have no average, the newest."""
  step = step.astype(jnp.float32)
  decay = ema_decay(step) if callable(ema_decay) else jnp.minimum(ema_decay, (1 + step) / (10 + step))

  def average(old: jax.Array, leaf: jax.Array) -> jax.Array:
    return decay * old + (1 - decay) * leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

  return jax.tree.map(average, ema, newest)


def make_features_step(
  task: compiled.Trained, graphdef: nnx.GraphDef, phase: Any
) -> Callable[..., compiled.Features]:
  """features_step(trainable, mutable, frozen, batch, rng) -> features, to be jitted: the frozen pass alone.

  Args:
    phase: the task's static setting.
  """

  def features_step(
    trainable: nnx.State,
    mutable: nnx.State,
    frozen: nnx.State,
    batch: compiled.Batch,
    rng: jax.Array | None,
  ) -> compiled.Features:
    model = nnx.merge(graphdef, trainable, mutable, frozen)
    return task.features(model, task.prepare(batch, rng, phase), None)

  return features_step


def make_predict_step(
  task: compiled.Predicting, graphdef: nnx.GraphDef, largest_size: tuple[int, int] | None = None
) -> Callable[..., compiled.Outputs]:
  """predict_step(trainable, mutable, frozen, batch[, features]) -> predictions, to be jitted; deterministic.

  Args:
    largest_size: static (height, width) that no source image exceeds, if the task depends on it.
  """

  def predict_step(
    trainable: nnx.State,
    mutable: nnx.State,
    frozen: nnx.State,
    batch: compiled.Batch,
    features: compiled.Features | None = None,
  ) -> compiled.Outputs:
    model = nnx.merge(graphdef, trainable, mutable, frozen)
    model.eval()
    batch = task.prepare(batch, None, task.phases[-1])
    given = task.features(model, batch, None) if features is None else features
    outputs = task.predict(model, batch, given)
    return task.to_source(outputs, batch, largest_size)

  return predict_step
