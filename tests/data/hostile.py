"""Small files that nobody vouches for: good ones, how they are mutated, and what readers may say of them."""

from collections.abc import Callable
import contextlib
import copy
import dataclasses
import io
import json
import pathlib
import random
import re
import tarfile
import time
import tracemalloc
import warnings

import av
import numpy as np
from PIL import Image

from frozen_vision.data import classes, images, names, text_files
from frozen_vision.data.classification import folders
from frozen_vision.data.detection import coco
from frozen_vision.data.segmentation import class_lists, label_maps
from frozen_vision.data.video import decoding, lists
from frozen_vision.metrics import coco_ap

_SECONDS = 5.0
_MOST_BYTES = 2**27
# Errors whose text is ours. A bare ValueError is checked for the name of the file too.
_ERRORS = (text_files.TextError, coco.CocoError, names.OutsideError, FileNotFoundError, ValueError)
_FOREIGN = (UnicodeError, json.JSONDecodeError)
_NUMBERS = [-1, 0, 255, 65536, 99_999_999, 2**53 + 1, 2**63, 10**400, 1e308, float("nan"), float("inf"), 0.5]
_TEXTS = ["", "x" * 3000, "../../x", "/etc/passwd", "a\0b", "#12345", "\ud800"]
_VALUES = [None, True, False, *_NUMBERS, *_TEXTS, [], [[]], {}, [1, 2, 3], {"a": 1}]
_MARKS = (b'"', b",", b"\n", b"\r", b"\t", b"\0", b"\xff\xfe", b"{", b"]", b"-")


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
  content = bytearray(data)
  for _ in range(rng.randint(1, 4)):
    start = rng.randrange(len(content) + 1)
    end = min(len(content), start + rng.choice((1, 1, 2, 8, 64)))
    match rng.randrange(6):
      case 0:
        content[start:end] = rng.randbytes(end - start)
      case 1:
        del content[start:end]
      case 2:
        content[start:start] = content[start:end] * rng.choice((1, 2, 50))
      case 3:
        content[start:start] = rng.choice(_MARKS)
      case 4:
        digits = [match.span() for match in re.finditer(rb"[0-9]+", content)]
        if digits:
          start, end = rng.choice(digits)
          content[start:end] = rng.choice((b"-1", b"99999999", b"9" * 400, b"1e999", b"NaN", b"0x10", b""))
      case _:
        del content[start:]
  return bytes(content)


def _mutate_json(content, rng: random.Random) -> bytes:
  """Replaces, removes or repeats some values anywhere in a document."""
  content = json.loads(json.dumps(content))
  for _ in range(rng.randint(1, 3)):
    places = []

    def collect(node):
      keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
      for key in keys:
        places.append((node, key))
        collect(node[key])

    collect(content)
    if not places:
      break
    node, key = rng.choice(places)
    match rng.randrange(4):
      case 0:
        del node[key]
      case 1 if isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
      case _:
        node[key] = copy.deepcopy(rng.choice(_VALUES))
  return json.dumps(content).encode("utf-8", "surrogatepass")


def _annotations():
  square = [[2.0, 3.0, 14.0, 3.0, 14.0, 16.0, 2.0, 16.0]]
  runs = {"size": [40, 50], "counts": [100, 30, 40 * 50 - 130]}
  common = dict(image_id=1, bbox=[2, 3, 12, 13], area=156)
  return dict(
    images=[dict(id=i, file_name=f"{i}.png", height=40, width=50) for i in (1, 2)],
    annotations=[
      dict(id=1, category_id=1, iscrowd=0, segmentation=square, **common),
      dict(id=2, category_id=2, iscrowd=1, segmentation=runs, **common),
    ],
    categories=[dict(id=1, name="a"), dict(id=2, name="b")],
  )


def _read_coco(path):
  source = coco.load_coco(path, path.parent, require_masks=None, check_images=True)
  for index in range(len(source)):
    record = source[index]
    if source.has_masks:
      coco.masks(record)
  truth = source.ground_truth
  json.dumps(truth)
  if truth["categories"]:
    coco_ap.CocoEvaluator(truth, ("bbox",))


def _evaluate(path):
  """Detections are a list, a ground truth is an object: each is tried with a sound one of the other."""
  truth, found = path.with_name("truth.json"), path.with_name("found.json")
  truth.write_text(json.dumps(_annotations()))
  found.write_text(json.dumps(_DETECTIONS))
  with contextlib.redirect_stdout(io.StringIO()):
    if b'"score"' in path.read_bytes():
      coco_ap.evaluate_files(truth, path)
    else:
      coco_ap.evaluate_files(path, found)


def _encoded(ending: str, *, side: int = 24, **options) -> bytes:
  """An image of noise as a file of a format."""
  pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
  if ending == "16 bit":
    image, ending = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "png"
  elif ending == "palette":
    image, ending = Image.fromarray(pixels).quantize(16), "png"
  else:
    image = Image.fromarray(pixels)
  file = io.BytesIO()
  image.save(file, ending, **options)
  return file.getvalue()


def _tar() -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w:gz") as archive:
    for name in ("a/1.png", "b/2.png"):
      data = _encoded("png", side=8)
      member = tarfile.TarInfo(name)
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  return file.getvalue()


def _video() -> bytes:
  file = io.BytesIO()
  with av.open(file, "w", format="mp4") as container:
    stream = container.add_stream("mpeg4", rate=10)
    stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
    for shade in range(12):
      frame = av.VideoFrame.from_ndarray(np.full((24, 32, 3), 20 * shade, np.uint8))
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return file.getvalue()


