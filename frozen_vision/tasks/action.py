"""Action recognition on a frozen image backbone: Video Swin blocks, an attentive probe or average pooling."""

from collections.abc import Callable, Sequence
import csv
import dataclasses
import os
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import ml_collections
import numpy as np
import optax

from frozen_vision import config as config_lib
from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.data import batches, pipeline
from frozen_vision.data.generated import motion_clips
from frozen_vision.data.video import clips, lists, prepared_videos, sources, survey
from frozen_vision.files import atomic
from frozen_vision.heads import video_swin
from frozen_vision.heads.base import ClipHead
from frozen_vision.metrics import action as action_metrics
from frozen_vision.tasks import base, common, frame_passes, pixels, results
from frozen_vision.tasks.action_options import ActionConfig, ActionOptions
from frozen_vision.visualization import clips as visualize_action
from frozen_vision.visualization import instances

_SPLITS = ("train", "validation")


def default_config() -> ml_collections.ConfigDict:
  """The task's section, for a config file to change."""
  return config_lib.config_dict(ActionOptions())


class Recogniser(nnx.Module):
  """An image backbone, and a head on the features of all frames."""

  def __init__(self, backbone: nnx.Module, head: nnx.Module):
    self.backbone = backbone
    self.head = head


class ActionTask(base.Task):
  """Videos with one label each."""

  nominal_classes = 400  # Kinetics-400's
  built_in_data = ("clips",)
  head_name = "act"
  best_metric = "top1"
  result_type = results.ClassProbabilities
  media = "video"
  input_name = "clip"

  def __init__(self, config: ActionConfig, classes: base.Classes | None = None):
    self._config = config
    self._options = options = config.action
    self._sampler = clips.Sampler(options.frames, options.stride, options.sampling, options.rate)
    self._train = self._validation = None
    self.headline = "Action recognition"
    if classes is None:
      self._train, self._validation = _open_sources(config)
      classes = common.shared_classes(
        self._train.classes,
        self._validation.classes,
        _data_names(options),
        "Put a classes.json beside the lists"
        + (", and prepare them again." if options.data == "prepared" else "."),
      )
      self.headline = common.headline(self.headline, self._train, self._validation, classes, "videos")
    self.classes = tuple(classes)
    self._names = [category["name"] for category in self.classes]

  def settle(self, config: ActionConfig) -> ActionConfig:
    """See `Task.settle`: levels that are counted from the backbone's last get their numbers."""
    levels = video_swin.check_levels(config.action.head.levels, common.feature_specs(config))
    return config.replace({"action": {"head": {"levels": levels}}})

  def build_model(self, backbone: nnx.Module | None = None) -> Recogniser:
    backbone = backbone or common.build_backbone(self._config)
    head = build_head(
      self._options, backbone.feature_specs, len(self.classes), rngs=nnx.Rngs(self._config.seed)
    )
    return Recogniser(backbone, head)

  def train_batches(self, start_example: int) -> pipeline.BatchIterator:
    return common.train_batches(self._config, self._train, self._train_transform(), start_example)

  def blank_example(self) -> batches.ClipTrainBatch:
    side = self._options.image_size
    record = dict(frames=np.zeros((self._sampler.frames, side, side, 3), np.uint8), label=0)
    return self._train_transform()(record, np.random.default_rng(0))

  def _train_transform(self) -> clips.TrainTransform:
    options = self._options
    return clips.TrainTransform(
      self._sampler,
      options.image_size,
      short_side=options.short_side,
      crop_scale=tuple(options.crop_scale),
      flip=options.flip,
      rand_augment=common.rand_augment(options.rand_augment),
      erasing=options.erasing,
    )

  def eval_batches(self) -> pipeline.BatchIterator:
    return common.eval_batches(
      self._config, self._validation, self.eval_transform(), num_workers=self._config.loader.workers
    )

  def eval_transform(self) -> clips.EvalTransform:
    test = self._options.test
    return clips.EvalTransform(self._sampler, self._options.image_size, test.clips, test.crops)

  def read_input(self, source: pixels.Source) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if isinstance(source, np.ndarray):
      record = {"frames": pixels.check_pixels(source, "video")}
    else:
      record = {"path": os.fspath(source)}
    clip = self.eval_transform().views(record)
    return clip[0], {"clip": clip}

  @property
  def view(self) -> dict[str, Any]:
    options, test = self._options, self._options.test
    return {
      "clips": test.clips,
      "crops": test.crops,
      "size": options.image_size,
      **dataclasses.asdict(self._sampler),
      "levels": list(video_swin.check_levels(options.head.levels, common.feature_specs(self._config))),
    }

  def features(
    self, model: Recogniser, batch: batches.ClipTrainBatch | batches.ClipEvalBatch, rng: jax.Array | None
  ) -> base.Features:
    """A map [clips, t, h, w, c] for each level that the head reads; every view of a video is a clip."""
    frames = batch["clip"]
    time = frames.shape[-4]
    maps = frame_passes.frame_features(
      model.backbone,
      frames.reshape(-1, *frames.shape[-3:]),
      model.head.levels,
      frames_per_pass=self._options.frames_per_pass,
      rng=rng,
    )
    return tuple(x.reshape(-1, time, *x.shape[1:]) for x in maps)

  def loss(
    self,
    model: Recogniser,
    batch: batches.ClipTrainBatch,
    features: base.Features,
    rng: jax.Array,
    state: None,
  ) -> base.Losses:
    logits = model.head(features, rng)
    labels = optax.smooth_labels(
      jax.nn.one_hot(batch["label"], logits.shape[-1]), self._options.label_smoothing
    )
    weights = batch["readable"].astype(jnp.float32)

    def mean(values):
      return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1)

    loss = mean(optax.softmax_cross_entropy(logits, labels))
    top1 = mean(jnp.argmax(logits, axis=-1) == batch["label"])
    return base.Losses({"cross_entropy": loss}, {"top1": top1, "unreadable": 1 - jnp.mean(weights)})

  def predict(
    self, model: Recogniser, batch: batches.ClipEvalBatch, features: base.Features
  ) -> dict[str, jax.Array]:
    """Probabilities [b, classes], averaged over the views of each video."""
    probabilities = jax.nn.softmax(model.head(features), axis=-1)
    views = probabilities.reshape(batch["clip"].shape[0], -1, probabilities.shape[-1])
    return {"probabilities": jnp.mean(views, axis=1)}

  @property
  def evaluations(self) -> dict[str, base.Evaluation]:
    return {
      "val": base.Evaluation(
        self.eval_batches, self.evaluator, pictures=self.pictures, write=self.write_results
      )
    }

  def evaluator(self) -> action_metrics.ActionEvaluator:
    return action_metrics.ActionEvaluator(self._names, top_k=sorted({1, min(5, len(self._names))}))

  def pictures(
    self, predictions: dict[str, np.ndarray], batch: batches.ClipEvalBatch, count: int
  ) -> dict[str, np.ndarray]:
    chosen = np.flatnonzero(batch["example_valid"] & batch["readable"])[:count]
    examples = [
      visualize_action.ClipPrediction(
        batch["clip"][i, 0], predictions["probabilities"][i], int(batch["label"][i])
      )
      for i in chosen
    ]
    return {"clips": visualize_action.draw_strips(examples, self._names)} if examples else {}

  def write_results(self, evaluator: action_metrics.ActionEvaluator, folder: pathlib.Path) -> None:
    """`confusion.csv` (true classes downwards), a picture of it, and `predictions.csv`, one line a video."""
    confusion, predictions = evaluator.total(), evaluator.predictions()
    if jax.process_index():
      return
    path = folder / "confusion.csv"
    with atomic.path_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
      writer = csv.writer(file)
      writer.writerow(["", *evaluator.classes])
      writer.writerows([name, *row] for name, row in zip(evaluator.classes, confusion.tolist()))
    path = folder / "predictions.csv"
    with atomic.path_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
      writer = csv.writer(file)
      writer.writerow(["index", "true", "predicted"])
      writer.writerows(predictions)
    instances.save_png(
      visualize_action.draw_confusion(confusion, evaluator.classes), folder / "confusion.png"
    )


