"""Label maps beside instances: read strictly, moved with the image, pasted with the objects."""

import json

from flax import nnx
import jax
import numpy as np
from PIL import Image
import pytest

from frozen_vision.data import images
from frozen_vision.data.detection import copy_paste, semantic_maps, transforms
from frozen_vision.tasks import build as tasks_build
from tests import paths, tiny


class OneImage:
  """An image whose red channel is the class of each pixel, in blocks of 8 pixels."""

  categories = ()

  def __init__(self, classes):
    pixels = np.repeat(np.repeat(classes, 8, axis=0), 8, axis=1).astype(np.uint8)
    self.record = {
      "image": np.stack([pixels] * 3, -1),
      "file_name": "folder/one.jpg",
      "height": pixels.shape[0],
      "width": pixels.shape[1],
      "boxes": np.zeros((0, 4)),
      "labels": np.zeros(0, int),
    }

  def __len__(self):
    return 1

  def __getitem__(self, index):
    return self.record


def _source(tmp_path, classes, *, labels=None, **options):
  source = OneImage(classes)
  (tmp_path / "folder").mkdir(exist_ok=True)
  labels = source.record["image"][..., 0] if labels is None else labels
  Image.fromarray(labels).save(tmp_path / "folder" / "one.png")
  return semantic_maps.WithSemanticMaps(source, tmp_path, **(dict(num_classes=5) | options))


_CLASSES = np.random.default_rng(0).integers(0, 5, (5, 7))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_labels_move_with_the_image(tmp_path, flip):
  source = _source(tmp_path, _CLASSES)
  place = transforms.DetectionTrain(
    (52, 61), 1, transforms.ResizeToLimits(40), flip_probability=flip, with_masks=False, semantic_stride=8
  )
  found = place(source[0], np.random.default_rng(0))
  assert found["semantic"].shape == (7, 8) and found["semantic"].dtype == np.uint8
  np.testing.assert_array_equal(found["semantic"][:5, :7], _CLASSES[:, ::-1] if flip else _CLASSES)
  np.testing.assert_array_equal(found["semantic"][:5, :7], found["image"][:40:8, :56:8, 0])
  padding = np.ones((7, 8), bool)
  padding[:5, :7] = False
  assert (found["semantic"][padding] == 255).all()
  # At another scale too, every label is that of its pixel, away from the borders between blocks.
  place = transforms.DetectionTrain(
    (120, 120), 1, transforms.ResizeToLimits(), with_masks=False, semantic_stride=4
  )
  found = place(source[0], np.random.default_rng(0))
  height, width = found["image_size"]
  seen = found["image"][:height:4, :width:4, 0]
  labels = found["semantic"][: seen.shape[0], : seen.shape[1]]
  assert (labels == seen).mean() > 0.8


def test_pasted_pixels_bring_their_labels():
  def example(label, box):
    mask = np.zeros((1, 36, 50), bool)
    mask[0, box[1] : box[3], box[0] : box[2]] = True
    return {
      "image": np.full((36, 50, 3), label, np.uint8),
      "image_size": np.array([36, 50]),
      "boxes": np.array([box], np.float32),
      "labels": np.array([label]),
      "masks": np.packbits(mask, axis=-1),
      "valid": np.array([True]),
      "semantic": np.full((5, 7), label, np.uint8),
    }

  target, source = example(1, [0, 0, 4, 4]), example(2, [8, 8, 33, 17])
  target["valid"][:] = False

  class Always(np.random.Generator):
    integers = staticmethod(lambda low, high: high - 1)
    choice = staticmethod(lambda values, size, replace: values[:size])

  found = copy_paste.copy_paste(target, source, Always(np.random.PCG64(0)))
  expected = np.ones((5, 7))
  expected[1:3, 1:5] = 2
  np.testing.assert_array_equal(found["semantic"], expected)
  np.testing.assert_array_equal(found["semantic"], found["image"][::8, ::8, 0])
  assert (target["semantic"] == 1).all()


