"""A web server that misbehaves in one of many ways, and what a download must make of each."""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import http.server
import pathlib
import re
import threading
import time

import numpy as np

from frozen_vision.files import download

DATA = np.random.default_rng(0).bytes(5000)
SHA256 = hashlib.sha256(DATA).hexdigest()
_HTML = b"<html><title>Log in to this network</title></html>"


class Server(http.server.ThreadingHTTPServer):
  """Serves `data`; `cuts` holds after how many bytes the next answers break off, `behaviour` replaces all."""

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.data, self.version, self.cuts, self.requests = DATA, '"1"', [], []
    self.knows_ranges = True
    self.behaviour: Callable[[http.server.BaseHTTPRequestHandler, str | None], None] | None = None

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}/weights.pth"

  def handle_error(self, request, client_address):
    pass  # the client hangs up on what it does not like


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    server = self.server
    asked = self.headers.get("Range")
    server.requests.append(asked)
    self.close_connection = True
    if server.behaviour is not None:
      return server.behaviour(self, asked)
    if self.path != "/weights.pth":
      return self.send_error(404)
    self.serve(asked)

  def serve(self, asked: str | None) -> None:
    """Answers as a good server does, but for `cuts`."""
    server, start = self.server, 0
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

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def running() -> Iterator[Server]:
  with Server() as server:
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()


# Behaviours: (handler, Range header) -> answer.


def _head(handler, length=None, status=200, **headers):
  handler.send_response(status)
  handler.send_header("ETag", '"1"')
  if length is not None:
    handler.send_header("Content-Length", str(length))
  for name, value in headers.items():
    handler.send_header(name.replace("_", "-"), value)
  handler.end_headers()


def _answers(body=DATA, length=None, status=200, **headers):
  """The same answer to every request."""

  def behave(handler, asked):
    _head(handler, length, status, **headers)
    handler.wfile.write(body)

  return behave


def _first(behaviour):
  """Misbehaves at the first request only."""

  def behave(handler, asked):
    if len(handler.server.requests) == 1:
      behaviour(handler, asked)
    else:
      handler.serve(asked)

  return behave


def _then(behaviour):
  """Breaks off after 1000 bytes first, so that the next requests ask for the rest."""

  def behave(handler, asked):
    if asked:
      behaviour(handler, asked)
    else:
      _head(handler, 5000)
      handler.wfile.write(DATA[:1000])

  return behave


def _cut(handler, asked):
  handler.server.cuts = [1000]
  handler.serve(asked)


def _one_byte_early(handler, asked):
  handler.server.cuts = [len(DATA) - (int(asked[6:-1]) if asked else 0) - 1]
  handler.serve(asked)


def _slowly(data, seconds=0.02):
  def write(handler, asked):
    with contextlib.suppress(OSError):
      for index in range(500):
        handler.wfile.write(data[index % len(data)])
        time.sleep(seconds)

  return write


def _drip(handler, asked):
  _head(handler, 5000)
  _slowly([bytes([byte]) for byte in DATA])(handler, asked)


def _drip_of_headers(handler, asked):
  handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
  _slowly([b"X-A: b\r\n"])(handler, asked)


def _silence(handler, asked):
  time.sleep(3)


def _silence_in_the_middle(handler, asked):
  _head(handler, 5000)
  handler.wfile.write(DATA[:1000])
  handler.wfile.flush()
  time.sleep(3)


def _chunked(*chunks, end=b"0\r\n\r\n"):
  def behave(handler, asked):
    handler.protocol_version = "HTTP/1.1"
    _head(handler, Transfer_Encoding="chunked", Connection="close")
    for chunk in chunks:
      handler.wfile.write(b"%x\r\n" % len(chunk) + chunk + b"\r\n")
    handler.wfile.write(end)

  return behave


def _endless(handler, asked):
  _head(handler)
  with contextlib.suppress(OSError):
    for _ in range(10_000):
      handler.wfile.write(DATA)


def _changed(handler, asked):
  if len(handler.server.requests) > 1:
    handler.server.version, handler.server.data = '"2"', DATA[::-1]
    handler.serve(asked)
  else:
    _cut(handler, asked)


def _weak(handler, asked):
  handler.server.version = 'W/"1"'
  (_cut if len(handler.server.requests) == 1 else _Handler.serve)(handler, asked)


def _elsewhere(handler, asked):
  if handler.path == "/weights.pth":
    _head(handler, 0, 302, Location="/other")
  else:
    handler.serve(asked)


def _without_ranges(handler, asked):
  handler.server.knows_ranges = False
  (_cut if len(handler.server.requests) == 1 else _Handler.serve)(handler, asked)


