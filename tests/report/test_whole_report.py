"""A whole report of two tiny backbones on class folders, stopped in the middle and continued."""

import json
import random

import numpy as np
import pytest

from frozen_vision import probe
from frozen_vision.backbones import base, families, random_weights
from frozen_vision.files import tensors, trees
from frozen_vision.report import card, cells, command, single, write
from tests import tiny


class Killed(BaseException):
  """Ends a process, as far as a test can tell."""


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
  """Two backbones in files, whose weights are drawn, and six classes of images."""
  folder = tmp_path_factory.mktemp("inputs")
  config = families.backbone_config("swinv2_nano", **tiny.SMALL_BACKBONE)
  module = base.abstract(families.family_of("swinv2_nano").module, config)
  shapes = trees.flatten(trees.weights(module))
  for seed, name in enumerate(("one", "two")):
    leaves = {
      path: tensors.LazyTensor(
        leaf.shape,
        np.dtype(np.float32),
        lambda path=path, leaf=leaf: random_weights.draw(path, leaf.shape, 0.3, seed),
      )
      for path, leaf in shapes.items()
    }
    families.write_leaves(leaves, folder / f"{name}.safetensors", name="swinv2_nano", config=config)
  tiny.image_folder(folder / "images", classes=6, images=32)
  options = {"image_size": 16, "probe.episodes": 5}
  return {
    "backbones": [str(folder / "one.safetensors"), str(folder / "two.safetensors")],
    "tasks": ("linear", "knn", "few_shot", "calibration"),
    "seeds": 2,
    "class_folders": [str(folder / "images")],
    "options": [f"probes:classification.{name}={value}" for name, value in options.items()],
  }


@pytest.fixture
def in_this_process(monkeypatch):
  """Cells run here, with cards that are quick to make; the names of those whose run began."""
  begun = []

  def run_apart(plan, cell):
    begun.append(cell.name)
    single.run(plan, cell)
    return 0

  monkeypatch.setattr(command, "_run_apart", run_apart)
  monkeypatch.setattr(card, "SIDE", 32)
  monkeypatch.setattr(card, "_SECONDS", 0.0)
  return begun


def _without_times(report):
  """A report without what a clock said."""
  if isinstance(report, dict):
    clocks = ("seconds", "images_per_second")
    return {key: _without_times(value) for key, value in report.items() if key not in clocks}
  return [_without_times(value) for value in report] if isinstance(report, list) else report


def test_a_report_that_is_killed_goes_on(flags, in_this_process, tmp_path, monkeypatch):
  whole = command.make_plan(workdir=tmp_path / "whole", **flags)
  assert all(each.state == "finished" for each in command.run(whole))
  expected = write.write(whole)
  assert expected["cells"]["finished"] == 6 and not expected["absent"]
  assert set(expected["scores"]) == {f"probes/{row}" for row in flags["tasks"]}
  assert expected["scores"]["probes/linear"]["one"]["mean"] > 0.3  # each class has a colour of its own
  assert [each["card"]["side"] for each in expected["backbones"]] == [32, 32]
  # Both seeds read the features that the first one has computed.
  assert len(list((tmp_path / "whole" / "features").iterdir())) == 4

  stopped = command.make_plan(workdir=tmp_path / "stopped", **flags)
  draw, run_probe, finish = random.Random(0), probe.probe, cells.finish

  def maybe(action):
    def call(*arguments, **options):
      if draw.random() < 0.4:
        raise Killed
      result = action(*arguments, **options)
      if draw.random() < 0.2:
        raise Killed
      return result

    return call

  cards = {each["label"]: each["card"] for each in expected["backbones"]}
  monkeypatch.setattr(card, "make", lambda entry: cards[entry.label])
  monkeypatch.setattr(probe, "probe", maybe(run_probe))
  monkeypatch.setattr(cells, "finish", maybe(finish))
  in_this_process.clear()
  written, kills, unfinished = {}, 0, 0
  while True:
    try:
      command.run(stopped)
      break
    except Killed:
      kills += 1
      cell = stopped.cell(in_this_process[-1])
      unfinished += not (stopped.folder(cell) / "cell.json").exists()
    for path in (tmp_path / "stopped").rglob("cell.json"):
      written.setdefault(path, path.stat().st_mtime_ns)
  assert kills >= 3
  assert written and all(path.stat().st_mtime_ns == time for path, time in written.items())
  assert len(in_this_process) == 6 + unfinished  # what was killed in the middle, and nothing else
  found = write.write(stopped)
  assert _without_times(found) == _without_times(json.loads(json.dumps(expected)))
  in_this_process.clear()
  command.run(stopped)
  assert not in_this_process
