"""A fifth task and two more heads, written outside of the package, with everything that a task may have.

`ColourTask` says the mean colour of an image: from frozen features, with random brightness on the device,
BatchNorm in its head, a frozen teacher, state of its own, and two sets of evaluation. `CentreHead` detects,
`TwoLayerHead` segments.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any, ClassVar, Literal

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from frozen_vision import config as config_lib
from frozen_vision import options
from frozen_vision.data import pipeline
from frozen_vision.files import atomic
from frozen_vision.heads import base as heads
from frozen_vision.heads import pixel_classification
from frozen_vision.ops import nms
from frozen_vision.tasks import base, common, results

SIDE = 32
CHANNELS = ("red", "green", "blue")


@dataclasses.dataclass(frozen=True)
class ColourOptions:
  """The section `colour`."""

  train_images: options.Count = 64
  brightness: options.Fraction = 0.5  # the least that training images are multiplied by


@dataclasses.dataclass(frozen=True)
class ColourConfig(config_lib.Config):
  """A config of task `colour`."""

  task: str = "colour"
  colour: ColourOptions = ColourOptions()


class Colours:
  """Images of one colour each, with noise; a record is a function of (split, index)."""

  def __init__(self, length: int, split: int):
    self._length, self._split = length, split

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    rng = np.random.default_rng((self._split, index))
    image = rng.integers(40, 216, 3) + rng.integers(-40, 40, (SIDE, SIDE, 3))
    return {"image": image.astype(np.uint8), "name": f"{self._split}-{index}"}


@dataclasses.dataclass(frozen=True)
class Square:
  """Training and evaluation examples: the image as a square, and its mean colour in 0..1."""

  def __call__(
    self, record: Mapping[str, Any], rng: np.random.Generator | None = None
  ) -> dict[str, np.ndarray]:
    image = np.asarray(Image.fromarray(record["image"]).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return {"image": image, "target": (image.mean((0, 1)) / 255).astype(np.float32)}


class ColourHead(nnx.Module):
  """Colour, and what the teacher says of it, from pooled features."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.norm = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
    self.colour = nnx.Linear(channels, 3, rngs=rngs)
    self.copy = nnx.Linear(channels, 3, rngs=rngs)


class Model(nnx.Module):
  def __init__(self, backbone: Any, head: ColourHead):
    self.backbone = backbone
    self.head = head


@dataclasses.dataclass(frozen=True)
class Colour(results.Result):
  """A mean colour, by channel in 0..1."""

  class Writer(results.ResultWriter):
    def __init__(self, *arguments: Any):
      super().__init__(*arguments)
      self.rows: dict[str, Any] = {}

    def add(self, name: str, file_name: str, result: "Colour") -> None:
      self.rows[file_name] = dict(zip(result.names, result.values.tolist()))

    def finish(self) -> None:
      atomic.write_json(self.folder / "colours.json", self.rows)

  exported: ClassVar[tuple[str, ...]] = ("colour",)
  writer: ClassVar[type[results.ResultWriter]] = Writer

  values: np.ndarray
  names: tuple[str, ...]

  @classmethod
  def from_outputs(cls, outputs: Any, batch: Any, count: int, classes: results.Classes) -> list["Colour"]:
    return [cls(row, results.class_names(classes)) for row in outputs["colour"][:count]]

  def draw(self, picture: np.ndarray, *, score_threshold: float = 0.3) -> np.ndarray:
    swatch = np.broadcast_to(np.clip(self.values * 255, 0, 255).astype(np.uint8), picture.shape)
    return np.concatenate([picture, swatch], axis=1)


class Closeness:
  """One minus the mean absolute error."""

  def __init__(self):
    self.errors: list[float] = []

  def update(self, predictions: dict[str, np.ndarray], batch: base.Batch) -> None:
    errors = np.abs(predictions["colour"] - batch["target"]).mean(axis=1)
    self.errors += errors[batch["example_valid"]].tolist()

  def result(self) -> dict[str, float]:
    return {"closeness": 1 - float(np.mean(self.errors)), "images": len(self.errors)}


