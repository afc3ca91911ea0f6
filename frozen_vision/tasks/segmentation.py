"""Semantic segmentation on a frozen backbone: Mask2Former, UPerNet or a linear head."""

from collections.abc import Callable
import dataclasses
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from frozen_vision import config as config_lib
from frozen_vision.data import batches, pipeline
from frozen_vision.data.generated import semantic_scenes
from frozen_vision.data.segmentation import (
  ade20k,
  class_lists,
  label_maps,
  prepared_segmentation,
  sources,
  survey,
)
from frozen_vision.data.segmentation import transforms as segmentation_transforms
from frozen_vision.files import atomic
from frozen_vision.heads import linear, plain_mask_decoder, upernet
from frozen_vision.heads.base import SegmentationHead
from frozen_vision.heads.mask2former import mask2former
from frozen_vision.metrics import mean_iou
from frozen_vision.necks import build as necks
from frozen_vision.tasks import base, common, pixel_data, results, semantic_inference
from frozen_vision.tasks.segmentation_options import SegmentationConfig, SegmentationOptions
from frozen_vision.visualization import instances
from frozen_vision.visualization import label_maps as visualize_semantic

# The module of a head by the name in its options (`segmentation_options.HEADS`).
HEADS: dict[str, Callable[..., SegmentationHead]] = {
  "mask2former": mask2former.Mask2Former,
  "plain_mask": plain_mask_decoder.PlainMaskDecoder,
  "upernet": upernet.UPerNet,
  "linear": linear.LinearHead,
}


def default_config() -> ml_collections.ConfigDict:
  """The task's section, for a config file to change."""
  return config_lib.config_dict(SegmentationOptions())


class Segmenter(nnx.Module):
  """Backbone, head, and perhaps a neck; without one the head reads the levels of the backbone."""

  def __init__(self, backbone: nnx.Module, neck: nnx.Module | None, head: nnx.Module):
    self.backbone = backbone
    self.neck = neck
    self.head = head


