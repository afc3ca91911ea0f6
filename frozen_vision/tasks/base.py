"""The contract of tasks: what training, evaluation, prediction, export and planning may count on.

A task is one kind of training: a model, its data, its loss, and how predictions are judged, shown and
written. A new one is a subclass of `Task` and its name in `tasks.build.TASKS`; nothing else lists the tasks.
"""

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import inspect
import pathlib
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from flax import nnx
import jax
import numpy as np

from frozen_vision.config import Config
from frozen_vision.data import batch_iterator
from frozen_vision.tasks import pixels, results
from frozen_vision.tasks.compiled import Batch, Features, Losses, Outputs

Classes = results.Classes


@runtime_checkable
class Evaluator(Protocol):
  """Collects predictions; the same object serves training, the command line and the tests."""

  def update(self, predictions: dict[str, np.ndarray], batch: Batch) -> None: ...

  def result(self) -> dict[str, float]: ...


def _draw_nothing(predictions: dict[str, np.ndarray], batch: Batch, count: int) -> dict[str, np.ndarray]:
  return {}


def _write_nothing(evaluator: Evaluator, folder: pathlib.Path) -> None:
  pass


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One set of data that a task is judged on.

  Attributes:
    batches: () -> this process's batches, from the first.
    evaluator: () -> an evaluator without predictions.
    largest_size: (height, width) that no source image exceeds, for `Task.to_source`; None where predictions
      do not depend on it.
    at_end_only: evaluate after the last step only, as a test set is.
    pictures: (predictions, batch, count) -> {name: uint8 [h, w, 3]} that show the first `count` predictions
      of a batch beside the truth.
    write: (evaluator, folder) writes what the evaluator holds in the formats of the field.
  """

  batches: Callable[[], batch_iterator.BatchIterator]
  evaluator: Callable[[], Evaluator]
  largest_size: tuple[int, int] | None = None
  at_end_only: bool = False
  pictures: Callable[[dict[str, np.ndarray], Batch, int], dict[str, np.ndarray]] = _draw_nothing
  write: Callable[[Any, pathlib.Path], None] = _write_nothing


def named_classes(names: Iterable[str]) -> Classes:
  """Classes whose ids are their indices."""
  return tuple({"id": index, "name": name} for index, name in enumerate(names))


class Task(abc.ABC):
  """One kind of training.

  Made with `classes` it opens no data: it builds its model, predicts, and is planned. What a subclass forgets
  is an error when the class is made.

  Attributes:
    nominal_classes: how many classes are planned for where no data are opened.
    built_in_data: values of the option `data` that are generated or ship with the package.
    head_name: what prediction calls its head unless the caller says otherwise, a verb such as "detect".
    best_metric: key of the evaluator's result of "val" that decides which checkpoint is the best.
    result_type: what a prediction is, how it is drawn, written and exported.
    media: "image" or "video", what one input is.
    input_name: key of a batch under which the pixels are.
    teacher_in_evaluation: evaluation compares the model with its teacher, so it is built there too.
    folds_teacher: whether a teacher that is a backbone is folded.
    averaged_teacher: the loss finds the model of the run's averages (`config.ema_decay`) as `model.teacher`.
    average_decay: decay of the averages by the number of the step, from 0; None for `config.ema_decay`.
    phases: static settings under which the train step is compiled, one program each, the largest last; most
      tasks have the single phase None.
    classes: what the model tells apart.
    learns_classes: they are made from the training data, so that the checkpoint of a run decides on them.
    headline: one line that says what will run, printed first.
  """

  nominal_classes: ClassVar[int]
  built_in_data: ClassVar[tuple[str, ...]] = ()
  head_name: ClassVar[str]
  best_metric: str
  result_type: ClassVar[type[results.Result]]
  media: ClassVar[Literal["image", "video"]] = "image"
  input_name: ClassVar[str] = "image"
  teacher_in_evaluation: ClassVar[bool] = False
  folds_teacher: bool = True
  averaged_teacher: ClassVar[bool] = False
  learns_classes: ClassVar[bool] = False
  average_decay: Callable[[jax.Array], jax.Array] | None = None
  phases: tuple[Any, ...] = (None,)
  classes: Classes
  headline: str

  def __init_subclass__(cls, **kwargs: Any):
    super().__init_subclass__(**kwargs)
    required = [*Task.__abstractmethods__, "nominal_classes", "head_name", "best_metric", "result_type"]
    missing = [
      name
      for name in required
      if getattr(inspect.getattr_static(cls, name, None), "__isabstractmethod__", False)
      or inspect.getattr_static(cls, name, None) is None
    ]
    if missing:
      raise TypeError(f"The task {cls.__name__} lacks {', '.join(sorted(missing))}; see tasks.base.Task.")

  @abc.abstractmethod
  def __init__(self, config: Config, classes: Classes | None = None):
    """Checks the options and opens the data.

    Args:
      config: of the run.
      classes: of a model that is trained already, or only planned; no data are looked for then.
    """

  @property
  def data(self) -> Mapping[str, Any]:
    """The sources that were opened, by "training" and "validation"; empty without data."""
    sources = {"training": getattr(self, "_train", None), "validation": getattr(self, "_validation", None)}
    return {name: source for name, source in sources.items() if source is not None}

  def settle(self, config: Config) -> Config:
    """The config as a run records it: options that the data or the backbone decide have their values.

    Configs of two runs are compared as this leaves them. By default nothing changes.
    """
    return config

  # The model.

  def keep_classes(self, trained: Sequence[Any] | None) -> None:
    """Takes over the classes of a checkpoint (its `classes`, if it has some), of a task that learns them.

    It comes before the model is built.
    """

  @abc.abstractmethod
  def build_model(self, backbone: nnx.Module | None = None) -> nnx.Module:
    """The whole model with its weights; its attribute `backbone` is what freezing is about.

    Args:
      backbone: put into the model as it is; None builds the one of the config.
    """

  def build_teacher(self) -> nnx.Module | None:
    """A second frozen network, which training attaches to the model as `model.teacher`; None for none.

    It never trains, whatever `config.trainable` says, and is in no checkpoint; a checkpoint remembers what
    identifies its features. Prediction does without it.
    """
    return None

  @property
  def teacher_settings(self) -> Mapping[str, Any]:
    """Options that decide the teacher's features beside itself, as JSON; a checkpoint remembers them too."""
    return {}

  def initial_state(self, model: nnx.Module) -> Any:
    """State of the task's own that steps change, a pytree of arrays, such as a queue; None for none."""
    del model
    return None

  # Training.

  @abc.abstractmethod
  def train_batches(self, start_example: int) -> batch_iterator.BatchIterator:
    """This process's training batches from an example on, without end."""

  @abc.abstractmethod
  def blank_example(self) -> dict[str, np.ndarray]:
    """A training example of an empty record; needs no data, and has every shape."""

  def phase_at(self, step: int) -> Any:
    """Which of `phases` an optimizer step runs under."""
    del step
    return self.phases[0]

  def prepare(self, batch: Batch, rng: jax.Array | None, phase: Any) -> Batch:
    """Changes a batch on the device before the backbone: mixing, masking, resizing. Nothing by default.

    Args:
      rng: key of what is random in training; None in evaluation and prediction.
      phase: one of `phases`; in evaluation and prediction the last.
    """
    del rng, phase
    return batch

  @abc.abstractmethod
  def features(self, model: Any, batch: Batch, rng: jax.Array | None) -> Features:
    """The backbone's features of a prepared batch.

    The train step calls it outside of the gradient where the backbone is frozen, inside where some of it
    trains.

    Args:
      rng: key of stochastic depth where some of the backbone trains; None is deterministic.
    """

  @abc.abstractmethod
  def loss(self, model: Any, batch: Batch, features: Features, rng: jax.Array, state: Any) -> Losses:
    """The terms to minimise, and what to log.

    Args:
      batch: as `prepare` gave it.
      features: what `features` gave.
      rng: key of what is random after the backbone: sampling, dropout.
      state: of `initial_state`, as the step before left it.
    """

  # Evaluation and prediction.

  @property
  @abc.abstractmethod
  def evaluations(self) -> Mapping[str, Evaluation]:
    """The data that the task is judged on by name: "val", and perhaps others such as "test"."""

  @abc.abstractmethod
  def predict(self, model: Any, batch: Batch, features: Features) -> Outputs:
    """Predictions for a prepared batch, with static shapes."""

  def to_source(self, outputs: Outputs, batch: Batch, largest_size: tuple[int, int] | None) -> Outputs:
    """The last step of predicting, which depends on the size of source images; nothing by default.

    It is a program of its own in prediction, where photographs have many sizes, so that `predict` is compiled
    once.

    Args:
      outputs: of `predict`.
      largest_size: static (height, width) that no source image exceeds.
    """
    del batch, largest_size
    return outputs

  @abc.abstractmethod
  def eval_transform(self) -> batch_iterator.EvalTransform:
    """The transform from a record to an example for evaluation and prediction; needs no data."""

  def read_input(self, source: pixels.Source) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(the pixels that results are drawn on, the example) of one input of prediction.

    Raises:
      FileError: a file that cannot be used.
      ValueError: an array that is no image.
    """
    image = pixels.decode_image(source)
    return image, self.eval_transform()({"image": image, "image_id": 0, "label": 0})

  @property
  @abc.abstractmethod
  def view(self) -> Mapping[str, Any]:
    """The input transform before the backbone, as JSON: heads of one view share its features."""

  @property
  def extra_views(self) -> int:
    """How many more views of each input `predict` looks at, with backbone passes of its own."""
    return 0

  @property
  def takes_features(self) -> bool:
    """Whether `predict` uses the features of the whole input; False where it looks through windows."""
    return True

  @classmethod
  def with_image_size(cls, config: Config, size: tuple[int, int]) -> Config:
    """The config with which evaluation looks once at each image, fitted into a frame of `size` (h, w).

    By default the same: a task whose inputs are squares of its own keeps them.
    """
    del size
    return config
