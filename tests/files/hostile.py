"""Opens checkpoint files that nobody trusts in a process with little memory and little time."""

import json
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_READER = """
import json, pathlib, re, resource, sys, time
from frozen_vision.files import checkpoint_file, formats
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for name in json.loads(sys.stdin.read()):
  started = time.process_time()
  try:
    file = checkpoint_file.open_checkpoint(name)
    arrays = file.read_all()
    said = "read " + json.dumps({key: [list(a.shape), a.dtype.name] for key, a in arrays.items()})
  except formats.FileFormatError as error:
    said = f"refused {error}"
  except (FileNotFoundError, ValueError) as error:
    said = f"other {type(error).__name__} {error}"
  seconds = time.process_time() - started
  # Not getrusage, whose peak a process inherits from the one that started it.
  peak = int(re.search("VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) >> 10
  print(json.dumps([name, said, round(seconds, 2), peak]), flush=True)
"""


def read_all(paths: list[pathlib.Path], *, seconds: float = 280) -> dict[str, tuple[str, float, int]]:
  """{path: (what came of it, seconds of processor time, peak of the process in MiB)}.

  Raises:
    AssertionError: the reader crashed, hung or raised something else.
  """
  child = subprocess.run(
    [sys.executable, "-c", _READER],
    input=json.dumps([str(path) for path in paths]),
    capture_output=True,
    text=True,
    timeout=seconds,
    cwd=_ROOT,
  )
  rows = [json.loads(line) for line in child.stdout.splitlines()]
  last = paths[len(rows)] if len(rows) < len(paths) else "the end"
  assert child.returncode == 0, f"the reader ended with {child.returncode} at {last}: {child.stderr[-2000:]}"
  return {name: (said, taken, peak) for name, said, taken, peak in rows}
