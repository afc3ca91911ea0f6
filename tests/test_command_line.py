"""Options on the command line: what they become, and one sentence about each that is wrong."""

import json
import pathlib

import pytest

from frozen_vision import command_line, config_files
from frozen_vision.options import Text
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import old_options
from tests import tiny

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def _load(config, *arguments):
  """The config of a command line, as `frozen_vision.main` reads it."""
  rest, changes = command_line.split(["main", *arguments])
  assert rest == ["main"], rest
  return config_files.load_config(_ROOT / config, changes)


def test_options_of_every_type():
  config = _load(
    "configs/coco_htc.py",
    "--config.steps=7",
    "--config.optimizer.learning_rate=1e-4",
    "--config.tensorboard=false",
    "--config.headline=one, two",
    "--config.trainable=neck/.*",
    "--config.detection.frame=(64, 96)",
    "--config.detection.head.sampling_ratio=none",
    "--config.detection.head.stage_stds=((1, 1, 2, 2),)",
    "--config.detection.head.stage_ious=0.5",
    "--config.detection.head.stage_loss_weights=(1,)",
    "--config.backbone.overrides.window_sizes=(4, 4, 4, 2)",
    "--config.detection.train={'annotations': 'a.json', 'images': 'i'}",
  )
  assert (config.steps, config.optimizer.learning_rate, config.tensorboard) == (7, 1e-4, False)
  assert (config.headline, config.trainable) == ("one, two", ("neck/.*",))
  assert config.detection.frame == (64, 96) and config.detection.head.sampling_ratio is None
  assert config.detection.head.stage_stds == ((1.0, 1.0, 2.0, 2.0),)
  assert config.detection.head.stage_ious == (0.5,)
  assert config.backbone.overrides == {"window_sizes": (4, 4, 4, 2)}
  assert config.detection.train.annotations == "a.json"


def test_the_forms_of_flags():
  rest, changes = command_line.split(
    ["--workdir=w", "--config.a.b", "3", "--config.c", "--noconfig.d", "-config.e=x=y", "--", "--config.f=1"]
  )
  assert rest == ["--workdir=w", "--", "--config.f=1"]
  assert changes == {"a.b": Text("3"), "c": Text("True"), "d": Text("False"), "e": Text("x=y")}


def test_the_last_of_two_values_counts_whatever_its_type():
  config = _load(
    "configs/coco_htc.py",
    "--config.steps=1",
    "--config.detection.frame=(32, 32)",
    "--config.trainable=head/.*",
    "--config.steps=2",
    "--config.detection.frame=(64, 64)",
    "--config.trainable=neck/.*",
  )
  assert (config.steps, config.detection.frame, config.trainable) == (2, (64, 64), ("neck/.*",))


def test_boxes_only_another_anchor_scale_and_another_neck():
  config = _load(
    "configs/coco_htc.py:recipe=files",
    "--config.detection.head.with_masks=False",
    "--config.detection.head.anchor_scales=(2, 4)",
    "--config.detection.neck.repeats=3",  # names count first, wherever they stand
    "--config.detection.neck.name=bifpn",
  )
  assert config.detection.head.with_masks is False and config.detection.head.anchor_scales == (2.0, 4.0)
  assert (config.detection.neck.name, config.detection.neck.repeats) == ("bifpn", 3)
  assert config.detection.neck.channels == 64  # what the recipe gives a neck of any name


def test_another_head_has_the_defaults_of_that_head_and_what_the_file_sets_for_it():
  config = _load("configs/coco_htc.py", "--config.detection.head.name=mask_rcnn")
  assert config.detection.head.stage_ious == (0.5,) and config.detection.head.fc_channels == 256
  config = _load("configs/ade20k_mask2former.py", "--config.segmentation.head.name=upernet")
  assert config.segmentation.head.channels == 64 and config.segmentation.head.dropout == 0.1
  assert config == _load("configs/ade20k_mask2former.py:head=upernet")
  # What a file sets for one name directly is not for another.
  config = tasks_build.read_config(tiny.detection()).replace({"detection.head.name": "htc"})
  assert config.detection.head.fc_channels == 1024 and len(config.detection.head.stage_ious) == 3


