"""`--mode=report`: runs the cells of a report that are not finished, and makes its page."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import logging
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time

from absl import flags

from frozen_vision import messages
from frozen_vision.files import atomic, lock
from frozen_vision.options import Text
from frozen_vision.report import cells, entries, recipes, single, words, write

_logger = logging.getLogger(__name__)
_COMMAND = ("python", "-m", "frozen_vision.main")
# Flags of lists; the others are in `define_flags`.
_LISTS = {
  "backbones": "Backbones: SOURCE or LABEL=SOURCE, a source being a name, a file, or VARIANT:WEIGHTS.",
  "tasks": f"Tasks, of {', '.join(recipes.TASKS)}.",
  "class_folders": "Of the probes: TRAIN or TRAIN,TEST, class folders in the place of generated images.",
  "coco": "Of detection: FILE.json,IMAGES in the place of generated scenes.",
  "label_maps": (
    "Of segmentation: CLASSES,IMAGES,LABELS,VALIDATION_IMAGES,VALIDATION_LABELS in the place of generated "
    "scenes."
  ),
  "videos": "Of action recognition: TRAIN or TRAIN,VALIDATION in the place of generated clips.",
}


def define_flags() -> None:
  """Defines the flags of `--mode=report`."""
  for name, text in _LISTS.items():
    flags.DEFINE_list(name, [], f"Of reports. {text}")
  flags.DEFINE_integer("seeds", 3, "Of reports: how many seeds.")
  flags.DEFINE_enum("budget", "demo", recipes.BUDGETS, "Of reports: how much every run may train.")
  flags.DEFINE_multi_string(
    "option", [], "Of reports: RECIPE:OPTION=VALUE sets an option of a recipe's config."
  )
  flags.DEFINE_string("cell", None, "Of reports: run this cell alone, BACKBONE/RECIPE/SEED.")
  flags.DEFINE_bool("print_commands", False, "Of reports: print a command for every cell that is to be run.")
  flags.DEFINE_bool("only_page", False, "Of reports: run nothing, make the page from what is there.")


def from_flags(workdir: str) -> None:
  """Does what the flags of `define_flags` say.

  Raises:
    ValueError: flags that do not fit.
    SystemExit: a cell was told to stop, or cells failed.
  """
  values = flags.FLAGS
  plan = make_plan(
    values.backbones,
    workdir,
    tasks=values.tasks,
    seeds=values.seeds,
    budget=values.budget,
    class_folders=values.class_folders,
    coco=values.coco,
    label_maps=values.label_maps,
    videos=values.videos,
    options=values.option,
  )
  if values.print_commands:
    print_commands(plan)
    return
  try:
    if values.cell:
      single.run(plan, plan.cell(values.cell))
      return
    found = [] if values.only_page else run(plan)
  except single.Interrupted as error:
    _logger.warning("%s", error)
    sys.exit(single.INTERRUPTED)
  except lock.LockedError as error:
    _logger.warning("%s", error)
    sys.exit(single.LOCKED)
  report = write.write(plan)
  _logger.info("%s", words.state(report))
  for each in report["absent"]:
    _logger.info("  %s: %s, %s.", each["cell"], each["state"], each["reason"])
  _logger.info("The page is %s.", plan.workdir / write.NAMES[0])
  if any(each.state != "finished" for each in found):
    sys.exit(1)


def make_plan(
  backbones: Sequence[str],
  workdir: str | os.PathLike,
  *,
  tasks: Sequence[str] = (),
  seeds: int = 3,
  budget: str = "demo",
  class_folders: Sequence[str] = (),
  coco: Sequence[str] = (),
  label_maps: Sequence[str] = (),
  videos: Sequence[str] = (),
  options: Sequence[str] = (),
) -> cells.Plan:
  """The report that flags ask for; each argument is the flag of that name.

  Args:
    backbones: as `entries.read` takes them.
    tasks: of `recipes.TASKS`; empty: those that every report has.
    seeds: how many; they are 0, 1 and so on.
    options: `RECIPE:OPTION=VALUE`, an option of the config of all runs of a recipe.

  Raises:
    ValueError, OSError: an argument that does not fit, or weights that are not there.
  """
  if budget not in recipes.BUDGETS:
    raise ValueError(f"--budget is {budget!r}; known: {', '.join(recipes.BUDGETS)}.")
  if seeds < 1:
    raise ValueError(f"--seeds is {seeds}; expected 1 or more.")
  data = recipes.Data(tuple(class_folders), tuple(coco), tuple(label_maps), tuple(videos))
  return cells.Plan(
    workdir=pathlib.Path(workdir).expanduser().absolute(),
    backbones=tuple(entries.read(backbones)),
    rows=recipes.chosen(tuple(tasks) or recipes.DEFAULT_TASKS),
    seeds=tuple(range(seeds)),
    budget=budget,
    data=data,
    changes=_changes(options),
  )


def _changes(texts: Sequence[str]) -> dict[str, dict[str, Text]]:
  found: dict[str, dict[str, Text]] = {}
  for text in texts:
    recipe, colon, option = text.partition(":")
    name, equals, value = option.removeprefix("config.").partition("=")
    if not (colon and equals):
      raise ValueError(f"--option is {text!r}; expected RECIPE:OPTION=VALUE, such as detection:steps=100.")
    if recipe not in recipes.RECIPES:
      raise ValueError(messages.unknown("recipe of reports", recipe, recipes.RECIPES))
    if name in ("backbone.name", "backbone.weights"):
      raise ValueError(f"--option is {text!r}; the backbones of a report are those that --backbones names.")
    found.setdefault(recipe, {})[name] = Text(value)
  return found


def arguments(plan: cells.Plan) -> list[str]:
  """The flags that ask for a plan."""
  tasks = [
    name for name, (recipe, rows) in recipes.TASKS.items() if set(rows) <= set(plan.rows.get(recipe, ()))
  ]
  found = [
    "--mode=report",
    f"--workdir={plan.workdir}",
    f"--backbones={entries.describe(plan.backbones)}",
    f"--tasks={','.join(tasks)}",
    f"--seeds={len(plan.seeds)}",
    f"--budget={plan.budget}",
  ]
  for name, paths in dataclasses.asdict(plan.data).items():
    if paths:
      absolute = [str(pathlib.Path(path).expanduser().absolute()) for path in paths]
      found.append(f"--{name}={flags.CsvListSerializer(',').serialize(absolute)}")
  for recipe, options in plan.changes.items():
    found += [f"--option={recipe}:{name}={value.text}" for name, value in options.items()]
  return found


def print_commands(plan: cells.Plan) -> None:
  """Prints a command for every cell that is to be run, for any scheduler; the log names stale ones."""
  for cell in plan.cells():
    state = cells.look(plan, cell)
    if state.state == "stale":
      _logger.warning("%s is stale: %s.", cell.name, state.reason)
    elif state.state != "finished":
      print(shlex.join(_command(plan, cell)))


def _command(plan: cells.Plan, cell: cells.Cell) -> list[str]:
  """What runs one cell."""
  return [*(plan.runner or (*_COMMAND, *arguments(plan))), f"--cell={cell.name}"]


def run(plan: cells.Plan) -> list[cells.Found]:
  """Runs all cells that are not finished, each in a process of its own, one after the other.

  A cell that fails is named and does not stop the others. The programs that its processes compile are kept in
  the workdir, since seeds and restarts need the same ones.

  Returns:
    What lies in every cell's folder at the end.

  Raises:
    single.Interrupted: a cell's process was told to stop.
  """
  found = []
  waiting = list(plan.cells())
  for number, cell in enumerate(waiting, 1):
    state = cells.look(plan, cell)
    if state.state == "finished":
      found.append(state)
      continue
    if state.state == "stale":
      _logger.warning("%s is stale: %s.", cell.name, state.reason)
      found.append(state)
      continue
    started = time.perf_counter()
    _logger.info("Cell %d of %d: %s.", number, len(waiting), cell.name)
    code = _run_apart(plan, cell)
    state = cells.look(plan, cell)
    if state.state == "finished":
      _logger.info("  finished in %.0f s.", time.perf_counter() - started)
    elif state.state == "missing":
      state = _name_failure(plan, cell, code)
    if state.state == "missing":
      _logger.warning("  %s is not finished: %s.", cell.name, state.reason)
    if state.state == "failed":
      _logger.warning("  %s failed: %s. %s has more.", cell.name, state.reason, plan.folder(cell) / "log.txt")
    found.append(state)
  return found


def _run_apart(plan: cells.Plan, cell: cells.Cell) -> int:
  """Runs a cell in a process of its own, whose output goes to its log; the exit status."""
  folder = plan.folder(cell)
  folder.mkdir(parents=True, exist_ok=True)
  # Kept programs make the second seed of a recipe start in a fraction of the time.
  environment = {"JAX_COMPILATION_CACHE_DIR": str(plan.workdir / "compiled"), **os.environ}
  command = [sys.executable, *_command(plan, cell)[1:]]
  with open(folder / "log.txt", "ab") as log, _stopped_by_sigterm():
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
      return process.wait()
    except KeyboardInterrupt:
      process.terminate()  # a run saves what it has, and ends
      process.wait()
      raise single.Interrupted(f"{cell.name} was told to stop; the same command continues.") from None


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
  """SIGTERM, too, raises KeyboardInterrupt in the block."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt

  before = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _name_failure(plan: cells.Plan, cell: cells.Cell, code: int) -> cells.Found:
  """Of a process that ended without a word: was it ended from outside?"""
  if -code in (signal.SIGINT, signal.SIGTERM) or code == single.INTERRUPTED:
    raise single.Interrupted(f"{cell.name} was told to stop; the same command continues.")
  if code == single.LOCKED:
    return cells.Found(cell, "missing", "another process is running it")
  log = plan.folder(cell) / "log.txt"
  lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
  last = lines[-1] if lines else ""
  if code < 0:
    last = f"its process was ended by {messages.signal_name(-code)}"
  atomic.write_json(
    plan.folder(cell) / "error.json", {"error": last.removeprefix("Error: ") or f"status {code}"}
  )
  return cells.look(plan, cell)
