"""All probes on the features of one data set: linear, nearest neighbours, few-shot episodes, calibration."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
import numpy as np

from frozen_vision.metrics import accuracy
from frozen_vision.probes import calibration, few_shot, knn, linear


class Examples(NamedTuple):
  """Features with one label each; or with all classes of each, a column for a class."""

  features: Float[np.ndarray, "n d"]
  labels: Int[np.ndarray, "n"] | Bool[np.ndarray, "n k"] | Int[np.ndarray, "n k"]


@dataclasses.dataclass(frozen=True)
class Results:
  """What the probes found; scores are in 0..1.

  Attributes:
    counts: examples of each part.
    linear: the linear evaluation; None of a set without a split.
    knn: {number of neighbours: top-1 on test data}, with training and validation data to vote.
    few_shot: for each number of shots that the data allow, over images of all parts together.
    calibration: of the linear classifier on test data, with a temperature fitted on validation data; None
      where an image has several labels.
    calibration_on_test_folds: with temperatures fitted on test data, as arXiv 2011.13377 has it.
    examples: by probe, the scores that its number is made of: 1 for every test example that is classified
      right, else 0 (`linear`, `knn_20` and so on); the accuracy of every episode (`few_shot_5` and so on).
  """

  counts: Mapping[str, int]
  linear: linear.LinearResult | None
  knn: dict[int, float]
  few_shot: tuple[few_shot.FewShotResult, ...]
  calibration: calibration.Calibration | None
  calibration_on_test_folds: calibration.Calibration | None
  examples: Mapping[str, Float[np.ndarray, "_"]]

  def to_dict(self) -> dict[str, Any]:
    """The numbers, as JSON; without what was not measured."""
    found: dict[str, Any] = {"examples": dict(self.counts)}
    if self.linear is not None:
      found["linear"] = _linear_numbers(self.linear)
    found["knn"] = {str(k): score for k, score in self.knn.items()}
    found["few_shot"] = {
      str(each.shots): {
        "mean": each.mean,
        "half_width_95": each.half_width,
        "classes": each.num_classes,
      }
      for each in self.few_shot
    }
    if self.calibration is not None:
      found["calibration"] = dataclasses.asdict(self.calibration)
      found["calibration_on_test_folds"] = dataclasses.asdict(self.calibration_on_test_folds)
    return found

  def to_text(self) -> str:
    """The numbers as a table in Markdown."""
    rows = [] if self.linear is None else [_linear_row(self.linear)]
    rows += [(f"{k} nearest neighbours, top-1", f"{score:.4f}", "") for k, score in self.knn.items()]
    rows += [
      (
        f"{few_shot.WAYS}-way {found.shots}-shot",
        f"{found.mean:.4f} ± {found.half_width:.4f}",
        f"{len(found.accuracies)} episodes of {found.num_classes} classes; 95% interval of the mean",
      )
      for found in self.few_shot
    ]
    if self.calibration is not None:
      rows += _calibration_rows(self.calibration, self.calibration_on_test_folds)
    lines = ["| probe | result | how |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


METRICS: Mapping[linear.Metric, str] = {
  "top1": "top-1",
  "mean_per_class": "mean accuracy of classes",
  "map11": "mean AP at 11 points",
}


def _linear_numbers(probe: linear.LinearResult) -> dict[str, Any]:
  return {
    "metric": probe.metric,
    "test": probe.test,
    "weight_decay": probe.weight_decay,
    "at_edge_of_grid": probe.at_edge,
    "grid": [
      {"weight_decay": decay, "validation": score, "iterations": iterations, "error": error}
      for decay, score, iterations, error in zip(
        probe.weight_decays, probe.validation, probe.iterations, probe.errors
      )
    ],
  }


def _linear_row(probe: linear.LinearResult) -> tuple[str, str, str]:
  edge = ", the edge of the grid: a wider one may hold a better" if probe.at_edge else ""
  return (
    f"linear, {METRICS[probe.metric]}",
    f"{probe.test:.4f}",
    f"weight decay {probe.weight_decay:.3g}{edge}; {max(probe.validation):.4f} on validation data",
  )


def _calibration_rows(
  scaled: calibration.Calibration, folds: calibration.Calibration
) -> list[tuple[str, str, str]]:
  return [
    ("calibration error (ECE, 15 bins)", f"{scaled.ece:.4f}", "of the linear classifier on test data"),
    (
      "with a temperature",
      f"{scaled.scaled_ece:.4f}",
      f"of {scaled.temperature:.3g}, fitted on validation data",
    ),
    (
      "with temperatures fitted on test data",
      f"{folds.scaled_ece:.4f}",
      f"of {folds.temperature:.3g} on average over 5 folds; to compare with arXiv 2011.13377 alone",
    ),
  ]


def run(
  train: Examples,
  validation: Examples,
  test: Examples,
  *,
  metric: linear.Metric = "top1",
  ks: Sequence[int] = knn.KS,
  shots: Sequence[int] = few_shot.SHOTS,
  episodes: int = few_shot.EPISODES,
  seed: int = 0,
) -> Results:
  """Runs all probes that the data allow.

  Args:
    train, validation, test: parts of one data set; `data.classification.splits` makes a validation part if
      there is none.
    metric: of the linear evaluation. Of "map11", for which an image may have several labels, it is the only
      probe.
    ks: numbers of neighbours; those above the number of examples are left out.
    shots: left out where fewer than five classes have images enough.
    seed: of episodes and folds.

  Raises:
    ValueError: a class without a training example; features that are not finite; several labels an image and
      another metric.
  """
  counts = {"train": len(train.labels), "validation": len(validation.labels), "test": len(test.labels)}
  if (train.labels.ndim == 2) != (metric == "map11"):
    several = "several labels" if train.labels.ndim == 2 else "one label"
    raise ValueError(f"Images with {several} cannot be scored by {metric!r}; 'map11' is for several.")
  if metric == "map11":
    parts = ((part.features, part.labels.astype(bool)) for part in (train, validation, test))
    return Results(counts, linear.evaluate(*parts, metric=metric), {}, (), None, None, {})
  found = linear.evaluate(train, validation, test, metric=metric)
  together = Examples(*(np.concatenate(part) for part in zip(train, validation)))
  everything = Examples(*(np.concatenate(part) for part in zip(train, validation, test)))
  neighbours = _neighbours(together, test, [k for k in ks if k <= len(together.labels)])
  episodic = run_few_shot(everything, shots=shots, episodes=episodes, seed=seed)
  examples = {"linear": (accuracy.label_ranks(found.logits, test.labels) < 1).astype(np.float64)}
  examples |= {f"knn_{k}": right for k, right in neighbours.items()}
  return Results(
    counts=counts,
    linear=found,
    knn={k: float(np.mean(right)) for k, right in neighbours.items()},
    few_shot=episodic.few_shot,
    calibration=calibration.evaluate(found.validation_logits, validation.labels, found.logits, test.labels),
    calibration_on_test_folds=calibration.evaluate_on_test_folds(found.logits, test.labels, seed=seed),
    examples={**examples, **episodic.examples},
  )


def run_few_shot(
  everything: Examples,
  *,
  shots: Sequence[int] = few_shot.SHOTS,
  episodes: int = few_shot.EPISODES,
  seed: int = 0,
) -> Results:
  """Few-shot episodes alone, of a set without a split, such as those of CD-FSL."""
  found = tuple(
    few_shot.evaluate(*everything, shots=count, episodes=episodes, seed=seed)
    for count in few_shot.possible_shots(everything.labels, shots)
  )
  examples = {f"few_shot_{each.shots}": each.accuracies for each in found}
  return Results({"all": len(everything.labels)}, None, {}, found, None, None, examples)


def _neighbours(train: Examples, test: Examples, ks: Sequence[int]) -> dict[int, Float[np.ndarray, "n"]]:
  """Whether each test example is classified right by its k nearest neighbours, for each k."""
  if not ks:
    return {}
  num_classes = 1 + int(max(np.max(train.labels), np.max(test.labels)))
  votes = knn.votes(test.features, *train, num_classes=num_classes, ks=ks)
  return {k: (np.argmax(each, axis=1) == test.labels).astype(np.float64) for k, each in votes.items()}
