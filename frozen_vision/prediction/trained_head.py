"""Heads of finished runs, ready to predict: model, classes, and how the input is prepared."""

import abc
from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from frozen_vision.data import images
from frozen_vision.data.video import decoding
from frozen_vision.freezing import feature_key
from frozen_vision.freezing import partition as freeze
from frozen_vision.freezing import prepare as frozen_backbones
from frozen_vision.prediction import results as predictions
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.tasks import base, common, semantic_inference
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import step as train_step

Example = dict[str, np.ndarray]


class TrainedHead(abc.ABC):
  """The neck and head of a finished run on their backbone.

  Attributes:
    media: "image" or "video", what it looks at.
    name: what the caller calls it.
    workdir: of the run.
    step: of the checkpoint that was read.
    classes: {"id", "name"} by index.
    config: of the run.
    feature_key: of the frozen backbone; None where some of the backbone was trained with the head.
    view: what it makes of an input before the backbone sees it, as JSON.
    extra_views: how many more views of each input it looks at, with backbone passes of its own.
    takes_features: whether it can use the features of a pass over the whole input.
    differs: {field: (of the given backbone, of its own)} where it did not fit the given backbone.
  """

  media: ClassVar[str] = "image"
  extra_views: int = 0
  takes_features: bool = True

  def __init__(
    self,
    name: str,
    workdir: str,
    step: int,
    task: base.Task,
    config: ml_collections.ConfigDict,
    model: tuple[nnx.GraphDef, nnx.State, nnx.State],
    feature_key: dict[str, Any] | None,
    differs: dict[str, tuple[Any, Any]],
  ):
    self.name = name
    self.workdir = workdir
    self.step = step
    self.task = task
    self.config = config
    self.graphdef, self.trainable, self.frozen = model
    self.feature_key = feature_key
    self.differs = differs
    self.classes = task.classes
    self.class_names = predictions.class_names(task.classes)
    self.transform = task.eval_transform()
    self._features = jax.jit(self.compute_features)
    self._outputs = jax.jit(self.compute_outputs)

  @property
  @abc.abstractmethod
  def view(self) -> dict[str, Any]: ...

  def prepare(self, source: np.ndarray | str | os.PathLike) -> tuple[np.ndarray, Example]:
    """(the input for pictures, the arrays that the model takes) of one decoded or encoded input.

    Raises:
      FileError: a file that cannot be used.
    """
    image = decode(source)
    return image, self.transform({"image": image, "image_id": 0, "label": 0})

  def compute_features(self, trainable: nnx.State, frozen: nnx.State, batch: base.Batch) -> base.Features:
    """The backbone's features of a batch, to be jitted."""
    return self.task.frozen_features(nnx.merge(self.graphdef, trainable, frozen), batch)

  def compute_outputs(
    self, trainable: nnx.State, frozen: nnx.State, batch: base.Batch, features: base.Features
  ) -> Any:
    """The head's outputs, to be jitted; it runs the backbone itself where `features` is None."""
    return self.task.predict(nnx.merge(self.graphdef, trainable, frozen), batch, features)

  def features(self, batch: base.Batch) -> base.Features:
    return self._features(self.trainable, self.frozen, train_step.device_batch(batch))

  def outputs(self, batch: base.Batch, features: base.Features) -> Any:
    return self._outputs(self.trainable, self.frozen, train_step.device_batch(batch), features)

  @abc.abstractmethod
  def results(self, outputs: Any, batch: base.Batch, count: int) -> list[predictions.Result]:
    """The first `count` examples' results, from outputs on the host."""


class DetectionHead(TrainedHead):
  """HTC, Cascade Mask R-CNN or Mask R-CNN."""

  @property
  def view(self) -> dict[str, Any]:
    return _frame(self.transform.scales[0].frame, self.transform.scales[0].resize)

  @property
  def extra_views(self) -> int:
    return len(self.transform.scales) * (1 + self.config.detection.test.flip) - 1

  def results(self, outputs: Any, batch: base.Batch, count: int) -> list[predictions.Detections]:
    return predictions.detections(outputs, batch, count, self.classes)


