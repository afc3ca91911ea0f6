"""Downloads large files over networks that break: resumed, verified, named only once complete.

A server may close early, continue at the wrong place, change the file, or send a byte a second: what it sent
is kept only where it fits, and no call lasts longer than its attempts, each of which ends once a minute has
passed below 1 kB/s. A file whose publisher gives no digest is pinned: the digest of its first use is kept
beside it and compared from then on.
"""

from collections.abc import Iterator
import contextlib
import errno
import hashlib
import http.client
import logging
import os
import pathlib
import shutil
import socket
import threading
import time
from typing import BinaryIO
import urllib.error
import urllib.parse
import urllib.request

from frozen_vision.files import atomic

try:
  import fcntl
except ImportError:  # Windows: two processes must not fetch the same file at once there.
  fcntl = None

_logger = logging.getLogger(__name__)
_CHUNK = 1 << 20
_TIMEOUT_S = 30  # without a byte
_HEADERS_S = 60  # for a whole answer's head
_WINDOW_S = 60  # over which a transfer may not be slower than this:
_SLOWEST = 1024  # bytes per second
_ATTEMPTS = 3
_OVERLAP = 1 << 16  # bytes that are asked for again, to see whether a server continues where it says


def fetch(
  url: str,
  path: pathlib.Path,
  *,
  sha256: str | None = None,
  least_bytes: int = 0,
  attempts: int = _ATTEMPTS,
) -> pathlib.Path:
  """Fetches a file to `path`, unless it is there.

  What has come lies in `path.partial` until all of it is there and verified; a further call, or the same one
  after an interruption, asks for the rest only. Processes that want the same file wait for each other.

  Args:
    url: `https:`, `http:` or `file:`.
    sha256: of the whole file, as hexadecimals; None if its publisher gives none: then the digest of what came
      is pinned beside it (`check`). In any case the server must tell the file's length.
    least_bytes: a file smaller than this is refused, whatever the server says.
    attempts: how often a transfer that breaks is taken up again.

  Returns:
    `path`.

  Raises:
    ConnectionError: the server could not be reached, or the transfer broke too often or was too slow; what
      came is kept.
    OSError: it cannot be written, or is larger than what the disk has left.
    ValueError: another hash or too few bytes: nothing is kept.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  with _locked(path.with_name(path.name + ".lock")):
    if path.is_file():
      check(path, url, sha256=sha256, least_bytes=least_bytes)
      return path
    _logger.info("Fetching %s to %s.", url, path)
    for attempt in range(1, attempts + 1):
      try:
        _transfer(url, partial)
        break
      except (OSError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
          raise
        refused = isinstance(error, FileNotFoundError) or getattr(error, "code", 500) < 500
        if refused or attempt == attempts:
          size = partial.stat().st_size if partial.exists() else 0
          kept = f" {size:,} bytes are kept and the next try continues." if size else ""
          raise ConnectionError(
            f"{url} could not be fetched ({error}).{kept} Without a network, fetch it elsewhere and put it "
            f"at {path}."
          ) from error
        _logger.warning("%s broke off (%s); trying again.", url, error)
    found = file_sha256(partial)
    size = partial.stat().st_size
    if size < least_bytes or found != (sha256 or found):
      partial.unlink()
      wanted = f"the SHA-256 {sha256}" if size >= least_bytes else f"at least {least_bytes:,} bytes"
      raise ValueError(
        f"{url} gave {size:,} bytes with the SHA-256 {found}, expected {wanted}. The file was removed; if "
        "the publisher has replaced it, fetch it by hand and give its path."
      )
    if sha256 is None:
      atomic.write_text(_pin(path), f"{found}  {size}\n")
    partial.replace(path)
    _logger.info(
      "%s: %s bytes, SHA-256 %s%s.",
      path,
      f"{size:,}",
      found,
      "" if sha256 else " (none was published to compare it with)",
    )
  return path


def check(path: pathlib.Path, url: str, *, sha256: str | None = None, least_bytes: int = 0) -> None:
  """Compares a file that is there with what is published, or with what it was at its first use.

  Raises:
    ValueError: it is another file; says what was expected.
  """
  size, found = path.stat().st_size, file_sha256(path)
  pin = _pin(path)
  wanted = sha256
  if wanted is None and pin.is_file():
    wanted = pin.read_text().partition(" ")[0]
  if size < least_bytes:
    expected = f"{url} has at least {least_bytes:,} bytes"
  elif wanted is not None and found != wanted:
    who = f"{url} has" if sha256 else f"{pin.name} beside it, written at its first use, says"
    expected = f"{who} the SHA-256 {wanted}"
  else:
    if sha256 is None and not pin.is_file():
      with contextlib.suppress(OSError):  # a folder that only others may write to
        atomic.write_text(pin, f"{found}  {size}\n")
    return
  raise ValueError(
    f"{path} has {size:,} bytes with the SHA-256 {found}, but {expected}. Remove both to have the "
    "file fetched again."
  )


def _pin(path: pathlib.Path) -> pathlib.Path:
  """The file with the digest of the first use, for one whose publisher gives none."""
  return path.with_name(path.name + ".sha256")


def file_sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _transfer(url: str, partial: pathlib.Path) -> None:
  """Appends to the partial file what it lacks.

  Raises:
    OSError, HTTPException: the server cannot be reached, sent less than it said, was too slow, continued with
      other bytes than are there, or does not tell how long the file is; or there is no room for it.
  """
  start = partial.stat().st_size if partial.exists() else 0
  with contextlib.closing(_open(url, partial, start)) as body:
    if body.total is None:  # it could be cut off, or never end
      raise ConnectionError("the server does not tell the file's length")
    free = shutil.disk_usage(partial.parent).free
    if body.total - start > free:
      raise OSError(errno.ENOSPC, f"{url} has {body.total:,} bytes, and {free:,} are free", str(partial))
    position = body.start
    with open(partial, "r+b" if partial.exists() else "w+b") as file:
      _compare(body, file, start, partial)
      position = file.tell()
      file.truncate()
      watch = _SpeedWatch()
      while chunk := body.read(_CHUNK):
        file.write(chunk)
        position += len(chunk)
        watch.add(len(chunk))
        if position > body.total:
          break
  if position != body.total:
    if position > body.total:
      partial.unlink()
    raise ConnectionError(f"{position:,} of {body.total:,} bytes came")
  _validator(partial).unlink(missing_ok=True)


def _compare(body: "_Body", file: BinaryIO, there: int, partial: pathlib.Path) -> None:
  """Checks that body and file agree where they overlap, and leaves the file positioned behind that.

  Raises:
    ConnectionError: they differ: the server continues somewhere else than it says. The file is removed.
  """
  file.seek(body.start)
  left = max(0, there - body.start) if body.start else 0
  while left:
    chunk = body.read(left)
    if not chunk or file.read(len(chunk)) != chunk:
      partial.unlink()
      raise ConnectionError(
        f"what the server sent for byte {body.start:,} on is not what came before; beginning anew"
      )
    left -= len(chunk)


class _SpeedWatch:
  """Ends a transfer that is too slow to ever end."""

  def __init__(self):
    self._started, self._count = time.monotonic(), 0

  def add(self, count: int) -> None:
    self._count += count
    elapsed = time.monotonic() - self._started
    if elapsed >= _WINDOW_S:
      if self._count < _SLOWEST * elapsed:
        raise ConnectionError(
          f"{self._count:,} bytes came in {elapsed:.0f} s, less than {_SLOWEST:,} a second"
        )
      self._started, self._count = time.monotonic(), 0


class _Deadline:
  """A connection with a deadline for response headers: a byte now and then does not extend it."""

  def getresponse(self):
    timer = threading.Timer(_HEADERS_S, self._give_up)
    timer.start()
    try:
      return super().getresponse()
    finally:
      timer.cancel()

  def _give_up(self) -> None:
    with contextlib.suppress(OSError, AttributeError):
      self.sock.shutdown(socket.SHUT_RDWR)


class _Http(_Deadline, http.client.HTTPConnection):
  pass


class _Https(_Deadline, http.client.HTTPSConnection):
  pass


class _HttpHandler(urllib.request.HTTPHandler):
  def http_open(self, request):
    return self.do_open(_Http, request)


class _HttpsHandler(urllib.request.HTTPSHandler):
  def https_open(self, request):
    return self.do_open(_Https, request)


class _Body:
  """The bytes of a file from `start` on; `total` is its whole length, None if the server does not tell."""

  def __init__(self, stream, start: int, total: int | None):
    # Reads what has arrived: waiting for a whole chunk would notice a slow server only after it.
    self.read = getattr(stream, "read1", stream.read)
    self.close, self.start, self.total = stream.close, start, total


def _open(url: str, partial: pathlib.Path, start: int) -> _Body:
  parts = urllib.parse.urlsplit(url)
  if parts.scheme == "file":
    stream = open(urllib.request.url2pathname(parts.path), "rb")
    total = os.fstat(stream.fileno()).st_size
    start = stream.seek(start if start <= total else 0)
    return _Body(stream, start, total)
  # A file that the server has replaced since must not be continued with bytes of another.
  validator = _validator(partial).read_text() if _validator(partial).exists() else ""
  headers = {"Accept-Encoding": "identity"}
  if start and validator:
    start = max(0, start - _OVERLAP)
    headers |= {"Range": f"bytes={start}-", "If-Range": validator}
  opener = urllib.request.build_opener(_HttpHandler, _HttpsHandler)
  try:
    response = opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
  except urllib.error.HTTPError as error:
    if error.code != 416:
      raise
    error.close()
    partial.unlink()  # it is as long as the file, but may be another one
    raise ConnectionError(f"the server has nothing after byte {start:,}; beginning anew") from error
  length = response.headers.get("Content-Length")
  if response.headers.get("Content-Encoding", "identity") != "identity":
    response.close()
    raise ConnectionError(f"the server sends {response.headers['Content-Encoding']}, which was not asked for")
  if response.status == 206:
    # "bytes 100-199/200"
    span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    if span.partition("-")[0] != str(start):
      response.close()
      raise ConnectionError(f"the server continues at {span or 'an unknown place'}, not at {start}")
    return _Body(response, start, int(total) if total.isdigit() else None)
  # A weak ETag does not promise equal bytes, so no download can be resumed by it.
  validator = response.headers.get("ETag", "")
  if not validator or validator.startswith("W/"):
    validator = response.headers.get("Last-Modified", "")
  _validator(partial).write_text(validator)
  return _Body(response, 0, int(length) if length and length.isdigit() else None)


def _validator(partial: pathlib.Path) -> pathlib.Path:
  """The file beside a partial file that holds the server's version of it: its ETag or date."""
  return partial.with_name(partial.name + ".version")


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  with open(path, "w") as file:
    if fcntl is not None:
      fcntl.flock(file, fcntl.LOCK_EX)  # the system lets go of it when a process ends, however it ends
    yield
