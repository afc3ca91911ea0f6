"""The detection task: testing on several views, hard images, training without masks, starting from a head
file."""

import functools
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from frozen_vision.backbones import families
from frozen_vision.data.detection import transforms
from frozen_vision.files import trees
from frozen_vision.freezing import partition as freeze
from frozen_vision.heads import files as head_weights
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import step as train_step
from tests import tiny

SIZE = (48, 64)  # of the images; frames are larger, so there is padding
TWO_STAGES = dict(
  stage_ious=(0.5, 0.6), stage_stds=((0.1, 0.1, 0.2, 0.2),) * 2, stage_loss_weights=(1.0, 0.5)
)


def _task(**changes):
  """HTC of two stages; `changes` of config.detection by dotted name."""
  config = tiny.detection()
  config.detection.head.name = "htc"
  config.detection.head.update(dict(TWO_STAGES, mask_roi_size=7, fc_channels=32))
  config.detection.scenes.image_size = 64
  config.update_from_flattened_dict({f"detection.{key}": value for key, value in changes.items()})
  return tasks_build.build_task(config)


@functools.cache
def _parts():
  """(graphdef, state) of a detector whose scores differ clearly from roi to roi."""
  model = _task().build_model()
  for head in model.head.box_heads:
    head.classes.kernel[...] = 30 * head.classes.kernel[...]
    head.boxes.kernel[...] = 100 * head.boxes.kernel[...]
  return nnx.split(model)


def _record(pixels):
  return {"image": pixels, "image_id": 1, "boxes": np.zeros((0, 4)), "labels": np.zeros(0, int)}


def _pixels(seed=0):
  """Smooth noise: after resizing, it is still the mirror image of itself mirrored, to rounding."""
  coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3)).astype(np.uint8)
  return np.asarray(Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC))


def _predict(task, *images):
  """The task's compiled prediction for a batch of images, loaded as the task loads them."""
  load = transforms.MultiScaleEval(task._scales)
  batch = jax.tree.map(lambda *rows: np.stack(rows), *map(load, map(_record, images)))
  graphdef, state = _parts()

  @jax.jit
  def predict(state, batch):
    model = nnx.merge(graphdef, state)
    return task.predict(model, batch, task.features(model, batch, None))

  return jax.tree.map(np.asarray, predict(state, train_step.device_batch(batch))), batch


def test_one_scale_is_plain_prediction():
  """Bit for bit what the head's two steps give on one view that was loaded alone."""
  frame = (64, 96)
  images = _pixels()[:40, :50], _pixels(), _pixels()[:, ::-1]
  found, batch = _predict(_task(**{"test.short_sides": (60,), "test.frames": (frame,)}), *images)
  load = transforms.DetectionEval(frame, transforms.ResizeToLimits(60))
  alone = jax.tree.map(lambda *rows: np.stack(rows), *map(load, map(_record, images)))
  assert set(alone) == set(batch)
  np.testing.assert_array_equal(alone["image"], batch["image"])
  graphdef, state = _parts()

  @jax.jit
  def plain(state, image, image_size):
    model = nnx.merge(graphdef, state)
    pyramid = model.neck(model.backbone(model.backbone.preprocessing.normalise(image, image_size)))
    detections = model.head.predict_boxes(pyramid, image_size)
    masks = model.head.predict_masks(pyramid, detections["boxes"], detections["labels"])
    return detections | {"masks": masks}

  wanted = plain(state, alone["image"], alone["image_size"])
  assert wanted["valid"].any() and len(np.unique(wanted["scores"])) > 3
  assert set(found) == set(wanted)
  for name in wanted:
    np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
  # An image and its mirror image differ, which is what testing mirrored views is about.
  assert np.abs(found["scores"][1] - found["scores"][2]).max() > 0.02


def test_testing_a_mirrored_image_gives_the_mirrored_result():
  task = _task(
    **{
      "test.short_sides": (0, 80),
      "test.frames": ((64, 64), (96, 128)),
      "test.sizes": ("sml", "sm"),
      "test.flip": True,
      "test.max_detections": 8,
    }
  )
  image = _pixels()
  found, batch = _predict(task, image, image[:, ::-1])
  assert {"image.1", "image_size.1"} <= set(batch) and found["valid"].shape == (2, 8)
  assert found["valid"].all()
  width = batch["image_size"][0, 1]
  boxes, (x1, y1, x2, y2) = found["boxes"], np.moveaxis(found["boxes"][1], -1, 0)
  np.testing.assert_allclose(found["scores"][0], found["scores"][1], atol=2e-3)
  np.testing.assert_array_equal(found["labels"][0], found["labels"][1])
  np.testing.assert_allclose(boxes[0], np.stack([width - x2, y1, width - x1, y2], -1), atol=0.1)
  np.testing.assert_allclose(found["masks"][0], found["masks"][1, :, :, ::-1], atol=5e-3)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"test.short_sides": (60, 80), "test.frames": ((64, 64),)}, "2 short_sides, 1 frames and 2 sizes"),
    ({"test.frames": ((64, 64),)}, "0 short_sides, 1 frames"),
    ({"test.sizes": ("s", "l")}, "1 short_sides, 1 frames and 2 sizes"),
    ({"test.sizes": ("xl",)}, "'xl'; expected some of the letters 'sml'"),
    ({"copy_paste": 1.5}, "copy_paste is 1.5"),
    ({"copy_paste": 0.5, "head.with_masks": False}, "copy_paste is 0.5, and only boxes are trained"),
  ],
)
def test_options_that_do_not_fit(changes, message):
  with pytest.raises(ValueError, match=message):
    task = tiny.detection()
    task.detection.head.with_masks = True
    task.update_from_flattened_dict({f"detection.{key}": value for key, value in changes.items()})
    tasks_build.build_task(task)