class SegmentationHead(TrainedHead):
  """Mask2Former, UPerNet or a linear head."""

  @property
  def view(self) -> dict[str, Any]:
    view = _frame(self.transform.frame, self.transform.resize)
    scale = self.transform.scales[0]
    return view if scale == 1 else view | {"scale": scale}

  @property
  def takes_features(self) -> bool:
    return not self.config.segmentation.test.window

  @property
  def extra_views(self) -> int:
    return len(self.transform.scales) * (1 + self.config.segmentation.test.flip) - 1

  def compute_outputs(
    self, trainable: nnx.State, frozen: nnx.State, batch: base.Batch, features: base.Features
  ) -> list[semantic_inference.View]:
    return self.task.views(nnx.merge(self.graphdef, trainable, frozen), batch, features)

  def outputs(self, batch: base.Batch, features: base.Features) -> dict[str, jax.Array]:
    views = super().outputs(batch, features)
    # A program of its own, and few of them: the sizes of photographs are many, and the head's program, which
    # takes long to compile, must not depend on them.
    side = canvas_side(int(np.max(batch["original_size"])))
    return {"label_map": _label_maps(views, batch["original_size"], (side, side))}

  def results(self, outputs: Any, batch: base.Batch, count: int) -> list[predictions.LabelMap]:
    return [
      predictions.LabelMap(np.ascontiguousarray(labels[:height, :width]), self.class_names)
      for labels, (height, width) in zip(outputs["label_map"][:count], batch["original_size"])
    ]


class ActionHead(TrainedHead):
  """Video Swin blocks, an attentive probe or an average of frames."""

  media = "video"

  @property
  def view(self) -> dict[str, Any]:
    options = self.config.action
    return {
      "clips": self.transform.num_clips,
      "crops": self.transform.num_crops,
      "size": self.transform.size,
      **dataclasses.asdict(self.transform.sampler),
      "levels": list(options[options.head].levels),
    }

  def prepare(self, source: np.ndarray | str | os.PathLike) -> tuple[np.ndarray, Example]:
    if isinstance(source, np.ndarray):
      record = {"frames": check_pixels(source, "video")}
    else:
      record = {"path": os.fspath(source)}
    clip = self.transform.views(record)
    return clip[0], {"clip": clip}

  def results(self, outputs: Any, batch: base.Batch, count: int) -> list[predictions.ClassProbabilities]:
    return [
      predictions.ClassProbabilities(row, self.class_names)
      for row in np.asarray(outputs["probabilities"])[:count]
    ]


class ClassificationHead(TrainedHead):
  """A linear layer on the pooled vector."""

  @property
  def view(self) -> dict[str, Any]:
    return {
      "central square": self.transform.size,
      "resized to": self.task.phases[-1] or self.transform.size,
      "pooled": True,
    }

  def compute_outputs(
    self, trainable: nnx.State, frozen: nnx.State, batch: base.Batch, features: base.Features
  ) -> dict[str, jax.Array]:
    outputs = super().compute_outputs(trainable, frozen, batch, features)
    return {"probabilities": jax.nn.softmax(outputs["logits"], axis=-1)}

  results = ActionHead.results


# By the task's name: what its head is called unless the caller says otherwise, and how it predicts.
KINDS: dict[str, tuple[str, type[TrainedHead]]] = {
  "action": ("act", ActionHead),
  "classification": ("classify", ClassificationHead),
  "detection": ("detect", DetectionHead),
  "segmentation": ("segment", SegmentationHead),
}


