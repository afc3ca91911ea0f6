import json

import numpy as np
from PIL import Image
import pytest

from frozen_vision.runs import curves


@pytest.fixture(autouse=True)
def all_panels(monkeypatch, draw_whole_figures):
  monkeypatch.setattr(curves, "_plot", draw_whole_figures)


def test_train_and_eval_get_a_figure_each(tmp_path):
  rows = [
    {"step": s, "train/loss": 3 / s, "train/rpn_box": 1 / s, "train/learning_rate": 1e-3}
    for s in range(1, 100)
  ]
  rows += [{"step": 99, "eval/box_AP": 0.4, "eval/box_AP_large": -1.0, "eval/mask_AP50": 0.5}]
  path = tmp_path / "metrics.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  written = curves.plot_curves(path, tmp_path / "curves.png")
  assert [p.name for p in written] == ["curves_train.png", "curves_eval.png"]
  for figure in written:
    pixels = np.asarray(Image.open(figure).convert("RGB"))
    assert pixels.shape[1] > 900 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_a_damaged_figure_is_seen(tmp_path):
  rows = [{"step": 1, "train/loss": 2.0, "eval/top1": 0.5}, {"step": 2, "train/loss": 1.0}]
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
  assert not curves.are_whole(tmp_path / "c.png")
  figures = curves.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "c.png")
  assert curves.are_whole(tmp_path / "c.png") and sorted(tmp_path.iterdir()) == sorted(
    [*figures, tmp_path / "metrics.jsonl"]
  )
  for figure in figures:
    whole = figure.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-4], b"", whole[:100] + b"?" + whole[101:], b"GIF89a"):
      figure.write_bytes(damaged)
      assert not curves.are_whole(tmp_path / "c.png")
    figure.write_bytes(whole)
  figures[1].unlink()
  assert not curves.are_whole(tmp_path / "c.png")


def test_one_point_and_no_eval(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 5, "train/loss": 2.0}\n')
  written = curves.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "c.png")
  assert [p.name for p in written] == ["c_train.png"]


def test_nothing_to_draw(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 5, "eval/box_AP": -1.0, "train/loss": NaN}\n')
  assert curves.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "c.png") == []


def test_reading_survives_a_killed_and_resumed_run(tmp_path, caplog):
  lines = [
    '{"step": 10, "train/loss": 3.0, "note": "text"}',
    '{"step": 20, "train/loss": 2.5}',
    '{"step": 20, "train/loss": 2.4, "train/grad_norm": null}',
    '{"step": 15, "train/loss": Infinity}',
    "",
    '{"train/loss": 1.0}',
    '{"step": 30, "train/l',
  ]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
  series = curves.read_metrics(tmp_path / "metrics.jsonl")
  assert series == {"train/loss": [(10, 3.0), (20, 2.4)]}
  assert "2 lines" in caplog.text


def test_panels_group_what_belongs_together():
  point = [(1, 0.5)]
  keys = ("loss", "loss/rpn_box", "loss/semantic", "learning_rate", "positives/rpn", "unreadable")
  panels = curves._panels(dict.fromkeys(keys, point), training=True)
  assert list(panels) == ["Loss", "Loss terms", "Learning rate", "Positives", "Unreadable"]
  assert list(panels["Loss terms"]) == ["rpn_box", "semantic"]
  # A run from before terms had a prefix.
  old = curves._panels(dict.fromkeys(("loss", "rpn_box", "positives/rpn"), point), training=True)
  assert list(old["Loss terms"]) == ["rpn_box"] and list(old) == ["Loss", "Loss terms", "Positives"]
  keys = ("top1", "top5", "box_AR_100", "box_AP_small", "mask_AP", "box_AP", "mean_iou")
  panels = curves._panels(dict.fromkeys(keys, point), training=False)
  assert list(panels) == ["Box AP", "Mask AP", "Box AP by object size", "Box AR", "Accuracy",
                          "Mean iou"]  # fmt: skip
