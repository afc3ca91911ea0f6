"""What transforms return is what `data/batches.py` says, for every task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.data import batches, pipeline
from frozen_vision.data.classification import augment
from frozen_vision.data.dense import sources
from frozen_vision.data.dense import transforms as dense_transforms
from frozen_vision.data.detection import copy_paste, transforms
from frozen_vision.data.generated import motion_clips, rooms, scenes, semantic_scenes
from frozen_vision.data.segmentation import transforms as segmentation_transforms
from frozen_vision.data.video import clips

_FRAME = (48, 60)


class _Images:
  """Records of classification."""

  def __len__(self):
    return 3

  def __getitem__(self, index):
    return {"image": np.full((20, 30, 3), index, np.uint8), "label": np.int32(index), "name": str(index)}


class _Semantic:
  """Scenes with a label map besides, as the semantic branch of HTC reads it."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    record = self._source[index]
    return {**record, "semantic": np.zeros(record["image"].shape[:2], np.uint8)}


def _detection(**options):
  return transforms.DetectionTrain(_FRAME, 7, **options)


_SCENES = scenes.SceneSource(5, split="train", image_size=64, seed=0)
_CLIPS = motion_clips.MotionClipSource(5, 4, 32, seed=0, split="train")
_MAPS = semantic_scenes.SemanticScenes(5, split="train", image_size=64, seed=0)
_SHORT = segmentation_transforms.RandomShortSide((40, 50), 100)

TRAIN = {
  "detection": (_SCENES, _detection(), batches.DetectionTrainBatch),
  "boxes only": (_SCENES, _detection(with_masks=False), batches.DetectionTrainBatch),
  "semantic": (_Semantic(_SCENES), _detection(semantic_stride=8), batches.DetectionTrainBatch),
  "copy-paste": (
    _SCENES,
    copy_paste.CopyPasteTrain(_detection(), _SCENES, 1.0),
    batches.DetectionTrainBatch,
  ),
  "segmentation": (
    _MAPS,
    segmentation_transforms.SegmentationTrain(_FRAME, 6, _SHORT),
    batches.SegmentationTrainBatch,
  ),
  "dense": (
    rooms.Rooms(5, 64),
    dense_transforms.DenseTrain(
      _FRAME,
      sources.TARGETS,
      segmentation_transforms.RandomShortSide((40, 50), 100, 1.0),
      segmentation_transforms.SegmentationEval(_FRAME),
    ),
    batches.DenseTrainBatch,
  ),
  "action": (_CLIPS, clips.TrainTransform(clips.Sampler(4, 1), 16), batches.ClipTrainBatch),
  "classification": (_Images(), augment.TrainTransform(16), batches.ClassificationBatch),
}
EVAL = {
  "detection": (
    _SCENES,
    transforms.MultiScaleEval((transforms.DetectionEval(_FRAME), transforms.DetectionEval((64, 64)))),
    batches.DetectionEvalBatch,
  ),
  "segmentation": (
    _MAPS,
    segmentation_transforms.SegmentationEval(_FRAME, scales=(1.0, 1.5)),
    batches.SegmentationEvalBatch,
  ),
  "action": (
    _CLIPS,
    clips.EvalTransform(clips.Sampler(4, 1), 16, num_clips=2, num_crops=3),
    batches.ClipEvalBatch,
  ),
  "classification": (_Images(), augment.EvalTransform(16), batches.ClassificationBatch),
}


@pytest.mark.parametrize("name", TRAIN)
def test_training_batches_are_as_described(name):
  source, transform, kind = TRAIN[name]
  assert batches.mismatches(transform(source[0], np.random.default_rng(0)), kind) == []
  with pipeline.train_batches(source, transform, batch_size=2, seed=0) as iterator:
    batch = next(iterator)
  assert batches.mismatches(batch, kind) == []
  assert set(batch) - set(kind.__required_keys__) <= {"index", "masks", "semantic", "normals", "depth"}
  narrow = {key: value for key, value in batch.items() if value.dtype.itemsize < 8}
  assert batches.mismatches(jax.tree.map(jnp.asarray, narrow), kind) == []


@pytest.mark.parametrize("name", EVAL)
def test_evaluation_batches_are_as_described(name):
  source, transform, kind = EVAL[name]
  with pipeline.eval_batches(source, transform, batch_size=2) as iterator:
    *_, last = iterator
  assert batches.mismatches(last, kind) == []
  assert last["example_valid"].tolist() == [True, len(source) % 2 == 0]


def test_differences_are_named():
  source, transform, kind = TRAIN["detection"]
  example = transform(source[0], np.random.default_rng(0))
  del example["valid"]
  example |= {"boxes": example["boxes"].astype(np.float64), "mask": 0, "labels": example["labels"][:3]}
  found = " ".join(batches.mismatches(example, kind))
  assert "valid is absent" in found
  assert "boxes is float64[7, 4]; expected float32 [*b n 4]" in found
  assert "mask is no key of DetectionTrainBatch" in found
  example = transform(source[0], np.random.default_rng(0))
  example["labels"] = example["labels"][:3]
  assert "labels is int32[3]" in " ".join(batches.mismatches(example, kind))
