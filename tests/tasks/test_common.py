"""What tasks share: classes of training and validation data, the line that says what will run."""

import pytest

from frozen_vision.backbones import base, families
from frozen_vision.layers import storage
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import common
from tests import tiny


def test_validation_data_must_have_the_classes_of_the_training_data():
  classes = common.shared_classes(["cat", "dog"], ("cat", "dog"), ("train", "val"))
  assert classes == ({"id": 0, "name": "cat"}, {"id": 1, "name": "dog"})
  letters = list("abcdefg")
  for other, differs in (
    (letters[:6], "6 classes in place of 7: it lacks 'g'."),
    (letters[::-1], "the same names in another order (class 0 is 'g', expected 'a')."),
  ):
    with pytest.raises(ValueError) as caught:
      common.shared_classes(letters, other, ("lists/train.csv", "lists/val.csv"), "Put a list beside them.")
    message = str(caught.value)
    assert message.startswith(
      f"lists/val.csv does not have the classes of lists/train.csv, but {differs} Both must"
    )
    assert message.endswith("in the same order. Put a list beside them.")


def test_a_task_that_pretrains_refuses_a_backbone_of_which_nothing_trains():
  config = tasks_build.read_config(tiny.masked_image_modeling())
  sizes = families.backbone_config("swinv2_nano", **config.backbone.overrides)
  backbone = base.abstract(families.family_of("swinv2_nano").module, sizes)
  common.check_backbone_trains(backbone, config)
  common.check_backbone_trains(
    backbone, config.replace({"trainable": ("backbone/stages/3/.*", "decoder/.*")})
  )
  frozen = config.replace({"trainable": ("decoder/.*", "mask_token")})
  for program in (backbone, storage.shapes(backbone)):  # as with backbone.fold=False, and folded
    with pytest.raises(ValueError, match="nothing of the backbone would train. Set --config.trainable"):
      common.check_backbone_trains(program, frozen)


def test_headline():
  line = common.headline("Detection", range(20000), range(200), "abc")
  assert line == "Detection: 20,000 training and 200 validation images, 3 classes."
