"""The grids of the frozen study: rows that exist, configs that load, pages whose claims the numbers allow."""

import dataclasses
import json
import pathlib
import shutil
import tarfile

import numpy as np
import pytest

from experiments.frozen_study import explain, findings, grids, paper, parts, plans, recipes, run
from frozen_vision import config_files, fine_tune
from frozen_vision.backbones import families
from frozen_vision.data.classification import folders
from frozen_vision.diagnostics import attention
from frozen_vision.report import cells, command, entries, single, statistics
from frozen_vision.tasks import build as tasks_build
from tests import tiny
from tests.report import reports

_DATA = pathlib.Path("/data")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A file for every backbone that a pretraining would write."""
  folder = tmp_path_factory.mktemp("weights")
  names = {variant.backbone for grid in grids.GRIDS.values() for variant in grid.variants}
  for name in names - {"swinv2_nano", "swinv2_nano:random", "efficientnet_lite0"}:
    shutil.copy(families.weights_file("swinv2_nano"), folder / f"{name}.safetensors")
  return folder


def _plan(name, workdir, *more):
  asked = run.read_arguments([f"--grid={name}", f"--workdir={workdir}", f"--data={_DATA}", *more])
  return plans.make_plan(name, asked)


@pytest.mark.parametrize("name", grids.GRIDS)
def test_variants_rows_and_configs(name, weights, tmp_path):
  grid = grids.GRIDS[name]
  labels = [variant.label for variant in grid.variants]
  assert len(set(labels)) == len(labels)
  keys = {f"{recipe}/{row}" for recipe, rows in grid.rows.items() for row in rows}
  for recipe, rows in grid.rows.items():
    assert set(rows) <= {row.name for row in grid.known[recipe].rows}
  for claim in grid.claims:
    assert {*claim.better, *claim.worse} <= set(labels) and set(claim.rows) <= keys
    assert not set(claim.better) & set(claim.worse)
  plan, absent = _plan(name, tmp_path, f"--weights={weights}", "--seeds=1")
  assert not absent and len(plan.backbones) == len(labels)
  configs = {}
  for cell in plan.cells():
    if cell.recipe != cells.CARD:
      config = plan.config(cell)
      assert config.cache.path == ("" if config.adapters.kind != "none" else str(tmp_path / "features"))
      text = json.dumps(config.to_dict(), default=str)
      assert recipes.DATA not in text and recipes.PART not in text
      decides = {key: value for key, value in config.to_dict().items() if key != "backbone"}
      configs.setdefault(cell.recipe, []).append((config.backbone.weights, decides))
  for each in configs.values():  # no two variants of a grid are the same run
    assert all(one != other for place, one in enumerate(each) for other in each[place + 1 :])


@pytest.mark.parametrize("name", grids.GRIDS)
def test_runs_at_full_scale_have_configs(name, tmp_path):
  found = [config_files.load_config(config, options) for _, config, options, _ in paper.runs(name)]
  assert found and not any(config.headline.startswith("DEMO") for config in found)
  commands = paper.commands(name, tmp_path)
  folders = [word for words in commands for word in words if word.startswith("--workdir=")]
  assert len(set(folders)) == len(commands)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("heads_detection", "heads_action", "inside", "reuse_nano"))
def test_trained_parts(name, tmp_path):
  plan, _ = _plan(name, tmp_path)
  counts = {}
  for entry in plan.backbones:
    for recipe in plan.rows:
      config = plan.config(cells.Cell(entry, recipe, 0))
      counts[entry.label, recipe] = single._trained_parameters(tasks_build.build_task(config), config)
  nano = 3_095_437
  for (label, recipe), count in counts.items():
    frozen = counts.get(("swinv2_nano", recipe)) or counts.get((label.rpartition("+")[0] + "+frozen", recipe))
    if label.endswith("+everything"):
      assert count == frozen + nano
    if label.endswith(("+adapters", "+last_stage")):
      assert frozen < count < frozen + nano
  if name == "heads_detection":
    bifpn = [counts[f"swinv2_nano+bifpn{k}", "detection"] for k in (1, 3, 5)]
    assert bifpn[1] - bifpn[0] == bifpn[2] - bifpn[1] > 0


def test_cells_share_features_unless_they_are_to_be_separate(tmp_path):
  for more, expected in (((), str(tmp_path / "features")), (("--separate",), "")):
    plan, _ = _plan("heads_segmentation", tmp_path, "--seeds=1", *more)
    assert {plan.config(cell).cache.path for cell in plan.cells()} == {expected}
    assert ("--separate" in plan.runner) == bool(more)


def test_verdicts_follow_the_comparisons():
  def compared(winner, adjusted=0.01):
    nothing = statistics.Estimate(0.1, 0.05, 0.15, adjusted, 3)
    return statistics.Comparison("a", "b", "x/y", nothing, adjusted, winner, True)

  claim = grids.Claim("a over b", ("a",), ("b",))

  def verdict(*winners):
    return findings.Finding(claim, tuple(compared(winner) for winner in winners)).verdict()

  assert verdict("a", "a", "") == "Seen in 2 of 3 comparisons, the opposite in none; 1 is open."
  assert verdict("a", "b", "") == "Seen in 1 of 3 comparisons, the opposite in 1; 1 is open."
  assert verdict("b") == "The opposite is seen in 1 of 1 comparison, the statement in none."
  assert verdict("", "").startswith("Open: no difference beyond its interval in any of 2 comparisons.")
  untested = findings.Finding(claim, (compared("", float("nan")),))
  assert untested.verdict().startswith("Not tested") and verdict().startswith("Not tested")


def test_a_page_says_what_was_seen(tmp_path, monkeypatch):
  variants = tuple(
    grids.Variant(label, "swinv2_nano", title) for label, title in (("one", "The one"), ("two", "The other"))
  )
  rows = {"linear_segmentation": ("mIoU",), "action": ("top1",)}
  claims = tuple(
    grids.Claim(f"{better} is better", (better,), (worse,))
    for better, worse in (("two", "one"), ("one", "two"))
  )
  monkeypatch.setitem(grids.GRIDS, "made", grids.Grid("Which is better?", rows, variants, claims))
  plan, _ = _plan("made", tmp_path)
  assert not plan.with_cards  # of one backbone
  reports.fill(plan, gain=0.2, without=("one/action/1", "two/action/0"))
  costs = {"one/action": {"flops": 2.5e9, "temporaries": 3e6}}
  path = findings.write("made", plan, {"three": "no weights"}, costs, tmp_path / "pages")
  text = path.read_text()
  assert "10 of 12 cells are finished" in text and "| The one | 0.603" in text
  table, _, _ = text.partition("### ")
  assert table.count("| two is better | Seen in ") == 1
  assert table.count("| one is better | The opposite is seen in ") == 1
  assert "| The one | Action recognition (Video Swin head) | 12,345 | 1.5 | 2.5 | 3 |" in text
  assert "All in all 15 minutes in 10 cells." in text and "| three | no weights |" in text
  assert "one/action/1" in text
  written = json.loads(path.with_suffix(".json").read_text())
  assert [each["comparisons"] for each in written["findings"]] == [2, 2]
  assert "<h1>Which is better?</h1>" in path.with_suffix(".html").read_text()


def test_claims_are_corrected_for_what_they_compare_alone(tmp_path, monkeypatch):
  variants = tuple(grids.Variant(label, "swinv2_nano", label) for label in ("one", "two", "three", "four"))
  claim = grids.Claim("four over one", ("four",), ("one",), ("action/top1",))
  grid = grids.Grid("?", {"action": ("top1",)}, variants, (claim,))
  monkeypatch.setitem(grids.GRIDS, "made", grid)
  plan, _ = _plan("made", tmp_path)
  reports.fill(plan, gain=0.2)
  [found] = findings.findings(plan, grid)
  [each] = found.comparisons
  assert (each.first, each.second) == ("four", "one") and each.adjusted == each.difference.p_value


def test_cells_are_run_once_and_by_commands_of_their_own(tmp_path, monkeypatch, capsys):
  tiny.image_folder(tmp_path / "images", classes=6, images=32)
  grid = grids.Grid(
    "?",
    {"probes": ("linear", "knn")},
    (grids.Variant("a", "swinv2_nano", "shipped"), grids.Variant("b", "swinv2_nano:random", "random")),
    (grids.Claim("learnt is better", ("a",), ("b",)),),
  )
  monkeypatch.setitem(grids.GRIDS, "made", grid)
  images = {"image_size": 16, "probe.episodes": 5, "data": "files", "train": str(tmp_path / "images")}
  images |= {"validation": str(tmp_path / "images")}
  flags = ["--grid=made", f"--workdir={tmp_path / 'w'}", "--seeds=1"]
  flags += [f"--option=probes:classification.{name}={value}" for name, value in images.items()]
  begun = []

  def run_apart(plan, cell):
    begun.append(cell.name)
    words = command._command(plan, cell)
    assert words[:2] == ["python", run._SCRIPT] and words[-2:] == ["--grid=made", f"--cell={cell.name}"]
    if cell.recipe == cells.CARD:
      reports.finish(plan, cell)
      return 0
    return run.main(words[2:])

  monkeypatch.setattr(command, "_run_apart", run_apart)
  assert run.main([*flags, "--print_commands"]) == 0
  assert capsys.readouterr().out.count("--cell=") == 4 and not begun
  assert run.main([*flags, "--only=b"]) == 0 and begun == ["b/card/0", "b/probes/0"]
  assert run.main(flags) == 0 and begun[2:] == ["a/card/0", "a/probes/0"]
  assert run.main(flags) == 0 and run.main([*flags, "--collect"]) == 0 and len(begun) == 4
  page = (tmp_path / "w" / "pages" / "made.md").read_text()
  assert "4 of 4 cells are finished" in page and "| shipped |" in page
  assert (
    run.main([*flags, "--print_commands"]) == 0 and "--cell=" not in capsys.readouterr().out.split("}")[-1]
  )


def test_changes_inside_are_judged_by_their_intervals():
  before = {"spreads": [1.0, 1.2, 0.9, 1.1], "rises": {"0": [2.0, 2.1], "1": [2.1, 2.1], "2": [2.0, 2.2]}}
  after = {"spreads": [3.0, 3.3, 2.8, 3.3], "rises": {0: [2.5, 1.5], 1: [1.9, 2.5], 2: [2.4, 1.7]}}
  text = explain.render({"swinv2_nano": before, "swinv2_nano_fd": after})
  [spread, rise] = [line for line in text.splitlines() if line.startswith("| (")]
  assert "| 1.05 | 3.1 | +2.05 (" in spread and spread.endswith("| seen |")
  assert rise.endswith("| open |")
  after["rises"] = {}
  assert "not measured" in explain.render({"swinv2_nano": before, "swinv2_nano_fd": after})
  heads = [attention.Heads(np.array(each), np.eye(len(each))) for each in ([9.0, 0.0], [1.0, 3.0], [4.0])]
  assert explain.spread(heads) == 1.0  # the first half, and heads without another one, do not count


def test_a_part_of_an_archive(tmp_path):
  tiny.image_folder(tmp_path / "images", classes=3, images=4)
  with tarfile.open(tmp_path / "all.tar", "w") as archive:
    for path in sorted((tmp_path / "images").rglob("*.*")):
      archive.add(path, path.relative_to(tmp_path / "images").as_posix())
  parts.write(tmp_path / "all.tar", tmp_path / "part.tar", 2)
  with tarfile.open(tmp_path / "part.tar") as part, tarfile.open(tmp_path / "all.tar") as archive:
    names = part.getnames()
    assert len(names) == 6 and names == sorted(names)
    for name in names:
      assert part.extractfile(name).read() == archive.extractfile(name).read()


@pytest.mark.slow
def test_loss_rises_around_a_fine_tuned_classifier(tmp_path, monkeypatch):
  images = str(tiny.image_folder(tmp_path / "images", classes=3, images=4))
  config = tasks_build.read_config(tiny.classification())
  config = config.replace(
    {
      "trainable": (".*",),
      "classification.data": "files",
      **{f"classification.{part}": images for part in ("train", "validation", "test")},
      "classification.fine_tuning.learning_rates": (1e-3,),
      "classification.fine_tuning.weight_decays": (0.0,),
    }
  )
  recipe = recipes.TRANSFER["tuned_caltech101"]
  scores, examples, data, details = single._fine_tune(recipe, config, tmp_path / "cell")
  written = json.loads((tmp_path / "cell" / "fine_tuning.json").read_text())
  assert scores == {"top1": written["test"]} and not examples and set(data) == {"top1"}
  assert details["selected"] == written["selected"] and details["steps"] == config.steps
  with monkeypatch.context() as patched:
    patched.setattr(fine_tune, "fine_tune", lambda config, folder: {})
    with pytest.raises(single.Interrupted):
      single._fine_tune(recipe, config, tmp_path / "cell")
  rises = explain.loss_rise(config, tmp_path / "cell")
  assert len(rises) == explain._DIRECTIONS and np.isfinite(rises).all() and np.ptp(rises) > 0
  assert explain.loss_rise(config, tmp_path / "cell") == rises
  test = folders.ImageFolder(images)
  entry = entries.read(["swinv2_nano"])[0]
  plan = dataclasses.replace(_plan("heads_action", tmp_path)[0], backbones=(entry,))
  spreads = explain.attention_spreads(plan, "swinv2_nano", test)
  assert len(spreads) == explain._BATCHES and min(spreads) > 0
