"""What a task owes the loops."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from flax import nnx
import jax
import numpy as np

from frozen_vision.data import batch_iterator

Batch = dict[str, Any]
Features = tuple[jax.Array, ...] | None
Scalars = dict[str, jax.Array]
# By index, {"id": ..., "name": ...} of every class as JSON holds it; ids are COCO's where the data have some.
Classes = Sequence[dict[str, Any]]


@runtime_checkable
class Evaluator(Protocol):
  """Collects predictions; the same object serves training, the command line and the tests."""

  def update(self, predictions: dict[str, np.ndarray], batch: Batch) -> None: ...

  def result(self) -> dict[str, float]: ...


def named_classes(names: Iterable[str]) -> Classes:
  """Classes whose ids are their indices."""
  return tuple({"id": index, "name": name} for index, name in enumerate(names))


@runtime_checkable
class Task(Protocol):
  """One kind of training: its model, its data, its loss, and how it is judged.

  A task that was made with `classes` has no data: it builds its model, predicts, and can be planned.

  Attributes:
    classes: what the model tells apart.
    headline: one line that says what will run, printed first.
    best_metric: key of the evaluator's result that decides which checkpoint is the best.
    phases: static settings under which the train step is compiled, one program each; most tasks have
      the single phase None.
  """

  classes: Classes
  headline: str
  best_metric: str
  phases: tuple[Any, ...]

  def phase_at(self, step: int) -> Any:
    """Which of `phases` an optimizer step runs under."""

  def layer_of(self, path: str) -> int:
    """Depth of a parameter, 0 for the stem up to the head's, for layer-wise decay."""

  def build_model(self, backbone: nnx.Module | None = None) -> nnx.Module:
    """The whole model with its weights; its attribute `backbone` is what freezing is about.

    Args:
      backbone: put into the model as it is; None builds the one of the config.
    """

  def train_batches(self, start_example: int) -> batch_iterator.BatchIterator: ...

  def blank_example(self) -> dict[str, np.ndarray]:
    """What the training transform makes of a record without content; needs no data, and has every shape."""

  def eval_batches(self) -> batch_iterator.BatchIterator: ...

  def eval_transform(self) -> batch_iterator.EvalTransform:
    """What makes an example of a record for evaluation and prediction; needs no data."""

  def frozen_features(self, model: Any, batch: Batch) -> Features:
    """What the frozen backbone says of a batch; called by the loop, outside of the gradient."""

  def loss(
    self, model: Any, batch: Batch, features: Features, rng: jax.Array, phase: Any
  ) -> tuple[jax.Array, Scalars]:
    """The scalar to minimise, and what to log.

    Args:
      features: what `frozen_features` gave, or None where some of the backbone trains and the task runs
        it itself.
    """

  def predict(self, model: Any, batch: Batch, features: Features) -> dict[str, jax.Array]: ...

  def evaluator(self) -> Evaluator: ...

  def pictures(self, predictions: dict[str, np.ndarray], batch: Batch, count: int) -> dict[str, np.ndarray]:
    """{name: uint8 [h, w, 3]} that show the first `count` predictions of a batch beside the truth."""

  def write_results(self, evaluator: Evaluator, folder: Any) -> None:
    """Writes what the evaluator holds in the formats of the field."""
