"""Shared by scripts that run one config several times and write a table: flags, one run, the file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import pathlib
import subprocess
import sys
import time

from absl import app, flags

from experiments import tables
from frozen_vision.planning import machines

WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the runs.", required=True)
_VARIANTS = flags.DEFINE_list("variants", [], "Only these of the study, separated by commas.")
_OPTIONS = flags.DEFINE_multi_string("option", [], "One more option of every run, such as config.steps=100.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write.", required=True)

_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def chosen(variants: Mapping[str, Sequence[str]]) -> list[tuple[int, str, Sequence[str]]]:
  """(number, name, options) of those variants of a study that --variants names, or of all.

  Raises:
    app.UsageError: a name that is none of them.
  """
  unknown = sorted(set(_VARIANTS.value) - set(variants))
  if unknown:
    raise app.UsageError(f"--variants has {unknown}; known: {sorted(variants)}.")
  return [
    (number, name, options)
    for number, (name, options) in enumerate(variants.items())
    if not _VARIANTS.value or name in _VARIANTS.value
  ]


def run(config: str, folder: pathlib.Path, options: Iterable[str], metric: str) -> dict[str, float]:
  """Trains in a process of its own.

  Args:
    config: such as `configs/coco_htc.py:photos`.
    folder: the workdir.
    options: of the config, such as `seed=1`; those of --option come last.
    metric: that an evaluation has, such as `mIoU`.

  Returns:
    The last evaluation by metric, and `minutes` that the whole command took.
  """
  started = time.perf_counter()
  subprocess.run(
    [
      sys.executable,
      "-m",
      "frozen_vision.main",
      f"--config={config}",
      f"--workdir={folder}",
      *(f"--config.{option}" for option in options),
      *(f"--{option}" for option in _OPTIONS.value),
    ],
    cwd=_REPOSITORY,
    check=True,
  )
  minutes = (time.perf_counter() - started) / 60
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  last = [line for line in lines if f"eval/{metric}" in line][-1]
  metrics = {key.removeprefix("eval/"): value for key, value in last.items() if key.startswith("eval/")}
  return {**metrics, "minutes": minutes}


def run_seeds(
  heading: str,
  variants: Mapping[str, Sequence[str]],
  seeds: Sequence[str],
  columns: Mapping[str, str],
  run_one: Callable[[int, str, list[str]], dict[str, float]],
  write_rows: Callable[[Sequence[str]], None],
) -> None:
  """Runs those of the variants that --variants names in several seeds, a row for each run and for each mean.

  Args:
    heading: of the column of variants.
    variants: options by name.
    seeds: of each variant.
    columns: headings by the metric below them; the minutes of a run come last.
    run_one: metrics with `minutes` of (the variant's number, the seed, the options of the run).
    write_rows: called with all rows so far after each.
  """
  rows = [
    f"| {heading} | seed | " + " | ".join(columns.values()) + " | minutes |",
    "|---|---|" + "---|" * (len(columns) + 1),
  ]

  def add(variant: str, seed: str, metrics: Mapping[str, float]) -> None:
    values = " | ".join(f"{metrics[name]:.3f}" for name in columns)
    rows.append(f"| {variant} | {seed} | {values} | {metrics['minutes']:.1f} |")
    write_rows(rows)

  for number, variant, changes in chosen(variants):
    found = []
    for seed in seeds:
      found.append(run_one(number, seed, [f"seed={seed}", *changes]))
      add(variant, seed, found[-1])
    if len(found) > 1:
      mean = {name: sum(metrics[name] for metrics in found) / len(found) for name in (*columns, "minutes")}
      add(f"**{variant}**", "mean", mean)


def write(made_by: str, rows: Sequence[str], more: str = "") -> None:
  """Writes the table to --out as far as it is, and prints its last row.

  Args:
    made_by: the command, without what only says where files are.
    rows: lines of the table.
    more: what else is to be said of the numbers.
  """
  with_options = f", with {' '.join(_OPTIONS.value)}" if _OPTIONS.value else ""
  text = (
    f"Made by `{made_by}`{with_options}; minutes are those of the whole command on {machines.processor()}"
    f"{more}.\n\n" + "\n".join(rows) + "\n"
  )
  tables.write(text, _OUT.value)
  print(rows[-1], flush=True)
