"""`--mode=fine_tune`: the grid, what it selects, and what a second call finds."""

import json

import pytest

from frozen_vision import config_files, fine_tune
from frozen_vision.backbones import families
from frozen_vision.runs import log as run_log
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop
from tests import tiny

_SINGLE = {"learning_rates": (0.03,), "weight_decays": (0.0,)}


def _rows(*scores):
  pairs = [(rate, decay) for rate in (0.1, 0.01) for decay in (0.0, 1e-3)]
  return [
    {"learning_rate": rate, "weight_decay": decay, "validation": score}
    for (rate, decay), score in zip(pairs, scores)
  ]


@pytest.mark.parametrize(
  "scores, selected",
  [
    ((0.1, 0.3, 0.3, 0.2), (0.1, 1e-3)),  # the first of equals
    ((None, None, 0.0, 0.2), (0.01, 1e-3)),
    ((0.0, None, None, None), (0.1, 0.0)),
  ],
)
def test_selection(scores, selected):
  best = fine_tune.select(_rows(*scores))
  assert (best["learning_rate"], best["weight_decay"]) == selected


def test_nothing_is_selected_where_all_diverged():
  assert fine_tune.select(_rows(None, None, None, None)) is None


def test_edges_of_the_grid():
  rates, decays = (0.1, 0.01, 0.001), (0.0, 1e-6, 1e-5)
  cases = {(0.1, 1e-6): True, (0.01, 1e-6): False, (0.01, 0.0): False, (0.01, 1e-5): True, (0.001, 0.0): True}
  for (rate, decay), expected in cases.items():
    assert fine_tune.at_edge({"learning_rate": rate, "weight_decay": decay}, rates, decays) == expected
  assert not fine_tune.at_edge({"learning_rate": 0.1, "weight_decay": 1.0}, (0.1,), (1.0,))


def test_weight_decay_is_a_quotient():
  run = fine_tune.point(tasks_build.read_config(tiny.classification()), 0.01, 1e-4)
  assert run.optimizer.learning_rate == 0.01 and run.optimizer.weight_decay == pytest.approx(0.01)


def test_the_papers_grid_is_the_configs():
  config = config_files.load_config("fine_tuning:benchmark")
  grid, optimizer = config.classification.fine_tuning, config.optimizer
  assert grid.learning_rates == (1e-1, 1e-2, 1e-3, 1e-4) and grid.weight_decays == (
    0.0,
    1e-6,
    1e-5,
    1e-4,
    1e-3,
  )
  assert (config.steps, config.batch_size, optimizer.schedule) == (5000, 64, "cosine")
  assert optimizer.nesterov and optimizer.l2 and config.trainable == (".*",)


@pytest.mark.parametrize("recipe", ["fd_clip_vitb16", "fd_clip_vitl14", "fd_esvit_swinb", "swinv2_b_22k"])
def test_recipes_of_published_models(recipe):
  config = config_files.load_config(f"fine_tuning:{recipe}")
  sizes = families.backbone_config(config.backbone.name, **config.backbone.overrides)
  options, optimizer = config.classification, config.optimizer
  assert config.trainable == (".*",) and sizes.drop_path_rate > 0 and optimizer.name == "adamw"
  assert (options.mixup, options.cutmix, options.erasing, options.label_smoothing) == (0.8, 1.0, 0.25, 0.1)
  assert (options.rand_augment.num_ops, options.rand_augment.magnitude) == (2, 9.0)
  images = config.steps * config.batch_size / 1_281_167
  epochs = {"fd_clip_vitl14": 50, "swinv2_b_22k": 30}.get(recipe, 100)
  assert images == pytest.approx(epochs, rel=2e-3) and optimizer.warmup_steps < config.steps / 4
  if recipe == "fd_clip_vitb16":
    assert sizes.positions == "relative" and (optimizer.learning_rate, optimizer.layer_decay) == (5e-3, 0.6)
    assert optimizer.final_fraction * optimizer.learning_rate == pytest.approx(1e-6)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("images")
  for part, images in (("train", 6), ("validation", 3), ("test", 4)):
    tiny.image_folder(folder / part, images=images)
  config = tasks_build.read_config(tiny.classification(folder / "train", folder / "validation"))
  return config.replace(
    {
      "steps": 2,
      "trainable": ("head/.*",),
      "log_every": 2,
      "optimizer": {"name": "sgd", "l2": True, "nesterov": True},
      "classification.test": str(folder / "test"),
      "classification.fine_tuning": {"learning_rates": (1e38, 0.1), "weight_decays": (0.0, 1e-3)},
    }
  )


