"""The package as a library: its names, what importing costs, and a program of somebody else's."""

import ast
import importlib
import inspect
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest

import frozen_vision as fv

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def _python(*arguments, folder):
  """What a fresh interpreter prints that knows the repository by PYTHONPATH only."""
  variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)}
  result = subprocess.run(
    [sys.executable, *map(str, arguments)],
    cwd=folder,
    env=variables,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert result.returncode == 0, result.stderr
  return result.stdout


def test_what_type_checkers_see_is_what_there_is():
  tree = ast.parse(pathlib.Path(fv.__file__).read_text())
  typed = {}
  for block in (node for node in tree.body if isinstance(node, ast.If)):
    for statement in block.body:
      for alias in statement.names:
        typed[alias.asname or alias.name] = (statement.module, alias.name)
  assert sorted(typed) == sorted(fv.__all__) and list(fv.__all__) == sorted(fv.__all__)
  for name, (module, attribute) in typed.items():
    value = getattr(fv, name)
    assert value is getattr(importlib.import_module(module), attribute), name
    assert inspect.getdoc(value), f"{name} has no docstring"
    if inspect.isfunction(value):
      signature = inspect.signature(value)
      untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
      assert signature.return_annotation is not signature.empty, name
      assert not untyped or untyped == ["changes"], (name, untyped)  # fields of HTCConfig
  assert set(fv.__all__) <= set(dir(fv))


def test_the_types_are_shipped():
  assert (pathlib.Path(fv.__file__).parent / "py.typed").exists()
  project = tomllib.loads((_ROOT / "pyproject.toml").read_text())
  assert "py.typed" in project["tool"]["setuptools"]["package-data"]["frozen_vision"]


def test_importing_the_package_launching_or_reading_data_imports_no_model(tmp_path):
  code = (
    "import sys, frozen_vision, frozen_vision.distributed; assert 'numpy' not in sys.modules; "
    "import frozen_vision.data.detection.coco; "
    "print([name for name in ('jax', 'flax', 'tensorflow') if name in sys.modules])"
  )
  assert _python("-c", code, folder=tmp_path).strip() == "[]"


@pytest.mark.parametrize(
  "name, message",
  [
    ("lod_backbone", "Did you mean 'load_backbone'?"),
    ("main", "'main'; it is a module of its own: import frozen_vision.main"),
    ("zzz", "no attribute 'zzz'; it has AttentiveHead, "),
    ("__wrapped__", "no attribute '__wrapped__'$"),
  ],
)
def test_an_unknown_name_says_what_there_is(name, message):
  # In this process other tests have imported the modules, which makes them attributes.
  with pytest.raises(AttributeError, match=message):
    fv.__getattr__(name)


# Runs the program, and compares its backbone with a fresh one.
_WATCH = """
import json, runpy, sys
import jax, numpy as np
import frozen_vision as fv
names = runpy.run_path(sys.argv[1])
fresh = fv.fold_backbone(fv.load_backbone("swinv2_nano"))
leaves = zip(jax.tree.leaves(names["backbone"]), jax.tree.leaves(fresh), strict=True)
equal = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves)
count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
sizes = dict(head=count(names["head"]), slots=count(names["slots"]), backbone=count(fresh))
print(json.dumps(dict(equal=equal, **sizes)))
"""


@pytest.mark.slow
def test_twenty_lines_outside_of_the_repository_train_a_head_of_their_own(tmp_path):
  program = tmp_path / "own_head.py"
  shutil.copy(_ROOT / "experiments" / "own_head.py", program)
  assert len(program.read_text().splitlines()) <= 20
  folder = tmp_path / "empty"
  folder.mkdir()
  *lines, watched = _python("-c", _WATCH, program, folder=folder).splitlines()
  losses = [float(line.split()[-1]) for line in lines]
  assert len(losses) == 30 and losses[-1] < losses[0] / 3, losses
  watched = json.loads(watched)
  assert watched["equal"]
  # Adam's two moments of the head and a counter, against a backbone of millions.
  assert watched["slots"] == 2 * watched["head"] + 1 and watched["backbone"] > 1000 * watched["head"]
  assert not list(folder.iterdir())