def test_errors_name_the_map(tmp_path):
  with pytest.raises(
    images.ImageError, match=r"one.png \(the semantic map of folder/one.jpg\).*outside of the class list: 4"
  ):
    _source(tmp_path, np.full((2, 2), 4), num_classes=4)[0]
  assert (_source(tmp_path, np.full((2, 2), 4), num_classes=4, ignored=(4,))[0]["semantic"] == 255).all()
  with pytest.raises(
    images.ImageError, match=r"is 16 x 8 pixels \(height x width\), and its image is 16 x 16"
  ):
    _source(tmp_path, np.zeros((2, 2)), labels=np.zeros((16, 8), np.uint8))[0]
  source = _source(tmp_path, np.zeros((2, 2)))
  (tmp_path / "folder" / "one.png").unlink()
  with pytest.raises(images.ImageError, match="one.png"):
    source[0]
  with pytest.raises(FileNotFoundError, match="no such folder of semantic maps"):
    semantic_maps.WithSemanticMaps(OneImage(_CLASSES), tmp_path / "absent", num_classes=3)


@pytest.mark.parametrize("options", [{"head.semantic_classes": 4}, {"semantic.maps": "."}])
def test_classes_and_maps_go_together(options):
  config = tiny.detection()
  config.detection.head.semantic_classes = 0
  config.update_from_flattened_dict({f"detection.{key}": value for key, value in options.items()})
  with pytest.raises(ValueError, match="semantic_classes is .*, detection.semantic.maps is"):
    tasks_build.build_task(config)


def test_maps_of_real_images_reach_the_batch(tmp_path):
  """The panoptic sample, whose maps hold category ids: a category is where its objects' boxes are."""
  root = paths.data_dir("coco_panoptic")
  panoptic = json.loads((root / "annotations" / "panoptic_train2017.json").read_text())
  things = {c["id"]: c for c in panoptic["categories"] if c["isthing"]}
  annotations, chosen = [], panoptic["images"][:6]
  for entry in panoptic["annotations"]:
    if entry["image_id"] in {image["id"] for image in chosen}:
      annotations += [
        dict(
          id=len(annotations) + i + 1,
          image_id=entry["image_id"],
          **{key: segment[key] for key in ("category_id", "bbox", "area", "iscrowd")},
        )
        for i, segment in enumerate(entry["segments_info"])
        if segment["category_id"] in things
      ]
  path = tmp_path / "boxes.json"
  path.write_text(json.dumps(dict(images=chosen, annotations=annotations, categories=list(things.values()))))
  config = tiny.detection()
  config.batch_size = 8
  options = config.detection
  for split in ("train", "validation"):
    options[split].update(dict(annotations=str(path), images=str(root / "train2017" / "images")))
  options.data = "files"
  options.frame = (256, 256)
  options.max_objects = 40
  options.head.update(dict(with_masks=False, semantic_classes=201))
  options.semantic.update(dict(maps=str(root / "train2017" / "semantic"), ignored=(0,)))
  task = tasks_build.build_task(config)
  with task.train_batches(0) as batches:
    batch = next(batches)
  assert batch["semantic"].shape == (8, 32, 32) and batch["semantic"].dtype == np.uint8
  categories = [category["id"] for category in task._train.categories]
  inside, covered = [], []
  for labels, boxes, classes, valid in zip(*(batch[key] for key in ("semantic", "boxes", "labels", "valid"))):
    for label in set(classes[valid]):
      union = np.zeros(labels.shape, bool)
      for x1, y1, x2, y2 in boxes[valid & (classes == label)] / 8:
        union[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
      pixels = labels == categories[label]
      if pixels.sum() > 20:
        inside.append((pixels & union).sum() / pixels.sum())
        covered.append(union.mean())
  assert len(inside) >= 5 and np.mean(inside) > 0.95 and np.mean(covered) < 0.7, (inside, covered)


def test_a_step_learns_from_the_maps():
  """The batch's labels are of the size that the semantic branch predicts, and give a loss."""
  config = tiny.detection()
  options = config.detection
  options.head.update(dict(semantic_classes=6, semantic_channels=8, semantic_convs=1, box_roi_size=7))
  options.semantic.maps = "."
  task = tasks_build.build_task(config)
  graphdef, state = nnx.split(nnx.eval_shape(task.build_model))
  shape = jax.ShapeDtypeStruct
  batch = dict(
    image=shape((1, 64, 64, 3), "uint8"),
    image_size=shape((1, 2), "int32"),
    boxes=shape((1, 8, 4), "float32"),
    labels=shape((1, 8), "int32"),
    masks=shape((1, 8, 64, 8), "uint8"),
    valid=shape((1, 8), "bool"),
    semantic=shape((1, 8, 8), "uint8"),
  )

  def loss(state, batch):
    model = nnx.merge(graphdef, state)
    return task.loss(model, batch, task.features(model, batch, None), jax.random.key(0), None)

  assert "semantic" in jax.eval_shape(loss, state, batch).terms
