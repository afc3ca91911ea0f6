"""Exchange of evaluation results between processes, as padded bytes."""

import json
from typing import Any

import jax
import numpy as np


def gather_objects(value: Any) -> list[Any]:
  """Collects one JSON-like value of every process, in process order, on every process.

  Bytes are exchanged, not arrays of numbers: `process_allgather` truncates int64, and COCO ids are
  int64. Lengths go first, because unequal shapes abort a process without a Python exception.

  Args:
    value: what `json.dumps` takes. Several processes must all call this, the same number of times.

  Returns:
    One value per process. With a single process, `[value]` itself, not copied.

  Raises:
    ValueError: on every process, if one process holds 2 GiB or more.
  """
  if jax.process_count() == 1:
    return [value]
  from jax.experimental import multihost_utils  # pylint: disable=g-import-not-at-top

  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  # The number that stands for "too long" travels as well, so that no process waits for another.
  length = np.array([data.size if data.size < 2**31 else -1], np.int32)
  lengths = np.asarray(multihost_utils.process_allgather(length)).reshape(-1)
  if lengths.min() < 0:
    raise ValueError(
      f"Process {int(lengths.argmin())} holds 2 GiB or more of results, too much for one "
      "exchange. Evaluate fewer images at a time or on more processes."
    )
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: data.size] = data
  rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
  return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
