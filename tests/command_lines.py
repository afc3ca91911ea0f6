"""Several command lines of the program in one process, so that its imports and compilations are paid once.

Run as a program: python -m tests.command_lines < FILE, a JSON list of lists of arguments. After the output of
each it prints a line of `END` and the exit status.
"""

from collections.abc import Sequence
import json
import os
import pathlib
import subprocess
import sys

from absl import flags

from frozen_vision import command_line, main

END = "=== exit"
_ROOT = pathlib.Path(__file__).resolve().parent.parent


def outputs(lines: Sequence[Sequence[str]]) -> tuple[list[tuple[int, str]], str]:
  """([(exit status, standard output) of each command line], standard error of all of them)."""
  found = subprocess.run(
    [sys.executable, "-m", __name__],
    input=json.dumps(lines),
    cwd=_ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=280,
  )
  assert found.returncode == 0, found.stdout + found.stderr
  first, *parts = found.stdout.split(f"{END} ")
  statuses, following = zip(*(part.split("\n", 1) for part in parts), strict=True)
  assert len(statuses) == len(lines), found.stdout + found.stderr
  return list(zip(map(int, statuses), [first, *following[:-1]], strict=True)), found.stderr


def run(arguments: list[str]) -> int:
  """The exit status of one command line; what it says goes to standard output."""
  flags.FLAGS.unparse_flags()
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()  # back to its default
  try:
    main._main(command_line.parse_flags(["main", *arguments]))
  except SystemExit as error:
    print(error.code)
    return 1
  return 0


if __name__ == "__main__":
  for line in json.load(sys.stdin):
    print(END, run(line), flush=True)
