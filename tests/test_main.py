"""The command line: clear errors, signals, and `kill -9` at random moments."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from frozen_vision.data import shared_memory
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import state_leaves
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop, optimizer
from frozen_vision.training import step as train_step
from tests import tiny

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_STEP = re.compile(r"step +(\d+)/")


def _environment(environment=None):
  variables = {**os.environ, "JAX_PLATFORMS": "cpu", **(environment or {})}
  # Imports of this test's own process must not decide what a fresh one prints.
  for name in ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS"):
    variables.pop(name, None)
  return variables


def _start(*arguments, environment=None, **options):
  """A process of the real command line; stdout and stderr together."""
  return subprocess.Popen(
    [sys.executable, "-m", "frozen_vision.main", *map(str, arguments)],
    cwd=_ROOT,
    env=_environment(environment),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    **options,
  )


# The command line once for each list of arguments, in processes that share what takes seconds: its imports.
_RUN_EACH = """
import json, os, runpy, sys, warnings
from frozen_vision import probe
from frozen_vision.planning import plan
from frozen_vision.prediction import files
warnings.filterwarnings("ignore", "os.fork")  # jax warns; before the first computation forks are safe
for index, arguments in enumerate(json.loads(sys.argv[1])):
  child = os.fork()
  if not child:
    output = os.open(f"{sys.argv[2]}/{index}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["main", *arguments]
    runpy.run_module("frozen_vision.main", run_name="__main__")
    sys.exit()
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def _run_each(commands, folder):
  """(output, exit code) of the command line with each of some lists of arguments."""
  process = subprocess.run(
    [sys.executable, "-c", _RUN_EACH, json.dumps(commands), folder],
    cwd=_ROOT,
    env=_environment({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),  # so that no process starts itself again
    stdout=subprocess.PIPE,
    text=True,
    timeout=300,
    check=True,
  )
  outputs = [(folder / f"{index}.txt").read_text() for index in range(len(commands))]
  return list(zip(outputs, map(int, process.stdout.split()), strict=True))


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

  # One after the other: the workdir is locked while a process looks at it.
  for arguments, (output, code) in zip(cases, _run_each(list(cases), tmp_path), strict=True):
    assert code == 1, (arguments, output)
    assert output.count("Error: ") >= 1 and "Traceback" not in output, (arguments, output)
    assert "DEMO" not in output, (arguments, output)  # nothing falls back to it
    for text in cases[arguments]:
      assert text in output, (arguments, output)
  assert not (tmp_path / "run").exists()


def _marked(marker):
  """Process ids whose environment holds a marker."""
  found = []
  for folder in pathlib.Path("/proc").iterdir():
    try:
      if folder.name.isdecimal() and marker.encode() in (folder / "environ").read_bytes():
        if (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
          found.append(int(folder.name))
    except OSError:  # it has ended, or is another user's
      pass
  return found


def _shared_memory(workdir):
  """Names of segments and semaphores of a run, not those of others on this machine."""
  return [path.name for path in pathlib.Path("/dev/shm").glob(f"*{shared_memory.run_name(workdir)}*")]


def _wait_for(condition, seconds=30):
  deadline = time.monotonic() + seconds
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.1)
  return condition()


def _state(workdir):
  """(step, every leaf of the newest checkpoint as bytes) of a run of `_SEGMENTATION`."""
  config = tasks_build.read_config(tiny.segmentation())
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)
  tx = optimizer.build(
    config.optimizer, steps=config.steps, trainable=model.trainable, layer_of=model.layer_of
  )
  state = train_step.init_state(model.trainable, tx, seed=config.seed, ema=True)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    state, meta = checkpoints.restore(state)
  state["key"] = jax.random.key_data(state["key"])
  leaves, _ = state_leaves.flatten(state)
  return meta["step"], {path: np.asarray(leaf).tobytes() for path, leaf in leaves.items()}


# A head that compiles in a second, long enough to be killed in.
_SEGMENTATION = ("--config=tests/tiny.py:segmentation", "--config.steps=60", "--config.checkpoint_every=5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The folder of a run that nothing ended early."""
  folder = tmp_path_factory.mktemp("whole")
  process = _start(*_SEGMENTATION, "--config.loader.workers=0", f"--workdir={folder}")
  output = process.communicate(timeout=300)[0]
  assert process.returncode == 0, output
  assert "Traceback" not in output
  return folder


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_at_random_moments(tmp_path, whole, workers):
  marker = f"FROZEN_VISION_TEST={tmp_path}"
  environment = dict([marker.split("=", 1)])
  command = [*_SEGMENTATION, f"--config.loader.workers={workers}"]
  killed = tmp_path / "killed"

  rng = random.Random(workers)
  # Once while it starts (workers too), then anywhere: in steps, and in the saves of every fifth one.
  moments = [0, *(11 * index + rng.randint(1, 5) for index in range(3))]
  done = []
  for moment in moments:
    process = _start(*command, f"--workdir={killed}", environment=environment)
    output = ""
    try:
      for line in process.stdout:
        output += line
        step = _STEP.search(line)
        if "Parameters:" in line and not moment:
          time.sleep(rng.uniform(0, 3))
          break
        if step and moment and int(step[1]) >= moment:
          time.sleep(rng.uniform(0, 0.03))
          break
    finally:
      process.kill()
      output += process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output
    done.append(int((_STEP.findall(output) or [0])[-1]))
    assert _wait_for(lambda: not _marked(marker)), "processes are left behind"
  assert done[-1] < 60 and max(done) > 20
  process = _start(*command, f"--workdir={killed}", environment=environment)
  output = process.communicate(timeout=300)[0]
  assert process.returncode == 0, output
  assert "Continuing from step" in output
  assert _wait_for(lambda: not _marked(marker)), "processes are left behind"
  assert _wait_for(lambda: not _shared_memory(killed)), _shared_memory(killed)

  wanted, found = _state(whole), _state(killed)
  assert wanted[0] == found[0] == 60
  assert wanted[1] == found[1]
  # Every step is logged once, with the same loss.
  losses = [tiny.metrics(workdir)["train/loss"] for workdir in (whole, killed)]
  assert losses[0] == losses[1] and [step for step, _ in losses[0]] == list(range(1, 61))
  scores = [
    json.dumps(
      {
        key: value
        for key, value in tiny.metrics(workdir).items()
        if key.startswith("eval/") and "per_second" not in key
      },
      sort_keys=True,
    )
    for workdir in (whole, killed)
  ]
  assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="needs /proc")
def test_ctrl_c_saves_and_ends_workers(tmp_path):
  marker = f"FROZEN_VISION_TEST={tmp_path}"
  environment = dict([marker.split("=", 1)])
  command = ["--config=tests/tiny.py", f"--workdir={tmp_path}/run", "--config.checkpoint_every=1000"]
  process = _start(*command, "--config.loader.workers=1", environment=environment, start_new_session=True)
  output = ""
  for line in process.stdout:
    output += line
    if "step  3/40" in line:
      os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
      break
  output += process.communicate(timeout=300)[0]
  assert process.returncode == 0, output
  stopped = re.search(r"Stopped by SIGINT; step (\d+) is saved and the same command continues", output)
  assert stopped and "Traceback" not in output, output
  assert _wait_for(lambda: not _marked(marker)), "processes are left behind"
  process = _start(*command, "--config.tensorboard=True", "--config.pictures=1", environment=environment)
  output = process.communicate(timeout=300)[0]
  assert process.returncode == 0 and f"Continuing from step {stopped[1]} in" in output, output
  # The first line says what runs; every line is the run's own, none of a library's.
  assert "Detection: 50 training and 3 validation images, 6 classes." in output.splitlines()[0]
  assert not [line for line in output.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)], output
