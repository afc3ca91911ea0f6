"""Embeddings of a data set: those of the backbone, read from the cache where nothing has changed."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from frozen_vision.config import BackboneOptions
from frozen_vision.data.classification import augment, folders
from frozen_vision.freezing import cache, embeddings, prepare
from tests import tiny
from tests.freezing import test_cache

_TRANSFORM = augment.EvalTransform(16)


@pytest.fixture(scope="module")
def backbone():
  config = tiny.classification()
  options = BackboneOptions(weights="random", overrides=config.backbone.overrides.to_dict())
  return prepare.freeze(prepare.open_source(options, 0))


class _Counting:
  """A source that counts the records that are read."""

  def __init__(self, source):
    self._source, self.count = source, 0

  def __getstate__(self):
    return {"source": self._source}

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    self.count += 1
    return self._source[index]


def _embed(backbone, folder, **options):
  source = _Counting(folders.ImageFolder(folder))
  found = embeddings.embed(backbone, source, options.pop("transform", _TRANSFORM), batch_size=8, **options)
  return found, source.count


def test_embeddings_are_those_of_the_backbone_and_are_computed_once(tmp_path, backbone):
  images = tiny.image_folder(tmp_path / "images")
  (plain, _), (first, _) = _embed(backbone, images), _embed(backbone, images, path=tmp_path / "cache")
  source = folders.ImageFolder(images)
  pixels = np.stack([_TRANSFORM(source[index])["image"] for index in range(len(source))])
  program = backbone.program
  wanted = jax.jit(lambda program, x: program.embed(program.preprocessing.normalise(x)))(program, pixels)
  np.testing.assert_allclose(plain.features, wanted, rtol=1e-5, atol=1e-6)
  assert plain.labels.tolist() == source.labels.tolist()
  again, count = _embed(backbone, images, path=tmp_path / "cache")
  assert count == 0
  for found in (first, again):
    assert found.features.dtype == np.float32 and found.features.tobytes() == plain.features.tobytes()
    assert found.labels.tolist() == plain.labels.tolist()
  rounded, count = _embed(backbone, images, path=tmp_path / "cache", dtype="bfloat16")
  assert count and rounded.features.dtype == np.float32
  np.testing.assert_allclose(rounded.features, plain.features, rtol=2**-8)
  # Whatever changes is computed again: the transform, and one image.
  assert _embed(backbone, images, path=tmp_path / "cache", transform=augment.EvalTransform(16, 0.5))[1]
  path: pathlib.Path = images / "class0" / "1.png"
  path.write_bytes((images / "class2" / "1.png").read_bytes())
  changed, count = _embed(backbone, images, path=tmp_path / "cache")
  assert count and not np.array_equal(changed.features[1], plain.features[1])
  np.testing.assert_array_equal(changed.features[2:], plain.features[2:])


def test_only_what_is_damaged_is_computed_again(tmp_path, backbone, monkeypatch):
  images = tiny.image_folder(tmp_path / "images")
  small = functools.partialmethod(cache.FeatureCache.writing, shard_bytes=1)
  monkeypatch.setattr(cache.FeatureCache, "writing", small)
  plain, _ = _embed(backbone, images, path=tmp_path / "cache")
  paths = test_cache.shard_paths(tmp_path / "cache")
  data = bytearray(paths[0].read_bytes())
  data[-1] ^= 1
  paths[0].write_bytes(data)
  again, count = _embed(backbone, images, path=tmp_path / "cache")
  assert 0 < count <= 8
  np.testing.assert_array_equal(again.features, plain.features)
