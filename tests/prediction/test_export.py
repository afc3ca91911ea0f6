"""Exported programs: on every platform, and without the package."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors

from frozen_vision import export
from frozen_vision.files import lock
from frozen_vision.prediction import predictor as predict
from tests import saved_runs, tiny

_SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "run_exported.py"


def _predictor(tmp_path, **configs):
  heads = {}
  for name, config in configs.items():
    heads[name] = tmp_path / name
    saved_runs.save_run(heads[name], config, saved_runs.CLASSES[config.task])
  return predict.Predictor(None, heads)


def _run_elsewhere(program, images, tmp_path):
  """What the script gives in an empty folder, where only installed packages can be imported."""
  folder = tmp_path / "elsewhere"
  folder.mkdir()
  np.save(folder / "images.npy", images)
  variables = {**os.environ, "JAX_PLATFORMS": "cpu"}
  check = subprocess.run(
    [sys.executable, "-I", "-c", "import frozen_vision"], cwd=folder, env=variables, capture_output=True
  )
  if check.returncode == 0:
    pytest.skip("frozen_vision is installed here, so a script cannot show that it does without.")
  done = subprocess.run(
    [sys.executable, "-I", str(_SCRIPT), str(program), "images.npy", "out.npz"],
    cwd=folder,
    env=variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stdout
  with np.load(folder / "out.npz") as file:
    return dict(file)


def test_script_is_ten_lines_of_others_packages():
  lines = [line for line in _SCRIPT.read_text().splitlines() if line.strip()]
  assert len(lines) <= 10 and "import frozen_vision" not in _SCRIPT.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("frozen_dtype", ["float32", "bfloat16", "int8"])
def test_program_without_the_package_gives_our_numbers(tmp_path, frozen_dtype):
  config = tiny.segmentation()
  config.frozen_dtype = frozen_dtype
  if frozen_dtype == "bfloat16":
    config.backbone.dtype = "bfloat16"
  coarse = tiny.segmentation()
  coarse.frozen_dtype, coarse.backbone.dtype = config.frozen_dtype, config.backbone.dtype
  coarse.segmentation.head.levels = (2, 3)
  predictor = _predictor(tmp_path, segment=config, coarse=coarse)
  path = tmp_path / "program.jaxexport"
  meta = export.export(predictor, path, batch_size=2)
  assert meta["images"] == [2, 64, 64, 3]
  program = jax.export.deserialize(path.read_bytes())
  assert program.platforms == ("cpu", "cuda", "tpu")
  with safetensors.safe_open(f"{path}.safetensors", framework="numpy") as file:
    names = list(file.keys())
    stored = json.loads(file.metadata()["frozen_vision"])
  assert [entry["name"] for entry in stored["heads"]["coarse"]["classes"]] == ["background", "disk", "ring"]
  assert sum(name.startswith("backbone/") for name in names) == sum(
    leaf is not None for leaf in jax.tree.leaves(predictor.heads["segment"].frozen)
  )  # once for both heads
  assert any(name.startswith("coarse/head/") for name in names)

  images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
  found = _run_elsewhere(path, images, tmp_path)
  function, weights, _ = export.program(predictor)
  ours = jax.jit(function)(weights, images, np.full((2, 2), 64, np.int32))
  wanted = predictor(list(images))
  assert set(found) == {"segment.label_map", "coarse.label_map"}
  for name in ("segment", "coarse"):
    np.testing.assert_array_equal(found[f"{name}.label_map"], ours[name]["label_map"])
    for labels, result in zip(found[f"{name}.label_map"], wanted[name]):
      # Where two classes score the same to rounding, a pass and heads in programs of their own may take the
      # other one; between programs bfloat16 features are rounded, inside of one XLA need not do it.
      assert np.mean(labels == result.labels) > (0.99 if frozen_dtype == "bfloat16" else 0.999)


@pytest.mark.slow
def test_detector_and_segmenter_are_one_program(tmp_path):
  predictor = _predictor(tmp_path, detect=tiny.detection(), segment=tiny.segmentation())
  path = tmp_path / "program.jaxexport"
  export.export(predictor, path, batch_size=2)
  images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
  found = _run_elsewhere(path, images, tmp_path)
  head = predictor.heads["detect"]
  sizes = np.full((2, 2), 64, np.int32)
  batch = {"image": images, "image_size": sizes, "original_size": sizes}
  wanted = jax.device_get(head.outputs(batch, head.features(batch)))
  assert wanted["valid"].any()
  for name in ("boxes", "scores", "masks"):
    np.testing.assert_allclose(found[f"detect.{name}"], wanted[name], rtol=1e-5, atol=1e-5)
  for name in ("labels", "valid"):
    np.testing.assert_array_equal(found[f"detect.{name}"], wanted[name])
  assert found["segment.label_map"].shape == (2, 64, 64)


def test_probabilities_of_videos_and_of_classifiers(tmp_path):
  action = tiny.action()
  action.action.head.name = "average"
  predictor = _predictor(tmp_path, act=action)
  path = tmp_path / "program.jaxexport"
  meta = export.export(predictor, path, platforms=("cpu",))
  assert meta["images"] == [1, 1, 4, 32, 32, 3]
  clip = np.random.default_rng(0).integers(0, 256, (1, 1, 4, 32, 32, 3)).astype(np.uint8)
  program = jax.export.deserialize(path.read_bytes())
  function, weights, _ = export.program(predictor)
  arguments = weights, clip, np.array([[32, 32]], np.int32)
  found = jax.jit(program.call)(*arguments)["act"]["probabilities"]
  np.testing.assert_array_equal(found, jax.jit(function)(*arguments)["act"]["probabilities"])
  wanted = predictor([clip[0, 0]])["act"][0].probabilities
  np.testing.assert_allclose(found[0], wanted, rtol=1e-6, atol=1e-7)
  # A second writer of the same program touches nothing.
  before = path.stat().st_mtime_ns
  with lock.hold(f"{path}.lock", "a program"):
    with pytest.raises(lock.LockedError, match=f"is writing the program {path}. Wait for it or end it"):
      export.export(predictor, path, platforms=("cpu",))
  assert path.stat().st_mtime_ns == before


def test_heads_that_cannot_be_one_program(tmp_path):
  predictor = _predictor(tmp_path, segment=tiny.segmentation(), act=tiny.action())
  with pytest.raises(ValueError, match="several; export them one by one"):
    export.export(predictor, tmp_path / "x")
  config = tiny.segmentation()
  config.segmentation.test.flip = True
  flipped = _predictor(tmp_path, flipped=config)
  with pytest.raises(ValueError, match="flipped looks at several views"):
    export.export(flipped, tmp_path / "x")
  with pytest.raises(ValueError, match=r"platforms are \['gpu'\]; known: cpu, cuda, tpu"):
    export.export(flipped, tmp_path / "x", platforms=("gpu",))
  with pytest.raises(SystemExit):
    export.main([f"--workdir={tmp_path}/absent", f"--out={tmp_path}/x"])
