"""Prediction with several heads: who shares a backbone pass, results in the inputs' coordinates, files."""

import json
import os
import pathlib
import subprocess
import sys

import av
from flax import nnx
import jax
import numpy as np
from PIL import Image
from pycocotools import coco as pycoco
import pytest

from frozen_vision.backbones import families
from frozen_vision.data import images
from frozen_vision.data.generated import scenes
from frozen_vision.data.segmentation import label_maps
from frozen_vision.prediction import files as predict_files
from frozen_vision.prediction import inputs as inputs_lib
from frozen_vision.prediction import predictor as predict
from frozen_vision.prediction import trained_head
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import results as results_lib
from frozen_vision.training import evaluation, loop
from frozen_vision.training import step as train_step
from tests import saved_runs, tiny

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _run(folder, config, classes=None):
  saved_runs.save_run(folder, config, saved_runs.CLASSES[config.task] if classes is None else classes)
  return folder


def _segmentation(head="linear"):
  """Several tests take one configuration, so that what one compiles the others read."""
  return tiny.segmentation(head)


def _picture(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_heads_with_one_key_and_one_view_share_a_pass(tmp_path):
  detect = _run(tmp_path / "detect", tiny.detection())
  segment = _run(tmp_path / "segment", _segmentation())
  act = _run(tmp_path / "act", tiny.action())
  config = _segmentation()
  config.segmentation.eval_frame = (96, 64)
  tall = _run(tmp_path / "tall", config)
  config = _segmentation()
  config.seed = 1  # another random backbone
  other = _run(tmp_path / "other", config)
  heads = dict(detect=detect, segment=segment, act=act, tall=tall, other=other)

  predictor = predict.Predictor(None, heads)
  groups = [[head.name for head in one.heads] for one in predictor.passes]
  assert groups == [["detect", "segment"], ["act"], ["tall"], ["other"]]
  reasons = [one.reason for one in predictor.passes]
  assert not reasons[0] and "videos" in reasons[1]
  assert reasons[2] == "its own: it differs from detect's in frame (detect [64, 64], tall [96, 64])"
  assert "in weights (detect " in reasons[3] and "frame" not in reasons[3]
  text = predictor.describe()
  assert "detect, segment: one backbone pass over every image for 2 heads." in text
  assert f"detect: detection with 3 classes, step 1 of {detect}." in text and reasons[2] in text

  # One frame for all: only the other weights keep their pass.
  groups = [[head.name for head in one.heads] for one in predict.Predictor(None, heads, image_size=80).passes]
  assert groups == [["detect", "segment", "tall"], ["act"], ["other"]]
  assert predict.Predictor(None, dict(tall=tall), image_size=(48, 80)).passes[0].key["frame"] == [48, 80]

  # A given backbone serves the heads that were trained on its features; the others keep theirs.
  config = tiny.detection()
  given = tasks_build.build_task(config, saved_runs.CLASSES["detection"]).build_model().backbone
  path = tmp_path / "backbone.safetensors"
  families.save_backbone(given, path, name="swinv2_nano")
  for backbone in (given, path):
    predictor = predict.Predictor(backbone, dict(detect=detect, other=other))
    assert [[head.name for head in one.heads] for one in predictor.passes] == [["detect"], ["other"]]
    assert list(predictor.heads["other"].differs) == ["weights"] and not predictor.heads["detect"].differs
    assert "other: segmentation with 3 classes" in predictor.describe()
    assert "it does not fit the given backbone and has its own: weights (given " in predictor.describe()


def test_views_of_their_own_and_a_trained_backbone_are_said(tmp_path):
  config = _segmentation()
  config.segmentation.test.update(dict(scales=(1.0, 1.5), flip=True))
  scales = _run(tmp_path / "scales", config)
  config = _segmentation()
  config.segmentation.test.window = (32, 32)
  window = _run(tmp_path / "window", config)
  config = _segmentation()
  config.trainable = ("head/.*", "backbone/stages/3/.*")
  tuned = _run(tmp_path / "tuned", config)
  predictor = predict.Predictor(None, dict(scales=scales, window=window, tuned=tuned))
  assert [len(one.heads) for one in predictor.passes] == [1, 1, 1]
  text = predictor.describe()
  assert "scales makes passes of its own for 3 more views" in text
  assert "window: one backbone pass over every image (its own: it looks through windows)" in text
  assert "(its own: some of its backbone was trained with it)" in text
  assert predictor.heads["tuned"].feature_key is None
  # One frame ends all that; what was trained with its backbone stays alone.
  predictor = predict.Predictor(None, dict(scales=scales, window=window, tuned=tuned), image_size=64)
  assert [[head.name for head in one.heads] for one in predictor.passes] == [["scales", "window"], ["tuned"]]


def test_a_backbone_that_trained_keeps_the_options_of_its_weights(tmp_path, caplog):
  config = _segmentation()
  sizes = dict(config.backbone.overrides)
  weights = tmp_path / "weights.safetensors"
  wide = families.build_backbone(config.backbone.name, rngs=nnx.Rngs(0), **sizes | dict(window_size=2))
  families.save_backbone(wide, weights, name=config.backbone.name)
  config.backbone.update(dict(weights=str(weights)))
  config.backbone.overrides = {key: value for key, value in sizes.items() if not key.startswith("window")}
  config.trainable = (".*",)
  run = _run(tmp_path / "run", config)
  head = predict.Predictor(None, {"segment": run}).heads["segment"]
  assert nnx.merge(head.graphdef, *head.parts).backbone.config == wide.config
  weights.unlink()  # the checkpoint has all of them
  predict.Predictor(None, {"segment": run})
  assert "its options are taken from swinv2_nano" in caplog.text


def test_one_pass_gives_what_each_head_gives_alone(tmp_path, monkeypatch):
  heads = {}
  for name, levels in (("all", ()), ("coarse", (2, 3)), ("fine", (0,))):
    config = _segmentation()
    config.segmentation.head.levels = levels
    heads[name] = _run(tmp_path / name, config)
  pictures = [_picture(50, 80), _picture(90, 30, seed=1), _picture(7, 9, seed=2)]
  together = predict.Predictor(None, heads, batch_size=2)
  passes = []
  features = trained_head.TrainedHead.features

  def counted(self, batch):
    return passes.append(self.name) or features(self, batch)

  monkeypatch.setattr(trained_head.TrainedHead, "features", counted)
  results = together(pictures)
  assert passes == ["all", "all"]  # three images, two at a time
  for name, run in heads.items():
    alone = predict.Predictor(None, {name: run}, batch_size=2)(pictures)[name]
    for picture, shared, own in zip(pictures, results[name], alone):
      assert shared.labels.shape == picture.shape[:2] and shared.labels.dtype == np.uint8
      np.testing.assert_array_equal(shared.labels, own.labels)
      assert sum(shared.shares().values()) == pytest.approx(1)
  assert any(np.any(a.labels != b.labels) for a, b in zip(results["coarse"], results["fine"]))


@pytest.mark.slow
def test_detections_are_those_of_the_evaluation(tmp_path):
  config = tiny.detection()
  workdir = tmp_path / "run"
  # A run from before checkpoints knew classes: they come from the data that its config names.
  saved_runs.save_run(workdir, config)
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)
  step = jax.jit(train_step.make_predict_step(task, model.graphdef))
  _, _, evaluator = evaluation.evaluate(
    task.evaluations["val"],
    lambda batch: step(model.trainable, model.mutable, model.frozen, train_step.device_batch(batch)),
  )
  wanted = evaluator.detections()
  source = scenes.SceneSource(3, split="validation", image_size=64, seed=0)
  predictor = predict.Predictor(None, {"detect": workdir}, batch_size=2)
  assert predictor.heads["detect"].classes == task.classes
  found = predictor([source[i]["image"] for i in range(3)])["detect"]
  rows = [
    row
    for i, result in enumerate(found)
    for row in result.coco_rows(source[i]["image_id"], [category["id"] for category in task.classes])
  ]
  assert len(rows) == len(wanted) >= 10
  for a, b in zip(rows, wanted):
    assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
    np.testing.assert_allclose(a["bbox"], b["bbox"], atol=2e-3)
    assert a["score"] == pytest.approx(b["score"], abs=1e-5)
  assert sum(a["segmentation"] == b["segmentation"] for a, b in zip(rows, wanted)) >= 0.9 * len(rows)
  one = found[0]
  assert one.masks().shape == (len(one), 64, 64) and one.masks().dtype == bool
  assert len(one.above(2.0)) == 0 and len(one.above(0.0)) == len(one)
  assert one.names[0] == task.classes[one.labels[0]]["name"]


