"""The table of one part of the benchmark, written after every row, with the machine it was measured on."""

from collections.abc import Callable, Mapping
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import jax

from frozen_vision.planning import machines

# Dense bfloat16, per second, by the name that the driver gives (NVIDIA's data sheets of the H100 SXM and the
# H200 SXM). Other forms of these chips have other clocks: without a row, no utilisation is stated.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "triton", "timm")
_CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
_ABSENT = "-"


@dataclasses.dataclass(frozen=True)
class Part:
  """One part of the benchmark.

  Attributes:
    title: heading of its table.
    columns: {key of a row: heading}.
    run: measures, adding rows and notes to the report.
  """

  title: str
  columns: Mapping[str, str]
  run: Callable[["Report"], None]


class Report:
  """Collects the rows of one part; on disk they are whole after every change, however the process ends.

  Files are `partN.md`, and `tables.json` with an entry for each part. Both are written beside their place and
  renamed.

  Attributes:
    tiny: toy sizes are asked for.
    peak: FLOP per second of the device in bfloat16, or None.
  """

  def __init__(self, number: int, part: Part, folder: pathlib.Path, *, seconds: float, tiny: bool):
    self._number, self._part, self._folder = number, part, folder
    self._started = time.monotonic()
    self._ends = self._started + seconds
    self._rows: list[dict[str, Any]] = []
    self._notes: list[str] = []
    self._complete = False
    self._machine = describe_machine()
    self._clocks = ClockMonitor()
    self.tiny = tiny
    self.peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    self._folder.mkdir(parents=True, exist_ok=True)
    print(f"\n# Part {number}: {part.title}\n", flush=True)
    for name, value in self._machine.items():
      print(f"{name}: {value}", flush=True)
    self._write()

  @property
  def folder(self) -> pathlib.Path:
    return self._folder

  def seconds_left(self) -> float:
    """Until the process is cut."""
    return self._ends - time.monotonic()

  def add(self, **row: Any) -> None:
    """Adds a row, whose keys are those of the part's columns; None is shown as a dash."""
    unknown = set(row) - set(self._part.columns)
    if unknown:
      raise ValueError(
        f"Part {self._number} has no columns {sorted(unknown)}; known: {list(self._part.columns)}."
      )
    self._rows.append(row)
    print("  ".join(f"{key}={_cell(value)}" for key, value in row.items()), flush=True)
    self._write()

  def remove(self, **values: Any) -> None:
    """Takes the rows out that have these values; a list stands for each of its elements."""

    def matches(row: dict[str, Any]) -> bool:
      return all(
        row.get(key) in (value if isinstance(value, list) else [value]) for key, value in values.items()
      )

    self._rows = [row for row in self._rows if not matches(row)]

  def note(self, text: str) -> None:
    """Adds a line below the table."""
    self._notes.append(text)
    print(text, flush=True)
    self._write()

  def utilisation(self, flops: float, seconds: float) -> float | None:
    """Model FLOPs over time and peak, in percent; None where the peak is not known."""
    return None if self.peak is None else 100 * flops / seconds / self.peak

  def finish(self) -> None:
    """Marks the table as complete, and prints it."""
    self._complete = True
    self._write()
    print("\n" + self._markdown(), flush=True)

  def _write(self) -> None:
    _replace(self._folder / f"part{self._number}.md", self._markdown())
    path = self._folder / "tables.json"
    tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    tables[f"part{self._number}"] = dict(
      title=self._part.title,
      complete=self._complete,
      seconds=round(time.monotonic() - self._started, 1),
      tiny=self.tiny,
      command=_command(),
      machine=self._machine,
      clocks=self._clocks.summary(),
      columns=dict(self._part.columns),
      rows=self._rows,
      notes=self._notes,
    )
    _replace(path, json.dumps(tables, indent=1) + "\n")

  def _markdown(self) -> str:
    columns = self._part.columns
    state = "" if self._complete else " (not finished)"
    lines = [f"# {self._part.title}{state}", ""]
    if self.tiny:
      lines += ["Toy sizes: these numbers show that the script runs, and nothing else.", ""]
    lines += [f"- {name}: {value}" for name, value in self._machine.items()]
    lines += [f"- Clocks: {self._clocks.summary()}", f"- Command: `{_command()}`", ""]
    lines += ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in self._rows:
      lines.append("| " + " | ".join(_cell(row.get(key)) for key in columns) + " |")
    if self._notes:
      lines += [""] + [f"{note}\n" for note in self._notes]
    return "\n".join(lines).rstrip() + "\n"


class ClockMonitor:
  """Reads the GPU's clocks twice a second in the background, as long as the process lives."""

  def __init__(self):
    self._samples: list[tuple[float, ...]] = []
    try:
      process = subprocess.Popen(
        [
          "nvidia-smi",
          f"--query-gpu={','.join(_CLOCKS)}",
          "--format=csv,noheader,nounits",
          "--id=0",
          "-lms",
          "500",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
      )
    except OSError:
      return
    threading.Thread(target=self._read, args=(process,), daemon=True).start()

  def _read(self, process: subprocess.Popen) -> None:
    for line in process.stdout:
      try:
        self._samples.append(tuple(float(value) for value in line.split(",")))
      except ValueError:  # "[N/A]"
        continue

  def summary(self) -> str:
    """Medians and extremes since the start."""
    samples = list(self._samples)
    if not samples:
      return "nvidia-smi says nothing"
    sm, memory, power, temperature = zip(*samples)
    return (
      f"SM {statistics.median(sm):.0f} MHz (median; {min(sm):.0f} to {max(sm):.0f}), "
      f"memory {max(memory):.0f} MHz, "
      f"power {statistics.median(power):.0f} W (at most {max(power):.0f}), at most {max(temperature):.0f} C, "
      f"{len(samples)} readings"
    )


def describe_machine() -> dict[str, str]:
  """Conditions of the numbers: device, driver, limits, versions, the state of the source."""
  device = jax.devices()[0]
  fields = dict(Device=f"{device.device_kind} ({device.platform}, {jax.device_count()} in all)")
  query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
  gpu = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"])
  if gpu:
    values = [value.strip() for value in gpu.split(",")]
    fields["GPU"] = "{}, driver {}, {}, SM at most {}, memory at most {}, power limit {}".format(*values)
  fields["CPU"] = f"{os.cpu_count()} cores of {machines.processor()}"
  versions = [f"Python {platform.python_version()}"]
  for name in _PACKAGES:
    try:
      versions.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      continue
  fields["Versions"] = ", ".join([*versions, "backend: " + " ".join(device.client.platform_version.split())])
  root = pathlib.Path(__file__).resolve().parents[3]
  commit = _output(["git", "-C", str(root), "describe", "--always", "--dirty"])
  if commit:
    fields["Source"] = commit
  return fields


def first_line(error: Exception) -> str:
  """An error in one short line."""
  return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def _output(command: list[str]) -> str:
  """Standard output of a command; empty where it does not exist or fails."""
  try:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return ""


def _command() -> str:
  return " ".join(["python", "-m", "experiments.benchmarks.gpu", *sys.argv[1:]])


def _cell(value: Any) -> str:
  if value is None:
    return _ABSENT
  if isinstance(value, float):
    return (
      f"{value:.2e}" if 0 < abs(value) < 0.01 else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    )
  return str(value).replace("|", "\\|")


def _replace(path: pathlib.Path, text: str) -> None:
  aside = path.with_name(path.name + ".part")
  aside.write_text(text, encoding="utf-8")
  os.replace(aside, path)
