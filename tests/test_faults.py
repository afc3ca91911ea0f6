"""Small inputs of public bug reports through the command line: what is right works, all else is said."""

import json
import re
import shutil

import pytest

from frozen_vision.runs import checkpoints as checkpoint
from tests import command_lines, paths, tiny


def _detection(workdir, train, validation=None, *options):
  """Arguments of a short run on two of the inputs."""
  arguments = ["--config=tests/tiny.py:detection", f"--workdir={workdir}", "--config.detection.data=files"]
  for split, folder in (("train", train), ("validation", validation or train)):
    arguments.append(f"--config.detection.{split}.annotations={folder}/ann.json")
    arguments.append(f"--config.detection.{split}.images={folder}/img")
  return [*arguments, "--config.steps=2", *options]


def _segmentation(workdir, classes):
  root = paths.faults_dir("label_value_255")
  pair = [
    f"--config.segmentation.{split}.{kind}={folder}"
    for split in ("train", "validation")
    for kind, folder in (("images", "img"), ("labels", "lab"))
  ]
  settings = ["--config.segmentation.data=files", f"--config.segmentation.root={root}"]
  return [
    "--config=tests/tiny.py:segmentation",
    f"--workdir={workdir}",
    f"--config.segmentation.classes={classes}",
    *settings,
    *pair,
  ]


def _action(workdir, name):
  path = paths.faults_dir("video_lists") / name
  lists = [f"--config.action.{split}={path}" for split in ("train", "validation")]
  return ["--config=tests/tiny.py:action", f"--workdir={workdir}", "--config.action.data=videos", *lists]


def _weights(workdir, name):
  path = paths.faults_dir("checkpoint_files") / f"{name}.pth"
  return ["--config=tests/tiny.py:detection", f"--workdir={workdir}", f"--config.backbone.weights={path}"]


def _outputs(lines):
  """(exit status, output) of each command line."""
  found, errors = command_lines.outputs(lines)
  assert "Traceback" not in errors + "".join(output for _, output in found), (found, errors)
  return found


def test_what_is_said_before_a_run_begins(tmp_path):
  """Weights that are absent end those whose data are right, after the data were read."""
  faults, run = paths.faults_dir, tmp_path / "run"
  no_weights, data_are_right = f"--config.backbone.weights={tmp_path}/w", f"{tmp_path}/w does not exist"
  text = faults("text_encodings")
  cases = [
    (_detection(run, faults("all_iscrowd")), ["every annotation is a crowd", "Set iscrowd to 0"]),
    (
      _detection(run, faults("normalised_boxes")),
      ["18 of 18 boxes lie within 0..1", "expected pixels. Multiply"],
    ),
    (
      _detection(run, faults("half_of_masks_missing")),
      [
        "9 of 18 annotations would be left out",
        "annotation 1 of im0.png",
        "head.with_masks=False",
        "allow_drops",
      ],
    ),
    (
      _detection(run, faults("boxes_only"), None, no_weights),
      ["Boxes only: the training annotations have no masks", data_are_right],
    ),
    (
      _detection(run, faults("big_image_ids"), None, no_weights),
      ["6 training and 6 validation", data_are_right],
    ),
    (
      _detection(run, faults("silent_drops_in_training"), None, no_weights),
      ["another Unicode form than in the annotations: found all the same (größe0.png", data_are_right],
    ),
    (
      _detection(run, faults("evaluation_error_loses_training")),
      ["1 of 6 images would be left out", "im3.png: cannot be decoded"],
    ),
    (
      _detection(run, faults("classes_swapped_after_training"), faults("boxes_only")),
      ["of its 2 categories 2 are not, with this id and name, those of the training", "Give a file with"],
    ),
    ([*_segmentation(run, "classes.json"), no_weights], ["2 classes", data_are_right]),
    ([*_segmentation(run, text / "bom.txt"), no_weights], [data_are_right]),
    (_segmentation(run, text / "lat.txt"), ["lat.txt, line 1: is not UTF-8", "Latin-1", "iconv -f"]),
    (_segmentation(run, text / "hex.json"), ["mode L, but the classes are given by their colours"]),
    *(
      ([*_action(run, name), no_weights], ["2 training and 2 validation videos", data_are_right])
      for name in ("header_space.csv", "quoted_noheader.csv", "strip.csv")
    ),
    (_weights(run, "cycle"), ["cycle.pth holds dictionaries in dictionaries"]),
    (_weights(run, "memo"), ["memo.pth holds no dictionary of tensors"]),
    (_weights(run, "short"), ["short.pth cannot be read as a .pth file", "lies about its size"]),
    (_weights(run, "stride0"), ["stride0.pth cannot be read as a .pth file"]),
    (_weights(run, "tuplehash"), ["tuplehash.pth holds no dictionary of tensors"]),
  ]
  outputs = _outputs([arguments for arguments, _ in cases])
  for (arguments, texts), (status, output) in zip(cases, outputs):
    assert status == 1 and len(re.findall("^Error: ", output, re.MULTILINE)) == 1, (arguments, output)
    for text in texts:
      assert text in output, (arguments, output)
  assert not run.exists()


@pytest.mark.slow
def test_training_is_kept_and_other_classes_are_refused(tmp_path):
  data, run = tmp_path / "data", tmp_path / "run"
  shutil.copytree(paths.faults_dir("classes_swapped_after_training"), data)
  truncated = paths.faults_dir("evaluation_error_loses_training")
  boxes = "--config.detection.head.with_masks=False"  # compiles sooner
  trains = _detection(run, data, truncated, "--config.data.check=False", boxes)
  [(status, output)] = _outputs([trains])
  assert status == 1 and "step 2/2" in output, output
  assert f"Error: {truncated}/img/im3.png: cannot be decoded" in output
  assert "Step 2 is saved and not evaluated. Mend the file or leave it out" in output
  with checkpoint.Checkpoints(run) as checkpoints:
    assert checkpoints.latest_step() == 2 and not tiny.metrics(run).keys() & {"eval/box_AP"}
  annotations = json.loads((data / "ann.json").read_text())
  first, second = annotations["categories"]
  first["name"], second["name"] = second["name"], first["name"]
  (data / "ann.json").write_text(json.dumps(annotations))
  swapped = _detection(run, data, None, "--mode=evaluate", boxes)
  for status, output in _outputs([swapped]):
    assert (
      status == 1 and "the same ones in another order. The first to differ is class 0, 'blue'" in output
    ), output
