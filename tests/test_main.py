"""The command line: clear errors, signals, and `kill -9` at random moments."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from frozen_vision.backbones import families
from tests import command_lines, comparing, forked, left_behind, random_backbones, tiny

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_STEP = re.compile(r"step +(\d+)/")


@pytest.fixture(scope="module")
def server():
  with forked.serve() as found:
    yield found


@pytest.mark.slow
def test_errors_are_one_message_and_leave_nothing(tmp_path):
  demo, workdir = "--config=configs/coco_htc.py", f"--workdir={tmp_path}/run"
  absent = tmp_path / "coco"
  cases = {
    ("--config=configs/coco_htc.py:swinv2_x", workdir): ["no variant 'swinv2_x'", ":swinv2_t", ":swinv2_g"],
    ("--config=configs/absent.py", workdir): ["configs/absent.py: no such file", "coco_htc"],
    (demo, workdir, "--config.optimizer.learning_rat=1"): [
      "config.optimizer.learning_rat: there is no such option; did you mean config.optimizer.learning_rate?",
    ],
    (demo, workdir, "--config.steps=many"): [
      "config.steps is 'many'; expected a whole number of at least 1."
    ],
    (demo, workdir, "--stepps=3"): ["Unknown command line flag 'stepps'"],
    (demo,): ["--workdir"],
    (demo + ":swinv2_b", workdir, f"--config.detection.root={absent}"): [
      f"config.detection.root: {absent} does not exist",
      "cocodataset.org",
      "--config.detection.root=FOLDER",
    ],
    # With data that is there, it is the weights that are missing.
    (
      demo + ":swinv2_b",
      workdir,
      "--config.detection.data=photos",
      f"--config.backbone.weights={tmp_path}/b.safetensors",
    ): [f"config.backbone.weights: {tmp_path}/b.safetensors does not exist", "--config.backbone.weights="],
    ("--config=tests/tiny.py", workdir, "--config.trainable=('neck/.*','haed/.*')"): [
      "pattern 'haed/.*' matches no parameter"
    ],
    ("--config=tests/tiny.py", workdir, "--mode=evaluate"): ["No checkpoint in"],
  }

  outputs, errors = command_lines.outputs(list(cases))
  assert "Traceback" not in errors
  for arguments, (code, output) in zip(cases, outputs, strict=True):
    assert code == 1, (arguments, output)
    assert output.count("Error: ") >= 1 and "Traceback" not in output, (arguments, output)
    assert "DEMO" not in output, (arguments, output)  # nothing falls back to it
    for text in cases[arguments]:
      assert text in output, (arguments, output)
  assert not (tmp_path / "run").exists()


# A head that compiles in a second, and weights that none of the runs draws; long enough to be killed in.
def _segmentation(weights, workers):
  return (
    "--config=tests/tiny.py:segmentation",
    f"--config.backbone.weights={weights}",
    "--config.steps=40",
    "--config.checkpoint_every=5",
    f"--config.loader.workers={workers}",
  )


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
  """(backbone weights, the folder of a run on them that nothing ended early)."""
  folder = tmp_path_factory.mktemp("whole")
  backbone = random_backbones.build("swinv2_nano", **tiny.SMALL_BACKBONE)
  families.save_backbone(backbone, folder / "weights.safetensors", name="swinv2_nano")
  output, status = server.run(
    *_segmentation(folder / "weights.safetensors", 0), f"--workdir={folder / 'run'}"
  )
  assert status == 0 and "Traceback" not in output, output
  return folder / "weights.safetensors", folder / "run"


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="needs /proc")
def test_kill_9_at_random_moments(tmp_path, server, whole):
  """The short form of `experiments/reliability/kills.py`: one chain, with and without a loader process."""
  weights, whole = whole
  marker = f"FROZEN_VISION_TEST={tmp_path}"
  killed = tmp_path / "killed"
  environment = dict([marker.split("=", 1)])

  rng = random.Random(0)
  # Once while it starts (workers too), then anywhere: in steps, and in the saves of every fifth one.
  moments = [0, rng.randint(1, 5), rng.randint(16, 20)]
  done = []
  for moment, workers in zip(moments, (1, 0, 1)):
    command = [*_segmentation(weights, workers), f"--workdir={killed}"]
    process = server.start(*command, environment=environment)
    output = ""
    for line in process.stdout:
      output += line
      step = _STEP.search(line)
      if "Parameters:" in line and not moment:
        time.sleep(rng.uniform(0, 2))
        break
      if step and moment and int(step[1]) >= moment:
        time.sleep(rng.uniform(0, 0.03))
        break
    process.kill()
    output += process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    done.append(int((_STEP.findall(output) or [0])[-1]))
    assert not left_behind.wait_until_none(lambda: left_behind.marked(marker))
  assert done[-1] < 40 and max(done) > 15
  output, status = server.run(*command, environment=environment)
  assert status == 0, output
  assert "Continuing from step" in output
  assert not left_behind.wait_until_none(lambda: left_behind.marked(marker))
  assert not left_behind.wait_until_none(lambda: left_behind.segments(killed))

  step, arrays = comparing.checkpoint(killed)
  assert step == 40 and (step, arrays) == comparing.checkpoint(whole)
  # Every step is logged once, with the same loss; every evaluation has the same scores.
  lines = comparing.log_lines(killed)
  assert lines == comparing.log_lines(whole)
  assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="needs /proc")
def test_ctrl_c_saves_and_ends_workers(tmp_path, server):
  marker = f"FROZEN_VISION_TEST={tmp_path}"
  environment = dict([marker.split("=", 1)])
  command = ["--config=tests/tiny.py", f"--workdir={tmp_path}/run", "--config.checkpoint_every=1000"]
  process = server.start(*command, "--config.loader.workers=1", environment=environment, new_session=True)
  output = ""
  for line in process.stdout:
    output += line
    if "step  3/40" in line:
      os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
      break
  output += process.communicate()
  assert process.returncode == 0, output
  stopped = re.search(r"Stopped by SIGINT; step (\d+) is saved and the same command continues", output)
  assert stopped and "Traceback" not in output, output
  assert not left_behind.wait_until_none(lambda: left_behind.marked(marker))
  # One process of the real command line, without what the server has imported.
  found = subprocess.run(
    [
      sys.executable,
      "-m",
      "frozen_vision.main",
      *command,
      "--config.tensorboard=True",
      "--config.pictures=1",
    ],
    cwd=_ROOT,
    env=forked.fresh(os.environ),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=300,
  )
  output = found.stdout
  assert found.returncode == 0 and f"Continuing from step {stopped[1]} in" in output, output
  # The first line says what runs; every line is the run's own, none of a library's.
  assert "Detection: 50 training and 3 validation images, 6 classes." in output.splitlines()[0]
  assert not [line for line in output.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)], output
