"""The short form of each benchmark in `experiments/benchmarks` that takes seconds."""

from experiments import rounds
from experiments.benchmarks import evaluator, loader


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


def test_loader():
  text = loader.main(["--side=96", "--batches=2", "--rounds=1"])
  rates = [float(line.split("|")[2]) for line in text.splitlines() if line.startswith("| ours, files, ")]
  assert len(rates) == 2 and min(rates) > 0 and "50 photographs" in text
