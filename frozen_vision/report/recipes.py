"""The tasks of a report: which config each of them runs, under which budget, and what it is judged by.

Every backbone gets the same recipe: same data, steps, batch, learning rate and head. Nothing is tuned to a
backbone but what a probe selects on validation data.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
import pathlib
from typing import Any, Literal

from frozen_vision import config_files, messages
from frozen_vision import options as option_lib
from frozen_vision.backbones import families
from frozen_vision.config import Config
from frozen_vision.report import entries

Budget = Literal["demo", "small", "paper"]
BUDGETS: tuple[Budget, ...] = ("demo", "small", "paper")


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of the table of scores.

  Attributes:
    name: identifies it.
    title: what the page calls it.
    compared: the score of a single example by which backbones are compared; empty where there is none.
    is_mean: whether the row's number is the mean of those scores.
    lower_is_better: it is an error.
  """

  name: str
  title: str
  compared: str = ""
  is_mean: bool = False
  lower_is_better: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A run that every backbone makes once for each seed.

  Attributes:
    name: of its folders.
    title: what the page calls it.
    kind: "train" trains a head, "probe" fits probes on embeddings, "fine_tune" trains a whole classifier
      over a grid.
    rows: what it gives; their names are the keys of `scores` in a cell's `cell.json`.
    config: on built-in data.
    files_config: on data of one's own; `data` says under which name.
    paper_config: at full scale.
    data: which of `Data` it reads; empty where it has built-in data only.
    changes: options of the config, by budget.
  """

  name: str
  title: str
  kind: Literal["train", "probe", "fine_tune"]
  rows: tuple[Row, ...]
  config: str
  files_config: str
  paper_config: str
  data: Literal["", "class_folders", "coco", "label_maps", "videos"]
  changes: Mapping[Budget, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Data:
  """Data of one's own, in the place of the built-in; empty: none.

  Attributes:
    class_folders: training images in class folders, and perhaps test images likewise.
    coco: a COCO JSON and the folder of its images; a fifth of the images is held out.
    label_maps: a list of classes, training images and their label images, validation images and theirs.
    videos: training videos in class folders or a list, and perhaps others for validation.
  """

  class_folders: tuple[str, ...] = ()
  coco: tuple[str, ...] = ()
  label_maps: tuple[str, ...] = ()
  videos: tuple[str, ...] = ()

  def __post_init__(self):
    for name, (least, most) in _DATA_COUNTS.items():
      found = getattr(self, name)
      if found and not least <= len(found) <= most:
        raise ValueError(f"--{name} is {','.join(found)!r}; expected {_DATA_HELP[name]}.")


_DATA_COUNTS = {"class_folders": (1, 2), "coco": (2, 2), "label_maps": (5, 5), "videos": (1, 2)}
_DATA_HELP = {
  "class_folders": "TRAIN or TRAIN,TEST, each a folder of class folders or a tar archive of them",
  "coco": "FILE.json,IMAGES: the annotations and the folder of their images",
  "label_maps": (
    "CLASSES,IMAGES,LABELS,VALIDATION_IMAGES,VALIDATION_LABELS: a list of classes and folders of images"
  ),
  "videos": "TRAIN or TRAIN,VALIDATION, each a folder of class folders or a list",
}


def _steps(steps: int, warmup: int, save: int = 100) -> dict[str, Any]:
  return {
    "steps": steps,
    "optimizer.warmup_steps": warmup,
    "eval_every": 0,
    "checkpoint_every": save,
    "log_every": 10,
  }


_SEGMENTATION = dict(
  kind="train",
  rows=(Row("mIoU", "mean IoU", "mean IoU of each image"),),
  data="label_maps",
)
_ACTION = dict(
  kind="train",
  rows=(Row("top1", "top-1", "whether each video is classified right", is_mean=True),),
  data="videos",
)

RECIPES: dict[str, Recipe] = {
  recipe.name: recipe
  for recipe in (
    Recipe(
      name="detection",
      title="Detection and instance segmentation (HTC)",
      kind="train",
      rows=(
        Row("box_AP", "box AP", "box AP of each image"),
        Row("mask_AP", "mask AP", "mask AP of each image"),
      ),
      config="coco_htc",
      files_config="coco_htc:recipe=files",
      paper_config="coco_htc:backbone=swinv2_l",
      data="coco",
      changes={"demo": _steps(200, 20), "small": {}, "paper": {}},
    ),
    Recipe(
      name="segmentation",
      title="Semantic segmentation (Mask2Former)",
      config="ade20k_mask2former",
      files_config="ade20k_mask2former:recipe=files",
      paper_config="ade20k_mask2former:backbone=swinv2_l",
      changes={"demo": _steps(400, 20), "small": {}, "paper": {}},
      **_SEGMENTATION,
    ),
    Recipe(
      name="linear_segmentation",
      title="Semantic segmentation (linear head)",
      config="ade20k_mask2former:head=linear",
      files_config="ade20k_mask2former:recipe=files,head=linear",
      paper_config="ade20k_mask2former:backbone=swinv2_l,head=linear",
      changes={"demo": _steps(300, 20), "small": {}, "paper": {}},
      **_SEGMENTATION,
    ),
    Recipe(
      name="action",
      title="Action recognition (Video Swin head)",
      config="kinetics_video_swin",
      files_config="kinetics_video_swin:recipe=files",
      paper_config="kinetics_video_swin:backbone=swinv2_l",
      changes={"demo": _steps(200, 20), "small": {}, "paper": {}},
      **_ACTION,
    ),
    Recipe(
      name="attentive_action",
      title="Action recognition (attentive head)",
      config="kinetics_video_swin:head=attentive",
      files_config="kinetics_video_swin:recipe=files,head=attentive",
      paper_config="kinetics_video_swin:backbone=swinv2_l,head=attentive",
      changes={"demo": _steps(200, 20), "small": {}, "paper": {}},
      **_ACTION,
    ),
    Recipe(
      name="normals_depth",
      title="Surface normals and depth (linear head)",
      kind="train",
      # All pixels of the built-in rooms are known, so that the mean over pixels is that over images.
      rows=(
        Row("mean_angle", "degrees, normals", "mean angle of each image", is_mean=True, lower_is_better=True),
        Row("abs_rel", "relative error, depth", "that of each image", is_mean=True, lower_is_better=True),
      ),
      config="depth_normals",
      files_config="",
      paper_config="depth_normals:recipe=nyuv2",
      data="",
      changes={"demo": _steps(200, 20), "small": {}, "paper": {}},
    ),
    Recipe(
      name="probes",
      title="Probes",
      kind="probe",
      rows=(
        Row("linear", "linear probe, top-1", "whether each image is classified right", is_mean=True),
        Row("knn", "nearest neighbours, top-1", "whether each image is classified right", is_mean=True),
        Row("few_shot", "5-way 5-shot", "accuracy of each episode", is_mean=True),
        Row("calibration", "calibration error with a temperature", lower_is_better=True),
      ),
      config="classification",
      files_config="classification:recipe=files",
      paper_config="classification:recipe=files",
      data="class_folders",
      changes={"demo": {}, "small": {}, "paper": {}},
    ),
  )
}

# Recipes whose head reads a pyramid of maps.
_NEED_PYRAMID = ("detection", "segmentation")
# Options that set sizes of a backbone.
_OVERRIDES = "backbone.overrides."
# A stride that `simple_pyramid` turns into those of every pyramid, 4 to 32.
_PYRAMID_STRIDE = 16
# What --tasks takes: (recipe, rows of it).
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
  **{
    name: (name, tuple(row.name for row in recipe.rows))
    for name, recipe in RECIPES.items()
    if recipe.kind == "train"
  },
  **{row.name: ("probes", (row.name,)) for row in RECIPES["probes"].rows},
}
# The attentive head is at chance on the built-in clips, whose classes differ in motion alone.
DEFAULT_TASKS = tuple(name for name in TASKS if name != "attentive_action")
# What a report of this kind would have too, and why it has not.
ABSENT = {
  "diagnostics": "python -m frozen_vision.diagnose makes them apart",
}


def chosen(tasks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
  """{recipe: rows} of the tasks that --tasks names, in the table's order.

  Raises:
    ValueError: an unknown task.
  """
  for task in tasks:
    if task not in TASKS:
      raise ValueError(messages.unknown("task of reports", task, TASKS))
  found: dict[str, tuple[str, ...]] = {}
  for name, (recipe, rows) in TASKS.items():
    if name in tasks:
      found[recipe] = found.get(recipe, ()) + rows
  return found


def make_config(
  recipe: Recipe,
  entry: entries.Entry,
  seed: int,
  *,
  budget: Budget,
  data: Data = Data(),
  cache: str = "",
  changes: Mapping[str, Any] | None = None,
) -> Config:
  """The config of one run.

  Args:
    cache: folder of feature caches, so that what seeds and heads have in common is computed once.
    changes: options that a user sets, by dotted path. `backbone.overrides.NAME` is set for every backbone.

  Raises:
    ValueError: options that do not exist or do not fit.
  """
  own = getattr(data, recipe.data) if recipe.data else ()
  neck, sizes = _pyramid_options(recipe, entry)
  options = {
    **_runs_options(cache, seed),
    **recipe.changes[budget],
    **(_data_options(recipe.data, own, seed) if own else {}),
    **neck,
    **{name: value for name, value in (changes or {}).items() if not name.startswith(_OVERRIDES)},
  }
  source = recipe.paper_config if budget == "paper" else recipe.files_config if own else recipe.config
  config = config_files.load_config(source, options)
  backbone = entry.options
  given = {
    name.removeprefix(_OVERRIDES): option_lib.parse(value.text, Any, name)
    if isinstance(value, option_lib.Text)
    else value
    for name, value in (changes or {}).items()
    if name.startswith(_OVERRIDES)
  }
  kept = dict(config.backbone.overrides) if _is_like(config.backbone.name, backbone.name) else {}
  return dataclasses.replace(
    config,
    headline="",
    backbone=dataclasses.replace(
      config.backbone,
      name=backbone.name,
      weights=backbone.weights,
      overrides={**kept, **backbone.overrides, **sizes, **given},
    ),
  )


def _runs_options(cache: str, seed: int) -> dict[str, Any]:
  """Options of every run of a report."""
  return {"seed": seed, "cache.path": cache, "pictures": 4, "tensorboard": False, "keep_checkpoints": 1}


def _data_options(kind: str, paths: tuple[str, ...], seed: int) -> dict[str, Any]:
  """Options of a config's data; paths are absolute, so that a command runs anywhere."""
  first, *rest = (str(pathlib.Path(path).expanduser().absolute()) for path in paths)
  match kind:
    case "class_folders":
      held = {"classification.validation": rest[0]} if rest else {"classification.validation_fraction": 0.25}
      return {"classification.data": "files", "classification.train": first, **held}
    case "coco":
      return {
        "detection.data": "files",
        "detection.train": {"annotations": first, "images": rest[0]},
        "detection.validation_fraction": 0.2,
      }
    case "label_maps":
      labels, validation, validation_labels = rest[1:]
      return {
        "segmentation.data": "files",
        "segmentation.classes": first,
        "segmentation.train": {"images": rest[0], "labels": labels},
        "segmentation.validation": {"images": validation, "labels": validation_labels},
      }
    case "videos" if rest:
      return {"action.data": "videos", "action.train": first, "action.validation": rest[0]}
    case _:
      # A fifth of the videos is held out, another one with every seed.
      return {
        "action.data": "folds",
        "action.lists": (first,),
        "action.num_folds": 5,
        "action.fold": seed % 5,
      }


