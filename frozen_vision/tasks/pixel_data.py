"""Tasks that predict something for every pixel: evaluation of whole images at one or several scales."""

from collections.abc import Mapping
from typing import Any

import jax

from frozen_vision.config import Config
from frozen_vision.data import pipeline
from frozen_vision.data.detection import transforms
from frozen_vision.data.segmentation import transforms as segmentation_transforms
from frozen_vision.tasks import base, common


class PixelData:
  """The part of such a task that is the same for all; put it before `base.Task` among the base classes.

  Attributes of its subclasses: `_config`; `_options`, the task's section of it, with `eval_frame`,
  `eval_short_side`, `eval_long_side` and `test.scales`; and `_validation`, the images to evaluate on. Its
  subclasses define `evaluator`, `pictures` and `write_results`, as `base.Evaluation` calls them.
  """

  _config: Config
  _options: Any
  _validation: pipeline.Source | None

  def eval_batches(self) -> pipeline.BatchIterator:
    return common.eval_batches(self._config, self._validation, self.eval_transform())

  def eval_transform(self) -> segmentation_transforms.SegmentationEval:
    options = self._options
    resize = transforms.ResizeToLimits(options.eval_short_side or None, options.eval_long_side or None)
    return segmentation_transforms.SegmentationEval(
      tuple(options.eval_frame), resize, tuple(options.test.scales)
    )

  @property
  def evaluations(self) -> dict[str, base.Evaluation]:
    return {
      "val": base.Evaluation(
        self.eval_batches,
        self.evaluator,
        largest_size=self._validation.largest_size,
        pictures=self.pictures,
        write=self.write_results,
      )
    }

  @property
  def view(self) -> dict[str, Any]:
    transform = self.eval_transform()
    view = common.frame_view(transform.frame, transform.resize)
    return view if transform.scales[0] == 1 else view | {"scale": transform.scales[0]}

  def features(self, model: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None) -> base.Features:
    return common.features(model, batch, rng)
