"""Image, boxes and masks stay together through `data/transforms.py`, in fixed shapes."""

import io

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
import pytest

from frozen_vision.data.detection import transforms

# Colour of object i; the background is black. Objects are rectangles, xyxy.
_COLOURS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], np.uint8)
_BOXES = np.array([[10, 8, 50, 40], [60, 30, 118, 78], [4, 50, 40, 76]], np.float32)
_SIZE = (80, 120)


def make_record(boxes=_BOXES, size=_SIZE, kind="bitmaps"):
  """A picture of coloured rectangles, annotated as bitmaps, polygons, or run lengths."""
  image = np.zeros((*size, 3), np.uint8)
  masks = np.zeros((len(boxes), *size), bool)
  for i, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
    image[y1:y2, x1:x2] = _COLOURS[i % 4]
    masks[i, y1:y2, x1:x2] = True
  record = {
    "image": image,
    "image_id": 7,
    "height": size[0],
    "width": size[1],
    "boxes": boxes,
    "labels": np.arange(len(boxes), dtype=np.int32),
    "crowd": np.zeros(len(boxes), bool),
  }
  if kind == "bitmaps":
    return record | {"masks": masks}
  if kind == "polygons":
    polygons = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()]
    return record | {"segmentations": polygons}
  runs = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
  return record | {"segmentations": runs}


def unpack(example):
  width = example["image"].shape[1]
  return np.unpackbits(example["masks"], axis=-1, count=width).astype(bool)


def tight(mask):
  ys, xs = np.nonzero(mask)
  return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def check(example, tolerance):
  """Masks lie inside the content and their boxes, and on the colour of their object."""
  height, width = example["image_size"]
  masks = unpack(example)
  assert not example["image"][height:].any() and not example["image"][:, width:].any()
  assert not masks[:, height:].any() and not masks[:, :, width:].any()
  for i, mask in enumerate(masks):
    if not example["valid"][i]:
      assert not mask.any() and not example["boxes"][i].any() and not example["labels"][i]
      continue
    box = example["boxes"][i]
    assert (box[:2] >= 0).all() and box[2] <= width and box[3] <= height
    np.testing.assert_allclose(tight(mask), box, atol=tolerance)
    colour = _COLOURS[example["labels"][i] % 4].astype(int)
    right = np.abs(example["image"].astype(int) - colour).max(-1) < 100
    # Only the outline may be mixed with the background or a pixel off.
    outline = 2 * (np.ptp(box[[0, 2]]) + np.ptp(box[[1, 3]]))
    assert (mask & ~right).sum() <= outline and (right & ~mask).sum() <= outline
  return masks


@pytest.mark.parametrize("kind", ["bitmaps", "polygons", "runs"])
def test_flip_moves_all_three(kind):
  record = make_record(kind=kind)
  keep = transforms.ResizeToLimits(short_side=80)
  frame = (96, 136)
  plain, flipped = (
    transforms.DetectionTrain(frame, 5, keep, flip_probability=p)(record, np.random.default_rng(0))
    for p in (0.0, 1.0)
  )
  np.testing.assert_array_equal(plain["image"][:80, :120], record["image"])
  np.testing.assert_array_equal(plain["boxes"][:3], _BOXES)
  np.testing.assert_array_equal(flipped["image"][:80, :120], record["image"][:, ::-1])
  np.testing.assert_array_equal(
    flipped["boxes"][:3],
    np.stack([120 - _BOXES[:, 2], _BOXES[:, 1], 120 - _BOXES[:, 0], _BOXES[:, 3]], axis=1),
  )
  for example in (plain, flipped):
    check(example, tolerance=0.0)
    np.testing.assert_array_equal(example["valid"], [True, True, True, False, False])
    np.testing.assert_array_equal(example["labels"], [0, 1, 2, 0, 0])
  np.testing.assert_array_equal(unpack(plain)[:, :80, :120], unpack(flipped)[:, :80, :120][:, :, ::-1])