def read_meta(workdir: str | os.PathLike, *, best: bool = False) -> dict[str, Any]:
  """What the newest (or best) checkpoint of a run remembers.

  Raises:
    FileNotFoundError: no checkpoint there.
  """
  if not pathlib.Path(workdir).is_dir():
    raise FileNotFoundError(
      f"{pathlib.Path(workdir).absolute()} does not exist; expected the workdir of a run."
    )
  with checkpoint.Checkpoints(workdir) as checkpoints:
    return checkpoints.read_meta(best=best)


def named(heads: Sequence[str]) -> dict[str, str]:
  """{name: workdir} of texts `NAME=WORKDIR`, or `WORKDIR` alone, which is called by its task.

  Raises:
    FileNotFoundError: no checkpoint there.
    ValueError: two heads of one name.
  """
  found: dict[str, str] = {}
  for text in heads:
    name, _, workdir = text.rpartition("=")
    name = name or KINDS[read_meta(workdir)["config"]["task"]][0]
    if name in found:
      raise ValueError(f"Two heads are called {name}; name them: NAME1={found[name]} and NAME2={workdir}.")
    found[name] = workdir
  return found


def load(
  name: str,
  workdir: str | os.PathLike,
  backbones: frozen_backbones.Backbones,
  *,
  best: bool = False,
  image_size: tuple[int, int] | None = None,
) -> TrainedHead:
  """The head of a run's newest (or best) checkpoint, with averaged parameters where the run has them.

  Needs no training data where the checkpoint knows its classes.

  Args:
    backbones: where its backbone comes from. The given one is taken where its features are those that the
      head was trained on; else that of the run's config.
    image_size: (height, width) of the frame that images are fitted into, in place of the config's test
      settings; heads with squares of their own keep them.

  Raises:
    FileNotFoundError: no checkpoint, or weights or data of the config that are not there any more.
    ValueError: a backbone with other features than the head was trained on.
  """
  meta = read_meta(workdir, best=best)
  config = _config(meta["config"])
  task_name = config.task
  init = config[task_name].get("init")
  init = ml_collections.ConfigDict(init) if init is not None else None
  if init is not None:
    config[task_name].init.path = ""  # what has trained since is in the checkpoint
  if image_size is not None:
    _set_image_size(config, image_size)
  classes = meta.get("classes")
  if classes is None:  # written before checkpoints knew them
    try:
      classes = tasks_build.build_task(config).classes
    except FileNotFoundError as error:
      raise FileNotFoundError(
        f"The checkpoint in {workdir} does not say which classes it has, and the data that do are not "
        f"there. {error}"
      ) from error
  task = tasks_build.build_task(config, classes)
  patterns, differs = tuple(config.trainable), {}
  if meta["feature_key"] is None:
    module, key = _trained_with_backbone(task, config, patterns), None
  else:
    wanted = feature_key.current(json.loads(json.dumps(meta["feature_key"])))
    backbone = backbones.of(config, given=True) if backbones.has_given else backbones.of(config)
    if backbones.has_given and backbone.key != wanted:
      differs = differing(backbone.key, wanted)
      try:
        backbone = backbones.of(config)
      except FileNotFoundError as error:
        raise FileNotFoundError(
          f"{workdir} was trained on other features than the given backbone gives "
          f"({', '.join(differs)} differ), and its own backbone is not there. {error}"
        ) from error
    key = backbone.key
    checkpoint.check_feature_key(wanted, key)
    module = task.build_model(backbone.module)
    module.backbone = backbone.held if isinstance(backbone.held, nnx.Module) else nnx.data(backbone.held)
  graphdef, trainable, frozen = freeze.partition(module, patterns)
  if init is not None and init.path and _has_frozen_head(frozen):
    common.start_head(module, init, f"{task_name}.init")
    graphdef, trainable, frozen = freeze.partition(module, patterns)
  part = "ema" if config.ema_decay > 0 else "trainable"
  with checkpoint.Checkpoints(workdir) as checkpoints:
    state, meta = checkpoints.restore({part: trainable}, meta["step"], partial=True, best=best)
  return KINDS[task_name][1](
    name, os.fspath(workdir), meta["step"], task, config, (graphdef, state[part], frozen), key, differs
  )


