"""Features of the examples of a run: computed by the frozen pass, stored in the cache, and read from it."""

from collections.abc import Callable, Mapping
import contextlib
import functools
import logging
import math
from typing import Any, Self

from flax import nnx
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np

from frozen_vision.config import CacheOptions
from frozen_vision.data import batch_iterator, content
from frozen_vision.devices import sharding
from frozen_vision.files import lock
from frozen_vision.freezing import cache as feature_cache
from frozen_vision.freezing import prepare
from frozen_vision.metrics import gather
from frozen_vision.tasks import base
from frozen_vision.training import step as step_lib

_logger = logging.getLogger(__name__)
_ADDED = ("index", "example_valid")  # keys of a batch that say where an example stands, not what it is
_FEATURE, _BATCH = "features.", "batch."  # how names of stored arrays begin


class FedBatch(dict):
  """A batch of this process on the host; its pixels are absent where its features were read.

  Attributes:
    slots: indices of its examples in the cache, int64 [b].
    features: as they are stored; None where they must be computed.
  """

  def __init__(
    self, batch: Mapping[str, np.ndarray], slots: np.ndarray, features: tuple[np.ndarray, ...] | None
  ):
    super().__init__(batch)
    self.slots, self.features = slots, features


def check_without_adapters(model: prepare.Model) -> None:
  """Raises a CacheError where adapters change the features at every step."""
  if model.feature_key is not None and "adapters" in model.feature_key:
    raise feature_cache.CacheError(
      "config.cache.path needs features that never change, and config.adapters trains inside the backbone. "
      "Leave --config.cache.path empty, or set --config.adapters.kind=none."
    )