# One of each kind of option and of mistake, behind `--config.`, and how the message goes on behind `config.`.
_WRONG = {
  "stpes=3": "stpes: there is no such option; did you mean config.steps?",
  "optimizer.learning_rat=1": "optimizer.learning_rat: there is no such option; did you mean "
  "config.optimizer.learning_rate?",
  "optimiser.name=sgd": "optimiser.name: there is no such option; did you mean config.optimizer?",
  "steps.more=3": "steps.more: there is no such option; config.steps is a whole number of at least 1.",
  "detection.head.repeats=2": "detection.head.repeats: htc has no such option; ",
  "detection.neck.separable=True": "detection.neck.separable: fpn has no such option; "
  "--config.detection.neck.name=bifpn has it.",
  "optimizer=adamw": "optimizer is a section of options; ",
  "steps=many": "steps is 'many'; expected a whole number of at least 1.",
  "steps=1.5": "steps is 1.5; expected a whole number of at least 1.",
  "steps=-1": "steps is -1; expected a whole number of at least 1.",
  "eval_every=-1": "eval_every is -1; expected a whole number of at least 0.",
  "optimizer.learning_rate=fast": "optimizer.learning_rate is 'fast'; expected a number above 0.",
  "optimizer.learning_rate=0": "optimizer.learning_rate is 0; expected a number above 0.",
  "optimizer.weight_decay=1e999": "optimizer.weight_decay is inf; expected a number of at least 0.",
  "ema_decay=1.5": "ema_decay is 1.5; expected a number from 0 to 1.",
  "tensorboard=maybe": "tensorboard is 'maybe'; expected True or False.",
  "optimizer.name=lamb": "optimizer.name is 'lamb'; expected adamw, muon or sgd.",
  "frozen_dtype=float16": "frozen_dtype is 'float16'; expected float32, bfloat16 or int8.",
  "detection.head.name=rcnn": "detection.head.name is 'rcnn'; known: htc, cascade_mask_rcnn, mask_rcnn, "
  "tf_mask_rcnn, tf_cascade_mask_rcnn, retinanet.",
  "detection.frame=(64,)": "detection.frame is (64,); expected 2 values, each a whole number of at least 1.",
  "detection.frame=64x64": "detection.frame is '64x64'; expected 2 values, each ",
  "detection.head.anchor_scales=(8, -1)": "detection.head.anchor_scales is (8, -1); expected a tuple "
  "of values, each a number above 0.",
  "detection.head.sampling_ratio=two": "detection.head.sampling_ratio is 'two'; expected a whole number "
  "of at least 1 or None.",
  "trainable=neck/.*,head/.*": "trainable is 'neck/.*,head/.*'; put each text of several in quotes",
  "detection.train={'image': 'i'}": "detection.train.image: there is no such option; did you mean "
  "config.detection.train.images?",
  "detection.head.stage_ious=(0.5,)": "detection.head: per-stage fields must have one equal, ",
  "mesh.model=0": "mesh.model is 0; expected 1 or more, or -1 for the devices that are left.",
  "backbone.name=swinv2_x": "backbone: Unknown backbone 'swinv2_x'",
  "backbone.overrides.window_sise=4": "backbone: ",
  "backbone.overrides.drop_path_rate=much": "backbone.overrides.drop_path_rate is 'much'; expected a number.",
  "detection.head.htc.fc_chanels=3": "detection.head.htc.fc_chanels: htc has no such option; did you mean "
  "config.detection.head.htc.fc_channels?",
}


@pytest.mark.parametrize("argument", _WRONG)
def test_one_sentence_names_the_one_option_that_is_wrong(argument):
  with pytest.raises(ValueError) as caught:
    _load("configs/coco_htc.py", "--config.seed=1", f"--config.{argument}", "--config.log_every=2")
  message = str(caught.value)
  assert message.startswith(f"config.{_WRONG[argument]}") and len(message.splitlines()) == 1, message
  assert "config.seed" not in message and "config.log_every" not in message


@pytest.mark.parametrize(
  "arguments, message",
  [
    ("swinv2_x", "no variant 'swinv2_x'; known: :photos, .*recipe=demo|photos|overfit|files"),
    ("backbone=swinv2_x", "backbone is 'swinv2_x'; known: swinv2_t, swinv2_b, swinv2_l, swinv2_g"),
    ("backbon=swinv2_b", "no argument 'backbon'; known: recipe, backbone, stage, train, neck"),
    ("recipe=files,backbone=swinv2_b", "recipe=files has its own backbone; give recipe= or backbone="),
    ("stage=objects365", "stage= and train= need a SwinV2, such as backbone="),
    ("backbone=dinov3_vitl16,train=all", "stage= and train= need a SwinV2, such as backbone="),
    ("backbone=swinv2_b,neck=vit_adapter", "neck= needs a plain vision transformer, such as backbone="),
  ],
)
def test_arguments_of_a_config_that_do_not_fit(arguments, message):
  with pytest.raises(ValueError, match=f"^configs/coco_htc.py.*{message}"):
    _load(f"configs/coco_htc.py:{arguments}")


def test_arguments_go_together():
  config = _load("configs/coco_htc.py:backbone=swinv2_b,stage=objects365")
  assert config.backbone.name == "swinv2_b" and config.detection.data == "files"
  assert config.detection.head.with_masks is False and config.steps == 67_500


