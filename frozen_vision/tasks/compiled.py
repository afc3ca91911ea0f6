"""The part of a task that compiled steps use; importing it loads neither data libraries nor metrics."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

Batch = dict[str, Any]
Features = tuple[jax.Array, ...]
Scalars = dict[str, jax.Array]
Outputs = Any  # a pytree of arrays, examples along the first axis


class Losses(NamedTuple):
  """The result of `Task.loss`.

  Attributes:
    terms: parts of the loss by name, already weighted; their sum is minimised.
    metrics: scalars that are logged beside the loss and not minimised.
    state: the task's own state after this step, of the structure of `Task.initial_state`.
  """

  terms: Scalars
  metrics: Scalars
  state: Any = None

  @property
  def total(self) -> jax.Array:
    """The scalar that is minimised."""
    return sum(self.terms.values())


@runtime_checkable
class Trained(Protocol):
  """The methods of `base.Task` that a train step calls; they are described there."""

  def prepare(self, batch: Batch, rng: jax.Array | None, phase: Any) -> Batch: ...

  def features(self, model: Any, batch: Batch, rng: jax.Array | None) -> Features: ...

  def loss(self, model: Any, batch: Batch, features: Features, rng: jax.Array, state: Any) -> Losses: ...


@runtime_checkable
class Predicting(Protocol):
  """The members of `base.Task` that a predict step uses; they are described there."""

  phases: tuple[Any, ...]

  def prepare(self, batch: Batch, rng: jax.Array | None, phase: Any) -> Batch: ...

  def features(self, model: Any, batch: Batch, rng: jax.Array | None) -> Features: ...

  def predict(self, model: Any, batch: Batch, features: Features) -> Outputs: ...

  def to_source(self, outputs: Outputs, batch: Batch, largest_size: tuple[int, int] | None) -> Outputs: ...
