"""Meshes of virtual devices and several processes give what one device gives; processes that die are seen."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from frozen_vision.backbones import families
from frozen_vision.devices import launcher
from frozen_vision.devices import processes as distributed
from frozen_vision.files import trees
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop
from tests import random_backbones, tiny, weights_run

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
  "task, head, meshes",
  [
    ("detection", "", ["4x2", "2x4"]),
    ("segmentation", "mask2former", ["4x2", "2x4"]),
    ("segmentation", "linear", ["8x1", "4x2", "2x4", "1x8"]),
    ("action", "", ["4x2", "2x4"]),
    # A step that trains a backbone takes long to compile.
    ("feature_distillation", "", ["8x1"]),
    ("masked_image_modeling", "", ["8x1"]),
    ("contrastive,self_distillation", "", ["8x1"]),
  ],
)
def test_every_mesh_gives_what_one_device_gives(task, head, meshes):
  result = subprocess.run(
    [sys.executable, "-m", "tests.mesh_run", task, head, "", *meshes],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert result.returncode == 0, result.stdout + result.stderr
  tasks = task.split(",")
  for name, line in zip(tasks, result.stdout.splitlines()[-len(tasks) :], strict=True):
    _check_meshes(name, meshes, json.loads(line))


def _check_meshes(task, meshes, report):
  """`report` is what tests/mesh_run.py prints of a task."""
  without_frozen = task in ("masked_image_modeling", "contrastive", "self_distillation")
  trains_backbone = without_frozen or task == "feature_distillation"
  assert list(report) == meshes
  for mesh, found in report.items():
    for name in ("scalars", "updated", "kept", "gradients", "predictions"):
      # Where a whole backbone trains, sums over the batch pass through all of it on their way back.
      assert found[name] <= (1e-4 if trains_backbone else 1e-5), (task, mesh, name, found)
    # On 4x2 that of heads is sharded; what trains of a backbone is so anyway.
    smallest, largest = (0.125, 0.16) if mesh == "4x2" else (0.125 if trains_backbone else 1.0, 1.0)
    assert smallest <= found["moments_share"] <= largest, (mesh, found)
    assert found["rois_equal"] and (task != "detection" or found["num_rois"] > 8), (mesh, found)
    if without_frozen:
      continue
    # Weights of (2, 4) are spread over groups of 4, those of the others over all 8.
    assert found["frozen_share"] <= (0.26 if mesh == "2x4" else 0.135), (mesh, found)


def _environment(devices):
  # Two devices a process on two cores wait for each other for ever, unless threads are plenty.
  return os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "8", "JAX_NUM_CPU_DEVICES": str(devices)}


def _command(workdir, *changes, task="detection", mode="train", distributed=True):
  return [
    sys.executable,
    "-m",
    "frozen_vision.main",
    f"--config=tests/tiny.py:{task}",
    f"--workdir={workdir}",
    f"--mode={mode}",
    "--config.batch_size=4",
    "--config.eval_batch_size=4",
    "--config.frozen_dtype=float32",
    *changes,
    *(["--distributed"] if distributed else []),
  ]


def _launch(processes, command):
  return [sys.executable, "-m", "frozen_vision.distributed", f"--processes={processes}", "--", *command]


def _trained(workdir):
  """What the newest checkpoint has trained and averaged, by path, and its step."""
  config = tiny.detection()
  trainable = loop.build_model(tasks_build.build_task(config), config).trainable
  with checkpoint.Checkpoints(workdir) as checkpoints:
    state, meta = checkpoints.restore({"trainable": trainable, "ema": trainable}, partial=True)
  leaves = {
    f"{part}/{path}": np.asarray(leaf)
    for part, tree in state.items()
    for path, leaf in trees.flatten(tree).items()
  }
  return leaves, meta["step"]


def _assert_close(found, wanted):
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    bound = 1e-4 * max(np.abs(value).max(initial=0), 1e-6)
    assert np.abs(found[name] - value).max(initial=0) <= bound, name


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
  changes = ("--config.steps=4", "--config.checkpoint_every=2", "--config.log_every=1")

  def run(command, devices):
    return subprocess.run(
      command,
      cwd=_ROOT,
      env=_environment(devices),
      capture_output=True,
      text=True,
      timeout=900,
    )

  alone = run(_command(tmp_path / "one", *changes, distributed=False), 1)
  assert alone.returncode == 0, alone.stdout + alone.stderr
  both = run(_launch(2, _command(tmp_path / "two", *changes, "--config.mesh.optimizer=sharded")), 2)
  assert both.returncode == 0, both.stdout + both.stderr
  assert "data 4 x model 1 on 2 processes" in both.stdout and "[0/2]" in both.stdout
  assert "[1/2]" not in both.stdout  # the others tell no more than warnings
  wanted, found = (tiny.metrics(tmp_path / name) for name in ("one", "two"))
  assert wanted["train/loss"] and len(wanted["train/loss"]) == 4
  for name in wanted:
    if name.startswith(("train/", "eval/")) and "per_second" not in name:
      np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6, err_msg=name)
  (arrays, step), (more, same) = _trained(tmp_path / "one"), _trained(tmp_path / "two")
  assert step == same == 4
  _assert_close(more, arrays)
  detections = [json.loads((tmp_path / name / "detections.json").read_text()) for name in ("one", "two")]
  assert len(detections[0]) == len(detections[1])

  # What two processes began, one of one device ends, as if it had been alone from the start.
  shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")
  resumed = run(_command(tmp_path / "two", *changes, distributed=False), 1)
  said = resumed.stdout + resumed.stderr
  assert resumed.returncode == 0 and "Continuing from step 2" in resumed.stdout, said
  _assert_close(_trained(tmp_path / "two")[0], arrays)
  evaluated = run(_launch(2, _command(tmp_path / "one", *changes, mode="evaluate")), 2)
  said = evaluated.stdout + evaluated.stderr
  assert evaluated.returncode == 0 and "Evaluating step 4" in evaluated.stdout, said
  assert tiny.metrics(tmp_path / "one")["eval/box_AP"][-1][1] == pytest.approx(
    wanted["eval/box_AP"][-1][1], abs=1e-6
  )


@pytest.mark.slow
def test_weights_of_every_source_on_two_processes(tmp_path):
  weights_run.write_files(tmp_path)
  command = [sys.executable, "-m", "tests.weights_run", str(tmp_path)]
  # One process of its own has programs compiled as the two have: last bits of folded weights depend on that.
  for processes in (1, 2):
    result = subprocess.run(
      _launch(processes, command),
      cwd=_ROOT,
      env=_environment(1),
      capture_output=True,
      text=True,
      timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
  alone, first, second = (
    json.loads((tmp_path / name).read_text()) for name in ("1_0.json", "2_0.json", "2_1.json")
  )
  assert first == second and first.keys() == alone.keys()
  for name, wanted in alone.items():
    features = np.array(wanted.pop("features")), np.array(first[name].pop("features"))
    assert first[name] == wanted, name
    np.testing.assert_allclose(*features, rtol=1e-4, atol=1e-5, err_msg=name)
  # Two public checkpoints and a file of ours have the same weights; every other source has its own.
  sources = weights_run.all_sources(tmp_path)
  fingerprints = {found.get("fingerprint") for found in alone.values()} - {None}
  assert len(fingerprints) == len(sources) - 2


# What a run does after an evaluation, many times: keeps the best, and saves.
_SAVES = """
import faulthandler, sys
from frozen_vision.devices import processes as distributed, sharding
from frozen_vision.runs import checkpoints as checkpoint
faulthandler.dump_traceback_later(240, exit=True)  # processes that wait for each other say where
distributed.initialize()
import jax, numpy as np
weights = {"weights": np.ones(8, np.float32)}
mesh = sharding.make_mesh()
state = {"trainable": sharding.put(weights, {"weights": sharding.replicated(mesh)})}
with checkpoint.Checkpoints(sys.argv[1], best_metric="quality") as checkpoints:
  for step in range(20):
    checkpoints.save_best(step, state, {}, {"quality": step})
    checkpoints.save(step, state, {})