def test_a_grid_from_its_runs_to_the_test(config, tmp_path, monkeypatch):
  trained = []
  train = loop.train

  def counted(run, folder):
    trained.append(run)
    return train(run, folder)

  monkeypatch.setattr(loop, "train", counted)
  found = fine_tune.fine_tune(config, tmp_path)
  assert [row["weight_decay"] for row in found["grid"]] == [0.0, 1e-3] * 2
  diverged, learned = found["grid"][:2], found["grid"][2:]
  assert all(row["validation"] is None for row in diverged) and all(row["validation"] for row in learned)
  assert found["selected"]["learning_rate"] == 0.1 and len(trained) == 5
  assert [run.classification.refit for run in trained] == [False] * 4 + [True]
  assert trained[-1].optimizer.learning_rate == 0.1
  tested = tmp_path / found["test_workdir"]
  assert tested == tmp_path / "test" / "lr_0.1_wd_0" or tested == tmp_path / "test" / "lr_0.1_wd_0.001"
  data = json.loads((tested / "data.json").read_text())
  assert data["training"]["examples"] == 27 and data["validation"]["examples"] == 12
  assert found["test"] == found["test_metrics"]["top1"]
  page = (tmp_path / "fine_tuning.md").read_text()
  assert "| 1e+38 | diverged | diverged |" in page and "Selected: learning rate 0.1" in page
  # Checkpoints of the grid are gone, that of the test stays.
  assert not list(tmp_path.glob("grid/*/checkpoints")) and list(tested.glob("checkpoints"))
  # Finished runs are not run again; results of another config are not taken.
  again = fine_tune.fine_tune(config.replace({"log_every": 1, "loader.threads": 3}), tmp_path)
  assert again == found and len(trained) == 5
  with pytest.raises(ValueError, match="lr_1e.38_wd_0 holds the result of another config(?s:.*)steps: 2"):
    fine_tune.fine_tune(config.replace({"steps": 3}), tmp_path)
  other = fine_tune.fine_tune(config.replace({"classification.fine_tuning": _SINGLE}), tmp_path)
  assert other["selected"]["learning_rate"] == 0.03 and other["test_workdir"] == "test/lr_0.03_wd_0"
  assert len(trained) == 7
  (tmp_path / "grid" / "lr_0.03_wd_0" / "result.json").write_text("[]")
  with pytest.raises(ValueError, match="result.json is no result of a run; remove .*lr_0.03_wd_0"):
    fine_tune.fine_tune(config.replace({"classification.fine_tuning": _SINGLE}), tmp_path)


def test_an_interrupted_run_goes_on_in_another_grid(config, tmp_path, monkeypatch):
  def stopped(signal, done):
    signal.signal_name = "SIGTERM"
    return True

  grid = {"learning_rates": (0.1,), "weight_decays": (0.0,)}
  with monkeypatch.context() as patch:
    patch.setattr(run_log.StopSignal, "agreed", stopped)
    assert not fine_tune.fine_tune(config.replace({"classification.fine_tuning": grid}), tmp_path)
  wider = grid | {"learning_rates": (0.1, 0.10000001)}  # one folder each, though six digits are equal
  found = fine_tune.fine_tune(config.replace({"classification.fine_tuning": wider}), tmp_path)
  assert len(found["grid"]) == 2 and all(row["validation"] for row in found["grid"])
  assert sorted(path.name for path in tmp_path.glob("grid/*")) == ["lr_0.10000001_wd_0", "lr_0.1_wd_0"]


def test_what_cannot_be_tested_is_refused_at_once(config, tmp_path):
  with pytest.raises(ValueError, match="no test data.*--config.classification.test=FOLDER"):
    fine_tune.fine_tune(config.replace({"classification.test": ""}), tmp_path)
  with pytest.raises(ValueError, match="refit is True"):
    fine_tune.fine_tune(config.replace({"classification.refit": True}), tmp_path)
  with pytest.raises(ValueError, match="config.task is 'action'"):
    fine_tune.fine_tune(tiny.action(), tmp_path)
  assert not list(tmp_path.iterdir())
