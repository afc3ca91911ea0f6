"""Detection and instance segmentation on a frozen backbone."""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from frozen_vision import config as config_lib
from frozen_vision.data import batches, pipeline
from frozen_vision.data import classes as class_names
from frozen_vision.data.detection import (
  coco,
  copy_paste,
  long_tail,
  lost_objects,
  photos,
  prepared_coco,
  semantic_maps,
  transforms,
  voc,
)
from frozen_vision.data.generated import scenes
from frozen_vision.files import atomic
from frozen_vision.heads import retinanet
from frozen_vision.heads import views as views_lib
from frozen_vision.heads.base import DetectionHead
from frozen_vision.heads.htc import config as htc_config
from frozen_vision.heads.htc import htc
from frozen_vision.metrics import coco_ap, voc_ap
from frozen_vision.necks import build as necks
from frozen_vision.ops import mirror
from frozen_vision.tasks import base, common, results
from frozen_vision.tasks.detection_options import AnnotatedImages, DetectionConfig, DetectionOptions
from frozen_vision.visualization import instances

_HOW_TO_GET_COCO = (
  "Download train2017.zip, val2017.zip and annotations_trainval2017.zip from "
  "https://cocodataset.org/#download, unpack them into one folder and give it with "
  "--config.detection.root=FOLDER; or give your own data with --config.detection.data=files."
)


def default_config() -> ml_collections.ConfigDict:
  """The task's section, for a config file to change."""
  return config_lib.config_dict(DetectionOptions())


# The module of a head by the name in its options (`detection_options.HEADS`).
HEADS: dict[str, Callable[..., DetectionHead]] = {
  **dict.fromkeys(htc_config.PRESETS, htc.HTC),
  "retinanet": retinanet.RetinaNet,
}


class Detector(nnx.Module):
  """Backbone, neck and head."""

  def __init__(self, backbone: nnx.Module, neck: nnx.Module, head: DetectionHead):
    self.backbone = backbone
    self.neck = neck
    self.head = head