# Images that break detectors: boxes and whether each is a crowd.
HARD = {
  "no objects": ([], ()),
  "one object covering everything": ([[0, 0, 64, 48]], (0,)),
  "300 objects": ([[x, y, x + 13, y + 11] for y in range(0, 30, 2) for x in range(0, 40, 2)], (0,) * 300),
  "crowds alone": ([[4, 4, 40, 40], [0, 0, 64, 48]], (1, 1)),
}


@pytest.fixture(scope="module")
def hard_steps():
  """{name: (batch, losses and metrics, gradients by path)} of one compiled step, and that step."""
  task = _task(max_objects=300)
  model = task.build_model()
  graphdef, trainable, frozen = freeze.partition(model, ("neck/.*", "head/.*"))
  place = transforms.DetectionTrain((64, 64), 300, transforms.ResizeToLimits(), flip_probability=0.0)
  keys = jax.random.split(jax.random.key(0), 4)
  features = tuple(
    jax.random.normal(key, (1, 64 // spec.stride, 64 // spec.stride, spec.channels))
    for key, spec in zip(keys, model.backbone.feature_specs)
  )

  @jax.jit
  def step(trainable, batch):
    def loss(trainable):
      model = nnx.merge(graphdef, trainable, frozen)
      losses = task.loss(model, batch, features, jax.random.key(1), None)
      return losses.total, losses.terms

    return jax.value_and_grad(loss, has_aux=True)(trainable)

  results = {}
  for name, (boxes, crowd) in HARD.items():
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    masks = np.zeros((len(boxes), *SIZE), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int)):
      mask[y1:y2, x1:x2] = True
    record = _record(_pixels()) | dict(
      boxes=boxes, labels=np.arange(len(boxes)) % 6, masks=masks, crowd=np.array(crowd, bool)
    )
    example = place(record, np.random.default_rng(0))
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], example)
    (_, scalars), gradients = step(trainable, batch)
    results[name] = batch, jax.device_get(scalars), trees.flatten(gradients)
  return results, step


@pytest.mark.parametrize("name", HARD)
def test_hard_images_give_finite_losses_and_gradients(hard_steps, name):
  results, _ = hard_steps
  batch, scalars, gradients = results[name]
  count = {"300 objects": 300, "one object covering everything": 1}.get(name, 0)
  assert int(batch["valid"].sum()) == count
  assert all(np.isfinite(value) for value in scalars.values())
  assert all(np.isfinite(leaf).all() for leaf in gradients.values())
  positive = ("rpn_box", "stage0_box", "stage0_mask", "stage1_box", "stage1_mask")
  assert all((scalars[key] > 0) == bool(count) for key in positive), scalars
  assert all(scalars[key] > 0 for key in ("rpn_class", "stage0_class", "stage1_class"))


@pytest.mark.parametrize("name", ["no objects", "crowds alone"])
def test_absent_objects_send_no_gradient(hard_steps, name):
  _, scalars, gradients = hard_steps[0][name]
  silent = ("head/rpn/deltas/", "head/mask_heads/", "head/box_heads/0/boxes/", "head/box_heads/1/boxes/")
  for path, leaf in gradients.items():
    if path.startswith(silent):
      assert not np.any(leaf), path
  # What says "there is nothing here" still learns.
  for path in (
    "head/rpn/objectness/kernel",
    "head/box_heads/0/classes/kernel",
    "head/box_heads/1/fcs/0/kernel",
  ):
    assert np.any(gradients[path]), path
  # A crowd is no target: it is as if it were not there.
  _, wanted, expected = hard_steps[0]["no objects"]
  assert scalars == wanted
  for path in expected:
    np.testing.assert_array_equal(gradients[path], expected[path], err_msg=path)


def test_hard_images_run_in_one_program(hard_steps):
  assert hard_steps[1]._cache_size() == 1


