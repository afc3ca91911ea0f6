"""Writes what the `lvis` package measures on generated detections; needs lvis and pycocotools, not JAX.

  python tests/references/lvis_ap.py FOLDER

FOLDER/lvis_ap.json: the 13 numbers of each type, `bbox` and `segm`, for `tests/metrics/lvis_data.py`.
"""

import copy
import json
import pathlib
import sys
import tempfile

from lvis import LVIS, LVISEval, LVISResults
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.metrics import lvis_data  # noqa: E402

np.float = float  # lvis 0.5.3 is older than NumPy 1.24, which took this name away


def measure(truth, detections, iou_type):
  with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
    json.dump(truth, file)
    file.flush()
    index = LVIS(file.name)
  results = LVISResults(index, copy.deepcopy(detections))
  evaluation = LVISEval(index, results, iou_type)
  evaluation.run()
  return {name: float(value) for name, value in evaluation.get_results().items()}


def main(folder):
  truth = lvis_data.truth()
  detections = lvis_data.detections(truth)
  found = {iou_type: measure(truth, detections, iou_type) for iou_type in ("bbox", "segm")}
  path = pathlib.Path(folder) / "lvis_ap.json"
  path.write_text(json.dumps(found, indent=1) + "\n")
  print(path, found)


if __name__ == "__main__":
  main(sys.argv[1])