class DetectionTask(base.Task):
  """Boxes and masks of objects in images."""

  nominal_classes = 80  # COCO's
  built_in_data = ("scenes", "photos")
  head_name = "detect"
  result_type = results.Detections

  def __init__(self, config: DetectionConfig, classes: base.Classes | None = None):
    self._config = config
    self._options = config.detection
    self._scales, self._sizes = _test_scales(self._options)
    with_masks = self._options.head.with_masks
    self._train = self._validation = None
    self._evaluates_masks = with_masks
    self.headline = "Detection"
    if classes is None:
      self._train, self._validation = _open_sources(config)
      classes = [{"id": int(category["id"]), "name": category["name"]} for category in self._train.categories]
      what = "images, held out of one file" if _holds_out(self._options) else "images"
      self.headline = common.headline(self.headline, self._train, self._validation, classes, what)
      if with_masks and not getattr(self._train, "has_masks", True):
        with_masks = False
        self.headline += " Boxes only: the training annotations have no masks."
      self._evaluates_masks = with_masks and getattr(self._validation, "has_masks", True)
      if with_masks and not self._evaluates_masks:
        self.headline += " Only boxes are evaluated: the validation annotations have no masks."
    self.classes = tuple(classes)
    self._names = tuple(category["name"] for category in self.classes)
    head = dataclasses.replace(self._options.head, num_classes=len(self._names))
    if with_masks != head.with_masks:
      head = dataclasses.replace(head, with_masks=with_masks)
    self._head_config = head
    self._semantic_stride = 0
    self._repeats, self._counts = None, long_tail.ClassCounts(*(np.ones((2, len(self._names)), np.int64)))
    if self._train is not None:
      lost_objects.count(self._train, self._train_transform())
      self._measure_classes()
    semantic_classes, semantic = self._head_config.semantic_classes, self._options.semantic
    if bool(semantic_classes) != bool(semantic.maps):
      raise ValueError(
        f"detection.head.semantic_classes is {semantic_classes}, detection.semantic.maps is "
        f"{semantic.maps!r}: the semantic branch needs both, the number of classes and the folder of label "
        "maps of the training images."
      )
    if semantic_classes:
      if self._train is not None:
        self._train = semantic_maps.WithSemanticMaps(
          self._train,
          common.existing_path(semantic.maps, "detection.semantic.maps"),
          num_classes=semantic_classes,
          ignored=tuple(semantic.ignored),
        )
      self._semantic_stride = self._pyramid_strides()[self._head_config.semantic_level]
    pasting = self._options.copy_paste
    if pasting and not with_masks:
      raise ValueError(
        f"detection.copy_paste is {pasting}, and only boxes are trained: objects are cut out by their masks. "
        "Set --config.detection.copy_paste=0."
      )

  def _measure_classes(self) -> None:
    """Counts the classes of the training images, where the loss or the order of images depends on them."""
    head, threshold = self._head_config, self._options.repeat_threshold
    if head.reads_class_counts or threshold:
      self._counts, self._repeats = long_tail.measure(self._train, threshold)
    if self._repeats is not None:
      self.headline += (
        f" A pass shows {round(self._repeats.sum()):,} examples, images of rare classes up to "
        f"{self._repeats.max():.1f} times."
      )
    if head.reads_class_lists and getattr(self._train, "class_lists", None) is None:
      self.headline += " The training images do not say which classes they were searched for."

  def settle(self, config: DetectionConfig) -> DetectionConfig:
    """See `Task.settle`: annotations without masks make a head for boxes only."""
    if self._head_config.with_masks == config.detection.head.with_masks:
      return config
    return config.replace({"detection": {"head": {"with_masks": self._head_config.with_masks}}})

  def _pyramid_strides(self) -> list[int]:
    """Pixels per cell of every level of the neck."""
    specs = common.feature_specs(self._config)
    neck = nnx.eval_shape(
      lambda: necks.from_options(self._options.neck, specs, dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    return [spec.stride for spec in neck.feature_specs]

  @property
  def best_metric(self) -> str:
    return "mask_AP" if self._evaluates_masks else "box_AP"

  def build_model(self, backbone: nnx.Module | None = None) -> Detector:
    dtype, rngs = jnp.dtype(self._options.head_dtype), nnx.Rngs(self._config.seed)
    backbone = backbone or common.build_backbone(self._config)
    neck = necks.from_options(self._options.neck, backbone.feature_specs, dtype=dtype, rngs=rngs)
    make_head = HEADS[self._head_config.name]
    head = make_head(neck.feature_specs, self._head_config, dtype=dtype, rngs=rngs)
    detector = Detector(backbone, neck, head)
    common.start_head(detector, self._options.init, "detection.init")
    return detector

  def train_batches(self, start_example: int) -> pipeline.BatchIterator:
    transform = self._train_transform()
    if self._options.copy_paste:
      transform = copy_paste.CopyPasteTrain(transform, self._train, self._options.copy_paste)
    return common.train_batches(self._config, self._train, transform, start_example, self._repeats)

  def blank_example(self) -> batches.DetectionTrainBatch:
    size = tuple(self._options.frame)
    record = dict(
      image=np.zeros((*size, 3), np.uint8),
      boxes=np.zeros((0, 4), np.float32),
      labels=np.zeros(0, np.int32),
      masks=np.zeros((0, *size), bool),
      semantic=np.zeros(size, np.uint8),
    )
    return self._train_transform()(record, np.random.default_rng(0))

  def _train_transform(self) -> transforms.DetectionTrain:
    options = self._options
    match options.resize:
      case "lsj":
        resize = transforms.LargeScaleJitter(tuple(options.scale_range))
      case "short_side":
        resize = transforms.ResizeToLimits(tuple(options.short_side), options.long_side)
      case "fit":
        resize = transforms.ResizeToLimits()
      case other:
        raise ValueError(f"detection.resize is {other!r}; known: lsj, short_side, fit.")
    return transforms.DetectionTrain(
      tuple(options.frame),
      options.max_objects,
      resize,
      flip_probability=options.flip,
      with_masks=self._head_config.with_masks,
      semantic_stride=self._semantic_stride,
      class_lists=len(self._names) if self._head_config.reads_class_lists else 0,
    )

  def eval_batches(self) -> pipeline.BatchIterator:
    return common.eval_batches(self._config, self._validation, self.eval_transform())

  def eval_transform(self) -> transforms.MultiScaleEval:
    # Every scale is resized from the source: resized on the device from one padded frame it would be
    # interpolated twice, and a single scale would not give what plain testing at that scale gives.
    return transforms.MultiScaleEval(self._scales)

  @property
  def view(self) -> dict[str, Any]:
    return common.frame_view(self._scales[0].frame, self._scales[0].resize)

  @property
  def extra_views(self) -> int:
    return len(self._scales) * (1 + self._options.test.flip) - 1

  @classmethod
  def with_image_size(cls, config: DetectionConfig, size: tuple[int, int]) -> DetectionConfig:
    test = dict(short_sides=(), frames=(), sizes=(), flip=False)
    return config.replace({"detection": dict(eval_frame=size, eval_short_side=0, test=test)})

  def features(
    self,
    model: Detector,
    batch: batches.DetectionTrainBatch | batches.DetectionEvalBatch,
    rng: jax.Array | None,
  ) -> base.Features:
    return common.features(model, batch, rng)

  def loss(
    self,
    model: Detector,
    batch: batches.DetectionTrainBatch,
    features: base.Features,
    rng: jax.Array,
    state: None,
  ) -> base.Losses:
    levels = common.head_levels(model, batch, features, rng)
    if self._head_config.reads_class_counts:
      counts = {"class_images": self._counts.images, "class_objects": self._counts.objects}
      batch = {**batch, **{name: jnp.asarray(value, jnp.float32) for name, value in counts.items()}}
    return base.Losses(*model.head.losses(levels, batch, rng))

  def predict(
    self, model: Detector, batch: batches.DetectionEvalBatch, features: base.Features
  ) -> dict[str, jax.Array]:
    views = []
    for scale, sizes in enumerate(self._sizes):
      image, image_size = (batch[f"{name}.{scale}" if scale else name] for name in ("image", "image_size"))
      for mirrored in (False, True) if self._options.test.flip else (False,):
        view = dict(image=mirror.mirror(image, image_size) if mirrored else image, image_size=image_size)
        if views:  # what was given is of the first view
          features = self.features(model, view, None)
        levels = common.head_levels(model, view, features)
        views.append(views_lib.View(levels, image_size, mirrored, sizes))
    return views_lib.predict(
      model.head, views, batch["original_size"], max_detections=self._options.test.max_detections or None
    )

  @property
  def evaluations(self) -> dict[str, base.Evaluation]:
    return {
      "val": base.Evaluation(
        self.eval_batches, self.evaluator, pictures=self.pictures, write=self.write_results
      )
    }

  def evaluator(self) -> coco_ap.CocoEvaluator:
    if voc_ap.measured_by(self._validation.ground_truth):
      return voc_ap.VocEvaluator(self._validation.ground_truth)
    kinds = ("bbox", "segm") if self._evaluates_masks else ("bbox",)
    return coco_ap.CocoEvaluator(self._validation.ground_truth, kinds)

  def pictures(
    self, predictions: dict[str, np.ndarray], batch: batches.DetectionEvalBatch, count: int
  ) -> dict[str, np.ndarray]:
    first = self._scales[0]
    place = transforms.DetectionTrain(
      first.frame, 300, first.resize, flip_probability=0.0, with_masks=self._evaluates_masks
    )
    rows = []
    for row in range(min(count, int(np.sum(batch["example_valid"])))):
      record = self._validation[int(batch["index"][row])]
      target = {key: value[None] for key, value in place(record, np.random.default_rng(0)).items()}
      height, width = batch["image_size"][row]
      rows.append(
        instances.Comparison(
          batch["image"][row][:height, :width],
          instances.predicted_instances(predictions, row, (height, width)),
          instances.true_instances(target, 0),
          str(record["file_name"]),
        )
      )
    return {"predictions": instances.draw_comparisons(rows, self._names)}

  def write_results(self, evaluator: coco_ap.CocoEvaluator, folder: pathlib.Path) -> None:
    """`detections.json` in the COCO server's format and the AP of each class in `per_class.json`.

    Of built-in data also `ground_truth.json`.
    """
    evaluator.write(folder / "detections.json")
    per_class = evaluator.class_result()
    if jax.process_index() != 0:
      return
    if per_class:
      atomic.write_json(folder / "per_class.json", per_class, indent=1)
    if self._options.data in ("scenes", "photos"):
      atomic.write_json(folder / "ground_truth.json", self._validation.ground_truth)


def _test_scales(
  options: DetectionOptions,
) -> tuple[tuple[transforms.DetectionEval, ...], tuple[str, ...]]:
  """How each scale of testing is loaded, and which objects it may find.

  Raises:
    ValueError: lists of different lengths, or an unknown size.
  """
  test, everything = options.test, "".join(views_lib.AREAS)
  short_sides, frames = tuple(test.short_sides), tuple(test.frames)
  sizes = tuple(test.sizes) or (everything,) * max(len(short_sides), 1)
  if not short_sides and not frames:
    short_sides, frames = (options.eval_short_side,), (options.eval_frame,)
  if not len(short_sides) == len(frames) == len(sizes):
    raise ValueError(
      f"detection.test has {len(short_sides)} short_sides, {len(frames)} frames and {len(sizes)} sizes; "
      "expected one frame for each short side, and one text of sizes for each or none at all."
    )
  for letters in sizes:
    if not letters or set(letters) - set(everything):
      raise ValueError(f"detection.test.sizes has {letters!r}; expected some of the letters {everything!r}.")
  return tuple(
    transforms.DetectionEval(tuple(frame), transforms.ResizeToLimits(side or None, None))
    for side, frame in zip(short_sides, frames)
  ), sizes


def _open_sources(config: DetectionConfig) -> tuple[Any, Any]:
  """(training, validation) sources with one label space.

  Annotations without masks are dropped where masks are trained and the file has any (`has_masks`).
  """
  options = config.detection

  def chosen(ids):
    return tuple(int(i) for i in ids) or None

  train = dict(image_ids=chosen(options.train_image_ids), drop_empty=True)
  validation = dict(image_ids=chosen(options.validation_image_ids))
  if options.data != "prepared":  # where the preparation has decided
    for split in (train, validation):
      split["require_masks"] = None if options.head.with_masks else False
      split["allow_outside"] = config.data.allow_outside
      split["check_images"] = config.data.check and options.data != "photos"
  match options.data:
    case "scenes":
      chosen, imbalance = options.scenes, options.scenes.imbalance
      sizes = dict(image_size=chosen.image_size, seed=config.seed, frequencies=imbalance > 1)
      return (
        scenes.SceneSource(chosen.train_images, split="train", imbalance=imbalance, **sizes),
        scenes.SceneSource(chosen.validation_images, split="validation", **sizes),
      )
    case "photos":
      sample = photos.sample_photos()
      for split, ids in zip((train, validation), photos.split_ids(), strict=True):
        split["image_ids"] = split["image_ids"] or ids
      source = coco.load_coco(sample.annotations, sample.images, **train)
      return source, coco.load_coco(
        sample.annotations, sample.images, categories=source.categories, **validation
      )
    case "coco":
      root = common.existing_path(options.root, "detection.root", _HOW_TO_GET_COCO)
      source = coco.coco_root(root, "train", **train)
      return source, coco.coco_root(root, "val", categories=source.categories, **validation)
    case "voc":
      root = common.existing_path(options.root, "detection.root", voc.HOW_TO_GET)
      names = class_names.VOC
      if options.voc.classes:
        names = class_names.read_classes(common.existing_path(options.voc.classes, "detection.voc.classes"))
      both = dict(class_names=names, average_precision=options.voc.average_precision)
      train["require_masks"] = validation["require_masks"] = False
      difficult = "object" if options.voc.difficult else "crowd"
      return (
        voc.load_voc(root, options.voc.train, difficult=difficult, **both, **train),
        voc.load_voc(root, options.voc.validation, **both, **validation),
      )
    case "files":
      if _holds_out(options):
        source = _open_files(options, "train", **train | dict(drop_empty=False))
        return coco.hold_out(source, options.validation_fraction, seed=config.seed)
      source = _open_files(options, "train", **train)
      return source, _open_files(options, "validation", categories=source.categories, **validation)
    case "prepared":
      root = common.existing_path(
        options.root,
        "detection.root",
        "Make it with python -m frozen_vision.data.prepare coco --root COCO --out FOLDER.",
      )
      return (
        prepared_coco.PreparedCoco(root, "train", **train),
        prepared_coco.PreparedCoco(root, "val", **validation),
      )
    case other:
      raise ValueError(f"detection.data is {other!r}; known: scenes, photos, coco, voc, files, prepared.")


def _holds_out(options: DetectionOptions) -> bool:
  """Whether validation images come out of the training file."""
  given = options.validation != AnnotatedImages() or options.validation_image_ids
  return options.data == "files" and options.validation_fraction > 0 and not given


def _open_files(options: DetectionOptions, name: str, **more: Any) -> coco.CocoSource:
  """The source of the paths in the section `name`; `more` as for `load_coco`."""
  pair = getattr(options, name)
  for kind in ("annotations", "images"):
    if not getattr(pair, kind):
      hold_out = "; or set --config.detection.validation_fraction=0.1 to hold out training images"
      raise ValueError(
        f"detection.data=files needs --config.detection.{name}.{kind}=PATH "
        f"({'a COCO JSON' if kind == 'annotations' else 'the folder of its images'})"
        f"{hold_out if name == 'validation' else ''}."
      )
  return coco.load_coco(
    common.existing_path(pair.annotations, f"detection.{name}.annotations"),
    common.existing_path(pair.images, f"detection.{name}.images"),
    **more,
  )