def _read_image(path):
  images.decode_image(images.read_bytes(path, name=path.name), name=path.name)


def _read_labels(path):
  label_maps.LabelFormat(tuple(map(str, range(255)))).decode(path.read_bytes(), name=path.name)


def _read_tar(path):
  source = folders.ImageTar(path)
  for index in range(len(source)):
    folders.record_image(source[index])


def _read_video(path):
  with decoding.Video(path) as video:
    video.read(np.arange(len(video)))


_DETECTIONS = [
  dict(image_id=1, category_id=1, bbox=[2, 3, 12, 13], score=0.9, segmentation=s)
  for s in ({"size": [40, 50], "counts": [100, 30, 1870]}, [[2, 3, 14, 3, 14, 16]])
]
_PANOPTIC = {"annotations": [{"file_name": "a.png", "segments_info": [{"id": 7, "category_id": 1}]}]}
_COLOURS = [{"name": "a", "value": 1, "color": [1, 2, 3]}, {"name": "b", "value": 255, "color": "#00ff00"}]
# Name: (the file, its content, the reader); content that is no bytes is JSON, mutated as such too.
READERS = {
  "names": ("a.txt", "straße\nhaus, klein\n".encode(), class_lists.read_format),
  "utf-16": ("a.txt", "straße\nhaus\n".encode("utf-16"), class_lists.read_format),
  "colour table": ("a.csv", b"name,r,g,b\nroad,1,2,3\nsky,4,5,6\n", class_lists.read_format),
  "classes": ("a.json", {"classes": _COLOURS, "ignore_index": 9}, class_lists.read_format),
  "categories": ("a.json", {"categories": _annotations()["categories"]}, class_lists.read_format),
  "panoptic": ("a.json", _PANOPTIC, class_lists.read_segments),
  "class names": ("a.json", ["a", "b"], classes.read_classes),
  "video table": ("a.csv", b'path,label,scene\n"1.png",x,1\n2.png,"y, z",2\n', lists.open_videos),
  "video lines": ("a.txt", b'1.png 0\n"2.png" 1\n', lists.open_videos),
  "kinetics": (
    "a.csv",
    b"label,youtube_id,time_start,time_end,split\nx,-a_B,10,20,train\n",
    lists.open_videos,
  ),
  "coco": ("a.json", _annotations(), _read_coco),
  "detections": ("a.json", _DETECTIONS, _evaluate),
  "ground truth": ("a.json", _annotations(), _evaluate),
  "png": ("a.png", _encoded("png"), _read_image),
  "png 16 bit": ("a.png", _encoded("16 bit"), _read_image),
  "png palette": ("a.png", _encoded("palette"), _read_image),
  "jpeg": ("a.jpg", _encoded("jpeg"), _read_image),
  "webp": ("a.webp", _encoded("webp"), _read_image),
  "tiff": ("a.tif", _encoded("tiff", compression="tiff_lzw"), _read_image),
  "label image": ("a.png", _encoded("palette"), _read_labels),
  "tar": ("a.tar.gz", _tar(), _read_tar),
  "video": ("a.mp4", _video(), _read_video),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of one mutated file.

  Attributes:
    kind: "read"; "refused", with an error of ours that names the file; or "fault".
    said: the error.
    data: the file's content.
    seconds: wall-clock time.
    peak: bytes that Python and NumPy held at most.
  """

  kind: str
  said: str
  data: bytes
  seconds: float
  peak: int


def make_files(folder: pathlib.Path) -> None:
  """Writes the images and videos that the good files name."""
  for i in (1, 2):
    Image.fromarray(np.full((40, 50, 3), i, np.uint8)).save(folder / f"{i}.png")
  (folder / "-a_B_000010_000020.mp4").write_bytes(b"x")


def try_one(reader: str, case: int, folder: pathlib.Path, rng: random.Random) -> Outcome:
  """Reads a mutation of a good file; of JSON two of three mutations are of its values."""
  name, content, read = READERS[reader]
  if isinstance(content, bytes):
    data = _mutate_bytes(content, rng)
  elif case % 3:
    data = _mutate_json(content, rng)
  else:
    data = _mutate_bytes(json.dumps(content).encode(), rng)
  return _outcome(folder / name, data, read)


def read_good(reader: str, folder: pathlib.Path) -> Outcome:
  """Reads the good file itself."""
  name, content, read = READERS[reader]
  return _outcome(
    folder / name, content if isinstance(content, bytes) else json.dumps(content).encode(), read
  )


def _outcome(path: pathlib.Path, data: bytes, read: Callable[[pathlib.Path], None]) -> Outcome:
  """What becomes of a file with these bytes."""
  name = path.name
  path.write_bytes(data)
  kind, said, started = "read", "", time.perf_counter()
  tracemalloc.start()
  try:
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of what it mends
      read(path)
  except Exception as error:
    said = f"{type(error).__name__}: {error}"
    ours = isinstance(error, _ERRORS) and not isinstance(error, _FOREIGN)
    named = name in said or "ground truth" in said or isinstance(error, images.ImageError)
    kind = "refused" if ours and named else "fault"
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  seconds = time.perf_counter() - started
  if seconds > _SECONDS or peak > _MOST_BYTES:
    kind, said = "fault", f"{seconds:.1f} s, {peak} bytes. {said}"
  return Outcome(kind, said, data, seconds, peak)
