"""The short form of each benchmark in `experiments/benchmarks` that takes seconds."""

import jax
import jax.numpy as jnp

from experiments import rounds
from experiments.benchmarks import cpu_operations, evaluator, loader, run_ahead, window_attention
from frozen_vision.tasks import build as tasks_build
from tests import tiny


def test_rounds_begin_with_another_run_each():
  calls = []
  seconds = rounds.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 3)
  assert "".join(calls) == "abcbcacab"
  assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
  assert rounds.ratio([2, 4, 6], [1, 2, 3]) == "2"
  assert rounds.ratio([2, 4, 6, 8, 10, 16], [2] * 6) == "3.5 (1 to 8)"


def test_evaluator(tmp_path):
  out = tmp_path / "table.md"
  text = evaluator.main(["--images=3", "--detections=8", "--rounds=1", f"--out={out}"])
  assert out.read_text() == text and "| pycocotools | " in text
  assert "mask AP 0.0" in text  # something was found, and both agreed on it


def test_cpu_operations(tmp_path):
  out = tmp_path / "table.md"
  text = cpu_operations.main(["--tiny", "--rounds=1", f"--out={out}"])
  assert out.read_text() == text
  rows = [line.split("|") for line in text.splitlines()[4:]]
  assert sum("gradients of" in row[1] for row in rows) == 2 and len(rows) == 5
  assert all(float(cell) > 0 for row in rows for cell in row[2:5])


def test_loader():
  text = loader.main(["--side=96", "--batches=2", "--rounds=1"])
  rates = [float(line.split("|")[2]) for line in text.splitlines() if line.startswith("| ours, files, ")]
  assert len(rates) == 2 and min(rates) > 0 and "50 photographs" in text


def test_window_attention(tmp_path):
  out = tmp_path / "table.md"
  text = window_attention.main(["--tiny", "--stages=1", f"--out={out}"])
  assert out.read_text() == text
  cells = text.splitlines()[-1].replace(",", "").split("|")
  assert cells[1:7] == [" any ", " 64 ", " 1 ", " 16 x 16 ", " 8 ", " 1 "]
  assert float(cells[10]) > 0 and float(cells[11]) > 0


def test_a_loop_moves_its_bytes_as_often_as_it_runs():
  def four_times(x, y):
    return jax.lax.scan(lambda x, _: (jnp.sin(x @ y), None), x, length=4)[0]

  def once(x, y):
    return jnp.sin(x @ y)

  inputs, device = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 2, jax.devices("cpu")[0]
  moved = {function: window_attention.measure(function, inputs, device)[1] for function in (once, four_times)}
  assert 4 * moved[once] <= moved[four_times] <= 6 * moved[once]


def test_run_ahead(tmp_path):
  images = tiny.image_folder(tmp_path / "images")
  config = tasks_build.read_config(tiny.classification(images, images))
  lines = run_ahead.compare(config, steps=3, number_of_rounds=1).splitlines()
  rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in lines[4:]}
  assert list(rows) == ["2 steps in flight", "no bound"]
  assert all(float(cell) > 0 for cells in rows.values() for cell in cells)
