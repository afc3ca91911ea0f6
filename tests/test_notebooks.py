"""The notebooks: they run at a small size, and what is stored in them is clean."""

import base64
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from tests import notebook, tiny

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_FOLDER = _ROOT / "experiments" / "notebooks"
_NAMES = ("modules", "own_data", "quick_start")
_SMALL_HEAD = {f"detection.head.{name}": value for name, value in tiny.SMALL_HEAD.items()}


def _run(name, folder, **parameters):
  """What every code cell showed."""
  result = subprocess.run(
    [
      sys.executable,
      "tests/notebook.py",
      str(_FOLDER / f"{name}.ipynb"),
      str(folder),
      *(f"{key}={value!r}" for key, value in parameters.items()),
    ],
    cwd=_ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=900,
  )
  assert result.returncode == 0, result.stdout
  return json.loads((folder / "cells.json").read_text())


def _pictures(cells, folder):
  """The pictures that were shown, each more than one colour."""
  pictures = [
    np.asarray(Image.open(folder / cell["picture"]).convert("RGB")) for cell in cells if cell["picture"]
  ]
  for picture in pictures:
    assert min(picture.shape[:2]) > 60 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
  return pictures


@pytest.mark.slow
def test_quick_start(tmp_path):
  changes = {
    "batch_size": 2,
    "eval_batch_size": 2,
    "segmentation.head.name": "linear",
    "segmentation.frame": (64, 64),
    "segmentation.eval_frame": (64, 64),
    "segmentation.short_sides": (64,),
    "segmentation.scenes.image_size": 64,
    "segmentation.scenes.validation_images": 2,
  }
  cells = _run("quick_start", tmp_path, STEPS=2, WORKDIR=str(tmp_path / "run"), CHANGES=changes)
  assert len(_pictures(cells, tmp_path)) == 2
  printed = "".join(cell["printed"] for cell in cells)
  assert "FeatureSpec(stride=4, channels=32)" in printed and "Segmentation: 20,000 training" in printed
  assert "one backbone pass over every image" in printed
  assert (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_own_data(tmp_path):
  changes = {
    "batch_size": 2,
    "eval_batch_size": 2,
    "detection.head.name": "mask_rcnn",
    "detection.neck.channels": 8,
    "detection.frame": (64, 64),
    "detection.eval_frame": (64, 64),
    **_SMALL_HEAD,
    "detection.head.max_detections": 10,
  }
  cells = _run("own_data", tmp_path, STEPS=2, WORKDIR=str(tmp_path / "run"), CHANGES=changes)
  assert len(_pictures(cells, tmp_path)) == 3
  printed = "".join(cell["printed"] for cell in cells)
  assert "39 training and 10 validation images, held out of one file" in printed
  # The ids of the file that the notebook made, not those of COCO.
  content = json.loads((tmp_path / "run" / "mine.json").read_text())
  detections = json.loads((tmp_path / "run" / "detections.json").read_text())
  assert detections and min(category["id"] for category in content["categories"]) >= 500
  assert {row["category_id"] for row in detections} <= {category["id"] for category in content["categories"]}
  assert {row["image_id"] for row in detections} <= {image["id"] for image in content["images"]}


@pytest.mark.slow
def test_modules(tmp_path):
  cells = _run("modules", tmp_path, STEPS=8, NUM_SCENES=8)
  assert len(_pictures(cells, tmp_path)) == 1
  printed = "".join(cell["printed"] for cell in cells)
  losses = [float(text) for text in re.findall(r"step .*segment ([\d.]+)", printed)]
  assert len(losses) >= 2 and losses[-1] < losses[0]
  assert "0 bytes of the backbone changed" in printed


@pytest.mark.parametrize("name", _NAMES)
def test_what_is_stored(name):
  path = _FOLDER / f"{name}.ipynb"
  assert path.stat().st_size < 500_000
  content = json.loads(path.read_text())
  assert content["nbformat"] == 4 and content["metadata"]["kernelspec"]["language"] == "python"
  ids = [cell["id"] for cell in content["cells"]]
  assert len(set(ids)) == len(ids) and content["cells"][0]["cell_type"] == "markdown"
  cells = notebook.code_cells(path)
  # From one run from top to bottom.
  assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
  pictures = 0
  for cell in cells:
    text = "".join(cell["source"])
    for output in cell["outputs"]:
      assert output["output_type"] in ("stream", "execute_result"), output["output_type"]
      assert output.get("name") != "stderr", output
      data = output.get("data", {})
      text += "".join(output.get("text", ())) + "".join(data.get("text/plain", ()))
      assert "image/png" not in data  # of photographs five times as large
      if "image/jpeg" in data:
        picture = Image.open(io.BytesIO(base64.b64decode("".join(data["image/jpeg"]))))
        assert max(picture.size) <= 1400 and len(picture.convert("RGB").getcolors(2**24)) > 50
        pictures += 1
    assert not re.search(r"(?<![\w.])/(home|root|work|Users|opt|content|usr|var)/", text), text
    # Nothing but Python, so that they run outside of Jupyter too.
    assert not re.search(r"^\s*[!%]", "".join(cell["source"]), re.MULTILINE)
  assert pictures


def test_every_notebook_is_tested():
  assert sorted(path.stem for path in _FOLDER.glob("*.ipynb")) == sorted(_NAMES)
