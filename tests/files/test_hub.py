"""Weights of the Hugging Face Hub, through a stand-in for its client that fills the cache as that does."""

import hashlib
import json
import sys
import types

import pytest

from frozen_vision.backbones import families
from frozen_vision.backbones.vit.config import VARIANTS
from frozen_vision.files import hub


class _Http(OSError):
  pass


class _RepositoryNotFound(_Http):
  pass


class _Gated(_RepositoryNotFound):
  pass


class _EntryNotFound(Exception):
  pass


class _LocalEntryNotFound(FileNotFoundError, _EntryNotFound):
  pass


class _Hub:
  """What of `huggingface_hub` is used, on files in memory."""

  errors = types.SimpleNamespace(
    GatedRepoError=_Gated,
    RepositoryNotFoundError=_RepositoryNotFound,
    EntryNotFoundError=_EntryNotFound,
    LocalEntryNotFoundError=_LocalEntryNotFound,
    HfHubHTTPError=_Http,
  )

  def __init__(self, cache, repositories, error=None):
    self.cache, self.repositories, self.error = cache, repositories, error
    self.fetched, self.damaged = [], set()

  def _place(self, repository, name):
    return self.cache / repository.replace("/", "--") / "snapshots" / "main" / name

  def try_to_load_from_cache(self, repository, name):
    path = self._place(repository, name)
    return str(path) if path.exists() else None

  def hf_hub_download(self, repository, name):
    if self.error is not None:
      raise self.error
    if repository not in self.repositories:
      raise _RepositoryNotFound("404")
    if name not in self.repositories[repository]:
      raise _EntryNotFound("404")
    content = self.repositories[repository][name]
    blobs = self.cache / repository.replace("/", "--") / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    blob = blobs / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content[:-1] if name in self.damaged else content)
    path = self._place(repository, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(blob)
    self.fetched.append(name)
    return str(path)


@pytest.fixture
def client(tmp_path, monkeypatch):
  index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
  client = _Hub(
    tmp_path / "cache",
    {
      "owner/small": {"model.safetensors": b"weights"},
      "owner/large": {
        "model.safetensors.index.json": index,
        "model-1.safetensors": b"first",
        "model-2.safetensors": b"second",
      },
      "owner/pickles": {"pytorch_model.bin": b"x"},
    },
  )
  monkeypatch.setitem(sys.modules, "huggingface_hub", client)
  return client


def test_fetched_once(client):
  for _ in range(2):
    assert hub.fetch_weights("owner/small").read_bytes() == b"weights"
  assert client.fetched == ["model.safetensors"]


def test_all_shards(client):
  path = hub.fetch_weights("owner/large")
  assert path.name == "model.safetensors.index.json"
  assert sorted(file.name for file in path.parent.iterdir()) == [
    "model-1.safetensors",
    "model-2.safetensors",
    "model.safetensors.index.json",
  ]
  client.error = OSError("no network")
  assert client.fetched.count("model-1.safetensors") == 1
  del client.repositories["owner/large"]["model-2.safetensors"]
  path.with_name("model-2.safetensors").unlink()
  client.error = None
  with pytest.raises(FileNotFoundError, match="owner/large lacks model-2.safetensors, which its"):
    hub.fetch_weights("owner/large")


@pytest.mark.parametrize(
  ("index", "message"),
  [
    ({"weight_map": {"w": "../outside"}}, "places w in '../outside'; a shard is a file beside the index"),
    ({"metadata": {}}, "is no index of shards: it holds no weight_map"),
  ],
)
def test_an_index_is_checked_before_its_shards_are_fetched(client, index, message):
  client.repositories["owner/hostile"] = {"model.safetensors.index.json": json.dumps(index).encode()}
  with pytest.raises(ValueError, match=message):
    hub.fetch_weights("owner/hostile")
  assert client.fetched == ["model.safetensors.index.json"]


def test_damaged_files_are_removed(client):
  client.damaged.add("model.safetensors")
  with pytest.raises(ValueError, match="was damaged on its way.*fetch it again"):
    hub.fetch_weights("owner/small")
  client.damaged.clear()
  assert hub.fetch_weights("owner/small").read_bytes() == b"weights"


def test_what_cannot_be_fetched(client):
  with pytest.raises(FileNotFoundError, match="no repository https://huggingface.co/owner/none"):
    hub.fetch_weights("owner/none")
  with pytest.raises(FileNotFoundError, match="owner/pickles holds neither model.safetensors nor"):
    hub.fetch_weights("owner/pickles")
  client.error = _Gated("403")
  with pytest.raises(
    PermissionError, match="gated: ask for access at .*owner/small, then log in with `hf auth"
  ):
    hub.fetch_weights("owner/small")
  for error in (_LocalEntryNotFound("offline"), OSError("reset by peer")):
    client.error = error
    with pytest.raises(ConnectionError, match="is not in the cache and could not be fetched"):
      hub.fetch_weights("owner/small")


def test_without_the_client(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
    families.load_backbone("dinov2_vits14")


def test_named_weights_are_rows():
  from frozen_vision.backbones.vit import published

  assert all(entry.variant in VARIANTS and "/" in entry.repository for entry in published.TABLE.values())
  named = families.published_weights()
  assert named["openclip_vitl14"].options == dict(mean=(0.5,) * 3, std=(0.5,) * 3)
  assert {"dinov3_vit7b16", "siglip2_vitg16", "mae_vith14", "clip_vitb16"} <= set(named)
