"""Weights by name: the table, the cache folder, and what a config may say."""

import dataclasses

from flax import nnx
import numpy as np
import pytest

from frozen_vision import config as config_lib
from frozen_vision.backbones import families
from frozen_vision.backbones import published as published_weights
from frozen_vision.backbones.swinv2 import checkpoint_windows
from frozen_vision.backbones.swinv2 import checkpoints as convert
from frozen_vision.backbones.swinv2 import config as swinv2_config
from frozen_vision.backbones.swinv2 import published as named_weights
from frozen_vision.files import trees
from frozen_vision.tasks import common
from tests.backbones.swinv2 import checkpoint_sources as sources
from tests.files import pth_file

_NAME = "swinv2_tiny_window8_256"


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("FROZEN_VISION_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture
def published(tmp_path, monkeypatch):
  """A small public checkpoint under a name of the table, at a `file:` address."""
  row = swinv2_config.VARIANTS["swinv2_nano"]
  rng = np.random.default_rng(0)
  state = {
    key: rng.standard_normal(value.shape).astype(np.float32) * 0.1
    for key, value in sources.timm(row.embed_dim, row.depths, row.num_heads, classes=7).items()
  }
  folder = tmp_path / "published"
  folder.mkdir()
  path = pth_file.write(folder / "swinv2_tiny_patch4_window8_256.pth", {"model": sources.microsoft(state)})
  entry = published_weights.NamedWeights(
    "swinv2_nano", path.as_uri(), sum(value.size for value in state.values())
  )
  monkeypatch.setitem(named_weights.TABLE, _NAME, entry)
  return path


def test_the_table():
  sizes = {"swinv2_t": 28_347_154, "swinv2_s": 49_728_418, "swinv2_b": 87_918_816, "swinv2_l": 196_739_932}
  for name, entry in named_weights.TABLE.items():
    row = swinv2_config.VARIANTS[entry.variant]
    classes = 21841 if name.endswith("_22k") else 1000
    more = (classes - 1000) * (8 * row.embed_dim + 1)
    assert entry.parameters == sizes[entry.variant] + more, name
    assert entry.file == name.replace("_window", "_patch4_window") + ".pth"
    assert entry.url.startswith("https://") and entry.licence
    found = checkpoint_windows.of_surroundings(published_weights.cache_folder() / entry.file, 4)
    assert found is not None and max(found[0]) in (8, 12, 16, 24)
  large = named_weights.TABLE["swinv2_large_window12to24_192to384_22kto1k_ft"]
  assert checkpoint_windows.of_surroundings(published_weights.cache_folder() / large.file, 4) == (
    (24, 24, 24, 12),
    (12, 12, 12, 6),
  )


def test_fetched_once_and_loaded(cache, published):
  wanted = trees.fingerprint(nnx.state(families.load_backbone(published), nnx.Param))
  config = config_lib.Config().replace({"backbone.weights": _NAME})
  backbone = common.build_backbone(config)  # whose name is swinv2_nano
  assert trees.fingerprint(nnx.state(backbone, nnx.Param)) == wanted
  assert backbone.config.window_sizes == (8, 8, 8, 8)
  published.rename(published.with_name("gone"))
  assert convert.open_checkpoint(_NAME).name == "swinv2_nano"
  assert families.load_backbone(_NAME, window_size=4).config.window_sizes == (4,) * 4
  assert {path.name for path in cache.iterdir()} >= {"swinv2_tiny_patch4_window8_256.pth"}
  config = config.replace({"backbone.name": "swinv2_t"})
  with pytest.raises(
    ValueError, match="with embed_dim = 32, .* but config.backbone.name = swinv2_t has embed_dim = 96, "
  ):
    common.build_backbone(config)


def test_files_in_the_cache_that_are_others(cache, published, monkeypatch):
  path = named_weights.TABLE[_NAME].local_path()
  assert path.parent == cache
  entry = dataclasses.replace(named_weights.TABLE[_NAME], sha256="0" * 64)
  monkeypatch.setitem(named_weights.TABLE, _NAME, entry)
  with pytest.raises(
    ValueError, match=f"{path} has .* with the SHA-256 .*Remove both to have the file fetched again"
  ):
    families.load_backbone(_NAME)
  monkeypatch.setitem(named_weights.TABLE, _NAME, dataclasses.replace(entry, sha256=None))
  path.write_bytes(path.read_bytes()[: entry.least_bytes - 1])
  with pytest.raises(ValueError, match=f"{path} has .* bytes with .*, but file:.* has at least"):
    families.load_backbone(_NAME)


def test_without_a_network(cache, published):
  published.unlink()
  with pytest.raises(
    ConnectionError, match=rf"window8_256.pth could not be fetched.*put it at {cache}/swinv2_tiny"
  ):
    families.load_backbone(_NAME)
  with pytest.raises(FileNotFoundError, match="or of published ones: .*swinv2_base_window12_192_22k"):
    families.load_backbone("swinv2_base_window12_192_23k")
  with pytest.raises(FileNotFoundError, match="Did you mean 'swinv2_base_window12_192_22k'"):
    families.load_backbone("swinv2_base_window12_192_21k")
