"""Several command lines of the program in one process, so that its imports and compilations are paid once.

Run as a program: python -m tests.command_lines < FILE, a JSON list of lists of arguments. After the output of
each it prints a line of `END` and the exit status.
"""

import json
import sys

from absl import flags

from frozen_vision import command_line, main

END = "=== exit"


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
