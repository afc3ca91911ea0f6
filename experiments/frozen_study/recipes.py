"""Recipes of the studies beside those of reports; sizes are of two CPU cores and two minutes a run."""

from typing import Any

from frozen_vision.report.recipes import Recipe, Row

# Places in the options of recipes that are filled in when a study is planned.
DATA = "{data}"  # the folder of --data
PART = "{part}"  # the part of CIFAR-10 that `parts` made

_STEPS = {"eval_every": 0, "checkpoint_every": 100, "log_every": 10}
# Boxes alone, in the small sizes of `coco_htc`.
_BOXES = {"detection.head.name": "mask_rcnn", "detection.head.with_masks": False}
# Its levels have strides 8 to 128: anchors are as large as FPN's, and rois of one size have the same stride.
NAS_FPN: dict[str, Any] = {
  "detection.neck.name": "nas_fpn",
  "detection.neck.norm": "group",  # on one cell, the last levels of small images, batch norm has no meaning
  "detection.neck.repeats": 3,
  "detection.head.anchor_scales": (2.0,),
  "detection.head.finest_scale": 56.0,
}
CASCADE: dict[str, Any] = {"detection.head.name": "cascade_mask_rcnn"}


def _row(name: str, title: str, compared: str = "", **more: Any) -> Row:
  return Row(name, title, compared, **more)


def _everywhere(changes: dict[str, Any]) -> dict[str, Any]:
  return {"demo": changes, "small": changes, "paper": changes}


def _recipe(name: str, title: str, kind: Any, rows: tuple[Row, ...], config: str, changes: dict) -> Recipe:
  return Recipe(
    name=name,
    title=title,
    kind=kind,
    rows=rows,
    config=config,
    files_config=config,
    paper_config=config,
    data="",
    changes=_everywhere(changes),
  )


REUSE = {
  recipe.name: recipe
  for recipe in (
    _recipe(
      "long_tail",
      "Boxes in scenes with a long tail of classes",
      "train",
      (
        _row("box_AP", "box AP", "box AP of each image"),
        _row("box_AP_rare", "AP of rare classes"),
        _row("box_AP_common", "AP of common classes"),
        _row("box_AP_frequent", "AP of frequent classes"),
      ),
      "coco_htc",
      _BOXES | _STEPS | {"steps": 350, "optimizer.warmup_steps": 35, "detection.scenes.imbalance": 30.0},
    ),
    _recipe(
      "coco",
      "Boxes in photographs of COCO",
      "train",
      (_row("box_AP", "box AP", "box AP of each image"), _row("box_AP50", "box AP50")),
      "coco_htc:recipe=files",
      _BOXES
      | _STEPS
      | {
        "detection.data": "coco",
        "detection.root": f"{DATA}/coco_subset",
        "detection.validation_fraction": 0.0,
        "detection.frame": (256, 256),
        "detection.eval_frame": (256, 256),
        "steps": 150,
        "optimizer.warmup_steps": 15,
      },
    ),
  )
}

_SETS = {
  "cifar10": ("a tenth of CIFAR-10", PART, 64),
  "caltech101": ("Caltech-101", f"{DATA}/caltech101", 96),
}


def _set_options(folder: str, side: int) -> dict[str, Any]:
  """A data set in class folders or archives, with a fifth of its training images held out."""
  archive = ".tar" if folder == PART else ""
  return {
    "classification.train": f"{folder}/train{archive}",
    "classification.test": f"{folder}/test{archive}",
    "classification.validation_fraction": 0.2,
    "classification.image_size": side,
  }


def _probed(name: str, title: str, folder: str, side: int) -> Recipe:
  return _recipe(
    f"probed_{name}",
    f"Probes on {title}",
    "probe",
    (
      _row("linear", "linear, top-1", "whether each image is classified right", is_mean=True),
      _row("knn", "nearest neighbours, top-1", "whether each image is classified right", is_mean=True),
    ),
    "classification:recipe=files",
    _set_options(folder, side) | {"classification.probe.shots": (5,), "classification.probe.episodes": 20},
  )


def _tuned(name: str, title: str, folder: str, side: int) -> Recipe:
  return _recipe(
    f"tuned_{name}",
    f"Fine-tuned on {title}",
    "fine_tune",
    (_row("top1", "top-1"),),
    "fine_tuning:recipe=files",
    _set_options(folder, side)
    | {
      "steps": 200,
      "log_every": 20,
      "eval_every": 0,
      "checkpoint_every": 100,
      "optimizer.warmup_steps": 20,
      "classification.crop_scale": (0.35, 1.0),
      "classification.fine_tuning.learning_rates": (1e-1, 1e-2),
      "classification.fine_tuning.weight_decays": (1e-5,),
    },
  )


TRANSFER = {
  recipe.name: recipe
  for name, (title, folder, side) in _SETS.items()
  for recipe in (_probed(name, title, folder, side), _tuned(name, title, folder, side))
}
