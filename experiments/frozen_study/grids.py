"""The grids: which variants are compared on which tasks, and which statements of papers they test.

`GRIDS` has them by name. Those of the frozen study (arXiv 2211.02043) are its three questions and its upper
bound; `reuse_...` are Proper Reuse (arXiv 2204.00484); `pretraining_tuned` is feature distillation (arXiv
2205.14141). A variant is a row: a backbone, and what its cells have otherwise than the recipe. Variants of
one label are the same in every grid, so that their cells are run once.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from experiments.frozen_study import recipes
from frozen_vision.report.recipes import Recipe, RECIPES


@dataclasses.dataclass(frozen=True)
class Variant:
  """One row of a grid.

  Attributes:
    label: of its folders, the same for the same cells.
    backbone: as `--backbones` takes it, or the name of a file of --weights.
    title: what the tables call it.
    changes: {recipe: options of its config}.
    configs: {recipe: the config in the place of the recipe's}.
  """

  label: str
  backbone: str
  title: str
  changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  configs: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Claim:
  """A statement: each of `better` is above each of `worse`, by label.

  Attributes:
    text: of the paper, or what one would expect.
    rows: keys of the table, such as `detection/mask_AP`; all if empty.
  """

  text: str
  better: tuple[str, ...]
  worse: tuple[str, ...]
  rows: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Grid:
  """One question.

  Attributes:
    rows: {recipe: rows of its table}.
    known: the recipes by name.
    about: what all variants have in common.
  """

  question: str
  rows: Mapping[str, tuple[str, ...]]
  variants: tuple[Variant, ...]
  claims: tuple[Claim, ...] = ()
  known: Mapping[str, Recipe] = dataclasses.field(default_factory=lambda: RECIPES)
  about: str = "Every variant gets the same data, steps, batch and learning rate; nothing is tuned to one."


def _rows(*names: str) -> dict[str, tuple[str, ...]]:
  return {name: tuple(row.name for row in RECIPES[name].rows) for name in names}


_HEADS_OF_TASKS = ("detection", "segmentation", "action")
_EVERYTHING = {
  **_rows("detection", "segmentation", "linear_segmentation", "action", "normals_depth"),
  "probes": ("linear", "knn", "few_shot"),
}
_SUPERVISED = Variant("swinv2_nano", "swinv2_nano", "classes of CIFAR-10, the shipped weights")
_RANDOM = Variant("swinv2_nano-random", "swinv2_nano:random", "none: random weights")
_LITE = tuple(
  Variant(f"efficientnet_lite{i}", f"efficientnet_lite{i}", f"EfficientNet-Lite{i}, classes of ImageNet")
  for i in range(3)
)


def _pretrained(name: str, title: str) -> Variant:
  return Variant(name, name, title)


_SAME_STEPS = _pretrained("swinv2_nano_supervised", "classes of CIFAR-10, the steps of the others")
_SIMMIM = _pretrained("swinv2_nano_simmim", "masked pixels (SimMIM)")
_MOCO = _pretrained("swinv2_nano_moco", "contrast of views (MoCo v3)")
_FD = _pretrained("swinv2_nano_fd", "features of the shipped weights, distilled")
_LITE0 = _pretrained("swinv2_nano_lite0", "features of EfficientNet-Lite0, distilled")
_SIMMIM_FD = _pretrained("swinv2_nano_simmim_fd", "features of SimMIM, distilled")
_MOCO_FD = _pretrained("swinv2_nano_moco_fd", "features of MoCo v3, distilled")
_UNLABELLED = (_SIMMIM, _MOCO)
_LEARNT = (_SUPERVISED, _SAME_STEPS, _SIMMIM, _MOCO, _FD, _LITE0)


def _labels(variants: Sequence[Variant]) -> tuple[str, ...]:
  return tuple(variant.label for variant in variants)


PRETRAINING = Grid(
  question="Which pretraining suits a frozen backbone?",
  rows=_EVERYTHING,
  variants=(*_LEARNT, _RANDOM, _LITE[0]),
  claims=(
    Claim(
      "Supervised pretraining is best where the backbone is frozen (2211.02043): as many steps on the same "
      "images with labels, against those without",
      _labels((_SAME_STEPS,)),
      _labels(_UNLABELLED),
    ),
    Claim(
      "Supervised pretraining is best where the backbone is frozen (2211.02043): the shipped weights, of "
      "more steps, against all that saw the same images",
      _labels((_SUPERVISED,)),
      _labels((_SIMMIM, _MOCO, _FD, _LITE0)),
    ),
    Claim(
      "The larger labelled set is better (2211.02043): EfficientNet-Lite0 of ImageNet against the shipped "
      "weights, of another architecture",
      _labels((_LITE[0],)),
      _labels((_SUPERVISED,)),
    ),
    Claim("Any pretraining is better than none", _labels(_LEARNT), _labels((_RANDOM,))),
  ),
)


def _detector(label: str, title: str, **changes: Any) -> Variant:
  options = {"detection": {f"detection.{name.replace('__', '.')}": value for name, value in changes.items()}}
  return Variant(f"swinv2_nano+{label}", "swinv2_nano", title, options)


HEADS_DETECTION = Grid(
  question="What makes a frozen backbone flexible: necks and heads of detection",
  rows=_rows("detection"),
  variants=(
    dataclasses.replace(_SUPERVISED, title="FPN, HTC"),
    *(
      _detector(f"bifpn{count}", f"BiFPN x {count}, HTC", neck__name="bifpn", neck__repeats=count)
      for count in (1, 3, 5)
    ),
    _detector("mask_rcnn", "FPN, Mask R-CNN", head__name="mask_rcnn"),
    _detector("cascade", "FPN, Cascade Mask R-CNN", head__name="cascade_mask_rcnn"),
  ),
  claims=(
    Claim(
      "More capacity in the neck helps a frozen backbone: BiFPN over FPN",
      ("swinv2_nano+bifpn1", "swinv2_nano+bifpn3", "swinv2_nano+bifpn5"),
      ("swinv2_nano",),
    ),
    Claim("Five BiFPN are better than one", ("swinv2_nano+bifpn5",), ("swinv2_nano+bifpn1",)),
    Claim(
      "A stronger head helps: HTC over Cascade and Mask R-CNN",
      ("swinv2_nano",),
      ("swinv2_nano+cascade", "swinv2_nano+mask_rcnn"),
    ),
  ),
)
_SEGMENTER = "ade20k_mask2former:head="
HEADS_SEGMENTATION = Grid(
  question="What makes a frozen backbone flexible: heads of semantic segmentation",
  rows=_rows("segmentation"),
  variants=(
    dataclasses.replace(_SUPERVISED, title="Mask2Former"),
    *(
      Variant(f"swinv2_nano+{head}", "swinv2_nano", title, configs={"segmentation": _SEGMENTER + head})
      for head, title in (("linear", "linear"), ("upernet", "UPerNet"))
    ),
  ),
  claims=(
    Claim(
      "Mask2Former is better than UPerNet and a linear head on a frozen backbone",
      ("swinv2_nano",),
      ("swinv2_nano+upernet", "swinv2_nano+linear"),
    ),
    Claim("UPerNet is better than a linear head", ("swinv2_nano+upernet",), ("swinv2_nano+linear",)),
  ),
)
_CLIPS = "kinetics_video_swin:head="


def _blocks(count: int) -> Variant:
  changes = {"action": {"action.head.depths": (count, count)}}
  return Variant(f"swinv2_nano+blocks{count}", "swinv2_nano", f"Video Swin, {count} blocks a level", changes)


HEADS_ACTION = Grid(
  question="What makes a frozen backbone flexible: heads of action recognition",
  rows=_rows("action"),
  variants=(
    dataclasses.replace(_SUPERVISED, title="Video Swin, 1 block a level"),
    _blocks(2),
    _blocks(4),
    *(
      Variant(f"swinv2_nano+{head}", "swinv2_nano", title, configs={"action": _CLIPS + head})
      for head, title in (("average", "average"), ("attentive", "attentive probe"))
    ),
  ),
  claims=(
    Claim(
      "Attention over time on a frozen image backbone is better than an average or an attentive probe",
      ("swinv2_nano", "swinv2_nano+blocks2", "swinv2_nano+blocks4"),
      ("swinv2_nano+average", "swinv2_nano+attentive"),
    ),
    Claim("Four blocks are better than one", ("swinv2_nano+blocks4",), ("swinv2_nano",)),
  ),
)

# Features that adapters change are not kept.
_ADAPTERS = {"adapters.kind": "bottleneck", "adapters.width": 16, "cache.path": ""}
# Beside neck and head, what of the backbone trains.
_OPEN = {
  "adapters": ("with adapters", _ADAPTERS),
  "last_stage": ("last stage trains", {"trainable": ("neck/.*", "head/.*", "backbone/stages/3/.*")}),
  "everything": ("everything trains", {"trainable": (".*",)}),
}


def _opened(backbone: str, title: str = "") -> tuple[Variant, ...]:
  """The policies that train parts of a backbone; models without a neck have no pattern for one."""
  found = []
  for name, (words, options) in _OPEN.items():
    changes = {recipe: dict(options) for recipe in _HEADS_OF_TASKS}
    for recipe in ("segmentation", "action"):
      if name == "last_stage":
        changes[recipe]["trainable"] = options["trainable"][1:]
    found.append(Variant(f"{backbone}+{name}", backbone, title + words, changes))
  return tuple(found)


INSIDE = Grid(
  question="What makes a frozen backbone flexible: parts of it that train",
  rows=_rows(*_HEADS_OF_TASKS),
  variants=(dataclasses.replace(_SUPERVISED, title="frozen"), *_opened("swinv2_nano")),
  claims=(
    Claim(
      "A few trained parts inside a frozen backbone help",
      ("swinv2_nano+adapters", "swinv2_nano+last_stage"),
      ("swinv2_nano",),
    ),
    Claim(
      "Training everything is better than adapters", ("swinv2_nano+everything",), ("swinv2_nano+adapters",)
    ),
  ),
)
_WIDTHS = (
  _pretrained("swinv2_narrow_supervised", "SwinV2, 16 channels"),
  dataclasses.replace(_SAME_STEPS, title="SwinV2, 32 channels (nano)"),
  _pretrained("swinv2_wide_supervised", "SwinV2, 48 channels"),
)
SIZE = Grid(
  question="What size brings to a frozen backbone",
  rows=_EVERYTHING,
  variants=(*_WIDTHS, *_LITE),
  claims=(
    Claim("A larger SwinV2 is better when frozen", _labels(_WIDTHS[2:]), _labels(_WIDTHS[:1])),
    Claim("A larger EfficientNet-Lite is better when frozen", _labels(_LITE[2:]), _labels(_LITE[:1])),
  ),
)
_STRONG = {
  "detection": {"detection.neck.name": "bifpn", "detection.neck.repeats": 5},
  "action": {"action.head.depths": (4, 4)},
}
SHARED = Grid(
  question="The upper bound: one frozen network for all tasks, under the strongest heads",
  rows=_rows(*_HEADS_OF_TASKS),
  variants=(
    Variant(
      "efficientnet_lite2+strong", "efficientnet_lite2", "one frozen Lite2 for all tasks", changes=_STRONG
    ),
    Variant(
      "efficientnet_lite2+strong+everything",
      "efficientnet_lite2",
      "a Lite2 for each task, everything trains",
      changes={recipe: {**_STRONG.get(recipe, {}), "trainable": (".*",)} for recipe in _HEADS_OF_TASKS},
    ),
  ),
  claims=(
    Claim(
      "Networks that are fine-tuned for each task are better than one frozen network "
      "(2211.02043: by 2 to 5 points)",
      ("efficientnet_lite2+strong+everything",),
      ("efficientnet_lite2+strong",),
    ),
  ),
)

_DETECTORS = {
  "fpn": ("FPN", {}),
  "nas_fpn": ("NAS-FPN", recipes.NAS_FPN),
  "cascade": ("NAS-FPN, cascade", recipes.NAS_FPN | recipes.CASCADE),
}
_POLICIES = {
  "frozen": ("frozen", {}),
  "everything": ("fine-tuned", {"trainable": (".*",)}),
  "adapters": ("frozen, adapters", _ADAPTERS),
}


def _reuse(backbone: str, recipe: str, rows: tuple[str, ...]) -> Grid:
  """{frozen, fine-tuned, adapters} x {FPN, NAS-FPN, NAS-FPN and cascade}."""
  variants = tuple(
    Variant(
      f"{backbone}+{neck}+{policy}",
      backbone,
      f"{detector}, {words}",
      {recipe: {**necks, **options}},
    )
    for neck, (detector, necks) in _DETECTORS.items()
    for policy, (words, options) in _POLICIES.items()
  )

  def label(neck: str, policy: str) -> tuple[str, ...]:
    return (f"{backbone}+{neck}+{policy}",)

  # Rows by frequency stand beside the whole: the paper's gain is largest for rare classes.
  claims = [
    Claim(
      "With FPN, freezing hurts (2204.00484, table 1)", label("fpn", "everything"), label("fpn", "frozen")
    )
  ]
  for neck in ("nas_fpn", "cascade"):
    text = f"With {_DETECTORS[neck][0]}, freezing helps (2204.00484, tables 1 and 5)"
    claims.append(Claim(text, label(neck, "frozen"), label(neck, "everything")))
    text = f"With {_DETECTORS[neck][0]}, adapters help a frozen backbone (2204.00484, table 7)"
    claims.append(Claim(text, label(neck, "adapters"), label(neck, "frozen")))
  return Grid(
    question=f"Proper reuse of a frozen classifier: {backbone}, {recipes.REUSE[recipe].title.lower()}",
    rows={recipe: rows},
    variants=variants,
    claims=tuple(claims),
    known=recipes.REUSE,
  )


_LONG_TAIL_ROWS = ("box_AP", "box_AP_rare", "box_AP_common", "box_AP_frequent")
_TUNED = (*_LEARNT, _SIMMIM_FD, _MOCO_FD, _RANDOM)
_TUNED_ROWS = tuple(f"{recipe}/top1" for recipe in ("tuned_cifar10", "tuned_caltech101"))
_LINEAR_ROWS = tuple(f"{recipe}/linear" for recipe in ("probed_cifar10", "probed_caltech101"))
PRETRAINING_TUNED = Grid(
  question="Pretrainings and feature distillation: probed, and fine-tuned",
  rows={name: tuple(row.name for row in recipe.rows) for name, recipe in recipes.TRANSFER.items()},
  variants=_TUNED,
  claims=(
    Claim(
      "(a) Feature distillation raises fine-tuned accuracy (2205.14141)",
      _labels((_FD,)),
      _labels((_SUPERVISED,)),
      _TUNED_ROWS,
    ),
    Claim("(a) the same of MoCo v3", _labels((_MOCO_FD,)), _labels((_MOCO,)), _TUNED_ROWS),
    Claim(
      "(a) and may lower linear accuracy: the teacher's is higher",
      _labels((_SUPERVISED, _MOCO)),
      _labels((_FD, _MOCO_FD)),
      _LINEAR_ROWS,
    ),
    Claim(
      "(b) SimMIM gains little from it (2205.14141: 0.2 points): none is seen if this is open",
      _labels((_SIMMIM_FD,)),
      _labels((_SIMMIM,)),
      _TUNED_ROWS,
    ),
    Claim("Any pretraining is better than none", _labels(_LEARNT), _labels((_RANDOM,))),
  ),
  known=recipes.TRANSFER,
  about="Probes select the weight decay, fine-tuning the learning rate, on images that were held out.",
)

GRIDS = {
  "pretraining": PRETRAINING,
  "heads_detection": HEADS_DETECTION,
  "heads_segmentation": HEADS_SEGMENTATION,
  "heads_action": HEADS_ACTION,
  "inside": INSIDE,
  "size": SIZE,
  "shared": SHARED,
  "reuse_lite0": _reuse("efficientnet_lite0", "long_tail", _LONG_TAIL_ROWS),
  "reuse_nano": _reuse("swinv2_nano", "long_tail", _LONG_TAIL_ROWS),
  "reuse_lite0_coco": _reuse("efficientnet_lite0", "coco", ("box_AP", "box_AP50")),
  "reuse_nano_coco": _reuse("swinv2_nano", "coco", ("box_AP", "box_AP50")),
  "pretraining_tuned": PRETRAINING_TUNED,
}