class SegmentationTask(pixel_data.PixelData, base.Task):
  """One class for every pixel."""

  nominal_classes = 150  # ADE20K's
  built_in_data = ("scenes",)
  head_name = "segment"
  best_metric = "mIoU"
  result_type = results.LabelMap

  def __init__(self, config: SegmentationConfig, classes: base.Classes | None = None):
    self._config = config
    self._options = config.segmentation
    self._train = self._validation = None
    self.headline = "Segmentation"
    if classes is None:
      self._train, self._validation = _open_sources(config)
      if config.data.check:
        self._train = _surveyed(self._train, absent_classes=True)
        self._validation = _surveyed(self._validation, absent_classes=False)
      classes = common.shared_classes(
        self._train.class_names, self._validation.class_names, (repr(self._train), repr(self._validation))
      )
      self.headline = common.headline(self.headline, self._train, self._validation, classes)
    self.classes = tuple(classes)
    self._names = tuple(category["name"] for category in self.classes)
    self._head_config = dataclasses.replace(self._options.head, num_classes=len(self._names))

  def build_model(self, backbone: nnx.Module | None = None) -> Segmenter:
    dtype, rngs = jnp.dtype(self._options.head_dtype), nnx.Rngs(self._config.seed)
    backbone = backbone or common.build_backbone(self._config)
    neck, specs = None, backbone.feature_specs
    if self._options.neck.name != "none":
      neck = necks.from_options(self._options.neck, specs, dtype=dtype, rngs=rngs)
      specs = neck.feature_specs
      if self._train is not None:
        common.check_neck_trains(neck, self._config, self._options.init)
    make_head = HEADS[self._head_config.name]
    head = make_head(specs, self._head_config, dtype=dtype, rngs=rngs)
    segmenter = Segmenter(backbone, neck, head)
    common.start_head(segmenter, self._options.init, "segmentation.init")
    return segmenter

  def train_batches(self, start_example: int) -> pipeline.BatchIterator:
    return common.train_batches(self._config, self._train, self._train_transform(), start_example)

  def blank_example(self) -> batches.SegmentationTrainBatch:
    size = tuple(self._options.frame)
    record = dict(image=np.zeros((*size, 3), np.uint8), label=np.zeros(size, np.uint8), name="blank")
    return self._train_transform()(record, np.random.default_rng(0))

  def _train_transform(self) -> segmentation_transforms.SegmentationTrain:
    options = self._options
    resize = segmentation_transforms.RandomShortSide(
      tuple(options.short_sides), options.long_side, options.category_max_area
    )
    return segmentation_transforms.SegmentationTrain(
      tuple(options.frame),
      min(options.max_segments, len(self._names)),
      resize,
      jitter=segmentation_transforms.ColourJitter() if options.colour_jitter else None,
      flip_probability=options.flip,
    )

  @property
  def extra_views(self) -> int:
    return len(self._options.test.scales) * (1 + self._options.test.flip) - 1

  @property
  def takes_features(self) -> bool:
    return not self._options.test.window

  @classmethod
  def with_image_size(cls, config: SegmentationConfig, size: tuple[int, int]) -> SegmentationConfig:
    test = dict(scales=(1.0,), flip=False, window=())
    return config.replace(
      {"segmentation": dict(eval_frame=size, eval_short_side=0, eval_long_side=0, test=test)}
    )

  def loss(
    self,
    model: Segmenter,
    batch: batches.SegmentationTrainBatch,
    features: base.Features,
    rng: jax.Array,
    state: None,
  ) -> base.Losses:
    levels = common.head_levels(model, batch, features, rng)
    return base.Losses(*model.head.losses(levels, batch, rng))

  def predict(
    self, model: Segmenter, batch: batches.SegmentationEvalBatch, features: base.Features
  ) -> list[semantic_inference.View]:
    """Class scores of every view of testing, each at the size of its own frame."""
    test = self._options.test

    def score(images: jax.Array, sizes: jax.Array, features: base.Features | None = None) -> jax.Array:
      view = {"image": images, "image_size": sizes}
      features = self.features(model, view, None) if features is None else features
      return model.head.predict_semantic(common.head_levels(model, view, features), images.shape[1:3])

    scorer: semantic_inference.Scorer = score
    if test.window:
      window = tuple(test.window)
      stride = tuple(test.stride) or tuple(max(1, side * 2 // 3) for side in window)
      scorer = semantic_inference.sliding(score, window, stride)
    views = []
    for i in range(len(test.scales)):
      ending = f".{i}" if i else ""
      images, sizes = batch[f"image{ending}"], batch[f"image_size{ending}"]
      if i == 0 and not test.window:
        scores = score(images, sizes, features)
      else:
        scores = scorer(images, sizes)
      views.append(semantic_inference.View(scores, sizes))
      if test.flip:
        views.append(semantic_inference.View(semantic_inference.mirrored(scorer)(images, sizes), sizes))
    return views

  def to_source(
    self,
    outputs: list[semantic_inference.View],
    batch: base.Batch,
    largest_size: tuple[int, int] | None,
  ) -> dict[str, jax.Array]:
    """`label_map`: the class of every pixel of the source images."""
    height, width = largest_size or tuple(self._options.eval_frame)
    maps = semantic_inference.label_maps(outputs, batch["original_size"], (height, width))
    return {"label_map": maps[:, :height, :width]}

  def evaluator(self) -> mean_iou.MeanIoUEvaluator:
    return mean_iou.MeanIoUEvaluator(
      self._names,
      self._validation.label,
      self._validation.name,
      len(self._validation),
      palette=[instances.class_color(i) for i in range(len(self._names))],
    )

  def pictures(
    self, predictions: dict[str, np.ndarray], batch: batches.SegmentationEvalBatch, count: int
  ) -> dict[str, np.ndarray]:
    examples = []
    for row in range(min(count, int(np.sum(batch["example_valid"])))):
      record = self._validation[int(batch["index"][row])]
      height, width = record["image"].shape[:2]
      examples.append(
        visualize_semantic.LabelComparison(
          record["image"], predictions["label_map"][row][:height, :width], record["label"], record["name"]
        )
      )
    return {"predictions": visualize_semantic.draw_label_comparisons(examples, self._names)}

  def write_results(self, evaluator: mean_iou.MeanIoUEvaluator, folder: pathlib.Path) -> None:
    """`per_class.json` and a label PNG of every image; of generated scenes also the true ones."""
    evaluator.write(folder, main_process=jax.process_index() == 0)
    if self._options.data == "scenes":
      truth = folder / "ground_truth"
      truth.mkdir(exist_ok=True)
      for index in range(len(self._validation)):
        path = truth / f"{self._validation.name(index)}.png"
        if not path.exists():
          atomic.write_bytes(path, label_maps.encode(self._validation.label(index)), sync=False)


def _surveyed(source: sources.SegmentationSource, *, absent_classes: bool) -> sources.SegmentationSource:
  """A source without what cannot be read; what is generated or prepared is as it should be."""
  if isinstance(source, sources.LabelledImages):
    return survey.survey(source, absent_classes=absent_classes)
  return source


def _open_sources(
  config: SegmentationConfig,
) -> tuple[sources.SegmentationSource, sources.SegmentationSource]:
  """(training, validation) sources."""
  options = config.segmentation
  training_unlabelled = "skip" if options.unlabelled == "keep" else options.unlabelled
  match options.data:
    case "scenes":
      sizes = dict(image_size=options.scenes.image_size, seed=config.seed)
      return (
        semantic_scenes.SemanticScenes(options.scenes.train_images, split="train", **sizes),
        semantic_scenes.SemanticScenes(options.scenes.validation_images, split="validation", **sizes),
      )
    case "ade20k":
      root = common.existing_path(
        options.root,
        "segmentation.root",
        f"{ade20k.HOW_TO_GET} Give it with --config.segmentation.root=FOLDER.",
      )
      return (
        ade20k.ade20k_root(root, "training", unlabelled=training_unlabelled),
        ade20k.ade20k_root(root, "validation", unlabelled=options.unlabelled),
      )
    case "files":
      return (
        _open_files(options, "train", training_unlabelled),
        _open_files(options, "validation", options.unlabelled),
      )
    case "prepared":
      root = common.existing_path(
        options.root,
        "segmentation.root",
        "Make it with python -m frozen_vision.data.prepare ade20k --root ADE20K --out FOLDER.",
      )
      return tuple(prepared_segmentation.PreparedSegmentation(root, split) for split in ade20k.SPLITS)
    case other:
      raise ValueError(f"segmentation.data is {other!r}; known: scenes, ade20k, files, prepared.")


def _open_files(options: SegmentationOptions, name: str, unlabelled: str) -> sources.LabelledImages:
  root = pathlib.Path(options.root).expanduser()
  pair = getattr(options, name)
  wanted = {
    "classes": (options.classes, "a class list, .json or .txt"),
    f"{name}.images": (pair.images, "a folder of images"),
  }
  if unlabelled != "keep":
    wanted[f"{name}.labels"] = (pair.labels, "the folder of their label images")
  for option, (value, what) in wanted.items():
    if not value:
      raise ValueError(f"segmentation.data=files needs --config.segmentation.{option}=PATH ({what}).")

  def find(value, option):
    return common.existing_path(
      root / value,
      f"segmentation.{option}",
      f"Give --config.segmentation.root=FOLDER, or an absolute path with "
      f"--config.segmentation.{option}=PATH.",
    )

  label_format = class_lists.read_format(
    find(options.classes, "classes"), ignored=tuple(options.ignore), unknown=options.unknown_labels
  )
  return sources.LabelledImages(
    find(pair.images, f"{name}.images"),
    find(pair.labels, f"{name}.labels") if pair.labels else None,
    label_format,
    segments=find(pair.segments, f"{name}.segments") if pair.segments else None,
    unlabelled=unlabelled,
    image_suffix=options.image_suffix,
    label_suffix=options.label_suffix,
  )
