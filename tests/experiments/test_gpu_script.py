"""`experiments/benchmarks/gpu.sh` at toy sizes, without the packages that a bare machine lacks."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.benchmarks.gpu import kernel_times, report, timing

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SCRIPT = _ROOT / "experiments" / "benchmarks" / "gpu.sh"
# Packages that a bare machine with a GPU lacks; PyTorch and timm too, whose peers would take minutes here.
_ABSENT = (
  "tensorflow",
  "tensorflow_datasets",
  "grain",
  "array_record",
  "clu",
  "ml_collections",
  "av",
  "pycocotools",
  "faster_coco_eval",
  "matplotlib",
  "PIL",
  "torch",
  "timm",
)
_BLOCKER = """
import sys

class Absent:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in {names}:
      raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


# Prints which of the packages cannot be imported.
_PROBE = f"""
import importlib, json
absent = []
for name in {_ABSENT}:
  try:
    importlib.import_module(name)
  except ModuleNotFoundError:
    absent.append(name)
print(json.dumps(absent))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory, cache_folder):
  """Variables of a process that cannot import `_ABSENT`; programs are compiled once for all tests."""
  folder = tmp_path_factory.mktemp("absent")
  (folder / "sitecustomize.py").write_text(_BLOCKER.format(names=_ABSENT))
  return os.environ | dict(
    PYTHON=sys.executable,
    PYTHONPATH=str(folder),
    JAX_PLATFORMS="cpu",
    JAX_COMPILATION_CACHE_DIR=str(cache_folder),
  )


def _run(environment, *arguments):
  return subprocess.run(
    [str(_SCRIPT), *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


@pytest.fixture(scope="module")
def tables(environment, tmp_path_factory):
  """(folder, what `tables.json` holds) of a whole run."""
  out = tmp_path_factory.mktemp("gpu")
  probe = subprocess.run([sys.executable, "-c", _PROBE], env=environment, stdout=subprocess.PIPE, text=True)
  assert json.loads(probe.stdout) == list(_ABSENT)
  done = _run(environment, "--tiny", "--part=1,2,3,4,5,6,7,8", f"--out={out}")
  assert done.returncode == 0, done.stdout[-3000:]
  return out, json.loads((out / "tables.json").read_text())


def test_every_part_writes_its_table(tables):
  folder, found = tables
  assert sorted(found) == [f"part{number}" for number in range(1, 9)]
  for name, table in found.items():
    assert table["complete"] and table["tiny"] and table["rows"], name
    text = (folder / f"{name}.md").read_text()
    assert "(not finished)" not in text and text.startswith(f"# {table['title']}\n")
    assert "Toy sizes" in text and "jax" in table["machine"]["Versions"] and table["machine"]["Device"]
    header = "| " + " | ".join(table["columns"].values()) + " |"
    lines = text.splitlines()
    start = lines.index(header) + 2
    assert len([line for line in lines[start:] if line.startswith("| ")]) == len(table["rows"])
  files = [path for path in folder.rglob("*") if path.is_file()]
  assert len(files) == 9 and all(path.suffix in (".md", ".json") for path in files)


def test_what_the_parts_measure(tables):
  rows = {name: table["rows"] for name, table in tables[1].items()}
  assert {row["ok"] for row in rows["part1"]} == {"yes"}
  assert all(0 < row["features"] <= row["bound"] for row in rows["part1"])
  assert [row["model"] for row in rows["part2"]] == ["swinv2_b", "swinv2_l"]
  assert any("timm is not measured" in note for note in tables[1]["part2"]["notes"])
  assert [row["storage"] for row in rows["part3"]] == ["bfloat16", "int8"]
  assert rows["part3"][1]["weights"] < rows["part3"][0]["weights"]
  heads = [(row["head"], row["trains"]) for row in rows["part4"]]
  assert heads == [
    ("HTC", "head"),
    ("Video Swin, 2 frames", "head"),
    ("Video Swin, 2 frames", "everything"),
    ("Mask2Former", "head"),
  ]
  assert all(math.isfinite(row["loss"]) and row["rate"] > 0 and row["tflop"] > 0 for row in rows["part4"])
  frozen, everything = rows["part4"][1:3]
  assert everything["tflop"] > 2 * frozen["tflop"]
  together, *alone, summed = rows["part5"]
  assert len(alone) == 3 and summed["weights"] == pytest.approx(sum(row["weights"] for row in alone))
  assert summed["weights"] > together["weights"] and "(" in summed["ratio"]
  for program in {row["program"] for row in rows["part6"]}:
    kernels = [row for row in rows["part6"] if row["program"] == program]
    assert len(kernels) == 11 and sum(row["fraction"] for row in kernels) == pytest.approx(100)
    assert [row["rank"] for row in kernels[:-1]] == list(range(1, 11))
    assert kernels == sorted(kernels[:-1], key=lambda row: -row["ms"]) + kernels[-1:]
  assert [row["model"] for row in rows["part7"]] == ["dinov3_vitl16", "resnet50"]
  masks, *probes, half, quarter = rows["part8"]
  assert masks["what"] == "L with a plain mask decoder, batch 1" and masks["rate"] > 0
  assert len(probes) == 2 and all(row["ms"] for row in probes)
  assert (half["storage"], quarter["storage"]) == ("bfloat16", "int8")
  assert half["what"] == quarter["what"] == "the 7B" and quarter["weights"] < half["weights"]


def test_a_killed_run_keeps_the_finished_tables(environment, tables, tmp_path):
  del tables  # has filled the cache of compiled programs
  process = subprocess.Popen(
    [str(_SCRIPT), "--tiny", "--part=2,4", f"--out={tmp_path}"],
    env=environment,
    start_new_session=True,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  second = tmp_path / "part4.md"
  while not second.exists():
    assert process.poll() is None, "the run ended before it could be killed"
    time.sleep(0.05)
  os.killpg(process.pid, signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  found = json.loads((tmp_path / "tables.json").read_text())
  assert found["part2"]["complete"] and len(found["part2"]["rows"]) == 2
  assert "(not finished)" not in (tmp_path / "part2.md").read_text()
  assert "(not finished)" in second.read_text()
  if "part4" in found:
    assert not found["part4"]["complete"]


def test_a_part_at_its_limit_is_cut_and_said_to_be(environment, tmp_path):
  done = _run(environment, "--tiny", "--part=3", "--limit=1", f"--out={tmp_path}")
  assert done.returncode == 1
  assert "Part 3 was cut at its limit of 1 s" in done.stdout and "Not finished: parts 3." in done.stdout


@pytest.mark.parametrize(
  "argument, said", [("--part=9", "expected numbers from 1 to 8"), ("--fast", "unknown argument")]
)
def test_wrong_arguments_are_refused(environment, argument, said):
  done = _run(environment, argument)
  assert done.returncode == 2 and said in done.stdout


def test_rows_are_on_disk_as_soon_as_they_are_added(tmp_path):
  part = report.Part("A title", dict(name="name", value="value in ms"), lambda table: None)
  table = report.Report(3, part, tmp_path, seconds=100, tiny=False)
  table.add(name="first", value=0.001234)
  assert "| first | 1.23e-03 |" in (tmp_path / "part3.md").read_text()
  table.add(name="second", value=None)
  table.note("Why there is no second.")
  saved = json.loads((tmp_path / "tables.json").read_text())["part3"]
  assert saved["rows"] == [dict(name="first", value=0.001234), dict(name="second", value=None)]
  assert not saved["complete"]
  table.remove(name=["first", "third"])
  table.finish()
  text = (tmp_path / "part3.md").read_text()
  assert "| first" not in text and "| second | - |" in text and "Why there is no second." in text
  with pytest.raises(ValueError, match="no columns"):
    table.add(colour="red")
  other = report.Report(1, part, tmp_path, seconds=100, tiny=False)
  other.finish()
  assert sorted(json.loads((tmp_path / "tables.json").read_text())) == ["part1", "part3"]


def test_time_inside_of_a_loop_counts_once():
  # A loop of 10 with bodies of 3 and 4, one of which holds a call of 1; then another operation.
  events = [
    ("loop", "", 0, 10),
    ("body", "", 1, 3),
    ("body", "", 5, 4),
    ("call", "", 6, 1),
    ("next", "", 10, 2),
  ]
  found = {}
  for name, _, nanoseconds in kernel_times._own_times(events):
    found[name] = found.get(name, 0) + nanoseconds
  assert found == {"loop": 3, "body": 6, "call": 1, "next": 2}


def test_programs_are_timed_in_turns():
  order = []
  taken = timing.interleave(
    {name: lambda times, name=name: order.extend([name] * times) for name in "abc"}, rounds=3, round_s=0.0
  )
  assert order[6:] == list("abc") + list("bca") + list("cab")  # after two calls of each to warm up
  assert {name: len(seconds) for name, seconds in taken.items()} == dict(a=3, b=3, c=3)
