"""How the package is laid out: which room imports which, and how long files and functions are."""

import ast
import builtins
import collections
from collections.abc import Iterator
import functools
import pathlib
import symtable

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PACKAGE = _ROOT / "frozen_vision"

# Rooms, folders and modules of the package, from those that know nothing of it to those that know all of it.
# A room imports rooms of earlier rows only; two rooms of one row do not know each other.
_ROWS = (
  ("annotations", "messages", "output"),
  ("files", "ops", "devices", "options", "failures"),
  ("layers", "data", "runs", "config"),
  ("backbones", "metrics", "visualization"),
  ("necks", "heads"),
  ("freezing",),
  ("tasks", "probes", "diagnostics"),
  ("training", "config_files"),
  ("prediction", "planning", "command_line"),
  ("export", "convert", "distributed", "probe", "fine_tune"),
  ("report",),
  ("diagnose", "transfer"),
  ("main", "__init__"),
)

# Imports inside of functions: the modules that are imported need a library which an installation may lack.
_LATE = {
  ("frozen_vision.data.prepare", "frozen_vision.data.dense.builder"): "TensorFlow",
  ("frozen_vision.data.prepare", "frozen_vision.data.detection.builder"): "TensorFlow",
  ("frozen_vision.data.prepare", "frozen_vision.data.segmentation.builder"): "TensorFlow",
  ("frozen_vision.data.prepare", "frozen_vision.data.video.builder"): "TensorFlow",
}

_FILE_LINES = 450
_FUNCTION_LINES = 80


def _name(path: pathlib.Path) -> str:
  parts = path.relative_to(_ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def _modules() -> dict[str, ast.Module]:
  return {_name(path): ast.parse(path.read_text()) for path in sorted(_PACKAGE.rglob("*.py"))}


def _imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
  """Every import statement with the module of the package that it names; imported names are cut off."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "imports are absolute"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    for name in names:
      while name and name not in _modules():
        name = name.rpartition(".")[0]
      if name and name != "frozen_vision":
        yield node, name


def _room(module: str) -> str:
  return module.split(".")[1] if "." in module else "__init__"


def _functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
  return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_every_room_has_its_row():
  rooms = {_room(module) for module in _modules()}
  assert rooms <= {room for row in _ROWS for room in row}


def test_imports_point_one_way():
  row_of = {room: i for i, row in enumerate(_ROWS) for room in row}
  wrong = set()
  for module, tree in _modules().items():
    for _, imported in _imports(tree):
      here, there = _room(module), _room(imported)
      if here != there and row_of[there] >= row_of[here]:
        wrong.add(f"{module} imports {imported}")
  assert not wrong


def test_no_module_imports_itself_through_others():
  arrows = {module: {name for _, name in _imports(tree)} - {module} for module, tree in _modules().items()}
  # Modules that nothing of the rest imports are taken away until only circles are left.
  while True:
    free = [module for module in arrows if not any(module in names for names in arrows.values())]
    if not free:
      break
    for module in free:
      del arrows[module]
  # What circles import, but is in none, imports nothing that is left.
  while leaves := [module for module, names in arrows.items() if not names & arrows.keys()]:
    for module in leaves:
      del arrows[module]
  assert not arrows


def test_no_import_hides_in_a_function():
  hidden = set()
  for module, tree in _modules().items():
    for function in _functions(tree):
      hidden |= {(module, name) for _, name in _imports(function)}
  assert hidden <= set(_LATE)


def _python_files() -> list[pathlib.Path]:
  return sorted(path for folder in ("frozen_vision", "tests") for path in (_ROOT / folder).rglob("*.py"))


def _undefined(source: str) -> list[str]:
  """Names of the module that something in it reads, and that nothing in it defines."""
  module = symtable.symtable(source, "module", "exec")
  known = {
    symbol.get_name() for symbol in module.get_symbols() if symbol.is_assigned() or symbol.is_imported()
  }
  known |= {*dir(builtins), "__file__", "__name__", "__doc__"}
  found, tables = set(), [module]
  while tables:
    table = tables.pop()
    tables += table.get_children()
    for symbol in table.get_symbols():
      # A function of the name "top", which is symtable's of a module, has local names that are global, too.
      reads_module = table is module or (symbol.is_global() and not symbol.is_local())
      if symbol.is_referenced() and reads_module and symbol.get_name() not in known:
        found.add(symbol.get_name())
  return sorted(found)


@pytest.mark.parametrize("folder", ["frozen_vision", "experiments", "configs", "tests"])
def test_every_name_is_defined(folder):
  # ruff's check of it is off, since it takes the shapes in annotations for names.
  undefined = {str(path): _undefined(path.read_text()) for path in sorted((_ROOT / folder).rglob("*.py"))}
  assert undefined and not {path: names for path, names in undefined.items() if names}


def test_undefined_names_are_found():
  source = (
    "import os\nclass A:\n  x: os.PathLike = b\n  def f(self, c=d): return [g(h) for h in self.x], len(c)\n"
  )
  assert _undefined(source) == ["b", "d", "g"]


def test_no_file_is_too_long():
  lines = {path: path.read_text().count("\n") for path in _python_files()}
  long = {str(path.relative_to(_ROOT)): count for path, count in lines.items() if count > _FILE_LINES}
  assert not long


def test_no_function_is_too_long():
  long = collections.Counter()
  for path in _python_files():
    for function in _functions(ast.parse(path.read_text())):
      name = f"{path.relative_to(_ROOT)}: {function.name}"
      long[name] = max(long[name], function.end_lineno - function.lineno + 1)
  assert not {name: count for name, count in long.items() if count > _FUNCTION_LINES}


@pytest.mark.parametrize(
  "source", ["import frozen_vision.tasks.base", "from frozen_vision.tasks import base"]
)
def test_both_forms_of_an_import_are_read(source):
  assert [name for _, name in _imports(ast.parse(source))] == ["frozen_vision.tasks.base"]
