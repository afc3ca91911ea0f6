"""Cells of a report: what is asked for, what is finished, stale or missing, and that nothing is run twice."""

import dataclasses
import os
import pathlib
import shlex
import shutil
import subprocess

from absl import flags
import numpy as np
import pytest

from frozen_vision import command_line
from frozen_vision.backbones import families
from frozen_vision.files import lock, tensors
from frozen_vision.freezing import prepare
from frozen_vision.report import cells, command, entries, recipes, single
from frozen_vision.tasks import build as tasks_build
from tests import command_lines
from tests.report import reports


def test_backbones_are_named_in_every_way(tmp_path):
  path = shutil.copy(families.weights_file("swinv2_nano"), tmp_path / "mine.safetensors")
  found = entries.read(
    ["swinv2_nano", str(path), "again=swinv2_nano", "swinv2_nano:random", f"x=swinv2_nano:{path}"]
  )
  assert [entry.label for entry in found] == ["swinv2_nano", "mine", "again", "swinv2_nano-random", "x"]
  assert {entry.options.name for entry in found} == {"swinv2_nano"}
  assert found[0].weights == found[2].weights and found[1].weights == found[4].weights
  assert found[3].weights == found[3].options.weights == "random"
  assert entries.read(_listed(entries.describe(found))) == found
  for texts, problem in (
    ([], "needs backbones"),
    (["swinv2_nano", "swinv2_nano"], "more than once.*--backbones=swinv2_nano,other=swinv2_nano"),
    (["a=swinv2_nano", "a=swinv2_nano:random"], "--backbones=swinv2_nano,other=swinv2_nano:random"),
    (["..=swinv2_nano"], "has the label '..'"),
    (["swinv2_b"], "does not exist"),
    (["absent.safetensors"], "does not exist"),
  ):
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
      entries.read(texts)


def test_weights_in_the_folder_of_the_package_are_named(tmp_path, monkeypatch):
  shutil.copy(families.weights_file("swinv2_nano"), tmp_path / "swinv2_nano_other.safetensors")
  monkeypatch.setattr(families, "_SHIPPED", tmp_path)
  assert families.shipped_weights() == ["swinv2_nano_other"]
  [entry] = entries.read(["swinv2_nano_other"])
  assert (entry.label, entry.source) == ("swinv2_nano_other",) * 2
  assert (entry.options.name, entry.options.weights) == ("swinv2_nano", "swinv2_nano_other")
  assert "with this package" in entry.licence
  assert entries.read(_listed(entries.describe([entry]))) == [entry]
  found = prepare.open_source(entry.options, 0)
  assert found.path == tmp_path / "swinv2_nano_other.safetensors" and found.fingerprint == entry.weights


def _listed(text):
  return flags.ListParser().parse(text)


def test_paths_with_equals_signs_and_commas(tmp_path):
  folder = tmp_path / "a, b"
  folder.mkdir()
  path = shutil.copy(families.weights_file("swinv2_nano"), folder / "lr=0.1.safetensors")
  found = entries.read([str(path), f"..x=swinv2_nano:{path}"])
  assert [entry.label for entry in found] == ["lr-0.1", "x"]
  assert {entry.options.weights for entry in found} == {str(path)}
  assert entries.read(_listed(entries.describe(found))) == found
  asked = command.make_plan([str(path)], tmp_path, tasks=("linear",), class_folders=[str(folder), "b"])
  [given] = [each for each in command.arguments(asked) if each.startswith("--class_folders=")]
  assert _listed(given.partition("=")[2]) == [str(folder), str(pathlib.Path("b").absolute())]


def test_a_file_of_other_sizes_brings_them(tmp_path):
  path = tmp_path / "small.safetensors"
  leaf = tensors.LazyTensor(
    (1,), np.dtype(np.float32), lambda: np.zeros(1, np.float32)
  )  # only the header is read
  config = families.backbone_config("swinv2_nano", depths=(1, 1, 1, 1), drop_path_rate=0.5)
  fingerprint = families.write_leaves({"leaf": leaf}, path, name="swinv2_nano", config=config)
  [entry] = entries.read([str(path)])
  assert entry.options.overrides == {"depths": (1, 1, 1, 1)}  # the rate has no weights
  assert entry.weights == fingerprint
  with pytest.raises(ValueError, match="holds a swinv2_nano, expected a swinv2_t"):
    entries.read([f"swinv2_t:{path}"])