class ColourTask(base.Task):
  """The mean colour of an image."""

  nominal_classes = 3
  head_name = "colour"
  best_metric = "closeness"
  result_type = Colour
  teacher_seed = 7  # other weights for the teacher: what a test of refusing them changes

  def __init__(self, config: ColourConfig, classes: base.Classes | None = None):
    self._config = config
    self._options = config.colour
    self.classes = classes or base.named_classes(CHANNELS)
    self.headline = "Mean colours"

  def build_model(self, backbone: nnx.Module | None = None) -> Model:
    backbone = backbone or common.build_backbone(self._config)
    head = ColourHead(backbone.feature_specs[-1].channels, rngs=nnx.Rngs(self._config.seed))
    return Model(backbone, head)

  def build_teacher(self) -> nnx.Module:
    return nnx.Linear(3, 3, rngs=nnx.Rngs(self.teacher_seed))

  def initial_state(self, model: nnx.Module) -> dict[str, jax.Array]:
    return {"mean": jnp.zeros(3), "images": jnp.zeros((), jnp.int32)}

  def train_batches(self, start_example: int) -> pipeline.BatchIterator:
    return common.train_batches(self._config, Colours(self._options.train_images, 0), Square(), start_example)

  def blank_example(self) -> dict[str, np.ndarray]:
    return Square()({"image": np.zeros((SIDE, SIDE, 3), np.uint8)})

  def prepare(self, batch: base.Batch, rng: jax.Array | None, phase: None) -> base.Batch:
    if rng is None:
      return batch
    brightness = jax.random.uniform(rng, (batch["image"].shape[0], 1), minval=self._options.brightness)
    image = batch["image"] * brightness[..., None, None]
    return batch | {"image": image, "target": batch["target"] * brightness}

  def features(self, model: Model, batch: base.Batch, rng: jax.Array | None) -> base.Features:
    return model.backbone(model.backbone.preprocessing.normalise(batch["image"]), rng=rng)[-1:]

  def loss(
    self, model: Model, batch: base.Batch, features: base.Features, rng: jax.Array, state: Any
  ) -> base.Losses:
    pooled = model.head.norm(features[0].mean((1, 2)))
    target = batch["target"]
    said = jax.lax.stop_gradient(model.teacher(target))
    mean = 0.9 * state["mean"] + 0.1 * target.mean(0)
    return base.Losses(
      {
        "colour": jnp.mean((model.head.colour(pooled) - target) ** 2),
        "copy": 0.1 * jnp.mean((model.head.copy(pooled) - said) ** 2),
      },
      {"brightness": mean.mean()},
      {"mean": mean, "images": state["images"] + target.shape[0]},
    )

  @property
  def evaluations(self) -> dict[str, base.Evaluation]:
    def batches(split: int) -> pipeline.BatchIterator:
      return common.eval_batches(self._config, Colours(5, split), self.eval_transform())

    def write(evaluator: Closeness, folder: pathlib.Path) -> None:
      atomic.write_json(folder / "errors.json", evaluator.errors)

    def pictures(predictions: Any, batch: base.Batch, count: int) -> dict[str, np.ndarray]:
      colours = Colour.from_outputs(predictions, batch, count, self.classes)
      return {"colours": np.concatenate([c.draw(image) for c, image in zip(colours, batch["image"])])}

    return {
      "val": base.Evaluation(lambda: batches(1), Closeness, pictures=pictures, write=write),
      "test": base.Evaluation(lambda: batches(2), Closeness, at_end_only=True, write=write),
    }

  def predict(self, model: Model, batch: base.Batch, features: base.Features) -> dict[str, jax.Array]:
    return {"colour": model.head.colour(model.head.norm(features[0].mean((1, 2))))}

  def eval_transform(self) -> Square:
    return Square()

  @property
  def view(self) -> dict[str, Any]:
    return {"square": SIDE}


@dataclasses.dataclass(frozen=True)
class CentreConfig(heads.DetectionHeadConfig):
  """Options of `CentreHead`."""

  num_classes: int = options.from_data(80)
  name: Literal["centre"] = "centre"
  max_detections: options.Count = 6
  box_weight: options.NonNegative = 0.1


