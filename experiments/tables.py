"""Prints and writes the tables of the scripts."""

import os
import pathlib

from frozen_vision.planning import machines


def publish(text: str, out: str | os.PathLike | None) -> None:
  """Prints a table, and writes it to the file `out`, whose folder is made, if there is one."""
  print(text, flush=True)
  write(text, out)


def write(text: str, out: str | os.PathLike | None) -> None:
  """Writes a table to the file `out`, if there is one."""
  if out:
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(out).write_text(text, encoding="utf-8")


def versions() -> str:
  """Versions of what compiles: `jax 0.10.2, libtpu 0.0.52`."""
  return ", ".join(f"{name} {version}" for name, version in machines.versions().items())


def blas_threads() -> str:
  """How many threads matrix products of NumPy may take: `BLAS threads: 1`."""
  known = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
  return f"BLAS threads: {known or 'all'}"