@pytest.mark.parametrize("budget", recipes.BUDGETS)
def test_every_recipe_has_a_config_on_every_kind_of_backbone(budget):
  for entry in entries.read(["swinv2_nano", "swinv2_t:random", "resnet18:random", "dinov2_vits14:random"]):
    for recipe in recipes.RECIPES.values():
      config = recipes.make_config(recipe, entry, 3, budget=budget)
      assert config.seed == 3 and config.backbone.name == entry.options.name
      assert config.headline == "" and config.keep_checkpoints == 1
      if "stride" in config.backbone.overrides and budget == "demo":
        assert single._trained_parameters(tasks_build.build_task(config), config) > 0
  # The maps of a plain ViT have one stride, of which a pyramid is made where a head needs one.
  configs = {
    name: recipes.make_config(recipe, entry, 0, budget=budget) for name, recipe in recipes.RECIPES.items()
  }
  assert configs["detection"].detection.neck.name == "simple_pyramid"
  assert configs["segmentation"].segmentation.neck.name == "simple_pyramid"
  assert configs["segmentation"].trainable == ("neck/.*", "head/.*")
  assert configs["detection"].backbone.overrides["stride"] == 16  # of patches of 14 pixels
  linear = configs["linear_segmentation"]
  assert linear.segmentation.neck.name == "none" and linear.trainable == ("head/.*",)
  assert "stride" not in linear.backbone.overrides


def test_data_of_ones_own_take_the_place_of_the_built_in():
  [entry] = entries.read(["swinv2_nano"])
  data = recipes.Data(class_folders=("images",), coco=("a.json", "photos"), videos=("clips",))
  configs = {
    name: recipes.make_config(recipe, entry, 7, budget="demo", data=data)
    for name, recipe in recipes.RECIPES.items()
  }
  assert configs["probes"].classification.validation_fraction == 0.25
  assert configs["probes"].classification.train.endswith("/images")
  assert configs["detection"].detection.train.images.endswith("/photos")
  assert configs["detection"].steps == configs["action"].steps == 200
  assert configs["action"].action.data == "folds" and configs["action"].action.fold == 2
  assert configs["segmentation"].segmentation.data == "scenes"
  two = dataclasses.replace(data, class_folders=("a", "b"), videos=("c", "d"))
  config = recipes.make_config(recipes.RECIPES["probes"], entry, 0, budget="demo", data=two)
  assert config.classification.validation.endswith("/b") and not config.classification.validation_fraction
  assert (
    recipes.make_config(recipes.RECIPES["action"], entry, 0, budget="demo", data=two).action.data == "videos"
  )
  folders = ("classes.json", "images", "labels", "other", "other_labels")
  for name in ("segmentation", "linear_segmentation"):
    labels = recipes.Data(label_maps=folders)
    options = recipes.make_config(recipes.RECIPES[name], entry, 0, budget="demo", data=labels).segmentation
    assert options.data == "files" and options.classes.endswith("/classes.json")
    assert options.train.images.endswith("/images") and options.train.labels.endswith("/labels")
    assert options.validation.images.endswith("/other")
    assert options.validation.labels.endswith("/other_labels")
  with pytest.raises(ValueError, match="--label_maps is 'a,b'; expected CLASSES,IMAGES,LABELS"):
    recipes.Data(label_maps=("a", "b"))
  with pytest.raises(ValueError, match="--coco is 'a.json'; expected FILE.json,IMAGES"):
    recipes.Data(coco=("a.json",))


def test_sizes_of_a_backbone_that_a_user_sets_reach_every_family(tmp_path):
  options = ["detection:backbone.overrides.stride=16"]
  asked = reports.plan(tmp_path, backbones=["swinv2_nano", "dino_vits16:random"], options=options)
  for cell in asked.cells():
    if cell.recipe != cells.CARD:
      stride = asked.config(cell).backbone.overrides.get("stride")
      assert stride == (16 if cell.recipe == "detection" else None), cell.name
  with pytest.raises(ValueError, match="backbones of a report are those that --backbones names"):
    reports.plan(tmp_path, options=["detection:backbone.name=resnet50"])