def _pyramid_options(recipe: Recipe, entry: entries.Entry) -> tuple[dict[str, Any], dict[str, int]]:
  """(options, overrides of the backbone) where a head reads a pyramid and a backbone's maps have one stride.

  A neck makes the pyramid. Of patches of 14 pixels it cannot; their images are resized to one patch for every
  16 pixels (`ViTConfig.stride`).
  """
  specs = families.backbone_config(entry.options.name, **entry.options.overrides).feature_specs
  if len({spec.stride for spec in specs}) > 1 or recipe.name not in _NEED_PYRAMID:
    return {}, {}
  trainable = {} if recipe.name == "detection" else {"trainable": ("neck/.*", "head/.*")}
  scale = specs[-1].stride / 4
  sizes = {} if scale >= 1 and math.log2(scale).is_integer() else {"stride": _PYRAMID_STRIDE}
  return {f"{recipe.name}.neck.name": "simple_pyramid", **trainable}, sizes


@functools.cache
def _is_like(name: str, other: str) -> bool:
  """Whether two backbones are of one family with as many stages, so that windows of one fit the other."""
  rows = families.backbone_config(name), families.backbone_config(other)
  return type(rows[0]) is type(rows[1]) and len(rows[0].feature_specs) == len(rows[1].feature_specs)
