"""What feeds the loops: batches as they are loaded, or their features from the cache."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import logging
from typing import Any, Protocol, runtime_checkable, Self

import jax
import numpy as np

from frozen_vision.config import Config
from frozen_vision.data import batch_iterator, pipeline
from frozen_vision.devices import sharding
from frozen_vision.freezing import cache, prepare
from frozen_vision.tasks import base
from frozen_vision.training import feature_store, hosts
from frozen_vision.training import step as step_lib

_logger = logging.getLogger(__name__)


@runtime_checkable
class Feed(Protocol):
  """Training batches without end; close it, or use it in a `with`.

  Attributes:
    store: of the features; None where every step computes them.
    meets: whether `next` raises in all processes if it fails in one, because they meet at every batch.
  """

  store: feature_store.FeatureStore | None
  meets: bool

  def __next__(self) -> base.Batch:
    """The next batch of this process, on the host."""

  def place(self, batch: base.Batch) -> tuple[Any, ...]:
    """What a step takes of a batch after the weights, on the devices."""

  def inputs(self, batch: base.Batch) -> tuple[Any, ...]:
    """The same as shapes or arrays, to compile the step with."""

  def __enter__(self) -> Self: ...

  def __exit__(self, *exc_info: object) -> None: ...


def open_feed(
  task: base.Task, model: prepare.Model, config: Config, mesh: jax.sharding.Mesh, start: int
) -> Feed:
  """The feed of a run from a step on.

  Raises:
    CacheError: features that cannot be cached, or a cache that cannot be written.
  """
  if config.cache.path and config.cache.views:
    return Cached(task, model, config, mesh, start)
  if config.cache.path:
    _logger.info(
      "Features of training examples are not cached, since each example is augmented anew: "
      "--config.cache.views=K gives each so many fixed views."
    )
  return Loaded(task.train_batches(start * config.batch_size), mesh)


class Loaded:
  """Batches as they are loaded. See `Feed`."""

  store, meets = None, False

  def __init__(self, batches: batch_iterator.BatchIterator, mesh: jax.sharding.Mesh):
    self._batches, self._mesh = batches, mesh

  def __next__(self) -> base.Batch:
    return next(self._batches)

  def place(self, batch: base.Batch) -> tuple[Any, ...]:
    return (sharding.put_batch(step_lib.device_batch(batch), self._mesh),)

  inputs = place

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._batches.close()


class Cached:
  """Batches with their features, read where all examples of a batch are in the cache. See `Feed`."""

  meets = True

  def __init__(
    self,
    task: base.Task,
    model: prepare.Model,
    config: Config,
    mesh: jax.sharding.Mesh,
    start: int = 0,
    *,
    strict: bool = False,
  ):
    """Raises as `FeatureStore` does, and `FeatureStore.prepare_to_write` with `strict`."""
    self._load_from: Callable[[int], batch_iterator.BatchIterator] = task.train_batches
    self._batch_size, self._rows = config.batch_size, config.batch_size // jax.process_count()
    self._first = jax.process_index() * self._rows
    self._position = start * config.batch_size
    self._batches = task.train_batches(self._position)
    if len(task.phases) != 1:
      raise cache.CacheError(
        f"config.cache.views is {config.cache.views}, and images have several sizes during the run, which "
        "gives them other features. Train at one size, or set --config.cache.views=0."
      )
    self.order = pipeline.Order(len(self._batches.source), config.seed, config.cache.views)
    example = task.blank_example()
    batch = {name: np.repeat(np.asarray(value)[None], self._rows, 0) for name, value in example.items()}
    self.store = feature_store.FeatureStore(
      task,
      model,
      config.cache,
      mesh,
      batch,
      self._batches,
      phase=task.phases[0],
      training=True,
      seed=config.seed,
    )
    self.store.prepare_to_write(np.arange(self.order.length * self.order.views), strict=strict)

  def __next__(self) -> feature_store.FedBatch:
    start = self._position
    self._position += self._batch_size
    if start // self.order.length > (start - self._batch_size) // self.order.length:
      self._begin_pass(start)
    slots = self.order.slots(range(start + self._first, start + self._first + self._rows))
    if not self.store.lacks(slots):
      return hosts.read_together(functools.partial(self.store.read, slots))
    return feature_store.FedBatch(hosts.read_together(functools.partial(self._load, start)), slots, None)

  def _load(self, start: int) -> base.Batch:
    """The batch whose first example is `start`, with its pixels."""
    if self._batches.position != start:
      self._batches.close()
      self._batches = self._load_from(start)
    return next(self._batches)

  def _begin_pass(self, start: int) -> None:
    """Makes what the pass before has computed readable."""
    self.store.sync()
    if self._batches.position < start:
      self._batches.close()  # the pass before was read; nothing is to be loaded in the background

  def fill(self) -> None:
    """Computes and stores all views of all examples that the cache lacks, whatever step the feed is at."""
    self._position = 0
    for _ in range(-(-self.order.length * self.order.views // self._batch_size)):
      batch = next(self)
      if batch.features is None:
        self.place(batch)
    self.store.sync()

  def place(self, batch: feature_store.FedBatch) -> tuple[Any, ...]:
    return self.store.place(batch)

  def inputs(self, batch: base.Batch) -> tuple[Any, ...]:
    del batch
    return self.store.inputs()

  def __enter__(self) -> Self:
    self.store.__enter__()
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._batches.close()
    self.store.__exit__(*exc_info)


class CachedEvaluation:
  """The batches of an evaluation, without their pixels where their features are in the cache.

  The first batch has its pixels all the same, for pictures.
  """

  def __init__(
    self,
    task: base.Task,
    model: prepare.Model,
    config: Config,
    mesh: jax.sharding.Mesh,
    evaluation: base.Evaluation,
    *,
    strict: bool = False,
  ):
    """Raises as `FeatureStore` does, and `FeatureStore.prepare_to_write` with `strict`."""
    self._load, self._batch_size = evaluation.batches, config.eval_batch_size
    self._rows = config.eval_batch_size // jax.process_count()
    with evaluation.batches() as batches:
      self._length = len(batches.source)
      self.store = feature_store.FeatureStore(
        task,
        model,
        config.cache,
        mesh,
        next(batches),
        batches,
        phase=task.phases[-1],
        training=False,
      )
    self.store.prepare_to_write(np.arange(self._length), strict=strict)

  @contextlib.contextmanager
  def batches(self) -> Iterator[Iterator[feature_store.FedBatch]]:
    """All batches of this process, from the first; takes the place of `Evaluation.batches`."""
    loaded: list[Any] = []  # the iterator of whole batches, once one is needed, and how many it has given

    def load(number: int) -> base.Batch:
      if not loaded:
        loaded.extend((stack.enter_context(self._load()), 0))
      while loaded[1] < number:
        next(loaded[0])
        loaded[1] += 1
      loaded[1] += 1
      return next(loaded[0])

    def each() -> Iterator[feature_store.FedBatch]:
      for number in range(-(-self._length // self._batch_size)):
        first = number * self._batch_size + jax.process_index() * self._rows
        indices = np.arange(first, first + self._rows)
        slots = np.minimum(indices, self._length - 1)
        lacks = self.store.lacks(slots)
        whole = load(number) if lacks or not number else {}
        if lacks:
          yield feature_store.FedBatch(whole, slots, None)
          continue
        batch = self.store.read(slots)
        batch.update(whole or {"index": slots, "example_valid": indices < self._length})
        yield batch

    with contextlib.ExitStack() as stack:
      yield each()
      self.store.sync()

  def fill(self) -> None:
    """Computes and stores the features that the cache lacks."""
    with self.batches() as batches:
      for batch in batches:
        if batch.features is None:
          self.store.place(batch)


@contextlib.contextmanager
def cached_evaluations(
  task: base.Task, model: prepare.Model, config: Config, mesh: jax.sharding.Mesh, *, strict: bool = False
) -> Iterator[dict[str, CachedEvaluation]]:
  """Those of the task's evaluations whose features the cache keeps, by name; none without a cache.

  Where predicting looks at more than the features of the whole input, such as other scales, none is cached.

  Args:
    strict: raise where another process is writing the cache.

  Raises:
    CacheError, LockedError: as `FeatureStore` does.
  """
  if config.cache.path:
    feature_store.check_without_adapters(model)
  found: dict[str, CachedEvaluation] = {}
  with contextlib.ExitStack() as stack:
    if config.cache.path and model.frozen_pass and not task.extra_views and task.takes_features:
      for name, evaluation in task.evaluations.items():
        found[name] = CachedEvaluation(task, model, config, mesh, evaluation, strict=strict)
        stack.enter_context(found[name].store)
    yield found
