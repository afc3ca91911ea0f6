"""Batches of numpy arrays from a source of records: order, workers, exact restart.

The order of examples and their random augmentation are a pure function of (seed, global example
index). The position in a run is therefore one integer, the number of examples consumed so far by
all processes together, and it restores exactly with any number of workers and of processes.

With a number of views, a record has so many fixed augmentations, which passes over the source take in turn:
then an example is a pure function of (seed, record, view).
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.shared_memory
import os
import secrets
import signal
import sys
import threading
from typing import Any

from absl import flags
import grain.python as grain
from jaxtyping import Float64, Int64
import numpy as np

from frozen_vision.data import shared_memory
from frozen_vision.data.batch_iterator import BatchIterator, EvalTransform, Source, TrainTransform

# How often a worker looks whether its parent still lives, besides watching the parent's pipe.
_PARENT_CHECK_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class _Read:
  """Reads the record at a position and pairs it with its global index.

  A map over positions instead of grain's own source node, whose bookkeeping costs more time per
  record than reading a small image.
  """

  source: Source

  def __call__(self, index: int, position: int) -> tuple[int, int, Any]:
    try:
      return index, int(position), self.source[int(position)]
    except Exception as error:
      error.add_note(f"While reading record {position} of the data source.")
      raise


class RepeatedPass:
  """Passes over a source in which records occur several times: (index, its number in a pass) -> position.

  Every pass has the same length, the sum of all factors, rounded. A record whose factor is f occurs floor(f)
  or ceil(f) times, f on average, up to that rounding: the records are laid out in a random order, each as
  long as its factor, and cut at equal distances. A pass is a pure function of (seed, its number).

  Args:
    factors: of every record, 1 or more.
  """

  def __init__(self, factors: Float64[np.ndarray, "m"], seed: int):
    if not np.all(factors >= 1):
      raise ValueError(f"Repeat factors are {np.min(factors)} and more; expected 1 or more.")
    self.factors, self.seed = np.asarray(factors, np.float64), seed
    self.length = max(1, round(float(self.factors.sum())))
    self._newest: dict[int, np.ndarray] = {}

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_newest": {}}

  def positions(self, number: int) -> Int64[np.ndarray, "n"]:
    """The positions of a pass, in its order."""
    found = self._newest.get(number)
    if found is None:
      rng = np.random.default_rng((self.seed, number))
      order = rng.permutation(len(self.factors))
      ends = np.cumsum(self.factors[order])
      cuts = (np.arange(self.length) + rng.random()) * (ends[-1] / self.length)
      found = order[np.minimum(np.searchsorted(ends, cuts, side="right"), len(order) - 1)]
      found = found[rng.permutation(self.length)]
      # Threads of a loader look at the end of one pass and the start of the next.
      self._newest = {**dict(list(self._newest.items())[-1:]), number: found}
    return found

  def __call__(self, index: int, _: int) -> int:
    return int(self.positions(index // self.length)[index % self.length])


class Order:
  """Which record every example of a training run shows, and which of its views.

  Attributes:
    length: of a pass over the source.
    views: how many there are of each record; 0 if every example has its own.
  """

  def __init__(self, length: int, seed: int, views: int = 0, repeats: Float64[np.ndarray, "m"] | None = None):
    # Explicit seeds per step: the defaults of grain would depend on the number of steps before.
    shuffle_seed, self.augment_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    self.length, self.views = length, views
    if repeats is None:
      self.positions = grain.MapDataset.range(length).shuffle(seed=shuffle_seed).repeat(None)
      return
    if views:
      raise ValueError(
        "Some records are repeated within a pass, and each has fixed views, of which a pass shows one. Set "
        "--config.cache.views=0, or repeat none."
      )
    repeated = RepeatedPass(repeats, shuffle_seed)
    self.length = repeated.length
    self.positions = grain.MapDataset.range(self.length).repeat(None).map_with_index(repeated)

  def view(self, index: int) -> int:
    """The view that an example shows: one for each pass over the source, then the first again."""
    return index // self.length % self.views

  def slots(self, indices: Iterable[int]) -> np.ndarray:
    """view * length + position of examples by global index, int64: what they show, as one number."""
    return np.array([self.view(i) * self.length + int(self.positions[i]) for i in indices], np.int64)

  def generator(self, index: int, position: int) -> np.random.Generator:
    """The generator of the augmentation of the view that an example shows."""
    return np.random.default_rng((self.augment_seed, self.view(index), position))


@dataclasses.dataclass(frozen=True)
class _ApplyTrain:
  transform: TrainTransform
  order: Order

  def __call__(self, indexed: tuple[int, int, Any], rng: np.random.Generator) -> dict[str, Any]:
    index, position, record = indexed
    if self.order.views:
      rng = self.order.generator(index, position)
    try:
      example = dict(self.transform(record, rng))
    except Exception as error:
      error.add_note(f"While preparing the training example with global index {index}.")
      raise
    example["index"] = np.int64(index)
    return example


@dataclasses.dataclass(frozen=True)
class _ApplyEval:
  transform: EvalTransform
  num_examples: int

  def __call__(self, indexed: tuple[int, int, Any]) -> dict[str, Any]:
    index, _, record = indexed
    try:
      example = dict(self.transform(record))
    except Exception as error:
      error.add_note(f"While preparing the evaluation example {index}.")
      raise
    example["index"] = np.int64(min(index, self.num_examples - 1))
    example["example_valid"] = np.bool_(index < self.num_examples)
    return example


@dataclasses.dataclass(frozen=True)
class _StackSparse:
  """Stacks examples to a batch; of long lists of arrays it copies the rows that are not padding.

  Without workers only: in a worker, grain's own stacking writes into the memory that is shared.

  Attributes:
    padded: keys whose rows behind the last that is `valid` are zeros, most of 13 MB for masks at 1024 px.
  """

  padded: tuple[str, ...]

  def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    batch = {key: np.stack([e[key] for e in examples]) for key in examples[0] if key not in self.padded}
    for key in self.padded:
      if key in examples[0]:
        first = examples[0][key]
        batch[key] = np.zeros((len(examples), *first.shape), first.dtype)
        for rows, example in zip(batch[key], examples, strict=True):
          count = int(np.flatnonzero(example["valid"])[-1:].sum()) + 1
          rows[:count] = example[key][:count]
    return batch


class _RepeatLast:
  """A source with its last record repeated until the length is a multiple of the batch size."""

  def __init__(self, source: Source, batch_size: int):
    self._source = source
    self._num_examples = len(source)
    self._length = -(-self._num_examples // batch_size) * batch_size

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Any:
    return self._source[min(index, self._num_examples - 1)]


def train_batches(
  source: Source,
  transform: TrainTransform,
  *,
  batch_size: int,
  seed: int,
  start_example: int = 0,
  num_workers: int = 0,
  num_threads: int = 1,
  prefetch_batches: int = 2,
  process_index: int = 0,
  process_count: int = 1,
  views: int = 0,
  repeats: Float64[np.ndarray, "m"] | None = None,
) -> BatchIterator:
  """Endless shuffled, augmented batches; each pass over the source has a new order.

  Args:
    source: the records, at least one.
    transform: makes a dict of arrays of equal shapes from a record and a generator that depends
      on (seed, global example index) only. With workers it must pickle (a function of a module or
      a dataclass of settings) and must not use jax. Its attribute `padded_keys`, if there is one, names
      what has zeros in all rows behind the last `valid` one, which are then not copied.
    batch_size: examples per batch over all processes.
    start_example: examples already consumed, a multiple of `batch_size`.
    num_workers: processes that prepare batches; each holds a copy of the source and takes seconds
      to start. With 0, threads of this process do, which overlaps with the device's work.
    num_threads: threads per worker (or of this process, without workers).
    prefetch_batches: finished batches that each worker (or this process) keeps ready.
    process_index: which part of each batch to yield: rows
      [process_index, process_index + 1) * batch_size / process_count of the global batch.
    process_count: number of processes that share each batch.
    views: how many fixed augmentations a record has, which passes over the source take in turn: the generator
      then depends on (seed, position of the record, view). 0: each example has its own.
    repeats: how often a pass shows each record, on average, 1 or more; None: once (`RepeatedPass`).

  Returns:
    An iterator of dicts with the transform's keys and `index` int64 [b], the global example index.

  Raises:
    ValueError: an empty source, sizes that do not divide, or `repeats` with `views`.
  """
  _check(source, batch_size, num_workers, process_index, process_count)
  if start_example < 0 or start_example % batch_size:
    raise ValueError(
      f"start_example is {start_example}, expected a multiple of batch_size ({batch_size}), "
      "because a run stops between batches; continue with the batch size it was started with."
    )
  order = Order(len(source), seed, views, repeats)
  dataset = order.positions.map_with_index(_Read(source))
  dataset = dataset.random_map(_ApplyTrain(transform, order), seed=order.augment_seed)
  padded = getattr(transform, "padded_keys", ())
  stack = _StackSparse(padded) if padded and not num_workers else None
  dataset = dataset.batch(batch_size // process_count, drop_remainder=True, batch_fn=stack)
  # Sliced behind the batching, so that neither workers nor processes change what a batch holds.
  first = start_example // batch_size * process_count + process_index
  dataset = dataset[first::process_count]
  batches = _iterate(dataset, batch_size, start_example, num_workers, num_threads, prefetch_batches)
  batches.source, batches.transform = source, transform
  return batches


def eval_batches(
  source: Source,
  transform: EvalTransform,
  *,
  batch_size: int,
  num_workers: int = 0,
  num_threads: int = 1,
  prefetch_batches: int = 2,
  process_index: int = 0,
  process_count: int = 1,
) -> BatchIterator:
  """All records once and in order; the last batch is filled up by repeating the last record.

  Args:
    transform: makes a dict of arrays of equal shapes from a record; without randomness, so it
      gets no generator.
    others: as in `train_batches`. Every process yields the same number of batches.

  Returns:
    An iterator of dicts with the transform's keys, `index` int64 [b], the position in the source,
    and `example_valid` bool [b], False where an example only fills up the last batch.

  Raises:
    ValueError: an empty source, or sizes that do not divide.
  """
  _check(source, batch_size, num_workers, process_index, process_count)
  padded = _RepeatLast(source, batch_size)
  dataset = grain.MapDataset.range(len(padded)).map_with_index(_Read(padded))
  dataset = dataset.map(_ApplyEval(transform, len(source)))
  dataset = dataset.batch(batch_size // process_count)[process_index::process_count]
  batches = _iterate(dataset, batch_size, 0, num_workers, num_threads, prefetch_batches)
  batches.source, batches.transform = source, transform
  return batches


def _check(source: Source, batch_size: int, num_workers: int, process_index: int, process_count: int) -> None:
  if not len(source):
    raise ValueError("The data source is empty; expected at least one record.")
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"batch_size is {batch_size}, expected a positive multiple of the number of processes "
      f"({process_count})."
    )
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index is {process_index}, expected 0 to {process_count - 1}.")
  if num_workers < 0:
    raise ValueError(f"num_workers is {num_workers}, expected 0 or more.")


def _iterate(
  dataset: grain.MapDataset,
  batch_size: int,
  start_example: int,
  num_workers: int,
  num_threads: int,
  prefetch_batches: int,
) -> BatchIterator:
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_batches)
  batches = dataset.to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():
      # Grain reads an absl flag when it starts workers, which fails outside of `absl.app.run`.
      flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=prefetch_batches),
      worker_init_fn=functools.partial(_initialise_worker, segment_prefix=shared_memory.prefix()),
    )
  return BatchIterator(
    batches, batch_size=batch_size, start_example=start_example, shared_memory=num_workers > 0
  )


def _initialise_worker(worker_index: int, worker_count: int, *, segment_prefix: str | None) -> None:
  """Keeps a worker off the accelerator and bound to the life of its parent, and names its shared memory."""
  del worker_index, worker_count
  os.environ["JAX_PLATFORMS"] = "cpu"
  if "jax" in sys.modules:
    # Imported by grain; its platforms were read from the environment then, its backends start
    # later, at the first use.
    sys.modules["jax"].config.update("jax_platforms", "cpu")
  # The terminal and batch schedulers send these to the whole group. The parent decides what to
  # do (it saves first) and ends its workers.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  creating = _take_over_shared_memory(segment_prefix)
  threading.Thread(target=_end_with_parent, args=(creating,), name="end-with-parent", daemon=True).start()


def _take_over_shared_memory(prefix: str | None) -> threading.Lock:
  """Makes this process hold the returned lock while it creates a segment, whose name begins with `prefix`.

  A segment is on disk first and known to the resource tracker, which removes what is left over, some system
  calls later. A process that ends in between leaves it behind for good.
  """
  lock = threading.Lock()
  create = multiprocessing.shared_memory.SharedMemory.__init__

  def locked(self: Any, *arguments: Any, **options: Any) -> None:
    if prefix is not None and options.get("create") and options.get("name") is None and not arguments:
      options["name"] = f"{prefix}{secrets.token_hex(8)}"
    with lock:
      create(self, *arguments, **options)

  multiprocessing.shared_memory.SharedMemory.__init__ = locked
  return lock


def _end_with_parent(creating: threading.Lock) -> None:
  """Ends this worker when its parent is gone, however it went (SIGKILL runs no cleanup there)."""
  parent = multiprocessing.parent_process()
  if parent is None:
    return
  # Linux could signal the child at the death of its parent, but means the thread that started it,
  # and grain starts workers from a thread of its own.
  while os.getppid() == parent.pid:
    if multiprocessing.connection.wait([parent.sentinel], timeout=_PARENT_CHECK_SECONDS):
      break
  creating.acquire()  # never released: nothing more is created
  os._exit(1)
