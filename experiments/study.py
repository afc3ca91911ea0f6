"""What the scripts share that run one config several times and write a table: one run, and the file."""

from collections.abc import Iterable, Sequence
import json
import pathlib
import subprocess
import sys
import time

from frozen_vision import machines

_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def run(config: str, folder: pathlib.Path, options: Iterable[str], metric: str) -> dict[str, float]:
  """Trains in a process of its own.

  Args:
    config: such as `configs/coco_htc.py:photos`.
    folder: the workdir.
    options: of the config, such as `seed=1`.
    metric: that an evaluation has, such as `mIoU`.

  Returns:
    The last evaluation by metric, and `minutes` that the whole command took.
  """
  started = time.perf_counter()
  subprocess.run(
      [sys.executable, "-m", "frozen_vision.main", f"--config={config}", f"--workdir={folder}",
       *(f"--config.{option.removeprefix('config.')}" for option in options)],
      cwd=_REPOSITORY, check=True)
  minutes = (time.perf_counter() - started) / 60
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  last = [line for line in lines if f"eval/{metric}" in line][-1]
  metrics = {key.removeprefix("eval/"): value for key, value in last.items() if key.startswith("eval/")}
  return {**metrics, "minutes": minutes}


def write(path: str, made_by: str, options: Sequence[str], rows: Sequence[str], more: str = "") -> None:
  """Writes the table as far as it is, and prints its last row.

  Args:
    path: of the markdown file.
    made_by: the command, without what only says where files are.
    options: that every run was given beyond those of the study.
    rows: lines of the table.
    more: what else is to be said of the numbers.
  """
  with_options = f", with {' '.join(options)}" if options else ""
  text = (
      f"Made by `{made_by}`{with_options}; minutes are those of the whole command on {machines.processor()}"
      f"{more}.\n\n" + "\n".join(rows) + "\n")
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  pathlib.Path(path).write_text(text)
  print(rows[-1], flush=True)