def test_videos_go_to_heads_for_videos(tmp_path):
  config = tiny.action()
  config.action.head.name = "average"
  run = _run(tmp_path / "run", config)
  segment = _run(tmp_path / "segment", _segmentation())
  predictor = predict.Predictor(None, dict(act=run, segment=segment), batch_size=2)
  clip = np.random.default_rng(0).integers(0, 256, (9, 40, 56, 3)).astype(np.uint8)
  results = predictor([clip, _picture(20, 20), clip[:2]])
  assert [type(x) for x in results["act"]] == [
    results_lib.ClassProbabilities,
    type(None),
    results_lib.ClassProbabilities,
  ]
  assert [type(x) for x in results["segment"]] == [type(None), results_lib.LabelMap, type(None)]
  first = results["act"][0]
  assert first.probabilities.sum() == pytest.approx(1, abs=1e-6)
  top = first.top(2)
  assert top[0][1] == first.probabilities.max()
  assert {name for name, _ in first.top()} == {"left", "right", "up", "down"}
  assert not np.array_equal(first.probabilities, results["act"][2].probabilities)


@pytest.mark.slow
def test_files_for_an_action_recogniser_and_a_classifier(tmp_path):
  act = _run(tmp_path / "act", tiny.action())
  classify = _run(tmp_path / "classify", tiny.classification())
  folder, out = tmp_path / "in", tmp_path / "out"
  folder.mkdir()
  clips = [np.random.default_rng(seed).integers(0, 256, (6, 32, 44, 3)).astype(np.uint8) for seed in (0, 1)]
  for name, clip in zip("ab", clips):
    with av.open(str(folder / f"{name}.avi"), "w") as container:
      stream = container.add_stream("ffv1", rate=10, options={"level": "3"})  # lossless
      stream.width, stream.height, stream.pix_fmt = 44, 32, "bgr0"
      for frame in clip:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
      container.mux(stream.encode())
  (folder / "bad.mp4").write_bytes(b"no video")
  pixels = _picture(20, 30)
  Image.fromarray(pixels).save(folder / "c.png")

  predictor = predict.Predictor(None, dict(act=act, classify=classify))
  summary = predict_files.predict_files(predictor, [folder], out)
  assert (summary["inputs"], summary["done"]) == (4, 3)
  assert [row["file"] for row in summary["skipped"]] == [str(folder / "bad.mp4")]
  direct = predictor([*clips, pixels])
  rows = json.loads((out / "act" / "actions.json").read_text())
  assert [row["file"] for row in rows] == ["a.avi", "b.avi"]
  for row, result in zip(rows, direct["act"]):
    assert [(entry["class"], entry["probability"]) for entry in row["top"]] == [
      (name, pytest.approx(probability, abs=1e-5)) for name, probability in result.top(5)
    ]
  (row,) = json.loads((out / "classify" / "top_classes.json").read_text())
  assert row["file"] == "c.png" and {entry["class"] for entry in row["top"]} == {"cat", "dog"}
  assert row["top"][0]["probability"] == pytest.approx(direct["classify"][2].probabilities.max(), abs=1e-5)
  # What the classifier says is what its model says of the same pixels.
  head = predictor.heads["classify"]
  model = nnx.merge(head.graphdef, *head.parts)
  image = {"image": head.task.read_input(pixels)[1]["image"][None]}
  logits = head.task.predict(model, image, head.task.features(model, image, None))["logits"]
  np.testing.assert_allclose(direct["classify"][2].probabilities, jax.nn.softmax(logits[0]), atol=1e-5)
  for head, name in (("act", "a"), ("act", "b"), ("classify", "c")):
    with Image.open(out / head / "pictures" / f"{name}.jpg") as picture:
      assert picture.size[0] >= 30


