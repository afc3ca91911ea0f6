"""Options of classification."""

import dataclasses
from typing import Annotated, Literal

from frozen_vision import config
from frozen_vision.data.classification import benchmarks
from frozen_vision.options import Count, Fraction, Natural, NonNegative, Path, Positive, Range
from frozen_vision.tasks.shared_options import RandAugmentOptions


@dataclasses.dataclass(frozen=True)
class ShapesOptions:
  """Generated images of one shape each (`data.generated.shape_images`)."""

  train_images: Count = 1200
  validation_images: Count = 300
  test_images: Natural = 300  # of probes; 0 for none
  image_size: Annotated[int, Range(32)] = 64
  seed: Natural = 0


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
  """A published data set (`data.classification.benchmarks`)."""

  name: str = "cifar10"
  root: Path = "."  # the folder of the set, or the one that holds it
  held_out: Fraction = 0.2  # of the training data, drawn by the seed, where the set has no validation data

  def __post_init__(self):
    row = benchmarks.benchmark(self.name)
    if row.is_few_shot:
      raise ValueError(
        f"BenchmarkOptions.name is {self.name!r}, which has no split to train on but is for few-shot "
        f"episodes; expected another, or python -m frozen_vision.transfer --sets={self.name}."
      )


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
  """Probes of a frozen backbone's embeddings (`--mode=probe`)."""

  # That linear classifiers are selected and tested by; auto: `classification.metric`.
  metric: Literal["auto", "top1", "mean_per_class", "map11"] = "auto"
  held_out: Fraction = 0.2  # of the training data, for validation where only two of three parts are given
  neighbours: tuple[Count, ...] = (10, 20, 100, 200)
  shots: tuple[Count, ...] = (5, 20, 50)
  episodes: Count = 600


@dataclasses.dataclass(frozen=True)
class FineTuningOptions:
  """The grid of `--mode=fine_tune`, in the order of its runs; by default arXiv 2011.13377's 20."""

  learning_rates: tuple[Positive, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
  # Times the learning rate: what a step takes away of a parameter. `optimizer.weight_decay` is the quotient.
  weight_decays: tuple[NonNegative, ...] = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)

  def __post_init__(self):
    for name in ("learning_rates", "weight_decays"):
      values = getattr(self, name)
      if not values or len(set(values)) < len(values):
        raise ValueError(f"FineTuningOptions.{name} is {values}; expected one or more different numbers.")


@dataclasses.dataclass(frozen=True)
class ClassificationOptions:
  """The section `classification`."""

  # At `train` and `validation`, generated, or a published set of `benchmark`.
  data: Literal["files", "shapes", "benchmark"] = "files"
  train: Path = "."  # image folder or tar archive with CLASS/IMAGE members
  validation: Path = "."
  # Of every class in `train`, held out and taken in the place of `validation`; the same whatever the seed.
  validation_fraction: Fraction = 0.0
  test: Path = ""  # of probes; without it they test on `validation` and hold out a part of `train`
  shapes: ShapesOptions = ShapesOptions()
  benchmark: BenchmarkOptions = BenchmarkOptions()
  # That decides which checkpoint is the best; auto: that of papers on the benchmark, else top-1.
  metric: Literal["auto", "top1", "mean_per_class", "map11"] = "auto"
  refit: bool = False  # train on training and validation data together, and evaluate on test data
  probe: ProbeOptions = ProbeOptions()
  fine_tuning: FineTuningOptions = FineTuningOptions()
  decoded_cache: bool = False  # keep all images decoded in memory; for many small ones of one size
  image_size: Count = 224  # side that the loader gives
  crop_padding: Annotated[
    int, Range(-1)
  ] = -1  # CIFAR-style shifted crops by up to so many pixels; -1: random resized
  crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
  rand_augment: RandAugmentOptions = RandAugmentOptions()
  erasing: Fraction = 0.25
  mixup: NonNegative = 0.8
  cutmix: NonNegative = 1.0
  mix_probability: Fraction = 1.0
  label_smoothing: Fraction = 0.1
  # ((first step, side), ...): sides that images are resized to on the device, growing during the run.
  # Empty: as loaded. Evaluation uses the last.
  resolutions: tuple[tuple[Natural, Count], ...] = ()

  @property
  def score(self) -> benchmarks.Metric:
    """`metric`, with what auto stands for."""
    if self.metric != "auto":
      return self.metric
    return benchmarks.BENCHMARKS[self.benchmark.name].metric if self.data == "benchmark" else "top1"

  @property
  def has_several_labels(self) -> bool:
    """Whether an image may have several classes, each a binary problem of its own."""
    return self.data == "benchmark" and benchmarks.BENCHMARKS[self.benchmark.name].metric == "map11"

  def __post_init__(self):
    if self.has_several_labels != (self.score == "map11"):
      several = "several labels" if self.has_several_labels else "one label"
      raise ValueError(
        f"ClassificationOptions.metric is {self.metric!r}, but images have {several}; expected auto. "
        "map11 is of several labels, the others of one."
      )
    if self.has_several_labels and self.label_smoothing:
      raise ValueError(
        f"ClassificationOptions.label_smoothing is {self.label_smoothing}, but images have several labels; "
        "expected 0."
      )
    starts = [start for start, _ in self.resolutions]
    if starts and (starts[0] != 0 or starts != sorted(set(starts))):
      raise ValueError(
        f"ClassificationOptions.resolutions is {self.resolutions}; expected growing first steps from 0."
      )


@dataclasses.dataclass(frozen=True)
class ClassificationConfig(config.Config):
  """A config of task `classification`."""

  task: str = "classification"
  classification: ClassificationOptions = ClassificationOptions()
