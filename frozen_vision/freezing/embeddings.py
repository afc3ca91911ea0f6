"""Embeddings of a whole data set by a frozen backbone, for probes; from the cache where they are there."""

import os
from typing import Any, NamedTuple

import jax
from jaxtyping import Float32, Int32
import numpy as np

from frozen_vision.data import batch_iterator, content, pipeline
from frozen_vision.freezing import cache as feature_cache
from frozen_vision.freezing import prepare

_PASSED = ("index", "example_valid", "image")  # of a batch; everything else is kept beside the embeddings


class Embeddings(NamedTuple):
  """Embeddings of a data set, which linear probes and kNN read.

  Attributes:
    features: of `backbone.embed`.
    labels: class indices, in the order of the source; [n, classes] where the transform gives several.
  """

  features: Float32[np.ndarray, "n d"]
  labels: Int32[np.ndarray, "n"] | np.ndarray


def embed(
  backbone: prepare.FrozenBackbone,
  source: batch_iterator.Source,
  transform: batch_iterator.EvalTransform,
  *,
  batch_size: int = 64,
  path: str | os.PathLike | None = None,
  dtype: str = "float32",
  num_threads: int = 1,
) -> Embeddings:
  """Computes, or reads, the embeddings of every record of a source, in its order.

  Args:
    backbone: of `prepare.freeze`, or of `prepare.Backbones`.
    source: records, such as `classification.folders.open_source` opens.
    transform: makes an example with `image` uint8 [h, w, 3] and `label` of a record, such as
      `classification.augment.EvalTransform`.
    batch_size: images of a pass.
    path: folder of feature caches; None keeps nothing.
    dtype: that embeddings are stored in, and rounded to without a cache too: float32 or bfloat16.
    num_threads: that decode images.

  Raises:
    CacheError: a cache that cannot be written to, or does not fit on its disk.
    LockedError: another process is writing to the cache.
  """
  size = len(source)
  if path is None:
    return _joined(_computed(backbone, source, transform, batch_size, dtype, num_threads), size)
  view = {"transform": content.digest(transform), "features": "embed"}
  key = feature_cache.make_key(features=backbone.key, data=content.digest(source), view=view, dtype=dtype)
  cache = feature_cache.FeatureCache(path, key)
  if len(missing := cache.missing(range(size))):
    with cache.writing() as writer:
      for indices, record in _computed(backbone, source, transform, batch_size, dtype, num_threads, missing):
        if indices[0] == missing[0]:
          cache.announce(len(missing), sum(array[0].nbytes for array in record.values()))
        writer.add(indices, record)
  return _joined(cache.iterate(range(size)), size)


def _computed(backbone, source, transform, batch_size, dtype, num_threads, missing=None):
  """(indices, records) of a source in batches, of all records or of those that are missing."""
  chosen = source if missing is None else _Chosen(source, missing)
  program = jax.jit(_embed, static_argnums=2)
  with pipeline.eval_batches(chosen, transform, batch_size=batch_size, num_threads=num_threads) as batches:
    for batch in batches:
      valid = batch["example_valid"]
      features = np.asarray(program(backbone.program, batch["image"], dtype))
      record = {name: value[valid] for name, value in batch.items() if name not in _PASSED}
      indices = batch["index"][valid]
      yield indices if missing is None else missing[indices], {"features": features[valid], **record}


def _embed(program: Any, images: jax.Array, dtype: str) -> jax.Array:
  return program.embed(program.preprocessing.normalise(images)).astype(dtype)


def _joined(parts, size: int) -> Embeddings:
  """All records in one place."""
  features = labels = None
  for indices, record in parts:
    if features is None:
      features = np.empty((size, *record["features"].shape[1:]), np.float32)
      labels = np.empty((size, *record["label"].shape[1:]), record["label"].dtype)
    features[indices], labels[indices] = record["features"].astype(np.float32), record["label"]
  return Embeddings(features, labels)


class _Chosen:
  """Some records of a source."""

  def __init__(self, source: batch_iterator.Source, positions: np.ndarray):
    self._source, self._positions = source, positions

  def __len__(self) -> int:
    return len(self._positions)

  def __getitem__(self, index: int) -> Any:
    return self._source[int(self._positions[index])]