@pytest.mark.parametrize("kind", ["bitmaps", "polygons", "runs"])
def test_large_scale_jitter_keeps_image_boxes_and_masks_together(kind):
  record = make_record(kind=kind)
  transform = transforms.DetectionTrain((64, 72), 4)
  sizes, objects = [], []
  for seed in range(60):
    example = transform(record, np.random.default_rng(seed))
    # Sources of 1 pixel become `scale` pixels, which is as far as a nearest pixel can be off.
    check(example, tolerance=1.5)
    sizes.append(example["image_size"])
    objects.append(example["valid"].sum())
  sizes = np.array(sizes)
  assert sizes[:, 0].min() < 20 and (sizes == (64, 72)).all(axis=1).any()
  assert set(objects) >= {1, 2, 3}
  assert np.array_equal(
    transform(record, np.random.default_rng(3))["image"],
    transform(record, np.random.default_rng(3))["image"],
  )


def test_window_equals_a_crop_of_the_whole_resized_image():
  image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
  for resized in ((75, 105), (20, 28)):
    whole = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.Resampling.BILINEAR))
    window = transforms.Geometry((50, 70), resized, 6, 5, (11, 13)).move_image(image)
    difference = np.abs(window.astype(int) - whole[6:17, 5:18])
    assert difference.max() <= 2  # Pillow rounds its weights and, between its two passes, pixels


def test_polygon_raster_equals_the_full_frame():
  generator = np.random.default_rng(1)
  for _ in range(20):
    # Corners far outside of the window as well; halves are exact in binary.
    polygon = (generator.integers(-40, 160, 10) / 2).tolist()
    geometry = transforms.Geometry((60, 60), (60, 60), 10, 20, (30, 35))
    full = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([[p + 100 for p in polygon]], 300, 300)))
    expected = full[110:140, 120:155].astype(bool)
    patch, found = geometry.move_polygons([polygon]), np.zeros((30, 35), bool)
    found[patch.top :, patch.left :][: patch.bits.shape[0], : patch.bits.shape[1]] = patch.bits
    np.testing.assert_array_equal(found, expected)
    packed = np.zeros((30, 5), np.uint8)
    patch.pack_into(packed)
    np.testing.assert_array_equal(packed, np.packbits(expected, axis=-1))
    if expected.any():
      np.testing.assert_array_equal(patch.box(), tight(expected))


def test_cut_objects_get_the_box_of_what_is_left():
  # An L: its upper bar reaches right, so a cut through the bar leaves a narrower box below.
  masks = np.zeros((1, 40, 40), bool)
  masks[0, 5:10, 5:35] = True
  masks[0, 5:35, 5:10] = True
  record = make_record(np.array([[5, 5, 35, 35]], np.float32), (40, 40)) | {"masks": masks}
  geometry = transforms.Geometry((40, 40), (40, 40), 15, 0, (25, 40))
  boxes, labels, moved = transforms._targets(record, geometry, 1.0, True)
  np.testing.assert_array_equal(boxes, [[5, 0, 10, 20]])
  assert moved[0].bits.sum() == 5 * 20 and len(labels) == 1
  geometry = transforms.Geometry((40, 40), (40, 40), 20, 20, (20, 20))
  assert len(transforms._targets(record, geometry, 1.0, True)[0]) == 0, "nothing visible is left"


def test_crowds_are_dropped_and_the_largest_objects_kept():
  record = make_record()
  record["crowd"] = np.array([False, True, False])
  keep = transforms.ResizeToLimits()
  example = transforms.DetectionTrain(_SIZE, 4, keep)(record, np.random.default_rng(0))
  np.testing.assert_array_equal(example["labels"][example["valid"]], [0, 2])
  record["crowd"][:] = False
  example = transforms.DetectionTrain(_SIZE, 2, keep, 0.0)(record, np.random.default_rng(0))
  np.testing.assert_array_equal(example["labels"], [0, 1])
  np.testing.assert_array_equal(example["boxes"], _BOXES[:2])


def test_image_without_objects():
  for kind in ("bitmaps", "polygons"):
    record = make_record(np.zeros((0, 4), np.float32), kind=kind)
    example = transforms.DetectionTrain((64, 64), 3)(record, np.random.default_rng(0))
    assert not example["valid"].any() and example["masks"].shape == (3, 64, 8)