def decode(source: np.ndarray | str | os.PathLike) -> np.ndarray:
  """RGB of an image file, or the array as it is.

  Raises:
    ImageError: a file that cannot be used.
    ValueError: an array that is no image.
  """
  return check_pixels(source, "image") if isinstance(source, np.ndarray) else images.decode_image(source)


def check_pixels(array: np.ndarray, media: str) -> np.ndarray:
  """The array, if it is an image [h, w, 3] or a video [t, h, w, 3] of uint8; raises ValueError."""
  wanted = {"image": 3, "video": 4}[media]
  if array.dtype != np.uint8 or array.ndim != wanted or array.shape[-1] != 3 or 0 in array.shape:
    raise ValueError(
      f"The {media} is {array.dtype} {array.shape}; expected RGB, uint8 "
      f"{'[height, width, 3]' if media == 'image' else '[frames, height, width, 3]'}."
    )
  return array


def media_of(source: np.ndarray | str | os.PathLike) -> str:
  """Whether an input is an "image" or a "video": by its axes, or by the ending of its name."""
  if isinstance(source, np.ndarray):
    return "video" if source.ndim == 4 else "image"
  return "video" if pathlib.Path(source).suffix.lower() in decoding.SUFFIXES else "image"


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """{field: (value in a, value in b)} of the fields that are not equal."""
  return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def canvas_side(side: int) -> int:
  """The next of 512, 768, 1024, 1536, 2048, ...: shapes of results that images of any size share."""
  canvas = 512
  while canvas < side:
    canvas = canvas * 3 // 2 if canvas & (canvas - 1) == 0 else canvas * 4 // 3
  return canvas


_label_maps = jax.jit(semantic_inference.label_maps, static_argnums=2)


def _frame(frame: tuple[int, int], resize: Any) -> dict[str, Any]:
  return {"frame": list(frame), "short side": resize.short_side, "long side": resize.long_side}


def _config(stored: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The config of a checkpoint; options that are younger than the run have their defaults."""

  def tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
      return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value

  def merged(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    both = dict(defaults, **values)
    for key, value in defaults.items():
      if isinstance(value, dict) and value and isinstance(values.get(key), dict):
        both[key] = merged(value, values[key])
    return both

  return ml_collections.ConfigDict(
    merged(tasks_build.default_config(stored["task"]).to_dict(), tuples(stored))
  )


def _set_image_size(config: ml_collections.ConfigDict, size: tuple[int, int]) -> None:
  """One view that fills a frame, for the tasks whose images are fitted into one."""
  match config.task:
    case "detection":
      options = config.detection
      options.eval_frame, options.eval_short_side = size, 0
      options.test.update(dict(short_sides=(), frames=(), sizes=(), flip=False))
    case "segmentation":
      options = config.segmentation
      options.eval_frame, options.eval_short_side, options.eval_long_side = size, 0, 0
      options.test.update(dict(scales=(1.0,), flip=False, window=()))


def _trained_with_backbone(
  task: base.Task, config: ml_collections.ConfigDict, patterns: tuple[str, ...]
) -> nnx.Module:
  """A model some of whose backbone is in the checkpoint; pretrained weights are read if it is not all."""
  start = ml_collections.ConfigDict(config)
  start.backbone.weights = "init"
  module = task.build_model(common.build_backbone(start))
  _, _, frozen = freeze.partition(module, patterns)
  if any(path.startswith("backbone/") for path in freeze.flatten(frozen)):
    module = task.build_model(common.build_backbone(config))
    graphdef, trainable, frozen = freeze.partition(module, patterns)
    module = nnx.merge(graphdef, trainable, freeze.cast(frozen, jnp.dtype(config.frozen_dtype)))
  return module


def _has_frozen_head(frozen: nnx.State) -> bool:
  return any(not path.startswith("backbone/") for path in freeze.flatten(frozen))
