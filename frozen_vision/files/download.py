"""Large files over a network that breaks: resumed, verified, and never half there under their own name."""

from collections.abc import Iterator
import contextlib
import hashlib
import http.client
import logging
import os
import pathlib
import urllib.error
import urllib.parse
import urllib.request

try:
  import fcntl
except ImportError:  # Windows: two processes must not fetch the same file at once there.
  fcntl = None

_logger = logging.getLogger(__name__)
_CHUNK = 1 << 20
_TIMEOUT_S = 30
_ATTEMPTS = 3


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
    sha256: of the whole file, as hexadecimals; None if nobody published it. Then the length that the server
      tells is all that is checked.
    least_bytes: a file smaller than this is refused, whatever the server says.
    attempts: how often a transfer that breaks is taken up again.

  Returns:
    `path`.

  Raises:
    ConnectionError: the server could not be reached, or the transfer broke too often; what came is kept.
    ValueError: another hash or too few bytes: nothing is kept.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  with _locked(path.with_name(path.name + ".lock")):
    if path.is_file():
      return path
    _logger.info("Fetching %s to %s.", url, path)
    for attempt in range(1, attempts + 1):
      try:
        _transfer(url, partial)
        break
      except (OSError, http.client.HTTPException) as error:
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
    partial.replace(path)
    _logger.info(
      "%s: %s bytes, SHA-256 %s%s.",
      path,
      f"{size:,}",
      found,
      "" if sha256 else " (none was published to compare it with)",
    )
  return path


def file_sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _transfer(url: str, partial: pathlib.Path) -> None:
  """Appends to the partial file what it lacks.

  Raises:
    OSError, HTTPException: the server cannot be reached, or it sent less than it said.
  """
  start = partial.stat().st_size if partial.exists() else 0
  with contextlib.closing(_open(url, partial, start)) as body:
    with open(partial, "ab") as file:
      file.truncate(body.start)
      position = body.start
      while chunk := body.read(_CHUNK):
        file.write(chunk)
        position += len(chunk)
  if body.total is not None and position != body.total:
    raise ConnectionError(f"{position:,} of {body.total:,} bytes came")
  _validator(partial).unlink(missing_ok=True)


class _Body:
  """The bytes of a file from `start` on; `total` is its whole length, None if the server does not tell."""

  def __init__(self, stream, start: int, total: int | None):
    self.read, self.close, self.start, self.total = stream.read, stream.close, start, total


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
    headers |= {"Range": f"bytes={start}-", "If-Range": validator}
  try:
    response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
  except urllib.error.HTTPError as error:
    if error.code != 416:
      raise
    error.close()
    partial.unlink()  # it is as long as the file, so nothing follows; whether it is the file nobody says
    raise ConnectionError(f"the server has nothing after byte {start:,}; beginning anew") from error
  length = response.headers.get("Content-Length")
  if response.status == 206:
    # "bytes 100-199/200"
    span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    if span.partition("-")[0] != str(start):
      response.close()
      raise ConnectionError(f"the server continues at {span or 'an unknown place'}, not at {start}")
    return _Body(response, start, int(total) if total.isdigit() else None)
  # A weak ETag promises no equal bytes, so it cannot hold a file together.
  validator = response.headers.get("ETag", "")
  if not validator or validator.startswith("W/"):
    validator = response.headers.get("Last-Modified", "")
  _validator(partial).write_text(validator)
  return _Body(response, 0, int(length) if length else None)


def _validator(partial: pathlib.Path) -> pathlib.Path:
  """Beside a partial file: by what the server knows the version that it is of."""
  return partial.with_name(partial.name + ".version")


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  with open(path, "w") as file:
    if fcntl is not None:
      fcntl.flock(file, fcntl.LOCK_EX)  # the system lets go of it when a process ends, however it ends
    yield
