"""The ways of pretraining have recipes, and one goes from beginning to a file that is loaded."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments import pretrained_weights
import frozen_vision
from frozen_vision import config_files

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", pretrained_weights.PRETRAININGS)
def test_recipes(name):
  way = pretrained_weights.PRETRAININGS[name]
  config = config_files.load_config(
    way.config, pretrained_weights.options(name, 700, "DATA", pathlib.Path("W"))
  )
  assert (config.steps, config.batch_size, config.eval_every) == (700, 128, 0)
  assert config.section.train == "DATA/train.tar.xz" and config.section.validation == "DATA/test.tar.xz"
  assert config.backbone.weights == "init"
  if name.endswith(("moco_fd", "simmim_fd")):
    teacher = name.removesuffix("_fd")
    assert config.feature_distillation.teacher.weights == f"W/{teacher}.safetensors"
  tiny = config_files.load_config(way.config, pretrained_weights.options(name, 2, None, pathlib.Path("W")))
  assert tiny.section.data == "shapes" and tiny.optimizer.warmup_steps == 0


@pytest.mark.slow
def test_from_the_first_step_to_a_file_that_is_loaded(tmp_path):
  def run(*more):
    command = [sys.executable, "experiments/pretrained_weights.py", f"--workdir={tmp_path}", "--tiny"]
    command += ["--steps=2", "--only=swinv2_nano_simmim", *more]
    return subprocess.run(
      command, cwd=_ROOT, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, check=True
    ).stdout

  assert run("--print_commands").count("swinv2_nano_simmim.safetensors") == 1
  assert "0.2 MB" in run()
  path = tmp_path / "weights" / "swinv2_nano_simmim.safetensors"
  backbone = frozen_vision.load_backbone(path)
  assert backbone.config.embed_dim == 8 and path.stat().st_size < 1e6
  card = path.with_suffix(".md").read_text()
  assert "8 channels" in card and "2 steps" in card and "l1 0." in card
  written = path.stat().st_mtime_ns
  assert "is there" in run() and path.stat().st_mtime_ns == written
  assert run("--print_commands") == ""
