"""Plans: the planned program is the trained one, its parts add up, and what does not fit is a result."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from frozen_vision.devices import sharding
from frozen_vision.planning import machines, plan
from frozen_vision.runs import state_leaves
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop, step
from tests import tiny

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PARTS = {
  "frozen_weights",
  "trained_parameters",
  "optimizer",
  "batch",
  "layout",
  "temporaries",
  "program",
  "total",
}
_KEYS = {
  "fits",
  "bytes_per_device",
  "limited_by",
  "advice",
  "model_flops_per_step",
  "step_seconds",
  "compile_seconds",
}

# As libtpu 0.0.42 refuses a program whose arrays alone are too large.
_TOO_LARGE = (
  "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (24.00G) "
  "exceeds available HBM (15.75G)."
)


@pytest.fixture
def configs(tmp_path):
  """One config of each task, with data that can be opened."""
  folder = tiny.image_folder(tmp_path / "images")
  classification = tiny.classification(folder, folder)
  classification.trainable = ("head/.*",)
  return {
    "detection": tiny.detection(),
    "segmentation": tiny.segmentation("mask2former"),
    "action": tiny.action(),
    "classification": classification,
  }


def _mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


def _described(tree):
  return state_leaves.describe(state_leaves.flatten(tree)[0])


@pytest.mark.parametrize(
  "name", [pytest.param("detection", marks=pytest.mark.slow), "segmentation", "action", "classification"]
)
def test_the_planned_program_takes_what_training_gives_it(configs, name):
  config = configs[name]
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)
  with task.train_batches(0) as batches:
    batch = step.device_batch(next(batches))

  program = plan.make_program(task, config, _mesh())
  assert _described(program.batch) == _described(batch)
  assert _described(program.state["trainable"]) == _described(model.trainable)
  assert _described(program.frozen) == _described(model.frozen)
  assert program.frozen_pass == model.frozen_pass
  assert "ema" in program.state or not config.ema_decay


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_weights_are_planned_as_they_are_held(storage):
  config = tiny.segmentation()
  config.frozen_dtype = storage
  task = tasks_build.build_task(config)
  program = plan.make_program(task, config, _mesh())
  assert _described(program.frozen) == _described(loop.build_model(task, config).frozen)


def test_neither_data_nor_weights_are_looked_for(configs):
  for name, config in configs.items():
    options = config[name]
    of_files = {"detection": "coco", "segmentation": "ade20k", "action": "videos", "classification": "files"}
    options.data = of_files[name]
    if name == "classification":
      options.train = options.validation = "absent"
    config.backbone.weights = "absent/weights.safetensors"
    if "init" in options:
      options.init.path = "absent/head.safetensors"
    task = plan.build_task(plan.without_files(config))
    assert len(task.classes) == dict(detection=80, segmentation=150, action=400, classification=1000)[name]
    program = plan.make_program(task, plan.without_files(config), _mesh())
    assert {leaf.shape[0] for leaf in program.batch.values()} == {config.batch_size}
    assert config.backbone.weights == "absent/weights.safetensors"  # the caller's config is as it was


def test_a_plan(tmp_path):
  config = tiny.segmentation()
  config.batch_size = 2
  report = plan.plan(config, str(tmp_path / "run"), "cpu:1", name="tiny")
  assert report == json.loads((tmp_path / "run" / "plan.json").read_text())
  assert _KEYS | {"devices", "device_memory_bytes", "mesh", "topology", "config", "finetune"} <= set(report)
  assert (report["devices"], report["topology"], report["config"]) == (1, "cpu:1", "tiny")
  assert report["mesh"] == {"data": 1, "model": 1} and report["examples_per_device"] == 2

  # What lies in memory is what a run would put there.
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)

  def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

  with task.train_batches(0) as batches:
    batch = size(step.device_batch(next(batches)))
  found = report["bytes_per_device"]
  assert set(found) == _PARTS and sum(found.values()) == 2 * found["total"]
  assert found["frozen_weights"] == report["frozen_bytes"] == size(model.frozen)
  assert found["trained_parameters"] == size(model.trainable)
  assert 3 <= found["optimizer"] / size(model.trainable) < 3.1  # two moments, one average, and counters
  assert found["batch"] == batch
  assert found["temporaries"] > 0
  assert report["fits"] and report["step_seconds"] is None

  # Nothing is frozen in fine-tuning: all of it has moments, and is paid for three times.
  tuned = report["finetune"]
  assert _KEYS <= set(tuned) and tuned["bytes_per_device"]["frozen_weights"] == 0
  backbone = tuned["bytes_per_device"]["trained_parameters"] - found["trained_parameters"]
  assert 0.9 < backbone / found["frozen_weights"] < 1.1
  assert 3 <= tuned["bytes_per_device"]["optimizer"] / tuned["bytes_per_device"]["trained_parameters"] < 3.1
  text = plan.table(report)
  for words in ("frozen backbone", "fine-tuned", "temporaries", "memory of a device", "tiny on cpu:1"):
    assert words in text


@pytest.fixture
def no_compiler(monkeypatch):
  """Programs that the compiler of a small TPU refuses, with the given message; nothing is compiled."""

  def install(message):
    def refuse(program):
      raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(plan.Program, "compile", refuse)
    describe = machines.describe
    monkeypatch.setattr(
      machines,
      "describe",
      lambda name: dataclasses.replace(
        describe("cpu:1"), name=name, device_memory=int(15.75 * 2**30), peak_flops=197e12
      ),
    )

  return install


def test_a_program_that_the_compiler_refuses_is_a_plan_that_does_not_fit(tmp_path, no_compiler):
  no_compiler(_TOO_LARGE)
  config = tiny.segmentation()
  report = plan.plan(config, str(tmp_path), "v5e:1x1", mfu=0.5)
  assert report == json.loads((tmp_path / "plan.json").read_text())
  for part in (report, report["finetune"]):
    assert not part["fits"] and part["limited_by"] == "temporaries"
    assert part["bytes_per_device"]["total"] == 24 * 2**30
    assert part["step_seconds"] == part["model_flops_per_step"] / (0.5 * 197e12)
  assert "micro-batches" in report["advice"]
  assert "no, 8.25 GiB too much" in plan.table(report)


def test_what_the_compiler_refuses_for_another_reason_is_an_error(tmp_path, no_compiler):
  no_compiler("INTERNAL: something else")
  with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
    plan.plan(tiny.segmentation(), str(tmp_path), "v5e:1x1")


def test_fitting_is_a_matter_of_the_memory(tmp_path, monkeypatch):
  describe = machines.describe
  monkeypatch.setattr(
    machines, "describe", lambda name: dataclasses.replace(describe(name), device_memory=100_000)
  )
  report = plan.plan(tiny.segmentation(), str(tmp_path), "cpu:1")
  assert not report["fits"] and not report["finetune"]["fits"]


def test_refusals_are_read():
  assert plan.needed_bytes(_TOO_LARGE) == 24 * 2**30
  assert plan.needed_bytes("INTERNAL: Mosaic failed") is None


def test_settings_that_cannot_be(tmp_path):
  config = tiny.segmentation()
  with pytest.raises(ValueError, match="mfu=0: expected a fraction"):
    plan.plan(config, str(tmp_path), "cpu:1", mfu=0)
  config.accumulate = 4
  with pytest.raises(ValueError, match="config.batch_size is 2"):
    plan.plan(config, str(tmp_path), "cpu:1")
  config.accumulate, config.mesh.model = 1, 3
  with pytest.raises(ValueError, match="config.mesh"):
    plan.plan(config, str(tmp_path), "cpu:1")
  assert not (tmp_path / "plan.json").exists()


def test_fine_tuning_costs_three_forward_passes_and_is_counted_without_what_is_computed_again():
  config = tiny.action()
  # In one pass, since the task computes several again; on the last level, since no gradient reaches what
  # comes after another one.
  config.action.update(dict(head=dict(name="average", levels=(3,)), frames_per_pass=64))
  config = plan.without_files(config)
  task, mesh = plan.build_task(config), _mesh()
  frozen = plan.make_program(task, config, mesh)
  tuned, again = (
    plan.make_program(task, plan.finetuned(config), mesh, stacked=True, remat=remat)
    for remat in (False, True)
  )
  once, tuned, again = (plan.program_flops(program) for program in (frozen, tuned, again))
  # The head is one small product, and no gradient goes into the images.
  assert 2.8 < tuned / once < 3.05
  assert 3.6 < again / once < 4.05


def test_flops_of_a_step_without_loops_are_those_that_the_compiler_counts():
  config = tiny.action()
  config.backbone.overrides.update(
    embed_dim=64, num_heads=(2, 4, 8, 16), pretrained_window_sizes=(4, 4, 4, 2)
  )
  config.action.update(dict(head=dict(name="average", levels=(3,)), frames_per_pass=64, image_size=64))
  config = plan.without_files(config)
  program = plan.make_program(plan.build_task(config), config, _mesh())
  with jax.set_mesh(program.mesh):
    analysis = program.traced.lower().cost_analysis()
  assert 0.95 < plan.program_flops(program) / analysis["flops"] < 1


@pytest.mark.slow
def test_the_command_plans_for_four_devices(tmp_path):
  command = [
    sys.executable,
    "-m",
    "frozen_vision.main",
    "--config=tests/tiny.py:action",
    f"--workdir={tmp_path}",
    "--mode=plan",
    "--topology=cpu:4",
    "--config.batch_size=8",
    "--plan_finetune=False",
  ]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  process = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=600)
  assert process.returncode == 0, process.stdout + process.stderr
  report = json.loads((tmp_path / "plan.json").read_text())
  assert report["devices"] == 4 and report["examples_per_device"] == 2
  assert report["config"] == "tests/tiny.py:action"
  task = tasks_build.build_task(tiny.action())
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(loop.build_model(task, tiny.action()).frozen))
  assert report["frozen_bytes"] == whole
  assert np.isclose(report["bytes_per_device"]["frozen_weights"], whole / 4, rtol=0.05)
  assert report["bytes_per_device"]["temporaries"] > 0
  assert report["finetune"] is None and "fine-tuned" not in process.stdout
  assert "as configured" in process.stdout and "Traceback" not in process.stdout + process.stderr