def _attentive(
  feature_specs: Sequence[FeatureSpec],
  config: video_swin.AttentiveHeadConfig,
  num_classes: int,
  *,
  dtype: DTypeLike,
  rngs: nnx.Rngs,
) -> ClipHead:
  options = {name: getattr(config, name) for name in ("levels", "channels", "num_heads", "dropout")}
  return video_swin.AttentiveHead(feature_specs, num_classes, dtype=dtype, rngs=rngs, **options)


def _average(
  feature_specs: Sequence[FeatureSpec],
  config: video_swin.AverageHeadConfig,
  num_classes: int,
  *,
  dtype: DTypeLike,
  rngs: nnx.Rngs,
) -> ClipHead:
  del dtype  # it is float32 throughout
  levels, dropout = config.levels, config.dropout
  return video_swin.AverageHead(feature_specs, num_classes, levels=levels, dropout=dropout, rngs=rngs)


# What makes the module of a head, by the name in its options (`action_options.HEADS`).
HEADS: dict[str, Callable[..., ClipHead]] = {
  "video_swin": video_swin.VideoSwinHead,
  "attentive": _attentive,
  "average": _average,
}


def build_head(
  options: ActionOptions, feature_specs: Sequence[FeatureSpec], num_classes: int, *, rngs: nnx.Rngs
) -> ClipHead:
  """The head that `options.head` describes."""
  make_head = HEADS[options.head.name]
  return make_head(
    tuple(feature_specs), options.head, num_classes, dtype=jnp.dtype(options.head_dtype), rngs=rngs
  )