class CentreHead(heads.DetectionHead):
  """Every cell of the finest level has scores and a box; an object belongs to the cell of its centre."""

  def __init__(self, feature_specs: Sequence[Any], config: CentreConfig, *, dtype: Any, rngs: nnx.Rngs):
    self.config = config
    self.stride = feature_specs[0].stride
    self.layer = nnx.Linear(feature_specs[0].channels, config.num_classes + 4, dtype=dtype, rngs=rngs)

  def _cells(self, features: heads.Features) -> tuple[jax.Array, jax.Array]:
    """Class logits [b, n, c] and boxes [b, n, 4] in pixels."""
    raw = self.layer(features[0]).astype(jnp.float32)
    b, h, w, _ = raw.shape
    raw = raw.reshape(b, h * w, -1)
    y, x = jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij")
    centre = (jnp.stack([x, y], -1).reshape(-1, 2) + 0.5) * self.stride
    sides = self.stride * jnp.exp(jnp.clip(raw[..., -4:], -4, 4))
    return raw[..., :-4], jnp.concatenate([centre - sides[..., :2], centre + sides[..., 2:]], axis=-1)

  def losses(
    self, features: heads.Features, batch: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[heads.Scalars, heads.Scalars]:
    logits, boxes = self._cells(features)
    width = features[0].shape[2]
    centres = (batch["boxes"][..., :2] + batch["boxes"][..., 2:]) / (2 * self.stride)
    cells = (centres[..., 1].astype(int) * width + centres[..., 0].astype(int)).clip(0, logits.shape[1] - 1)
    valid = batch["valid"][..., None]
    rows = jnp.arange(logits.shape[0])[:, None]
    targets = jnp.zeros(logits.shape).at[rows, cells, batch["labels"]].max(valid[..., 0].astype(jnp.float32))
    errors = jnp.abs(jnp.take_along_axis(boxes, cells[..., None], axis=1) - batch["boxes"]) * valid
    count = jnp.maximum(valid.sum(), 1)
    terms = {
      "class": jnp.mean(jnp.logaddexp(0, logits) - targets * logits),
      "box": self.config.box_weight * errors.sum() / count,
    }
    return terms, {"objects": count / logits.shape[0]}

  def score_boxes(
    self, features: heads.Features, image_size: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    logits, boxes = self._cells(features)
    return boxes[:, :, None], jax.nn.sigmoid(logits), jnp.ones(logits.shape[:2], bool)

  def select(
    self,
    boxes: jax.Array,
    probabilities: jax.Array,
    valid: jax.Array,
    *,
    num_views: int = 1,
    max_detections: int | None = None,
  ) -> dict[str, jax.Array]:
    def one(boxes: jax.Array, scores: jax.Array) -> dict[str, jax.Array]:
      found = nms.multiclass_nms(
        boxes,
        scores,
        iou_threshold=0.5,
        score_threshold=0.0,
        max_detections=max_detections or self.config.max_detections,
      )
      return {name: found[name] for name in ("boxes", "scores", "labels", "valid")}

    return jax.vmap(one)(boxes[:, :, 0], jnp.where(valid[..., None], probabilities, -jnp.inf))


@dataclasses.dataclass(frozen=True)
class TwoLayerConfig:
  """Options of `TwoLayerHead`."""

  num_classes: int = options.from_data(1)
  name: Literal["two_layer"] = "two_layer"
  channels: options.Count = 8


class TwoLayerHead(heads.SegmentationHead):
  """Two linear layers on each cell of the finest level."""

  def __init__(self, feature_specs: Sequence[Any], config: TwoLayerConfig, *, dtype: Any, rngs: nnx.Rngs):
    self.stride = feature_specs[0].stride
    self.first = nnx.Linear(feature_specs[0].channels, config.channels, dtype=dtype, rngs=rngs)
    self.second = nnx.Linear(config.channels, config.num_classes, dtype=dtype, rngs=rngs)

  def __call__(self, features: heads.Features) -> jax.Array:
    return self.second(nnx.relu(self.first(features[0])))

  def losses(
    self, features: heads.Features, batch: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[heads.Scalars, heads.Scalars]:
    loss, accuracy = pixel_classification.cross_entropy(self(features), batch["labels"], stride=self.stride)
    return {"pixels": loss}, {"accuracy": accuracy}

  def predict_semantic(self, features: heads.Features, size: tuple[int, int]) -> jax.Array:
    return pixel_classification.probabilities(self(features), size, stride=self.stride)