class FeatureStore:
  """The cache of one set of examples, and the program that computes what it lacks.

  What is stored of an example is its features, and its batch without the pixels. Features go through the
  dtype of the cache whether they were read or have just been computed: no run depends on what was there.

  Attributes:
    cache: of the examples.
    restore: features as they are stored -> as `task.features` gives them.
    record_bytes: of an example.
  """

  def __init__(
    self,
    task: base.Task,
    model: prepare.Model,
    options: CacheOptions,
    mesh: jax.sharding.Mesh,
    batch: base.Batch,
    made_of: batch_iterator.BatchIterator,
    *,
    phase: Any,
    training: bool,
    seed: int = 0,
  ):
    """Traces the frozen pass, and opens the cache; the device program is compiled when it is first needed.

    Args:
      batch: any batch of this process, for its shapes.
      made_of: an iterator over the batches, for its source and transform.
      phase: the task's static setting.
      training: whether examples are views of training, which depend on `seed`.

    Raises:
      CacheError: features that depend on more than the example and the frozen backbone.
    """
    check_without_adapters(model)
    if not model.frozen_pass:
      raise feature_cache.CacheError(
        "config.cache.path needs a frozen backbone, and config.trainable matches some of its parameters. "
        "Leave --config.cache.path empty, or train the head alone."
      )
    self._model, self._mesh = model, mesh
    self._shapes = _global_shapes(step_lib.device_batch(batch), mesh)
    self.size = next(iter(self._shapes.values())).shape[0]  # of a batch of all processes
    self._pixels = [name for name in batch if name.partition(".")[0] == task.input_name]
    self._kept = [name for name in batch if name not in self._pixels and name not in _ADDED]
    self._step = step_lib.make_features_step(task, model.graphdef, phase)
    self._rng = jax.random.key(0) if training else None
    self._features = self._trace(task)
    self._stored = tuple(_stored_shape(x, self.size, options.dtype) for x in self._features)
    self.record_bytes = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in self._stored)
    self.record_bytes += sum(batch[name][0].nbytes for name in self._kept) + 8
    teacher = {} if model.teacher is None else {"teacher": model.teacher}
    key = feature_cache.make_key(
      features={**model.feature_key, **teacher},
      data=content.digest(made_of.source),
      view={
        "task": task.input_name,
        "input": {name: list(batch[name].shape[1:]) for name in self._pixels},
        "transform": content.digest(made_of.transform),
        **({"seed": seed} if training else {}),
        "settings": dict(task.view),
        "phase": str(phase),
        "kept": {name: [str(batch[name].dtype), list(batch[name].shape[1:])] for name in sorted(self._kept)},
        "features": [[str(x.dtype), list(x.shape[1:])] for x in self._stored],
      },
      dtype=options.dtype,
    )
    self.cache = feature_cache.FeatureCache(options.path, key)
    self._program: Any = None
    self._pending: list[tuple[FedBatch, tuple[jax.Array, ...]]] = []
    self._stack = contextlib.ExitStack()
    self._writer: feature_cache.Writer | None = None
    self._may_write = True
    self._needed = np.zeros(0, np.int64)

  def _trace(self, task: base.Task) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of the features, if they depend on the backbone and the example alone."""
    model = self._model
    arguments = model.trainable, model.mutable, model.frozen, self._shapes, self._rng
    traced = jax.jit(self._step).trace(*jax.tree.map(_shape_of, arguments))
    trainable, mutable, frozen, _, rng = read_arguments(traced, arguments)
    heads = [read for network, read in frozen.items() if str(network) not in ("backbone", "teacher")]
    if any(jax.tree.leaves((trainable, mutable, heads))):
      raise feature_cache.CacheError(
        f"The features of {type(task).__name__} depend on more than its frozen backbone, so they cannot be "
        "cached. Leave --config.cache.path empty."
      )
    if any(jax.tree.leaves(rng)):
      raise feature_cache.CacheError(
        f"The features of {type(task).__name__} depend on numbers that every step draws anew, such as those "
        "of mixup and cutmix, so they cannot be cached. Switch that off (--config.classification.mixup=0 and "
        "--config.classification.cutmix=0), or set --config.cache.views=0."
      )
    return tuple(traced.out_info)

  def restore(self, stored: tuple[jax.Array, ...]) -> base.Features:
    """Features as they are stored -> as `task.features` gives them, for any number of examples."""
    return tuple(
      x.reshape(-1, *wanted.shape[1:]).astype(wanted.dtype) for x, wanted in zip(stored, self._features)
    )

  def inputs(self) -> tuple[Any, Any]:
    """Shapes of what a compiled step takes after the weights: the batch, and features as they are stored."""
    spread = sharding.batch_sharding(self._mesh)
    return self._shapes, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread) for x in self._stored)

  def check_unread(self, traced: Any, arguments: tuple[Any, ...], batch: int) -> bool:
    """Whether a traced step on given features reads no pixel.

    Args:
      arguments: that it was traced with.
      batch: which of them is the batch.
    """
    read = read_arguments(traced, arguments)[batch]
    return not any(read[name] for name in self._pixels)

  def prepare_to_write(self, slots: np.ndarray, *, strict: bool = False) -> None:
    """Announces what examples that are absent will take, and opens the cache for writing if there are any.

    Args:
      slots: of all examples that will be read.
      strict: raise where another process is writing; else the cache is only read.

    Raises:
      CacheError: a full disk, or a folder that cannot be written to.
      LockedError: see `strict`.
    """
    self._needed = slots
    absent = self.cache.missing(slots, verify=False)
    if len(absent):
      self.cache.announce(len(absent), self.record_bytes)
      try:
        self._writer = self._stack.enter_context(self.cache.writing(part=jax.process_index()))
      except lock.LockedError as error:
        if strict:
          raise
        self._give_up(error)

  def lacks(self, slots: np.ndarray) -> bool:
    """Whether some example is missing, in this process or another: then all of them compute the batch."""
    return any(gather.gather_objects(len(self.cache.missing(slots)) > 0))

  def read(self, slots: np.ndarray) -> FedBatch:
    """A batch whose examples are all there."""
    record = self.cache.read(slots)
    features = tuple(record[f"{_FEATURE}{i}"] for i in range(len(self._stored)))
    return FedBatch({name: record[f"{_BATCH}{name}"] for name in self._kept}, slots, features)

  def place(self, batch: FedBatch) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...]]:
    """A batch and its features on the devices; features that are missing are computed and kept.

    Where the pixels are absent, something of their shape stands in for them, which no step reads.
    """
    placed = sharding.put_batch(step_lib.device_batch(batch), self._mesh)
    if batch.features is not None:
      put = sharding.put_batch({str(i): x for i, x in enumerate(batch.features)}, self._mesh)
      return self._stand_ins | placed, tuple(put[str(i)] for i in range(len(batch.features)))
    features = self._compute(placed)
    self._pending.append((batch, features))
    while len(self._pending) > 1:  # the last is left to the devices
      self._store(*self._pending.pop(0))
    return placed, features

  @functools.cached_property
  def _stand_ins(self) -> dict[str, jax.Array]:
    count = jax.process_count()
    shapes = {name: self._shapes[name] for name in self._pixels}
    zeros = {name: np.zeros((x.shape[0] // count, *x.shape[1:]), x.dtype) for name, x in shapes.items()}
    return sharding.put_batch(zeros, self._mesh)

  def _compute(self, placed: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    if self._program is None:
      model = self._model
      others = jax.tree.map(_shape_of, (model.trainable, model.mutable))

      def compute(frozen: nnx.State, batch: base.Batch) -> tuple[jax.Array, ...]:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), others)  # which nothing reads
        features = self._step(*zeros, frozen, batch, self._rng)
        return tuple(x.reshape(to.shape).astype(to.dtype) for x, to in zip(features, self._stored))

      program = jax.jit(compute, out_shardings=sharding.batch_sharding(self._mesh))
      self._program = program.lower(model.frozen, placed).compile()
    return self._program(self._model.frozen, placed)

  def _store(self, batch: FedBatch, features: tuple[jax.Array, ...]) -> None:
    """Adds the examples of a batch that the cache lacks; a disk that fails is left alone from then on."""
    slots, first = np.unique(batch.slots, return_index=True)
    missing = np.isin(slots, self.cache.missing(slots))
    slots, rows = slots[missing], first[missing]
    if not len(slots) or not self._may_write:
      return
    try:
      if self._writer is None:  # something was damaged
        self._writer = self._stack.enter_context(self.cache.writing(part=jax.process_index()))
      host = sharding.local_rows(features)
      record = {f"{_FEATURE}{i}": x[rows] for i, x in enumerate(host)}
      self._writer.add(slots, record | {f"{_BATCH}{name}": batch[name][rows] for name in self._kept})
    except (OSError, feature_cache.CacheError) as error:
      self._give_up(error)

  def _give_up(self, error: Exception) -> None:
    self._may_write, self._writer = False, None
    with contextlib.suppress(OSError):
      self._stack.close()
    _logger.warning("%s Features that are not in the cache are computed, and not stored.", _sentence(error))

  def sync(self) -> None:
    """Stores what was computed, finds what others have stored, and leaves a full cache to other writers."""
    while self._pending:
      self._store(*self._pending.pop(0))
    if self._writer is not None:
      try:
        self._writer.flush()
      except OSError as error:
        self._give_up(error)
    self.cache.refresh()
    if self._writer is not None and not len(self.cache.missing(self._needed, verify=False)):
      self._writer = None
      self._stack.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
    try:
      if kind is None:
        self.sync()
    finally:
      self._pending = []
      self._stack.close()


def restoring(step: Callable[..., Any], store: FeatureStore) -> Callable[..., Any]:
  """A step whose last argument is features as they are stored."""

  def run(*arguments: Any) -> Any:
    return step(*arguments[:-1], store.restore(arguments[-1]))

  return run


def read_arguments(traced: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
  """Which leaves of its arguments a traced program's outputs depend on: bools in a tree like `arguments`.

  Args:
    traced: of `jax.jit(...).trace`.
  """
  jaxpr = traced.jaxpr.jaxpr
  _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return jax.tree.unflatten(jax.tree.structure(arguments), used)


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _global_shapes(batch: base.Batch, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a batch of all processes, given that of one."""
  spread, count = sharding.batch_sharding(mesh), jax.process_count()
  return {
    name: jax.ShapeDtypeStruct((len(x) * count, *x.shape[1:]), x.dtype, sharding=spread)
    for name, x in batch.items()
  }


def _stored_shape(features: jax.ShapeDtypeStruct, size: int, dtype: str) -> jax.ShapeDtypeStruct:
  """A row for each example; floating numbers in the dtype of the cache, unless they have fewer bits."""
  if features.shape[0] % size:
    raise feature_cache.CacheError(
      f"Features of shape {features.shape} do not divide into {size} examples, so they cannot be cached."
    )
  views = features.shape[0] // size
  shape = (size, *((views,) if views > 1 else ()), *features.shape[1:])
  wanted = jnp.dtype(dtype)
  is_wider = jnp.issubdtype(features.dtype, jnp.floating) and features.dtype.itemsize > wanted.itemsize
  return jax.ShapeDtypeStruct(shape, wanted if is_wider else features.dtype)


def _sentence(error: Exception) -> str:
  """An error as a sentence that ends."""
  if isinstance(error, OSError) and error.filename is not None and error.strerror:
    return f"{error.filename}: {error.strerror}."
  text = str(error)
  return text if text.endswith(".") else f"{text}."
