"""Data of classification and of tasks that train on images alone: opened, augmented and batched."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen_vision.config import Config
from frozen_vision.data import batches, pipeline
from frozen_vision.data.classification import augment, folders
from frozen_vision.data.generated import shape_images
from frozen_vision.tasks import base, common


class SquareImages:
  """The part of a task that reads square images; put it before `base.Task` among the base classes.

  Attributes:
    sources: records of "train" and "validation", and perhaps more; empty without data.
  """

  _config: Config
  _options: Any  # with `image_size`, `crop_padding` and `crop_scale`
  sources: dict[str, Any]

  @property
  def data(self) -> dict[str, Any]:
    """See `Task.data`."""
    return {"training" if name == "train" else name: source for name, source in self.sources.items()}

  def _open(self, path: str) -> folders.ImageFolder | folders.ImageTar:
    source = folders.open_source(common.existing_path(path, self._config.task))
    if self._config.data.check:
      source.check()
    return source

  def train_batches(self, start_example: int) -> pipeline.BatchIterator:
    return common.train_batches(self._config, self.sources["train"], self._train_transform(), start_example)

  def blank_example(self) -> batches.ClassificationBatch:
    side = self._options.image_size
    record = dict(image=np.zeros((side, side, 3), np.uint8), label=0)
    return self._train_transform()(record, np.random.default_rng(0))

  def _train_transform(self) -> augment.TrainTransform:
    """Crops and mirrored images, which change neither colours nor labels."""
    options = self._options
    return augment.TrainTransform(
      size=options.image_size,
      padding=None if options.crop_padding < 0 else options.crop_padding,
      crop_scale=tuple(options.crop_scale),
      rand_augment=None,
      erasing=0.0,
    )

  def eval_batches(self) -> pipeline.BatchIterator:
    return common.eval_batches(self._config, self.sources["validation"], self.eval_transform())

  def eval_transform(self) -> augment.EvalTransform:
    return augment.EvalTransform(self._options.image_size)


class ImageData(SquareImages):
  """The part of a task that trains on images without labels; put it before `base.Task` likewise."""

  built_in_data = ("shapes",)
  nominal_classes = 0  # no classes

  def open_data(self, config: Config, classes: base.Classes | None, title: str) -> None:
    """Opens the images that `config.section` names, unless `classes` are given.

    Raises:
      FileNotFoundError: no images there.
    """
    self._config = config
    self._options = options = config.section
    self.sources: dict[str, Any] = {}
    self.headline = title
    self.classes = ()
    if classes is not None:
      return
    if options.data == "shapes":
      shapes = options.shapes
      counts = {"train": shapes.train_images, "validation": shapes.validation_images}
      self.sources = {
        split: shape_images.ShapeImages(count, shapes.image_size, shapes.seed, split)
        for split, count in counts.items()
      }
    else:
      self.sources = {name: self._open(getattr(options, name)) for name in ("train", "validation")}
      if options.decoded_cache:
        self.sources = {name: folders.DecodedImages(source) for name, source in self.sources.items()}
    train, validation = self.sources["train"], self.sources["validation"]
    self.headline = f"{title}: {len(train):,} training and {len(validation):,} validation images."

  @property
  def view(self) -> dict[str, Any]:
    return {"central square": self._options.image_size, "resized to": self._options.side}

  def prepare(self, batch: base.Batch, rng: jax.Array | None, phase: None) -> base.Batch:
    """Images as float32 in 0..255, at the side that the network sees."""
    del rng, phase
    return batch | {"image": resized(batch["image"].astype(jnp.float32), self._options.side)}


def resized(images: jax.Array, side: int) -> jax.Array:
  """Square images [b, h, w, 3] at another side, bicubic with antialiasing; as they are at their own."""
  if images.shape[1:3] == (side, side):
    return images
  return jax.image.resize(images, (images.shape[0], side, side, 3), "cubic")