def test_shapes_and_types_of_the_batch_format():
  example = transforms.DetectionTrain((60, 90), 6)(make_record(), np.random.default_rng(0))
  assert {name: (value.dtype.name, value.shape) for name, value in example.items()} == {
    "image": ("uint8", (60, 90, 3)),
    "image_size": ("int32", (2,)),
    "boxes": ("float32", (6, 4)),
    "labels": ("int32", (6,)),
    "masks": ("uint8", (6, 60, 12)),
    "valid": ("bool", (6,)),
  }
  example = transforms.DetectionEval((60, 90))(make_record())
  assert {name: (value.dtype.name, value.shape) for name, value in example.items()} == {
    "image": ("uint8", (60, 90, 3)),
    "image_size": ("int32", (2,)),
    "original_size": ("int32", (2,)),
    "image_id": ("int64", ()),
  }


def test_evaluation_view_of_encoded_images():
  buffer = io.BytesIO()
  Image.fromarray(make_record()["image"]).save(buffer, "PNG")
  record = {"image": buffer.getvalue(), "image_id": 3, "file_name": "a.png"}
  example = transforms.DetectionEval((64, 64))(record)
  np.testing.assert_array_equal(example["image_size"], [43, 64])
  np.testing.assert_array_equal(example["original_size"], _SIZE)
  limited = transforms.DetectionEval((64, 64), transforms.ResizeToLimits(short_side=20))(record)
  np.testing.assert_array_equal(limited["image_size"], [20, 30])
  limited = transforms.DetectionEval((64, 64), transforms.ResizeToLimits(40, long_side=48))(record)
  np.testing.assert_array_equal(limited["image_size"], [32, 48])


def test_random_short_sides():
  transform = transforms.DetectionTrain((90, 130), 4, transforms.ResizeToLimits((30, 80), long_side=110))
  shorts = set()
  for seed in range(40):
    example = transform(make_record(), np.random.default_rng(seed))
    check(example, tolerance=1.5)
    shorts.add(int(example["image_size"][0]))
  assert min(shorts) >= 30 and max(shorts) == 73 and len(shorts) > 10


def test_errors_name_the_image():
  record = make_record() | {"height": 120, "width": 80, "file_name": "turned.jpg"}
  with pytest.raises(ValueError, match="turned.jpg is 80 x 120.*120 x 80"):
    transforms.DetectionEval((64, 64))(record)
  with pytest.raises(ValueError, match="damaged.jpg"):
    transforms.DetectionEval((64, 64))({"image": b"xx", "image_id": 1, "file_name": "damaged.jpg"})
  with pytest.raises(ValueError, match="needs randomness"):
    transforms.DetectionEval((64, 64), transforms.ResizeToLimits((30, 80)))(make_record())
  record = make_record(kind="polygons") | {"file_name": "boxes_only.jpg"}
  record["segmentations"][1] = None
  with pytest.raises(ValueError, match="Object 1 of boxes_only.jpg has no mask"):
    transforms.DetectionTrain(_SIZE, 4, transforms.ResizeToLimits())(record, np.random.default_rng(0))


def test_without_masks_boxes_are_clipped():
  record = make_record()
  del record["masks"]
  record["crowd"] = np.array([False, False, True])

  def place(source, frame, rng):
    del frame, rng
    return transforms.Geometry(source, source, 20, 30, (40, 60))

  found = transforms.DetectionTrain((48, 64), 4, place, flip_probability=0.0, with_masks=False)(
    record, np.random.default_rng(0)
  )
  assert "masks" not in found
  np.testing.assert_array_equal(found["valid"], [True, True, False, False])
  np.testing.assert_array_equal(found["boxes"][:2], [[0, 0, 20, 20], [30, 10, 60, 40]])
  np.testing.assert_array_equal(found["labels"], [0, 1, 0, 0])


def test_every_scale_is_loaded_as_it_would_be_alone():
  scales = tuple(
    transforms.DetectionEval(frame, transforms.ResizeToLimits(short))
    for frame, short in (((80, 120), None), ((160, 200), 100), ((64, 64), 30))
  )
  record = make_record()
  found = transforms.MultiScaleEval(scales)(record)
  assert set(found) == {
    "image",
    "image_size",
    "original_size",
    "image_id",
    "image.1",
    "image_size.1",
    "image.2",
    "image_size.2",
  }
  for i, scale in enumerate(scales):
    alone = scale(record)
    for name in ("image", "image_size"):
      np.testing.assert_array_equal(found[f"{name}.{i}" if i else name], alone[name])