def test_results_are_drawn_in_the_inputs_coordinates():
  names = ("disk", "ring")
  found = results_lib.Detections.from_outputs(
    {
      "boxes": np.array([[[8.0, 4, 24, 12], [0, 0, 64, 32]]]),
      "scores": np.array([[0.9, 0.2]], np.float32),
      "labels": np.array([[1, 0]]),
      "valid": np.array([[True, True]]),
      "masks": np.ones((1, 2, 4, 4), np.float32),
    },
    {"image_size": np.array([[32, 64]]), "original_size": np.array([[64, 128]])},
    1,
    [{"id": 5, "name": "disk"}, {"id": 9, "name": "ring"}],
  )[0]
  np.testing.assert_allclose(found.boxes[0], [16, 8, 48, 24])
  assert found.size == (64, 128) and found.names == ["ring", "disk"]
  mask = found.masks()[0]
  assert mask[9:23, 17:47].all() and mask.sum() == mask[8:24, 16:48].sum()
  row = found.coco_rows(4, (5, 9))[0]
  assert (row["image_id"], row["category_id"], row["bbox"]) == (4, 9, [16.0, 8.0, 32.0, 16.0])
  picture = found.draw(np.full((64, 128, 3), 128, np.uint8))
  changed = np.any(picture != 128, axis=-1)
  scale = picture.shape[1] // 128
  assert changed[16 * scale, 32 * scale] and not changed[-2 * scale, 2 * scale]  # 0.2 is not drawn
  labels = results_lib.LabelMap(np.zeros((20, 3000), np.uint8), names)
  assert max(labels.draw(np.zeros((20, 3000, 3), np.uint8)).shape) < 1700
  assert labels.shares() == {"disk": 1.0}