"""


@pytest.mark.slow
def test_saves_of_two_folders_do_not_meet(tmp_path):
  result = subprocess.run(
    _launch(2, [sys.executable, "-c", _SAVES, str(tmp_path)]),
    cwd=_ROOT,
    env=_environment(1),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  with checkpoint.Checkpoints(tmp_path, best_metric="quality") as checkpoints:
    assert checkpoints.latest_step() == checkpoints.best_step() == 19


def _run_until(command, log, step, act):
  """Runs a launcher's command, and calls `act` with the launcher's id once a step is logged.

  Returns:
    (what `act` gave, the launcher's status, the log).
  """
  with open(log, "w", encoding="utf-8") as file:
    launcher = subprocess.Popen(
      command, cwd=_ROOT, env=_environment(1), stdout=file, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 600
    while not re.search(rf"step +{step}/", log.read_text()):
      assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()
      time.sleep(0.05)
    found = act(launcher.pid)
    started = time.monotonic()
    status = launcher.wait(timeout=150)
  assert time.monotonic() - started < 60, log.read_text()
  return found, status, log.read_text()


def _end_second(how):
  """Sends a signal to the second process of a launcher; returns that process's id."""

  def act(launcher):
    victim = _children(launcher)[1]
    os.kill(victim, how)
    return victim

  return act


def _newest_step(workdir):
  with checkpoint.Checkpoints(workdir) as checkpoints:
    return checkpoints.latest_step()


@pytest.mark.slow
def test_whatever_ends_one_process_of_a_run_ends_both_and_both_resume(tmp_path):
  """One is killed; one is told to stop; and one cannot read its part of a batch."""
  run, log, images = tmp_path / "run", tmp_path / "log.txt", tiny.image_folder(tmp_path / "images")
  backbone = random_backbones.build("swinv2_nano", **tiny.SMALL_BACKBONE)
  families.save_backbone(backbone, tmp_path / "weights.safetensors", name="swinv2_nano")
  changes = [
    f"--config.backbone.weights={tmp_path / 'weights.safetensors'}",
    *(f"--config.classification.{split}={images}" for split in ("train", "validation")),
    *("--config.trainable=('head/.*',)", "--config.steps=100000"),
    *("--config.checkpoint_every=10", "--config.log_every=10"),
  ]
  command = _launch(2, _command(run, *changes, task="classification"))
  victim, status, text = _run_until(command, log, 20, _end_second(signal.SIGKILL))
  assert status != 0 and "Process 1 of 2 was ended by SIGKILL; ending the others." in text, text
  assert re.search(rf"Process 1 of 2 \(process id {victim} on .*\) was lost at \d\d:\d\d:\d\d", text), text
  killed_at = _newest_step(run)
  assert killed_at >= 10

  # At SIGTERM all of them save and end well.
  _, status, text = _run_until(command, log, killed_at + 10, _end_second(signal.SIGTERM))
  assert f"Continuing from step {killed_at}" in text, text
  assert status == 0 and "the same command continues" in text, text
  stopped_at = _newest_step(run)
  assert stopped_at >= killed_at + 10

  # An image is damaged under the run: the step before it is saved by both, and both name it and its host.
  image = images / "class1" / "2.png"
  data = image.read_bytes()[:60]
  _, status, text = _run_until(command, log, (stopped_at // 10 + 1) * 10, lambda _: image.write_bytes(data))
  assert f"Continuing from step {stopped_at}" in text and status == 1, text
  sentence = r"Error: host [01] \(\S+\): class1/2.png: .*\. Step (\d+) is saved\. Mend the file"
  assert re.search(sentence, text), text
  assert int(re.search(sentence, text)[1]) == _newest_step(run) > stopped_at, text


# A host sees the folders of its own working directory.
_HOST = """
import os, runpy, sys
os.chdir(os.path.join(sys.argv[1], os.environ["FROZEN_VISION_PROCESS"]))
sys.argv = ["main", *sys.argv[2:]]
runpy.run_module("frozen_vision.main", run_name="__main__")
"""


@pytest.mark.slow
def test_hosts_with_other_data_are_named_before_the_first_step(tmp_path):
  for host in "01":
    for split in ("train", "validation"):
      tiny.image_folder(tmp_path / host / split)
  (tmp_path / "1" / "train" / "class0" / "0.png").unlink()
  image = tmp_path / "1" / "validation" / "class0" / "0.png"
  image.write_bytes(image.read_bytes() + b"\0")
  flags = [
    f"--config={_ROOT}/tests/tiny.py:classification",
    f"--workdir={tmp_path / 'run'}",
    "--config.classification.train=train",
    "--config.classification.validation=validation",
    "--distributed",
  ]
  result = subprocess.run(
    _launch(2, [sys.executable, "-c", _HOST, str(tmp_path), *flags]),
    cwd=_ROOT,
    env=_environment(1) | {"PYTHONPATH": str(_ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  said = result.stdout + result.stderr
  assert result.returncode == 1 and "Error: The hosts of this run were not started alike: " in said, said
  assert re.search(r"host 1 \(.*\) found 11 training examples where host 0 \(.*\) found 12", said), said
  assert re.search(
    r"the validation examples of host 1 \(.*\) have other file sizes than those of host 0", said
  )
  assert not (tmp_path / "run" / "config.json").exists()


_WAITING = """
import time
from frozen_vision.devices import processes
processes.initialize()
print("ready\\n", end="", flush=True)  # one write, which that of another process cannot divide
time.sleep(100)
"""


def test_a_killed_launcher_takes_its_processes_along():
  with subprocess.Popen(
    _launch(2, [sys.executable, "-c", _WAITING]),
    cwd=_ROOT,
    env=_environment(1),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ) as launcher:
    assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    launcher.send_signal(signal.SIGKILL)
    started = time.monotonic()
    said = launcher.stdout.read()  # to its end, which comes when nobody is left to write
  assert "The launcher of this process was gone at" in said, said
  assert time.monotonic() - started < 30


def test_a_process_without_the_others_says_for_whom_it_waits(monkeypatch, capfd):
  monkeypatch.setattr(distributed, "_SILENT_SECONDS", 0.0)
  with distributed._joining({"num_processes": 4, "coordinator_address": "host:1"}):
    time.sleep(0.2)
  assert re.search(
    r"Waiting for the other 3 processes at host:1 since \d\d:\d\d:\d\d", capfd.readouterr().err
  )
  said = []
  monkeypatch.setattr(distributed, "_JOINING_SECONDS", 0.0)
  monkeypatch.setattr(distributed, "leave", said.append)
  with distributed._joining({}):
    time.sleep(0.2)
  assert "Error: not all of the other processes of this run came within 0 s" in said[0]


def _children(parent):
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = path.read_text().rpartition(")")[2].split()
    except OSError:
      continue
    if int(fields[1]) == parent:
      found.append(int(path.parent.name))
  return sorted(found)


def test_wrong_use_is_said(monkeypatch):
  for name in ("COORDINATOR", "PROCESSES", "PROCESS"):
    monkeypatch.delenv(f"FROZEN_VISION_{name}", raising=False)
  monkeypatch.setenv("FROZEN_VISION_PROCESSES", "2")
  with pytest.raises(ValueError, match="all of FROZEN_VISION_COORDINATOR"):
    distributed.initialize()
  monkeypatch.setenv("FROZEN_VISION_COORDINATOR", "localhost:1")
  monkeypatch.setenv("FROZEN_VISION_PROCESS", "2")
  with pytest.raises(ValueError, match="expected 0 to 1"):
    distributed.initialize()
  monkeypatch.setenv("FROZEN_VISION_PROCESS", "x")
  with pytest.raises(ValueError, match="expected two numbers"):
    distributed.initialize()
  for arguments in ([], ["--processes=2"], ["--processes=0", "--", "true"]):
    with pytest.raises(SystemExit):
      launcher.main(arguments)
  assert launcher.launch([sys.executable, "-c", "import sys; sys.exit(0)"], 2) == 0
  failing = (
    "import os, sys, time; sys.exit(3) if os.environ['FROZEN_VISION_PROCESS'] == '1' else time.sleep(60)"
  )
  started = time.monotonic()
  assert launcher.launch([sys.executable, "-c", failing], 2) == 3
  assert time.monotonic() - started < 30


def test_a_process_that_a_signal_ended_is_named_before_those_that_fail_for_want_of_it(tmp_path, capfd):
  program = (
    "import os, pathlib, sys, time\n"
    f"gone = pathlib.Path({str(tmp_path / 'gone')!r})\n"
    "if os.environ['FROZEN_VISION_PROCESS'] == '1':\n"
    "  gone.touch()\n"
    "  os.kill(os.getpid(), 9)\n"
    "while not gone.exists():\n"
    "  time.sleep(0.001)\n"
    "time.sleep(0.01)\n"
    "sys.exit(1)\n"
  )
  assert launcher.launch([sys.executable, "-c", program], 2) == 128 + signal.SIGKILL
  assert "Process 1 of 2 was ended by SIGKILL" in capfd.readouterr().err