def _boxes_only(tmp_path):
  """A COCO file of two images whose annotations have boxes and no masks, as Objects365's."""
  images, annotations = [], []
  for i in range(2):
    Image.fromarray(_pixels(i)).save(tmp_path / f"{i}.png")
    images.append(dict(id=i + 1, file_name=f"{i}.png", height=SIZE[0], width=SIZE[1]))
    annotations.append(
      dict(id=i + 1, image_id=i + 1, category_id=7, bbox=[4, 4, 30, 30], area=900, iscrowd=0)
    )
  path = tmp_path / "boxes.json"
  path.write_text(
    json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=7, name="thing")]))
  )
  return path


def test_annotations_without_masks_train_boxes_by_themselves(tmp_path):
  config = tiny.detection()
  path = str(_boxes_only(tmp_path))
  for split in ("train", "validation"):
    config.detection[split].update(dict(annotations=path, images=str(tmp_path)))
  config.detection.data = "files"
  task = tasks_build.build_task(config)
  assert "Boxes only" in task.headline
  with task.train_batches(0) as batches:
    batch = train_step.device_batch(next(batches))
  assert "masks" not in batch and batch["valid"].sum(1).tolist() == [1, 1]
  graphdef, state = nnx.split(nnx.eval_shape(task.build_model))

  def loss(state, batch):
    model = nnx.merge(graphdef, state)
    return task.loss(model, batch, task.features(model, batch, None), jax.random.key(0), None)

  losses = jax.eval_shape(loss, state, batch)
  assert not [name for name in {**losses.terms, **losses.metrics} if "mask" in name]
  evaluation = task.evaluations["val"]
  with evaluation.batches() as batches:
    batch = next(batches)

  def predict(state, batch):
    model = nnx.merge(graphdef, state)
    return task.predict(model, batch, task.features(model, batch, None))

  found = jax.eval_shape(predict, state, train_step.device_batch(batch))
  assert set(found) == {"boxes", "scores", "labels", "valid"}
  evaluator = evaluation.evaluator()
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), found)
  evaluator.update(zeros, batch)
  assert evaluator.result()["box_AP"] == 0 and "mask_AP" not in evaluator.result()
  assert evaluation.pictures(zeros, batch, 2)["predictions"].ndim == 3
  assert task.best_metric == "box_AP"


def _head_file(task, path):
  """A file of the task's neck and head with other numbers than it starts from."""
  state = nnx.state(task.build_model())
  arrays = {
    name: np.random.default_rng(i).standard_normal(leaf.shape).astype(np.float32)
    for i, (name, leaf) in enumerate(trees.flatten(state).items())
    if name.startswith(("neck/", "head/"))
  }
  head_weights.save(path, arrays, source="a test")
  return arrays


def test_a_run_starts_from_a_head_file(tmp_path, caplog):
  path = tmp_path / "head.safetensors"
  plain = _task()
  arrays = _head_file(plain, path)
  before = trees.flatten(nnx.state(plain.build_model()))
  keep = ("neck/laterals/.*", "head/.*/(classes|logits)/.*")
  with caplog.at_level("INFO"):
    found = trees.flatten(nnx.state(_task(**{"init.path": str(path), "init.keep": keep}).build_model()))
  kept = {
    name for name in arrays if name.startswith("neck/laterals/") or "/classes/" in name or "/logits/" in name
  }
  assert kept and set(found) == set(before)
  for name, leaf in found.items():
    wanted = before[name] if name in kept or name.startswith("backbone/") else arrays[name]
    np.testing.assert_array_equal(leaf, wanted, err_msg=name)
  for name in kept:  # said twice: ours stays, the file's is not used
    assert caplog.text.count(f"  {name}") == 2, name


def test_a_head_file_that_does_not_fit_is_refused(tmp_path):
  path = tmp_path / "head.safetensors"
  _head_file(_task(), path)
  with pytest.raises(ValueError) as error:
    _task(**{"init.path": str(path), "head.fc_channels": 4, "neck.input_norm": False}).build_model()
  text = str(error.value)
  assert "a test" in text and "unexpected neck/norms/0/scale (8,)" in text
  assert "head/box_heads/1/fcs/1/kernel has shape (32, 32), expected (4, 4)" in text
  with pytest.raises(ValueError, match="'head/maks.*' matches no parameter"):
    _task(**{"init.path": str(path), "init.keep": ("head/maks.*",)}).build_model()
  with pytest.raises(ValueError, match="missing head/mask_heads/1/flow/kernel"):
    _head_file(_task(**{"head.mask_info_flow": False}), path)
    _task(**{"init.path": str(path)}).build_model()
  with pytest.raises(FileNotFoundError, match="config.detection.init.path"):
    _task(**{"init.path": str(tmp_path / "absent.safetensors")}).build_model()
  other = tmp_path / "backbone.safetensors"
  families.save_backbone(_task().build_model().backbone, other, name="small")
  with pytest.raises(ValueError, match="is no file of a neck and a head"):
    _task(**{"init.path": str(other)}).build_model()
