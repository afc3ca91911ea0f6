"""Two real processes give what one gives, with unequal shares and ids beyond int32."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from frozen_vision.metrics import accuracy, coco_ap

ROOT = pathlib.Path(__file__).resolve().parents[2]
IDS = [5, 2**40 + 1, 3, 77, 12]


def run(indices: list[int], workdir: str) -> dict:
  """Evaluates the given share of five images, and as many rows of logits per image as its index."""
  truth = {
      "images": [{"id": i, "height": 64, "width": 64} for i in IDS],
      "categories": [{"id": 4, "name": "a"}, {"id": 2, "name": "b"}],
      "annotations": [
          {"id": n, "image_id": i, "category_id": (2, 4)[n % 2], "bbox": [4, 4, 20 + n, 30],
           "area": 600, "segmentation": [[4, 4, 24 + n, 4, 24 + n, 34, 4, 34]]}
          for n, i in enumerate(IDS)
      ],
  }  # fmt: skip
  detection, classes = coco_ap.CocoEvaluator(truth), accuracy.AccuracyEvaluator((1, 2))
  for index in indices:
    rng = np.random.default_rng(index)
    low = rng.uniform(0, 9, (1, 6, 2))
    detection.update(
        {
            "boxes": np.concatenate([low, low + rng.uniform(15, 30, (1, 6, 2))], -1),
            "scores": rng.random((1, 6), np.float32),
            "labels": rng.integers(0, 2, (1, 6)),
            "valid": np.ones((1, 6), bool),
            "masks": rng.random((1, 6, 28, 28), np.float32) ** 0.2,
        },
        {"image_id": np.array([IDS[index]]), "image_size": np.array([[64, 64]]),
         "original_size": np.array([[64, 64]])},
    )  # fmt: skip
    logits, labels = rng.normal(size=(index, 3)), rng.integers(0, 3, index)
    classes.update({"logits": logits}, {"label": labels})
  detection.write(pathlib.Path(workdir) / "detections.json")
  return {"coco": detection.result(), "accuracy": classes.result()}


def main() -> None:
  import jax  # pylint: disable=g-import-not-at-top

  address, index, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(address, num_processes=2, process_id=index)
  result = run([[4, 1, 3], [0, 2]][index], workdir)
  pathlib.Path(workdir, f"result{index}.json").write_text(json.dumps(result))


def test_two_processes_equal_one(tmp_path):
  (tmp_path / "one").mkdir()
  expected = run([0, 1, 2, 3, 4], str(tmp_path / "one"))
  assert 0 < expected["coco"]["mask_AP50"] < 1
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  workdir = tmp_path / "two"
  workdir.mkdir()
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "NPROC": "8"}
  processes = [
      subprocess.Popen(
          [sys.executable, "-m", "tests.metrics.test_gather", address, str(i), str(workdir)],
          cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
      )
      for i in range(2)
  ]  # fmt: skip
  try:
    for process in processes:
      _, errors = process.communicate(timeout=120)
      assert process.returncode == 0, errors
  finally:
    for process in processes:
      process.kill()  # SIGKILL: jax.distributed catches SIGTERM.
  for i in range(2):
    assert json.loads((workdir / f"result{i}.json").read_text()) == expected
  assert (workdir / "detections.json").read_bytes() == (tmp_path / "one/detections.json").read_bytes()


if __name__ == "__main__":
  main()
