"""Types of a loader's inputs and outputs; importing them loads no data library."""

from collections.abc import Callable, Iterable, Iterator
import time
from typing import Any, Protocol, runtime_checkable, Self
import weakref

import numpy as np

Batch = dict[str, np.ndarray]
TrainTransform = Callable[[Any, np.random.Generator], Batch]
EvalTransform = Callable[[Any], Batch]


@runtime_checkable
class Source(Protocol):
  """Records by position. With `num_workers > 0` it must pickle."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Any: ...


class BatchIterator(Iterator[Batch]):
  """Iterates over batches, prefetching in the background; close it, or use it in a `with`.

  Attributes:
    position: examples that were consumed so far, over all processes, `start_example` included;
      passing it as `start_example` later continues with the next batch. For evaluation the
      examples that pad the last batch count too.
    wait_seconds: total time that `next` has blocked its caller, the start of workers included.
    source, transform: what the batches are made of; None where unknown.
  """

  def __init__(self, dataset: Iterable[Batch], *, batch_size: int, start_example: int, shared_memory: bool):
    self._iterator = iter(dataset)
    self._batch_size = batch_size
    self._shared_memory = shared_memory
    self.position = start_example
    self.source: Source | None = None
    self.transform: TrainTransform | EvalTransform | None = None
    self.wait_seconds = 0.0
    # Runs at `close`, when the object is collected, or at exit: the first of them.
    self._finalizer = weakref.finalize(self, self._iterator.close)

  def __next__(self) -> Batch:
    if not self._finalizer.alive:
      raise ValueError("The batch iterator is closed; make a new one at its `position`.")
    started = time.perf_counter()
    try:
      batch = next(self._iterator)
      if self._shared_memory:
        # The arrays are views of memory that is unlinked when they are collected, which must not
        # depend on how long the caller keeps a batch.
        batch = {name: np.array(value, copy=True, subok=False) for name, value in batch.items()}
    finally:
      self.wait_seconds += time.perf_counter() - started
    self.position += self._batch_size
    return batch

  def close(self) -> None:
    """Ends threads and worker processes; closing twice does nothing."""
    self._finalizer()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()
