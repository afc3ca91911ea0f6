"""Inputs that cannot be used, names that cannot be written, full disks: what was found is kept."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from frozen_vision.files import atomic, lock
from frozen_vision.prediction import files as predict_files
from frozen_vision.prediction import inputs as inputs_lib
from frozen_vision.prediction import predictor as predict
from tests import saved_runs, small_disk, tiny


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("classify")
  saved_runs.save_run(folder, tiny.classification(), saved_runs.CLASSES["classification"])
  return folder


@pytest.fixture(scope="module", name="predictor")
def _predictor(run):
  return predict.Predictor(None, {"classify": run})


def _image(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((20, 30, 3), 80, np.uint8)).save(path)


def _files(out):
  return [row["file"] for row in json.loads((out / "classify" / "top_classes.json").read_text())]


def _skipped(summary):
  return {os.path.basename(row["file"]): row["reason"] for row in summary["skipped"]}


def test_what_is_no_file_is_named_and_does_not_block(predictor, tmp_path):
  folder = tmp_path / "in"
  _image(folder / "good.png")
  os.mkfifo(folder / "pipe.jpg")
  os.mkfifo(folder / "pipe.mp4")
  (folder / "link.png").symlink_to("nowhere")
  (folder / "folder.png").mkdir()
  summary = predict_files.predict_files(predictor, [folder, folder / "pipe.jpg"], tmp_path / "out")
  assert _skipped(summary) == {
    "pipe.jpg": "is a named pipe, not a file",
    "pipe.mp4": "no head takes videos",
    "link.png": "cannot be read (a link to what is not there)",
  }
  assert _files(tmp_path / "out") == ["good.png"] and summary["done"] == 1


def test_long_names_have_results(predictor, tmp_path):
  names = ["x" * 251 + ".png", "x" * 251 + ".gif", "ß" * 125 + ".png", "a:b.png"]
  for name in names:
    _image(tmp_path / "in" / name)
  out = tmp_path / "out"
  summary = predict_files.predict_files(predictor, [tmp_path / "in"], out)
  assert summary["done"] == 4 and sorted(_files(out)) == sorted(names)
  pictures = sorted(path.name for path in (out / "classify" / "pictures").iterdir())
  assert len(pictures) == 4 and all(len(name.encode()) <= 204 for name in pictures)
  assert pictures[0] == "a%3Ab.jpg"


def test_a_path_that_is_too_long_is_named_and_the_rest_goes_on(predictor, tmp_path):
  deep = tmp_path / "in"
  while len(str(deep)) < 3700:
    deep /= "d" * 200
  _image(deep / "deep.png")
  _image(tmp_path / "in" / "good.png")
  out = tmp_path / ("o" * 200) / ("o" * 200) / "out"
  summary = predict_files.predict_files(predictor, [tmp_path / "in"], out)
  [reason] = _skipped(summary).values()
  assert reason.startswith("its results cannot be written: ") and reason.endswith(": File name too long.")
  assert _files(out) == ["good.png"] and summary["done"] == 1


def test_the_second_writer_of_a_folder_touches_nothing(predictor, tmp_path):
  _image(tmp_path / "in" / "0.png")
  out = tmp_path / "out"
  predict_files.predict_files(predictor, [tmp_path / "in"], out)
  with lock.hold(out / ".lock", "predictions"):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    with pytest.raises(lock.LockedError, match=f"is writing predictions in {out}. Wait for it or end it"):
      predict_files.predict_files(predictor, [tmp_path / "in"], out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before


def test_results_before_any_error_are_kept(predictor, tmp_path, monkeypatch):
  for i in range(9):
    _image(tmp_path / "in" / f"{i}.png")
  inputs, original = inputs_lib.find_inputs([tmp_path / "in"]), predictor.run

  def run(media, examples):
    calls.append(media)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return original(media, examples)

  calls = []
  monkeypatch.setattr(predictor, "run", run)
  with pytest.raises(KeyboardInterrupt):
    predict_files.predict_files(predictor, inputs, tmp_path / "out")
  assert _files(tmp_path / "out") == ["0.png", "1.png", "2.png", "3.png"]
  summary = json.loads((tmp_path / "out" / "summary.json").read_text())
  assert (summary["inputs"], summary["done"], summary["stopped"]) == (9, 4, "KeyboardInterrupt")


def test_a_disk_that_cannot_be_written_is_named(predictor, tmp_path, monkeypatch):
  for i in range(6):
    _image(tmp_path / "in" / f"{i}.png")
  original = atomic.open_aside

  def open_aside(path, **options):
    if "2.jpg" in str(path):
      raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    return original(path, **options)

  monkeypatch.setattr(atomic, "open_aside", open_aside)
  out = tmp_path / "out"
  with pytest.raises(OSError) as error:
    predict_files.predict_files(predictor, [tmp_path / "in"], out)
  assert str(error.value) == (
    f"{out}/classify/pictures/2.jpg: Read-only file system. The results of 2 of 6 inputs are in {out}. Free "
    "space there, or give another folder with --out=FOLDER."
  )
  assert _files(out) == ["0.png", "1.png"]


@pytest.mark.slow
def test_on_a_full_disk_pictures_make_room_for_results(run, tmp_path, request):
  rng = np.random.default_rng(0)
  for i in range(30):
    (tmp_path / "in").mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)).save(tmp_path / "in" / f"{i:02}.png")
  disk = tmp_path / "disk"
  disk.mkdir()
  command = [sys.executable, "-m", "frozen_vision.main", "--mode=predict", str(tmp_path / "in")]
  done = subprocess.run(
    small_disk.command(
      disk, "200k", [*command, f"--workdir={run}", f"--out={disk}/out"], kept=tmp_path / "kept"
    ),
    cwd=request.config.rootpath,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
  assert f"Error: {disk}/out/classify/pictures/" in done.stderr, done.stderr
  assert ": No space left on device. The results of" in done.stderr
  assert "pictures were removed to make room for them. Free space there" in done.stderr
  out = tmp_path / "kept" / "out"
  summary = json.loads((out / "summary.json").read_text())
  assert 0 < summary["done"] < 30 and _files(out) == [f"{i:02}.png" for i in range(summary["done"])]
