"""Linear evaluation: a logistic regression whose weight decay is selected on validation data.

The protocol of "How Well Do Self-Supervised Models Transfer?" (arXiv 2011.13377): features as the backbone
gives them, a grid of 45 weight decays, the best of them on validation data, one more fit on training and
validation data together, one test. Unlike in the paper's code every fit runs to convergence, so that results
do not depend on the order of the grid.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools

from jaxtyping import Bool, Float, Int
import numpy as np

from frozen_vision.data.classification import benchmarks
from frozen_vision.metrics import accuracy, average_precision
from frozen_vision.probes import basis as basis_lib
from frozen_vision.probes import logistic

# From 1e-6 to 1e5; scikit-learn's C is 1 / weight_decay.
GRID = tuple(float(decay) for decay in np.logspace(-6, 5, 45))

Metric = benchmarks.Metric
Targets = Int[np.ndarray, "_"] | Bool[np.ndarray, "_ k"]


@dataclasses.dataclass(frozen=True)
class LinearResult:
  """Results of a linear evaluation.

  Attributes:
    metric: of all scores here, which are in 0..1.
    weight_decays: the grid, ascending.
    validation: score on validation data at each of them.
    iterations, errors: of each fit, and of the last one behind them; see `logistic.Fit`.
    weight_decay: the selected one: the smallest of the best.
    at_edge: whether it is an end of the grid, so that a wider one might hold a better.
    test: score of the classifier that was fitted on training and validation data, on test data.
    classifier: that classifier.
    logits: its scores of the test data.
    validation_logits: scores of the validation data by the classifier that was selected on them, which is
      fitted on training data alone.
  """

  metric: Metric
  weight_decays: tuple[float, ...]
  validation: tuple[float, ...]
  iterations: tuple[int, ...]
  errors: tuple[float, ...]
  weight_decay: float
  at_edge: bool
  test: float
  classifier: basis_lib.LinearClassifier
  logits: Float[np.ndarray, "n k"]
  validation_logits: Float[np.ndarray, "v k"]


def evaluate(
  train: tuple[Float[np.ndarray, "n d"], Targets],
  validation: tuple[Float[np.ndarray, "v d"], Targets],
  test: tuple[Float[np.ndarray, "t d"], Targets],
  *,
  metric: Metric = "top1",
  weight_decays: Iterable[float] | None = None,
  num_classes: int | None = None,
  tolerance: float = logistic.TOLERANCE,
) -> LinearResult:
  """Selects a weight decay on validation data, fits again on all but the test data, and tests once.

  Args:
    train, validation, test: features and their labels; for `map11`, the classes of each, bool [n, k], each
      class a problem of its own (VOC 2007).
    metric: of selection and test: accuracy, accuracy averaged over classes, or the mean over classes of the
      average precision at eleven points, as the paper's code has it.
    weight_decays: the grid; by default `GRID`.
    num_classes: by default one more than the largest label.
    tolerance: see `logistic.path`.

  Raises:
    ValueError: a class without a training example; features that are not finite.
  """
  loss: logistic.Loss = "sigmoid" if metric == "map11" else "softmax"
  features, held, tested = (np.asarray(part[0], np.float32) for part in (train, validation, test))
  targets, held_targets, tested_targets = (np.asarray(part[1]) for part in (train, validation, test))
  if num_classes is None and loss == "softmax":
    num_classes = 1 + max(int(np.max(part)) for part in (targets, held_targets, tested_targets))
  truth = _truth(np.concatenate([targets, held_targets]), num_classes)
  together = np.concatenate([features, held])
  basis = basis_lib.principal(together)
  coordinates = basis.coordinates(together)
  own, others = coordinates[: len(features)], coordinates[len(features) :]
  decays = GRID if weight_decays is None else weight_decays
  fits, best = [], None
  for fit in logistic.path(own, truth[: len(own)], decays, loss=loss, tolerance=tolerance):
    held_logits = basis_lib.scores(others, fit.weights)
    score = SCORES[metric](held_logits, held_targets)
    # Weight decays descend: of equally good ones the smallest is taken, as in the paper's order.
    if best is None or score >= best[0]:
      best = score, fit, held_logits
    fits.append((fit.weight_decay, score, fit.iterations, fit.error))
  decay, start = best[1].weight_decay, best[1].weights
  [final] = logistic.path(coordinates, truth, [decay], loss=loss, start=start, tolerance=tolerance)
  classifier = basis.classifier(final.weights)
  logits = classifier.logits(tested)
  decays, scores, iterations, errors = zip(*reversed(fits))
  return LinearResult(
    metric=metric,
    weight_decays=decays,
    validation=scores,
    iterations=(*iterations, final.iterations),
    errors=(*errors, final.error),
    weight_decay=decay,
    at_edge=len(decays) > 1 and decay in (decays[0], decays[-1]),
    test=SCORES[metric](logits, tested_targets),
    classifier=classifier,
    logits=logits,
    validation_logits=best[2],
  )


def _truth(targets: Targets, num_classes: int | None) -> Bool[np.ndarray, "n k"]:
  """The classes of each example as a matrix."""
  return targets.astype(bool) if targets.ndim == 2 else targets[:, None] == np.arange(num_classes)


SCORES: Mapping[Metric, Callable[[np.ndarray, np.ndarray], float]] = {
  "top1": accuracy.top1,
  "mean_per_class": accuracy.mean_per_class,
  "map11": functools.partial(average_precision.mean_eleven_point, from_one=True),
}