def test_inputs_are_found_and_named(tmp_path):
  for name in (
    "a.jpg",
    "b/a.png",
    "b/c.PNG",
    "b/c.jpg",
    "b/x.mp4",
    "notes.txt",
    ".hidden.jpg",
    "out/old.png",
  ):
    (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "in" / name).write_bytes(b"x")
  folder = tmp_path / "in"
  found = inputs_lib.find_inputs([folder], exclude=folder / "out")
  assert [(entry.name, entry.file_name, entry.media) for entry in found] == [
    ("a", "a.jpg", "image"),
    ("b/a", "b/a.png", "image"),
    ("b/c.PNG", "b/c.PNG", "image"),
    ("b/c.jpg", "b/c.jpg", "image"),
    ("b/x", "b/x.mp4", "video"),
  ]
  found = inputs_lib.find_inputs([folder / "notes.txt", str(folder / "b" / "c.*"), folder / "b"])
  assert [entry.file_name for entry in found] == ["notes.txt", "c.PNG", "c.jpg", "a.png", "x.mp4"]
  found = inputs_lib.find_inputs([folder / "a.jpg", folder / "b" / "a.png", folder / "b" / "c.jpg"])
  assert [entry.name for entry in found] == ["a.jpg", "a.png", "c"]
  with pytest.raises(FileNotFoundError, match="--inputs=.*absent.jpg: .* does not exist"):
    inputs_lib.find_inputs([tmp_path / "absent.jpg"])
  with pytest.raises(FileNotFoundError, match="No image and no video"):
    inputs_lib.find_inputs([folder / "out" / ".."], exclude=folder)