def test_a_printed_command_asks_for_the_same_report(tmp_path, capsys):
  asked = reports.plan(
    tmp_path, seeds=2, budget="small", tasks=("linear", "detection"), options=["detection:steps=7"]
  )
  reports.fill(asked, without=("other/detection/1",))
  command.print_commands(asked)
  [line] = capsys.readouterr().out.splitlines()
  words = shlex.split(line)
  assert words[:3] == ["python", "-m", "frozen_vision.main"] and words[-1] == "--cell=other/detection/1"
  given = {}
  for flag in words[3:-1]:
    name, _, value = flag.removeprefix("--").partition("=")
    given.setdefault(name, []).append(value)
  again = command.make_plan(
    _listed(given["backbones"][0]),
    given["workdir"][0],
    tasks=_listed(given["tasks"][0]),
    seeds=int(given["seeds"][0]),
    budget=given["budget"][0],
    options=given["option"],
  )
  assert again == asked and again.config(again.cell("other/detection/1")).steps == 7
  assert command_line.split(words)[1] == {}  # none of the flags is taken for an option of a config


def test_flags_that_do_not_fit_are_named(tmp_path):
  for options, problem in (
    (dict(tasks=("detecton",)), "detecton.*detection"),
    (dict(seeds=0), "--seeds is 0"),
    (dict(budget="huge"), "--budget is 'huge'; known: demo, small, paper"),
    (dict(options=["steps=3"]), "expected RECIPE:OPTION=VALUE"),
    (dict(options=["detecton:steps=3"]), "detecton"),
  ):
    with pytest.raises(ValueError, match=problem):
      reports.plan(tmp_path, **options)
  with pytest.raises(ValueError, match="this report has swinv2_nano/card/0"):
    reports.plan(tmp_path).cell("absent")


def test_states_of_cells(tmp_path):
  asked = reports.plan(tmp_path, seeds=1)
  cell = asked.cell("other/linear_segmentation/0")
  folder = asked.folder(cell)
  assert cells.look(asked, cell).state == "missing"
  folder.mkdir(parents=True)
  (folder / "error.json").write_text('{"error": "The disk is full."}')
  assert cells.look(asked, cell).reason == "The disk is full"
  reports.finish(asked, cell)
  found = cells.look(asked, cell)
  assert found.state == "finished" and found.result["scores"] == {"mIoU": 0.6}
  assert not (folder / "error.json").exists()
  # Options that change no number do not make it stale; others, other weights and another version do.
  for option in ("pictures=1", "cache.path=/elsewhere", "data.allow_drops=True", "loader.threads=3"):
    free = reports.plan(tmp_path, seeds=1, options=[f"linear_segmentation:{option}"])
    assert cells.look(free, cell).state == "finished", option
  for option in (
    "cache.dtype=bfloat16",
    "cache.views=3",
    "backbone.fold=False",
    "backbone.dtype=bfloat16",
    "backbone.overrides.window_sizes=(8, 8, 8, 8)",
  ):
    other = reports.plan(tmp_path, seeds=1, options=[f"linear_segmentation:{option}"])
    name = option.partition("=")[0].removesuffix(".window_sizes")
    found = cells.look(other, cell)
    assert found.state == "stale" and f"config.{name}" in found.reason
  other = reports.plan(tmp_path, seeds=1, options=["linear_segmentation:optimizer.learning_rate=0.5"])
  found = cells.look(other, cell)
  assert found.state == "stale" and "config.optimizer.learning_rate was 0.003 and is 0.5" in found.reason
  with pytest.raises(ValueError, match="run otherwise"):
    single.run(other, cell)
  moved = dataclasses.replace(cell, entry=dataclasses.replace(cell.entry, weights="other"))
  assert "weights was" in cells.look(asked, moved).reason
  scores = folder / "cell_examples.npz"
  for damaged in (scores.read_bytes()[:-30], b""):
    scores.write_bytes(damaged)
    found = cells.look(asked, cell)
    assert found.state == "failed" and "cell_examples.npz cannot be read" in found.reason
  scores.unlink()
  assert cells.look(asked, cell).state == "failed" and cells.read_examples(asked, cell) == {}
  (folder / "cell.json").write_text("{")
  assert "cannot be read" in cells.look(asked, cell).reason


def test_data_that_change_make_a_cell_stale(tmp_path):
  images = tmp_path / "images"
  images.mkdir()
  (images / "a.png").write_bytes(b"1")
  asked = reports.plan(tmp_path / "w", seeds=1, class_folders=[str(images)])
  cell = asked.cell("other/probes/0")
  reports.finish(asked, cell)
  assert cells.look(asked, cell).state == "finished"
  (images / "b.png").write_bytes(b"22")
  again = reports.plan(tmp_path / "w", seeds=1, class_folders=[str(images)])
  assert cells.look(again, cell).state == "stale"