def test_paths_of_every_kind_know_the_home_folder(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  config = _load(
    "configs/coco_htc.py",
    "--config.detection.root=~/coco",
    "--config.detection.train.images=~/images",
    "--config.backbone.weights=~/b.pth",
    "--config.detection.init.path=~/head.safetensors",
  )
  assert config.detection.root == f"{tmp_path}/coco" and config.detection.train.images == f"{tmp_path}/images"
  assert config.backbone.weights == f"{tmp_path}/b.pth"
  assert config.detection.init.path == f"{tmp_path}/head.safetensors"
  (tmp_path / "mine.py").write_text((_ROOT / "configs" / "coco_htc.py").read_text())
  assert config_files.load_config("~/mine.py:recipe=files").detection.data == "files"
  for text, wanted in (
    ("~/run", f"{tmp_path}/run"),
    ("~/rate=0.1", f"{tmp_path}/rate=0.1"),
    ("act=~/run", f"act={tmp_path}/run"),
    ("act=~/rate=0.1", f"act={tmp_path}/rate=0.1"),
    (None, None),
  ):
    assert command_line.path(text) == wanted
  lists = _load("configs/kinetics_video_swin.py", "--config.action.lists=('~/a.csv', 'b.csv')").action.lists
  assert lists == (f"{tmp_path}/a.csv", "b.csv")


@pytest.mark.parametrize(
  "config, old, new",
  [
    ("coco_htc.py", ["detection.head=mask_rcnn"], ["detection.head.name=mask_rcnn"]),
    ("coco_htc.py", ["detection.head_options.roi_samples=9"], ["detection.head.roi_samples=9"]),
    (
      "ade20k_mask2former.py",
      ["segmentation.head=upernet", "segmentation.upernet.channels=32"],
      ["segmentation.head.name=upernet", "segmentation.head.channels=32"],
    ),
    ("ade20k_mask2former.py", ["segmentation.linear.levels=(0,)"], []),  # of a head that is not chosen
    ("coco_htc.py", ["detection.validation_share=0.3"], ["detection.validation_fraction=0.3"]),
    (
      "kinetics_video_swin.py",
      ["action.video_swin.motion_radius=1"],
      ["action.head.motion_radius=1"],
    ),
  ],
)
def test_old_options_do_what_they_did_and_say_their_new_name(config, old, new, caplog):
  with caplog.at_level("INFO"):
    found = _load(f"configs/{config}", *(f"--config.{text}" for text in old))
  assert found == _load(f"configs/{config}", *(f"--config.{text}" for text in new))
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == len(old)
  for text, line in zip(old, said):
    assert line.startswith(f"config.{text.partition('=')[0]} is called config.")


def test_the_config_of_an_old_run_is_read():
  """As `config.json` had it: a name and options apart, options of every head, a neck with those of both."""
  old = {
    "task": "detection",
    "steps": 7,
    "detection": {
      "head": "mask_rcnn",
      "head_options": {"anchor_scales": [4.0], "roi_samples": 8},
      "neck": {"name": "fpn", "channels": 8, "repeats": 1, "separable": False, "norm": "group"},
      "frame": [64, 64],
      "validation_share": 0.25,
    },
  }
  config = tasks_build.read_config(json.loads(json.dumps(old)), quiet=True)
  assert (config.detection.head.name, config.detection.head.roi_samples) == ("mask_rcnn", 8)
  assert config.detection.head.anchor_scales == (4.0,) and config.detection.neck.channels == 8
  assert config.detection.frame == (64, 64) and config.detection.validation_fraction == 0.25
  head = {"motion_radius": 2, "levels": [1, 2], "channels": [32, 32], "depths": [1, 1]}
  old = {"task": "action", "action": {"head": "video_swin", "video_swin": head, "average": {"levels": [2]}}}
  config = tasks_build.read_config(old, quiet=True)
  assert config.action.head.levels == (1, 2) and config.action.head.motion_radius == 2
  assert tasks_build.read_config(config.to_dict()) == config
  assert tasks_build.read_config(json.loads(json.dumps(config.to_dict()))) == config


def test_the_task_can_be_named_on_the_command_line():
  assert _load("configs/coco_htc.py", "--config.task=detection").task == "detection"
  with pytest.raises(ValueError, match="config.task is 'detect'; known: action, "):
    _load("configs/coco_htc.py", "--config.task=detect")


def test_an_old_config_file_is_translated_or_says_what_is_new(tmp_path):
  lines = [
    "from frozen_vision import config as config_lib",
    "from frozen_vision.tasks import detection, segmentation",
    "def get_config():",
    "  config = config_lib.base_config()",
    "  config.task = 'detection'",
    "  config.detection = detection.default_config()",
    "  config.detection.head = 'mask_rcnn'",
    "  config.detection.head_options = dict(roi_samples=8)",
    "  return config",
  ]
  path = tmp_path / "old.py"
  path.write_text("\n".join(lines))
  config = config_files.load_config(path, {"detection.head.fc_channels": 16})
  assert (config.detection.head.name, config.detection.head.roi_samples) == ("mask_rcnn", 8)
  assert config.detection.head.fc_channels == 16
  lines[4:8] = [
    "  config.task = 'segmentation'",
    "  config.segmentation = segmentation.default_config()",
    "  config.segmentation.mask2former.update(dict(num_queries=8))",
  ]
  path.write_text("\n".join(lines))
  with pytest.raises(
    ValueError, match="config.segmentation.mask2former is config.segmentation.head.mask2former"
  ):
    config_files.load_config(path)


def test_old_names_lead_to_options_that_exist():
  for task, (_, config_type) in tasks_build.TASKS.items():
    for old, new in old_options.RENAMED.items():
      if old.startswith(f"{task}."):
        assert hasattr(config_type().section, new.split(".")[1]), new
        assert not hasattr(config_type().section, old.split(".")[1]), old
