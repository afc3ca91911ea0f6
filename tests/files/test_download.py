"""Fetching survives servers and networks that break, and leaves nothing wrong behind."""

import concurrent.futures
import errno
import hashlib
import itertools

import pytest

from frozen_vision.files import download
from tests.files import servers

_DATA, _HASH = servers.DATA, servers.SHA256


@pytest.fixture
def server():
  with servers.running() as server:
    yield server


@pytest.fixture
def path(tmp_path):
  return tmp_path / "cache" / "weights.pth"


@pytest.fixture(autouse=True)
def small_overlap(monkeypatch):
  monkeypatch.setattr(download, "_OVERLAP", 100)


def _left(path):
  """What lies beside the file, but for the lock and the pinned digest."""
  return sorted(p.name for p in path.parent.iterdir() if p.suffix not in (".lock", ".sha256"))


def test_a_whole_file_once(server, path):
  assert download.fetch(server.url, path, sha256=_HASH) == path
  assert path.read_bytes() == _DATA and _left(path) == ["weights.pth"]
  download.fetch(server.url, path, sha256=_HASH)
  assert server.requests == [None]


def test_what_breaks_off_is_continued(server, path):
  server.cuts = [1000, 1500]
  download.fetch(server.url, path, sha256=_HASH)
  assert server.requests == [None, "bytes=900-", "bytes=2300-"]
  assert path.read_bytes() == _DATA and _left(path) == ["weights.pth"]


def test_a_later_call_continues_what_an_earlier_one_kept(server, path):
  server.cuts = [1000]
  with pytest.raises(
    ConnectionError, match=r"1,000 of 5,000 bytes came.*1,000 bytes are kept.*put it at .*weights.pth"
  ):
    download.fetch(server.url, path, sha256=_HASH, attempts=1)
  assert not path.exists() and _left(path) == ["weights.pth.partial", "weights.pth.partial.version"]
  download.fetch(server.url, path, sha256=_HASH)
  assert server.requests == [None, "bytes=900-"]
  assert path.read_bytes() == _DATA


def test_killed_between_the_last_byte_and_the_name(server, path):
  server.cuts = [1000]
  with pytest.raises(ConnectionError):
    download.fetch(server.url, path, attempts=1)
  path.with_name("weights.pth.partial").write_bytes(_DATA)
  download.fetch(server.url, path, sha256=_HASH)
  assert server.requests == [None, "bytes=4900-"] and path.read_bytes() == _DATA


def test_servers_that_begin_anew(server, path):
  # One that knows no ranges, and one whose file is another by now.
  for change in (dict(knows_ranges=False), dict(version='"2"', data=_DATA[::-1])):
    server.cuts = [1000]
    vars(server).update(change)
    download.fetch(server.url, path)
    assert server.requests[-2:] == [None, "bytes=900-"]
    assert path.read_bytes() == server.data and _left(path) == ["weights.pth"]
    path.unlink()
    path.with_name("weights.pth.sha256").unlink()
    server.knows_ranges = True
  server.cuts = [1000]
  with pytest.raises(ConnectionError):
    download.fetch(server.url, path, attempts=1)
  server.version, server.data = '"3"', _DATA
  download.fetch(server.url, path, sha256=_HASH)
  assert path.read_bytes() == _DATA


def test_a_version_that_cannot_be_held_together_is_not_continued(server, path):
  server.version, server.cuts = 'W/"1"', [1000]
  download.fetch(server.url, path, sha256=_HASH)
  assert server.requests == [None, None] and path.read_bytes() == _DATA


def test_another_file_is_refused_and_removed(server, path):
  with pytest.raises(
    ValueError, match=f"gave 5,000 bytes with the SHA-256 {_HASH}, expected the SHA-256 {'0' * 64}"
  ):
    download.fetch(server.url, path, sha256="0" * 64)
  with pytest.raises(ValueError, match="gave 5,000 bytes .* expected at least 6,000 bytes"):
    download.fetch(server.url, path, least_bytes=6000)
  assert _left(path) == []


def test_what_cannot_be_reached(server, path, tmp_path):
  with pytest.raises(ConnectionError, match=r"absent could not be fetched \(HTTP Error 404"):
    download.fetch(server.url.replace("weights.pth", "absent"), path)
  assert len(server.requests) == 1  # asking again would not help
  with pytest.raises(
    ConnectionError, match=r"http://127.0.0.1:9/x could not be fetched.*Without a network.*put it at "
  ):
    download.fetch("http://127.0.0.1:9/x", path)
  with pytest.raises(ConnectionError, match="No such file"):
    download.fetch((tmp_path / "absent").as_uri(), path)
  assert _left(path) == []


def test_files_of_this_machine(path, tmp_path):
  source = tmp_path / "a b.pth"
  source.write_bytes(_DATA)
  path.parent.mkdir()
  path.with_name("weights.pth.partial").write_bytes(_DATA[:4000])  # continued
  download.fetch(source.as_uri(), path, sha256=_HASH)
  assert path.read_bytes() == _DATA and _left(path) == ["weights.pth"]
  path.unlink()
  path.with_name("weights.pth.partial").write_bytes(_DATA + b"more")  # longer than the file: begun anew
  download.fetch(source.as_uri(), path, sha256=_HASH)
  assert path.read_bytes() == _DATA


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
  """What is wrong with a download from each server, with and without a digest: all at a time, as they wait.

  This is the short form of `experiments/reliability/server_behaviours.py`.
  """
  cases = list(itertools.product(servers.BEHAVIOURS, (True, False)))

  def try_one(case):
    behaviour, has_digest = case
    folder = tmp_path_factory.mktemp("server")
    return servers.try_one(behaviour, folder, has_digest=has_digest)[-1]

  with pytest.MonkeyPatch.context() as patch, concurrent.futures.ThreadPoolExecutor(8) as pool:
    for name, value in servers.SETTINGS.items():
      patch.setattr(download, name, value)
    return dict(zip(cases, pool.map(try_one, cases)))


@pytest.mark.parametrize("behaviour", list(servers.BEHAVIOURS))
@pytest.mark.parametrize("has_digest", [True, False])
def test_a_server_that_misbehaves_gives_the_whole_file_or_none(faults, behaviour, has_digest):
  assert not faults[behaviour, has_digest]


def test_the_digest_of_the_first_use_is_pinned(server, path):
  download.fetch(server.url, path)
  assert path.with_name("weights.pth.sha256").read_text().split() == [_HASH, "5000"]
  path.write_bytes(_DATA[:-1] + b"?")
  with pytest.raises(ValueError, match=f"sha256 beside it, .* says the SHA-256 {_HASH}. Remove both"):
    download.fetch(server.url, path)
  path.unlink()
  path.write_bytes(_DATA[:-1] + b"?")
  download.check(path, server.url, sha256=hashlib.sha256(path.read_bytes()).hexdigest())  # published: no pin


def test_a_full_disk_is_no_fault_of_the_server(server, path, monkeypatch):
  def full(self, count):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(download._SpeedWatch, "add", full)
  with pytest.raises(OSError, match="No space left"):
    download.fetch(server.url, path)
  assert len(server.requests) == 1