def test_clear_errors(tmp_path, without_type_checks):
  run = _run(tmp_path / "run", _segmentation())
  with pytest.raises(ValueError, match="No head"):
    predict.Predictor(None, {})
  with pytest.raises(FileNotFoundError, match="absent does not exist; expected the workdir of a run"):
    predict.Predictor(None, {"segment": tmp_path / "absent"})
  with pytest.raises(FileNotFoundError, match="No checkpoint in"):
    predict.Predictor(None, {"segment": tmp_path})
  predictor = predict.Predictor(None, {"segment": run})
  with pytest.raises(ValueError, match="is a Segmenter; give the canonical one"):
    predict.Predictor(predictor.heads["segment"].task.build_model(), {"segment": run})
  with pytest.raises(ValueError, match=r"for a single image give \[image\]"):
    predictor(_picture(8, 8))
  with pytest.raises(ValueError, match=r"float32 \(8, 8, 3\); expected RGB, uint8"):
    predictor([_picture(8, 8).astype(np.float32)])
  with pytest.raises(ValueError, match="Input 1 is a video, and no head takes one"):
    predictor([_picture(8, 8), np.zeros((2, 8, 8, 3), np.uint8)])
  with pytest.raises(images.ImageError, match="absent.jpg"):
    predictor([tmp_path / "absent.jpg"])
  with pytest.raises(ValueError, match="needs the trained heads"):
    predict_files.predict([str(tmp_path)])
  with pytest.raises(ValueError, match="Two heads are called segment"):
    trained_head.named([str(run), str(run)])


def _cli(*arguments):
  variables = {**os.environ, "JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    [sys.executable, "-m", "frozen_vision.main", "--mode=predict", *map(str, arguments)],
    cwd=_ROOT,
    env=variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=600,
  )


@pytest.mark.slow
def test_command_line_on_three_files_one_of_them_bad(tmp_path):
  segment, detect = _run(tmp_path / "segment", _segmentation()), _run(tmp_path / "detect", tiny.detection())
  folder, out = tmp_path / "in", tmp_path / "out"
  folder.mkdir()
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by a quarter
  Image.fromarray(_picture(60, 80)).convert("CMYK").save(folder / "turned.jpg", exif=exif)
  Image.fromarray(_picture(700, 100)[..., 0]).save(folder / "gray.png")
  (folder / "bad.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:700])
  os.mkfifo(folder / "pipe.png")

  done = _cli(f"--inputs={folder}", f"--heads={detect},labels={segment}", f"--out={out}")
  assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
  assert "detect, labels: one backbone pass over every image for 2 heads." in done.stdout
  assert f"Skipped {folder}/bad.jpg: cannot be decoded" in done.stdout
  assert "4/4 images" in done.stdout and "2 of 4 inputs done" in done.stdout
  summary = json.loads((out / "summary.json").read_text())
  assert (summary["inputs"], summary["done"]) == (4, 2)
  assert [row["file"] for row in summary["skipped"]] == [f"{folder}/bad.jpg", f"{folder}/pipe.png"]
  # COCO's own tool reads the detections with the list of images beside them.
  truth = pycoco.COCO(str(out / "detect" / "images.json"))
  assert [(row["file_name"], row["height"], row["width"]) for row in truth.dataset["images"]] == [
    ("gray.png", 700, 100),
    ("turned.jpg", 80, 60),
  ]
  assert {category["name"] for category in truth.loadCats([3, 7, 8])} == {"disk", "ring", "bar"}
  loaded = truth.loadRes(str(out / "detect" / "detections.json"))
  assert loaded.getAnnIds() and loaded.annToMask(loaded.dataset["annotations"][0]).shape == (700, 100)
  classes = json.loads((out / "labels" / "classes.json").read_text())
  assert [entry["name"] for entry in classes] == ["background", "disk", "ring"]
  label_format = label_maps.LabelFormat(tuple(entry["name"] for entry in classes))
  for name, size in (("gray", (700, 100)), ("turned", (80, 60))):
    data = (out / "labels" / "label_maps" / f"{name}.png").read_bytes()
    assert label_format.decode(data, name=name).shape == size
    for head in ("detect", "labels"):
      with Image.open(out / head / "pictures" / f"{name}.jpg") as picture:
        assert picture.size[0] >= 60

  failed = _cli(folder / "bad.jpg", f"--inputs={folder}/bad.jpg", f"--workdir={segment}")
  assert failed.returncode == 1 and "None of the 1 inputs could be used" in failed.stdout
  failed = _cli(f"--workdir={segment}")
  assert failed.returncode == 1 and "--mode=predict needs --inputs" in failed.stdout
