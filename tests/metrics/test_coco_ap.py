import contextlib
import copy
import io
import json

import numpy as np
from pycocotools import coco as pycoco
from pycocotools import cocoeval
from pycocotools import mask as mask_utils
import pytest

from frozen_vision.metrics import coco_ap, coco_matching
from tests import paths

ORACLE_TRUTH = "instances_val2014_100.json"
ORACLE_DETECTIONS = {
  "bbox": "instances_val2014_fakebbox100_results.json",
  "segm": "instances_val2014_fakesegm100_results.json",
}
CATEGORIES = [{"id": i, "name": name} for i, name in ((7, "seven"), (3, "three"), (90, "ninety"))]


def pycocotools_stats(truth: dict, detections: str, iou_type: str) -> np.ndarray:
  with contextlib.redirect_stdout(io.StringIO()):
    coco = pycoco.COCO()
    coco.dataset = copy.deepcopy(truth)
    coco.createIndex()
    evaluation = cocoeval.COCOeval(coco, coco.loadRes(str(detections)), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
  return evaluation.stats


def values(result: dict[str, float], prefix: str) -> list[float]:
  return [result[f"{prefix}_{name}"] for name in coco_matching.METRIC_NAMES]


def make_batch(truth: dict, image_ids, input_scale=1.0):
  sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
  original = np.array([sizes[i] for i in image_ids], np.int32)
  return {
    "image_id": np.array(image_ids, np.int64),
    "original_size": original,
    "image_size": np.round(original * input_scale).astype(np.int32),
    "example_valid": np.ones(len(image_ids), bool),
  }


def make_predictions(b: int, k: int, *, size: float = 0, labels: int = 1, seed: int = 0) -> dict:
  """Boxes anywhere in a square of `size` pixels; half of the scores are ties."""
  rng = np.random.default_rng(seed)
  corners = np.sort(rng.uniform(0, size, (b, k, 2, 2)), axis=2).reshape(b, k, 4)
  scores = rng.uniform(0, 1, (b, k))
  scores = np.where(rng.random((b, k)) < 0.5, np.round(scores, 1), scores)
  return {
    "boxes": corners.astype(np.float32),
    "scores": scores.astype(np.float32),
    "labels": rng.integers(0, labels, (b, k)).astype(np.int32),
    "valid": rng.random((b, k)) < 0.9,
    "masks": rng.random((b, k, 28, 28), np.float32) ** 0.5,
  }


def near_truth(predictions: dict, truth: dict, image_ids, scale: float, seed: int = 0) -> dict:
  """Half of the detections become disturbed boxes of true objects, so that matches happen."""
  rng = np.random.default_rng(seed)
  index = {c: i for i, c in enumerate(sorted(c["id"] for c in truth["categories"]))}
  for i, image_id in enumerate(image_ids):
    objects = [a for a in truth["annotations"] if a["image_id"] == image_id]
    for j in range(0, len(predictions["boxes"][i]) if objects else 0, 2):
      target = objects[rng.integers(len(objects))]
      x, y, w, h = target["bbox"]
      box = np.array([x, y, x + w, y + h]) + rng.normal(0, 0.06, 4) * (w, h, w, h)
      predictions["boxes"][i, j] = np.maximum(box, 0) * scale
      predictions["labels"][i, j] = index[target["category_id"]]
  return predictions


@pytest.fixture(name="truth")
def make_truth() -> dict:
  """6 images; polygons, a crowd as RLE, an object of two parts, an image without objects."""
  rng = np.random.default_rng(0)
  ids = (12, 5, 40, 2**33, 9, 31)
  images = [{"id": i, "height": 120 + i % 50, "width": 160 - i % 50} for i in ids]
  annotations = []
  for image in images[:-1]:
    for _ in range(6):
      w, h = rng.uniform(8, 90, 2)
      x, y = rng.uniform(0, image["width"] - w), rng.uniform(0, image["height"] - h)
      polygon = [x, y, x + w, y, x + w, y + h, x + 0.3 * w, y + h]
      annotations.append({
          "id": 100 + len(annotations), "image_id": image["id"], "iscrowd": 0, "area": w * h * 0.8,
          "category_id": int(rng.choice([7, 3, 90])), "bbox": [x, y, w, h],
          "segmentation": [polygon],
      })  # fmt: skip
  annotations[3]["segmentation"] = annotations[3]["segmentation"] + [[1, 1, 9, 1, 9, 9]]
  for annotation in (annotations[0], annotations[8]):
    image = next(image for image in images if image["id"] == annotation["image_id"])
    region = np.zeros((image["height"], image["width"]), np.uint8, order="F")
    region[20:90, 30:110] = 1
    runs = np.flatnonzero(np.diff(region.ravel("F"), prepend=0, append=0))
    counts = np.diff(runs, prepend=0, append=region.size).tolist()
    annotation.update(
        iscrowd=1, bbox=[30, 20, 80, 70], area=5600,
        segmentation={"size": list(region.shape), "counts": counts},
    )  # fmt: skip
  return {"images": images, "annotations": annotations, "categories": CATEGORIES}


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_official_demo_from_files(iou_type):
  folder = paths.data_dir("coco_eval_oracle")
  expected = json.loads((folder / "expected_stats.json").read_text())[iou_type]
  result = coco_ap.evaluate_files(folder / ORACLE_TRUTH, folder / ORACLE_DETECTIONS[iou_type])
  np.testing.assert_allclose(list(result.values()), expected, rtol=0, atol=1e-9)
  assert list(result)[:2] == (["box_AP", "box_AP50"] if iou_type == "bbox" else
                              ["mask_AP", "mask_AP50"])  # fmt: skip


def test_official_demo_boxes_through_update(tmp_path):
  folder = paths.data_dir("coco_eval_oracle")
  expected = json.loads((folder / "expected_stats.json").read_text())["bbox"]
  truth = json.loads((folder / ORACLE_TRUTH).read_text())
  rows = json.loads((folder / ORACLE_DETECTIONS["bbox"]).read_text())
  evaluator = coco_ap.CocoEvaluator(folder / ORACLE_TRUTH, ("bbox",))
  index = {c: i for i, c in enumerate(sorted(c["id"] for c in truth["categories"]))}
  for image in truth["images"]:
    own = [row for row in rows if row["image_id"] == image["id"]]
    boxes = np.array([row["bbox"] for row in own]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    evaluator.update(
      {
        "boxes": boxes[None].astype(np.float32),
        "scores": np.array([[row["score"] for row in own]], np.float32),
        "labels": np.array([[index[row["category_id"]] for row in own]], np.int32),
        "valid": np.ones((1, len(own)), bool),
      },
      make_batch(truth, [image["id"]]),
    )
  np.testing.assert_allclose(list(evaluator.result().values()), expected, rtol=0, atol=1e-9)
  evaluator.write(tmp_path / "detections.json")
  written = json.loads((tmp_path / "detections.json").read_text())

  def key(row):
    return (row["image_id"], row["category_id"], row["score"], row["bbox"])

  assert sorted(map(key, written)) == sorted(map(key, rows))


def filled_evaluator(truth, k, *, scale=1.0, order=1, **kwargs) -> coco_ap.CocoEvaluator:
  evaluator = coco_ap.CocoEvaluator(truth, **kwargs)
  ids = [image["id"] for image in truth["images"]]
  predictions = make_predictions(len(ids), k, size=110 * scale, labels=3)
  predictions = near_truth(predictions, truth, ids, scale)
  predictions["valid"][1] = False
  batch = make_batch(truth, ids, scale)
  for i in range(len(ids))[::order]:
    evaluator.update(
      {key: value[i : i + 1] for key, value in predictions.items()},
      {key: value[i : i + 1] for key, value in batch.items()},
    )
  return evaluator


@pytest.mark.parametrize("k, scale", [(30, 1.0), (30, 0.7), (340, 2.0)])
def test_written_file_gives_the_same_numbers_in_pycocotools(truth, tmp_path, k, scale):
  """With 340 detections, more than 100 of a class fall in one image, and only 100 may count."""
  before = copy.deepcopy(truth)
  evaluator = filled_evaluator(truth, k, scale=scale)
  result = evaluator.result()
  assert truth == before
  path, truth_path = tmp_path / "detections.json", tmp_path / "truth.json"
  evaluator.write(path)
  truth_path.write_text(json.dumps(truth))
  for iou_type, prefix in (("bbox", "box"), ("segm", "mask")):
    expected = pycocotools_stats(truth, path, iou_type)
    np.testing.assert_allclose(values(result, prefix), expected, rtol=0, atol=1e-12)
    assert 0 < expected[0] < 1
  assert coco_ap.evaluate_files(truth_path, path) == result
  labels = [detection["category_id"] for detection in evaluator.detections()]
  assert k < 100 or max(map(labels.count, labels)) > 100 * 5


def test_real_photographs_agree_with_pycocotools(tmp_path):
  path = paths.data_dir("coco_subset") / "annotations/instances_val2017.json"
  truth = json.loads(path.read_text())
  ids = [image["id"] for image in truth["images"]]
  evaluator = coco_ap.CocoEvaluator(path)
  batch = make_batch(truth, ids, 0.5)
  predictions = make_predictions(len(ids), 20, size=200, labels=80)
  evaluator.update(near_truth(predictions, truth, ids, 0.5), batch)
  result = evaluator.result()
  evaluator.write(tmp_path / "detections.json")
  for iou_type, prefix in (("bbox", "box"), ("segm", "mask")):
    expected = pycocotools_stats(truth, tmp_path / "detections.json", iou_type)
    np.testing.assert_allclose(values(result, prefix), expected, rtol=0, atol=1e-12)


def test_mask_area_follows_a_file_without_boxes(truth, tmp_path):
  evaluator = filled_evaluator(truth, 60, mask_area="mask")
  evaluator.write(tmp_path / "segm.json", iou_types=("segm",))
  assert set(json.loads((tmp_path / "segm.json").read_text())[0]) == {
      "image_id", "category_id", "score", "segmentation",
  }  # fmt: skip
  expected = pycocotools_stats(truth, tmp_path / "segm.json", "segm")
  result = evaluator.result()
  np.testing.assert_allclose(values(result, "mask"), expected, rtol=0, atol=1e-12)
  by_box = filled_evaluator(truth, 60).result()
  assert {k for k in result if result[k] != by_box[k]} <= {
      "mask_AP_small", "mask_AP_medium", "mask_AP_large",
  }  # fmt: skip


def test_order_of_images_does_not_matter(truth, tmp_path):
  one, two = filled_evaluator(truth, 40), filled_evaluator(truth, 40, order=-1)
  assert one.result() == two.result()
  one.write(tmp_path / "1.json")
  two.write(tmp_path / "2.json")
  assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_per_class_ap_averages_to_ap(truth):
  evaluator = filled_evaluator(truth, 40)
  classes = evaluator.class_result()
  assert list(classes) == evaluator.class_names == ["three", "seven", "ninety"]
  result = evaluator.result()
  for key in ("box_AP", "box_AP50", "mask_AP", "mask_AP50"):
    assert np.mean([row[key] for row in classes.values()]) == pytest.approx(result[key], abs=1e-12)


def test_perfect_and_empty_predictions(truth, tmp_path):
  """An object of id 0 counts like any other, and areas without objects give -1."""
  truth["annotations"] = [a for a in truth["annotations"] if a["area"] < 32**2][:3]
  for i, annotation in enumerate(truth["annotations"]):
    annotation["id"] = i
  truth["images"] = [image for image in truth["images"]
                     if image["id"] in {a["image_id"] for a in truth["annotations"]}]  # fmt: skip
  ids = [image["id"] for image in truth["images"]]
  evaluator = coco_ap.CocoEvaluator(truth, ("bbox",))
  order = [c.get("id") for c in sorted(CATEGORIES, key=lambda c: c["id"])]
  for image_id in ids:
    own = [a for a in truth["annotations"] if a["image_id"] == image_id]
    boxes = np.array([a["bbox"] for a in own], np.float32)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([[order.index(a["category_id"]) for a in own]])
    evaluator.update(
        {"boxes": boxes[None], "labels": labels, "scores": np.ones((1, len(own)), np.float32),
         "valid": np.ones((1, len(own)), bool)},
        make_batch(truth, [image_id]),
    )  # fmt: skip
  result = evaluator.result()
  assert result["box_AP"] == pytest.approx(1.0) and result["box_AP_small"] == pytest.approx(1.0)
  assert result["box_AP_large"] == -1.0
  json.dumps(result, allow_nan=False)

  evaluator = coco_ap.CocoEvaluator(truth)
  nothing = make_predictions(len(ids), 4)
  nothing["valid"][:] = False
  evaluator.update(nothing, make_batch(truth, ids))
  result = evaluator.result()
  assert len(result) == 24 and result["mask_AP"] == result["box_AR_100"] == 0.0
  evaluator.write(tmp_path / "detections.json")
  assert (tmp_path / "detections.json").read_text() == "[]"
  (tmp_path / "truth.json").write_text(json.dumps(truth))
  files = coco_ap.evaluate_files(tmp_path / "truth.json", tmp_path / "detections.json")
  assert files == result


def test_unlabelled_images_are_written_but_not_scored(truth, tmp_path, caplog):
  del truth["annotations"]
  evaluator = coco_ap.CocoEvaluator(truth)
  ids = [image["id"] for image in truth["images"]]
  evaluator.update(make_predictions(len(ids), 5, size=100, labels=3), make_batch(truth, ids))
  assert evaluator.result() == {}
  assert "no annotations" in caplog.text
  evaluator.write(tmp_path / "detections.json")
  rows = json.loads((tmp_path / "detections.json").read_text())
  assert rows and set(rows[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
  mask = mask_utils.decode(rows[0]["segmentation"])
  assert mask.shape == tuple(rows[0]["segmentation"]["size"])


def test_padding_is_ignored(truth):
  ids = [image["id"] for image in truth["images"]]
  evaluator = coco_ap.CocoEvaluator(truth, ("bbox",))
  batch = make_batch(truth, ids + ids[:2])
  batch["example_valid"][-2:] = False
  evaluator.update(make_predictions(len(ids) + 2, 3, size=50), batch)
  assert {row["image_id"] for row in evaluator.detections()} <= set(ids)


def test_wrong_input_is_named(truth, tmp_path):
  ids = [image["id"] for image in truth["images"]]
  evaluator = coco_ap.CocoEvaluator(truth)
  predictions, batch = make_predictions(1, 3, size=50), make_batch(truth, ids[:1])
  predictions["valid"][:] = True

  def update(predictions_change=(), batch_change=()):
    evaluator.reset()
    evaluator.update(predictions | dict(predictions_change), batch | dict(batch_change))

  with pytest.raises(ValueError, match="not in the ground truth"):
    update(batch_change={"image_id": np.array([77])})
  with pytest.raises(ValueError, match="in the ground truth; its annotations would not fit"):
    update(batch_change={"original_size": np.array([[50, 60]])})
  with pytest.raises(ValueError, match="NaN"):
    update({"scores": np.full((1, 3), np.nan, np.float32)})
  with pytest.raises(ValueError, match=r"labels 0\.\.3, but .* 3 categories"):
    update({"labels": np.array([[0, 3, 1]])})
  with pytest.raises(ValueError, match="iou_types=.'bbox',"):
    evaluator.update({k: v for k, v in predictions.items() if k != "masks"}, batch)
  update()
  with pytest.raises(ValueError, match=r"given twice.*reset\(\)"):
    evaluator.update(predictions, batch)
  with pytest.raises(ValueError, match="no 'categories'"):
    coco_ap.CocoEvaluator({"images": truth["images"]})
  with pytest.raises(ValueError, match=r"annotation 0 \(id 100\), lacks \['segmentation'\].*bbox"):
    del truth["annotations"][0]["segmentation"]
    coco_ap.CocoEvaluator(truth)
  with pytest.raises(FileNotFoundError, match="absent.json"):
    coco_ap.CocoEvaluator(tmp_path / "absent.json")
  (tmp_path / "broken.json").write_text("{")
  with pytest.raises(ValueError, match="broken.json.*not valid JSON"):
    coco_ap.evaluate_files(tmp_path / "broken.json", tmp_path / "broken.json")


def test_missing_areas_and_empty_polygons(truth, caplog):
  del truth["annotations"][4]["area"]
  truth["annotations"][5]["segmentation"] = []
  result = filled_evaluator(truth, 20).result()
  assert "1 annotations have no 'area'" in caplog.text
  assert 0 < result["mask_AP"] < 1


def test_images_without_update_are_reported(truth, caplog):
  evaluator = coco_ap.CocoEvaluator(truth, ("bbox",))
  evaluator.update(make_predictions(1, 3, size=50), make_batch(truth, [truth["images"][0]["id"]]))
  evaluator.result()
  assert "1 of 6 images" in caplog.text


def test_command_line_prints_the_usual_table(tmp_path, truth, capsys):
  evaluator = filled_evaluator(truth, 20)
  evaluator.write(tmp_path / "detections.json")
  (tmp_path / "truth.json").write_text(json.dumps(truth))
  coco_ap.main([str(tmp_path / "truth.json"), str(tmp_path / "detections.json")])
  lines = capsys.readouterr().out.splitlines()
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    coco = pycoco.COCO(str(tmp_path / "truth.json"))
    evaluation = cocoeval.COCOeval(coco, coco.loadRes(str(tmp_path / "detections.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    printed.truncate(0)
    printed.seek(0)
    evaluation.summarize()
  assert lines[0] == "box:" and lines[1:13] == printed.getvalue().splitlines()
  with pytest.raises(SystemExit):
    coco_ap.main([str(tmp_path / "absent.json"), str(tmp_path / "detections.json")])
