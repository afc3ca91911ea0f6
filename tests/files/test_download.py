"""Fetching survives servers and networks that break, and leaves nothing wrong behind."""

import contextlib
import errno
import hashlib
import http.server
import re
import threading
import time

import numpy as np
import pytest

from frozen_vision.files import download

_DATA = np.random.default_rng(0).bytes(5000)
_HASH = hashlib.sha256(_DATA).hexdigest()


class _Server(http.server.ThreadingHTTPServer):
  """Serves `data`; `cuts` holds after how many bytes the next answers break off."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.data, self.version, self.cuts, self.requests = _DATA, '"1"', [], []
    self.knows_ranges = True
    self.behaviour = None

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}/weights.pth"


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    server = self.server
    asked = self.headers.get("Range")
    server.requests.append(asked)
    if server.behaviour is not None:
      self.close_connection = True
      return server.behaviour(self, asked)
    if self.path != "/weights.pth":
      return self.send_error(404)
    start = 0
    if asked and server.knows_ranges and self.headers.get("If-Range") == server.version:
      start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
      if start >= len(server.data):
        return self.send_error(416)
      self.send_response(206)
      self.send_header("Content-Range", f"bytes {start}-{len(server.data) - 1}/{len(server.data)}")
    else:
      self.send_response(200)
    self.send_header("ETag", server.version)
    self.send_header("Content-Length", str(len(server.data) - start))
    self.end_headers()
    rest = server.data[start:]
    self.wfile.write(rest[: server.cuts.pop(0)] if server.cuts else rest)
    self.close_connection = True

  def log_message(self, *args):
    pass


@pytest.fixture
def server():
  with _Server() as server:
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()


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


def _head(handler, length=None, status=200, **headers):
  handler.send_response(status)
  handler.send_header("ETag", '"1"')
  if length is not None:
    handler.send_header("Content-Length", str(length))
  for name, value in headers.items():
    handler.send_header(name.replace("_", "-"), value)
  handler.end_headers()


def _wrong_place(handler, asked):
  """Continues at another byte than it says, once there is something to continue."""
  if not asked:
    _head(handler, 5000)
    handler.wfile.write(_DATA[:1000])
    return
  _head(handler, 4100, 206, Content_Range="bytes 900-4999/5000")
  handler.wfile.write(_DATA[800:4900])


def _other_place(handler, asked):
  """Says that it continues at another byte than was asked for."""
  if not asked:
    _head(handler, 5000)
    handler.wfile.write(_DATA[:1000])
    return
  _head(handler, 4500, 206, Content_Range="bytes 500-4999/5000")
  handler.wfile.write(_DATA[500:])


def _no_length(handler, asked):
  _head(handler)
  handler.wfile.write(_DATA[:3000])


def _too_much(handler, asked):
  _head(handler, 5000)
  handler.wfile.write(_DATA + b"more")


def _compressed(handler, asked):
  _head(handler, 5000, Content_Encoding="gzip")
  handler.wfile.write(_DATA)


def _nothing(handler, asked):
  pass


def _no_http(handler, asked):
  handler.wfile.write(b"\x00" * 100)


def _redirected_for_ever(handler, asked):
  _head(handler, 0, 302, Location="/weights.pth")


def _redirected_to_a_file(handler, asked):
  _head(handler, 0, 302, Location="file:///etc/passwd")


def _lying_length(handler, asked):
  _head(handler, "a lot")
  handler.wfile.write(_DATA[:3000])


@pytest.mark.parametrize(
  "behaviour",
  [
    _wrong_place,
    _other_place,
    _no_length,
    _compressed,
    _nothing,
    _no_http,
    _redirected_for_ever,
    _redirected_to_a_file,
    _lying_length,
  ],
)
def test_servers_that_misbehave_leave_no_file(server, path, behaviour):
  server.behaviour = behaviour
  with pytest.raises(ConnectionError, match="weights.pth could not be fetched"):
    download.fetch(server.url, path, attempts=2)
  assert not path.exists()
  server.behaviour = None  # and nothing that was kept spoils the next call
  download.fetch(server.url, path)
  assert path.read_bytes() == _DATA


def test_more_than_was_announced_is_not_read(server, path):
  server.behaviour = _too_much
  download.fetch(server.url, path)
  assert path.read_bytes() == _DATA


def _drip(handler, asked):
  _head(handler, 5000)
  with contextlib.suppress(OSError):
    for index in range(200):
      handler.wfile.write(_DATA[index : index + 1])
      time.sleep(0.02)


def _drip_of_headers(handler, asked):
  with contextlib.suppress(OSError):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for _ in range(200):
      handler.wfile.write(b"X-A: b\r\n")
      time.sleep(0.02)


@pytest.mark.parametrize("behaviour", [_drip, _drip_of_headers])
def test_a_byte_now_and_then_ends_in_a_stated_time(server, path, behaviour, monkeypatch):
  monkeypatch.setattr(download, "_WINDOW_S", 0.2)
  monkeypatch.setattr(download, "_HEADERS_S", 0.2)
  server.behaviour = behaviour
  started = time.monotonic()
  with pytest.raises(ConnectionError, match="weights.pth could not be fetched"):
    download.fetch(server.url, path, attempts=2)
  assert time.monotonic() - started < 3
  assert not path.exists()


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
