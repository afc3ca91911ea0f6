"""Errors that end a program, in one sentence to a person, errors of libraries included."""

import logging
import os
import pathlib
import re
import shutil
import traceback

import jax

from frozen_vision import messages

_SHARED_MEMORY = "/dev/shm"
_ENLARGE = "Set --config.loader.workers=0, or enlarge it (docker run --shm-size=8g)."


def sentence(error: BaseException) -> str | None:
  """Says what went wrong and what to do; None where only a traceback does."""
  match error:
    case OSError() if error.errno is not None and error.filename is not None:
      names = [str(name) for name in (error.filename, error.filename2) if name is not None]
      return f"{' and '.join(names)}: {error.strerror}."
    case OSError() if error.strerror and _passed_through(error, "multiprocessing"):  # its locks lie there too
      return (
        f"{_shared_memory()}, where loader processes hand over batches, cannot be used: {error.strerror}. "
        f"{_ENLARGE}"
      )
    case OSError() | ValueError() | FloatingPointError():
      return str(error)
    case MemoryError():
      return "This machine has not enough memory; lower --config.batch_size or --config.loader.workers."
    case RuntimeError() if found := re.search(
      r"Worker process was terminated .* exit code (-?\d+)", str(error)
    ):
      return dead_worker(int(found[1]))
    case RuntimeError() if "Unable to initialize backend" in str(error):
      return _no_such_device(str(error).split(" (set JAX_PLATFORMS")[0])
    case AssertionError() if _raised_in(error, "xla_bridge.py"):  # jax says nothing at all
      return _no_such_device("jax finds no such device")
    case jax.errors.JaxRuntimeError() if str(error).startswith("RESOURCE_EXHAUSTED"):
      return (
        "The device has not enough memory; lower --config.batch_size or raise --config.accumulate "
        f"(--mode=plan says what fits). The compiler says: {str(error).splitlines()[0]}"
      )
  return None


def report(error: BaseException, *, debug: bool = False) -> str:
  """The text that a program prints before it ends: the sentence, a traceback without one or with `debug`."""
  found = sentence(error)
  text = "".join(traceback.format_exception(error)) if debug or found is None else ""
  return text + (f"Error: {found}" if found is not None else "")


def quiet_libraries() -> None:
  """Keeps out of the log what Orbax says, at length, of errors that it raises too: `report` says those."""
  logging.getLogger("absl").addFilter(
    lambda record: record.levelno < logging.ERROR or "orbax" not in pathlib.Path(record.pathname).parts
  )


def dead_worker(exit_code: int) -> str:
  """Explains why a loader's process may have ended, by its exit code; negative ones are signals."""
  if exit_code >= 0:
    return f"A loader process ended with status {exit_code}; --config.loader.workers=0 shows its error here."
  name = messages.signal_name(-exit_code)
  if name == "SIGBUS":
    return (
      f"A loader process was ended by {name}: {_shared_memory()}, where they hand over batches, is full. "
      f"{_ENLARGE}"
    )
  if name == "SIGKILL":
    return (
      f"A loader process was ended by {name}, as the system does when memory runs out. Set a lower "
      "--config.loader.workers or --config.batch_size."
    )
  return f"A loader process was ended by {name}; --config.loader.workers=0 shows its error here."


def _shared_memory() -> str:
  """The folder of shared memory with its size."""
  try:
    return f"{_SHARED_MEMORY} ({shutil.disk_usage(_SHARED_MEMORY).total / 2**20:,.0f} MiB)"
  except OSError:
    return "shared memory"


def _no_such_device(reason: str) -> str:
  platforms = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms
  return (
    f"JAX_PLATFORMS={platforms}: {reason}. Unset JAX_PLATFORMS to take the devices that there are, or "
    "install jax for them: jax[cuda12] or jax[tpu]."
  )


def _passed_through(error: BaseException, package: str) -> bool:
  frames = traceback.extract_tb(error.__traceback__)
  return any(os.path.basename(os.path.dirname(frame.filename)) == package for frame in frames)


def _raised_in(error: BaseException, file: str) -> bool:
  frames = traceback.extract_tb(error.__traceback__)
  return bool(frames) and os.path.basename(frames[-1].filename) == file