_FLIPPED = DATA[:-1] + bytes([DATA[-1] ^ 1])
WHOLE, REFUSED, OTHER = "whole", "refused", "another file"
# {name: (behaviour, what becomes of a file with a published digest, of one without)}. Without a digest nobody
# can tell a file of the right size that is another one; it is pinned, so that it cannot change again.
BEHAVIOURS = {
  "answers well": (lambda handler, asked: handler.serve(asked), WHOLE, WHOLE),
  "breaks off once": (_first(_cut), WHOLE, WHOLE),
  "breaks off always": (_answers(DATA[:1000], 5000), REFUSED, REFUSED),
  "breaks off one byte early": (_one_byte_early, REFUSED, REFUSED),
  "breaks off before the body": (_answers(b"", 5000), REFUSED, REFUSED),
  "closes at once": (lambda handler, asked: None, REFUSED, REFUSED),
  "closes at once, the first time": (_first(lambda handler, asked: None), WHOLE, WHOLE),
  "tells no length": (_answers(), REFUSED, REFUSED),
  "tells no length and breaks off": (_answers(DATA[:3000]), REFUSED, REFUSED),
  "tells no length and never ends": (_endless, REFUSED, REFUSED),
  "tells a length that is no number": (_answers(DATA, "a lot"), REFUSED, REFUSED),
  "tells a negative length": (_answers(DATA, -5), REFUSED, REFUSED),
  "tells too short a length": (_answers(DATA, 4000), REFUSED, REFUSED),
  "tells too long a length": (_answers(DATA, 6000), REFUSED, REFUSED),
  "tells more than the disk holds": (_answers(DATA, 10**15), REFUSED, REFUSED),
  "sends more than it tells": (_answers(DATA + b"more", 5000), WHOLE, WHOLE),
  "sends chunks": (_chunked(DATA[:2000], DATA[2000:]), REFUSED, REFUSED),
  "sends chunks that break off": (_chunked(DATA[:2000], end=b"bb8\r\nx"), REFUSED, REFUSED),
  "sends what it calls gzip": (_answers(DATA, 5000, Content_Encoding="gzip"), REFUSED, REFUSED),
  "continues at another byte": (
    _then(_answers(DATA[800:4900], 4100, 206, Content_Range="bytes 900-4999/5000")),
    REFUSED,
    REFUSED,
  ),
  "continues where it was not asked to": (
    _then(_answers(DATA[500:], 4500, 206, Content_Range="bytes 500-4999/5000")),
    REFUSED,
    REFUSED,
  ),
  "continues without saying where": (_then(_answers(DATA[900:], 4100, 206)), REFUSED, REFUSED),
  "continues to another end": (
    _then(_answers(DATA[900:], 4100, 206, Content_Range="bytes 900-5999/6000")),
    REFUSED,
    REFUSED,
  ),
  "knows no ranges": (_without_ranges, WHOLE, WHOLE),
  "has nothing to continue": (_then(lambda handler, asked: handler.send_error(416)), REFUSED, REFUSED),
  "replaces the file meanwhile": (_changed, REFUSED, OTHER),
  "has a weak version": (_weak, WHOLE, WHOLE),
  "drips bytes": (_drip, REFUSED, REFUSED),
  "drips headers": (_drip_of_headers, REFUSED, REFUSED),
  "sends headers without end": (_answers(b"", 5000, X=70_000 * "x"), REFUSED, REFUSED),
  "is silent": (_silence, REFUSED, REFUSED),
  "is silent in the middle": (_silence_in_the_middle, REFUSED, REFUSED),
  "speaks no HTTP": (lambda handler, asked: handler.wfile.write(bytes(100)), REFUSED, REFUSED),
  "redirects": (_elsewhere, WHOLE, WHOLE),
  "redirects for ever": (_answers(b"", 0, 302, Location="/weights.pth"), REFUSED, REFUSED),
  "redirects to a file": (_answers(b"", 0, 302, Location="file:///etc/passwd"), REFUSED, REFUSED),
  "knows no such file": (lambda handler, asked: handler.send_error(404), REFUSED, REFUSED),
  "fails always": (lambda handler, asked: handler.send_error(500), REFUSED, REFUSED),
  "fails once": (_first(lambda handler, asked: handler.send_error(503)), WHOLE, WHOLE),
  "wants a login": (_answers(_HTML, len(_HTML)), REFUSED, REFUSED),
  "flips a bit": (_answers(_FLIPPED, 5000), REFUSED, OTHER),
}
# Seconds that take the place of those of `download`, so that a behaviour takes no minutes; the most of a call
# with `ATTEMPTS` follows from them.
TIMES = {"_TIMEOUT_S": 0.5, "_HEADERS_S": 0.5, "_WINDOW_S": 0.3}
# And a part asked for again that is smaller than the file, so that a download continues in its middle.
SETTINGS = TIMES | {"_OVERLAP": 100}
ATTEMPTS = 3
MOST_SECONDS = ATTEMPTS * sum(TIMES.values()) + 2.0


def try_one(name: str, folder: pathlib.Path, *, has_digest: bool) -> tuple[str, float, list[str]]:
  """What becomes of a download from a server of one behaviour, with the times of `TIMES`.

  Returns:
    ("whole", "refused" or "another file", seconds, what is wrong with that).
  """
  behaviour, with_digest, without = BEHAVIOURS[name]
  path, faults = folder / f"{'with' if has_digest else 'without'}" / "weights.pth", []
  options = dict(sha256=SHA256 if has_digest else None, least_bytes=len(DATA), attempts=ATTEMPTS)
  with running() as server:
    server.behaviour = behaviour
    started = time.monotonic()
    try:
      download.fetch(server.url, path, **options)
      outcome = WHOLE if path.read_bytes() == DATA else OTHER
    except (ConnectionError, ValueError, OSError) as error:
      outcome = REFUSED
      if path.exists():
        faults.append("a file is there although it was refused")
      if server.url not in str(error) and str(path) not in str(error):
        faults.append(f"the error names no file: {error}")
    seconds = time.monotonic() - started
    if outcome != (with_digest if has_digest else without):
      faults.append(f"it was {outcome}")
    if seconds > MOST_SECONDS:
      faults.append(f"it took {seconds:.1f} s")
    if outcome == REFUSED:  # nothing that was kept spoils the next call
      server.behaviour, server.data, server.version, server.knows_ranges = None, DATA, '"1"', True
      server.cuts = []
      download.fetch(server.url, path, **options)
      if path.read_bytes() != DATA:
        faults.append("what was kept spoils a later download")
  return outcome, seconds, faults