def test_a_finished_cell_is_not_run_again_and_a_failure_is_kept(tmp_path, monkeypatch):
  asked = reports.plan(tmp_path, seeds=1)
  cell = asked.cell("other/action/0")
  monkeypatch.setattr(single, "_run", lambda *arguments: (_ for _ in ()).throw(ValueError("No such data.")))
  with pytest.raises(ValueError, match="No such data"):
    single.run(asked, cell)
  assert cells.look(asked, cell).reason == "No such data"
  with lock.hold(asked.folder(cell) / ".cell.lock", "a test"), pytest.raises(lock.LockedError):
    single.run(asked, cell)
  monkeypatch.setattr(single, "_run", lambda asked, cell, folder: reports.finish(asked, cell))
  assert single.run(asked, cell).state == "finished"
  monkeypatch.setattr(single, "_run", None)
  assert single.run(asked, cell).state == "finished"


def test_bad_cells_do_not_stop_the_others(tmp_path, monkeypatch):
  asked = reports.plan(tmp_path, seeds=1, tasks=("linear", "action"))
  reports.fill(asked, without=("swinv2_nano/action/0", "other/action/0", "other/probes/0"))
  tried = []

  def run_apart(asked, cell):
    tried.append(cell.name)
    folder = asked.folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    if cell.name == "swinv2_nano/action/0":
      (folder / "log.txt").write_text("12:00:00 Begins.\nError: The videos are gone.\n")
      return 1
    if cell.name == "other/action/0":
      (folder / "log.txt").write_text("12:00:00 Begins.\n")
      return -9
    reports.finish(asked, cell)
    return 0

  monkeypatch.setattr(command, "_run_apart", run_apart)
  found = {each.cell.name: each for each in command.run(asked)}
  assert sorted(tried) == ["other/action/0", "other/probes/0", "swinv2_nano/action/0"]
  assert found["swinv2_nano/action/0"].reason == "The videos are gone"
  assert found["other/action/0"].reason == "its process was ended by SIGKILL"
  assert found["other/probes/0"].state == "finished"
  # The same again tries what failed, and nothing else.
  tried.clear()
  command.run(asked)
  assert sorted(tried) == ["other/action/0", "swinv2_nano/action/0"]
  # What another process is running is no failure, and neither is what was told to stop.
  for name in tried:
    (asked.folder(asked.cell(name)) / "error.json").unlink()
  monkeypatch.setattr(command, "_run_apart", lambda asked, cell: single.LOCKED)
  found = {each.cell.name: each for each in command.run(asked)}
  assert found["other/action/0"].reason == "another process is running it"
  assert cells.look(asked, asked.cell("other/action/0")).reason == "it has not been run"
  monkeypatch.setattr(command, "_run_apart", lambda asked, cell: -15)
  with pytest.raises(single.Interrupted, match="the same command continues"):
    command.run(asked)


def test_the_command_line(tmp_path):
  """One process that makes pages and prints commands, and errors in one sentence."""
  asked = reports.plan(tmp_path, seeds=1, tasks=("linear",))
  reports.fill(asked, without=("other/probes/0",))
  own = ["--mode=report", f"--workdir={tmp_path}", "--seeds=1", "--tasks=linear"]
  backbones, changed = f"--backbones={','.join(reports.BACKBONES)}", "--option=probes:cache.dtype=bfloat16"
  lines = [
    [*own, backbones, "--only_page"],
    [*own, backbones, changed, "--print_commands"],
    [*own, "--backbones=absent"],
    own,
  ]
  found, errors = command_lines.outputs(lines)
  (_, page), (_, commands), (_, absent), (_, nothing) = found
  assert "3 of 4 cells are finished" in page and "other/probes/0: missing" in page
  assert (tmp_path / "report.html").exists()
  # What is printed is commands alone: the log goes to standard error, and has what is stale.
  assert len(commands.strip().splitlines()) == 1 and "--cell=other/probes/0" in commands
  assert "swinv2_nano/probes/0 is stale" in errors
  assert "Error: Backbone weights 'absent'" in absent and "Traceback" not in absent
  assert "--mode=report needs --backbones" in nothing


def test_slurm_tells_the_run_when_its_time_is_up(tmp_path):
  """The batch's shell becomes the process of the cell; without `B:` the signal goes to job steps alone."""
  script = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "launch" / "report_slurm.sh"
  assert "#SBATCH --signal=B:TERM@" in script.read_text()
  (tmp_path / "cells.txt").write_text("echo another\nbash -c 'echo $$'\n")
  environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "2"}
  words = ["bash", str(script), str(tmp_path / "cells.txt")]
  process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
  assert process.communicate(timeout=60)[0] == f"{process.pid}\n"