def _open_sources(config: ActionConfig) -> tuple[Any, Any]:
  """Training and validation records."""
  options, seed = config.action, config.seed
  match options.data:
    case "clips":

      def make(split, count):
        return motion_clips.MotionClipSource(
          count, options.clips.frames, options.image_size, seed=seed, split=split
        )

      return make("train", options.clips.train_clips), make("validation", options.clips.validation_clips)
    case "videos":
      return tuple(
        _open_videos(
          common.existing_path(getattr(options, name), f"action.{name}", _HOW_TO_GET_KINETICS), config
        )
        for name in _SPLITS
      )
    case "folds":
      if not options.lists:
        raise ValueError("config.action.data=folds needs config.action.lists, one list of videos or more.")
      parts = [
        _open_videos(common.existing_path(path, "action.lists"), config, options.group_column)
        for path in options.lists
      ]
      return sources.split_fold(sources.concatenate(parts), options.fold, options.num_folds)
    case "prepared":
      root = common.existing_path(
        options.root,
        "action.root",
        "Make it with python -m frozen_vision.data.prepare videos --videos FOLDER_OR_LIST --out FOLDER "
        "--split train, and again for --split validation.",
      )
      return tuple(_fitting(prepared_videos.PreparedVideos(root, split), options) for split in _SPLITS)


def _open_videos(path: pathlib.Path, config: ActionConfig, group_column: str = "") -> Any:
  """The videos of a folder, a list, or the folder of a prepared split."""
  options = config.action
  prepared = prepared_videos.open_split(path)
  if prepared is not None:
    return _fitting(prepared, options)
  videos = lists.open_videos(
    path, root=options.root, group_column=group_column, allow_outside=config.data.allow_outside
  )
  return survey.survey(videos) if config.data.check else videos


def _fitting(
  prepared: prepared_videos.PreparedVideos, options: ActionOptions
) -> prepared_videos.PreparedVideos:
  prepared.require(rate=options.rate, short_side=max(options.short_side, options.image_size))
  return prepared


def _data_names(options: ActionOptions) -> tuple[str, str]:
  """Names of the training and the validation data, for errors."""
  if options.data == "prepared":
    return tuple(f"{options.root}, split {split}" for split in _SPLITS)
  return options.train, options.validation


_HOW_TO_GET_KINETICS = (
  "Give a folder of class folders, or a .csv or .txt list of paths and labels, with "
  "--config.action.train=PATH and --config.action.validation=PATH; "
  "--config=configs/kinetics_video_swin.py without a variant needs no data."
)
