"""Labelled images for classification: a folder per class, or the same tree in a tar archive."""

from collections.abc import Sequence
import pathlib
import tarfile
from typing import Any

from jaxtyping import Bool, Int, UInt8
import numpy as np

from frozen_vision.data import classes as class_names
from frozen_vision.data import findings, fingerprint, image_checks, images

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")


KINDS = {"image_unreadable": findings.Kind("images that cannot be read: dropped", "images")}


class ImageFiles:
  """Records of image files below a folder, read when asked for.

  Attributes:
    classes: class names; a label is a position in it.
    labels: int32 [n], the label of each record; bool [n, classes] where an image has several.
    names: path of each record below the root.
    findings: what `check` counted.
  """

  def __init__(
    self,
    root: pathlib.Path,
    names: Sequence[str],
    labels: Int[np.ndarray, "n"] | Bool[np.ndarray, "n k"],
    classes: Sequence[str],
  ):
    self._root, self.names, self.labels, self.classes = root, list(names), labels, list(classes)
    self.findings = findings.Findings(KINDS)

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record {image: encoded bytes, label, name: path below the root}."""
    name = self.names[index]
    return {
      "image": images.read_bytes(self._root / name, name=name),
      "label": self.labels[index],
      "name": name,
    }

  def files(self) -> list[pathlib.Path]:
    """The file of every record; see `data.content`."""
    return [self._root / name for name in self.names]

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    sizes = fingerprint.file_sizes(self.files())
    return {"file names": self.names, "labels": self.labels, "file sizes": sizes}

  def check(self) -> None:
    """Looks at every file, and leaves out those that cannot be read; `findings` says which."""
    errors = image_checks.check_files(self.files(), self.names)
    kept = self.findings.add_errors("image_unreadable", errors)
    self.findings.saw("images", len(self.names))
    self.names, self.labels = [self.names[index] for index in kept], self.labels[kept]


class ImageFolder(ImageFiles):
  """Records of `ROOT/CLASS/**/IMAGE`, files read when asked for.

  Attributes:
    classes: class names; a label is a position in it.
    labels: int32 [n], the label of each record.
    names: path of each record below the root, sorted by class, then path.
    findings: what `check` counted.
  """

  def __init__(self, root: str | pathlib.Path, *, classes: Sequence[str] | None = None):
    """Lists the images.

    Args:
      root: folder with one folder per class.
      classes: class names in the order of their labels; default: `classes.json` in the root or
        beside it (a JSON list of names), else the folders' names, sorted.

    Raises:
      FileNotFoundError: the root is no folder.
      ValueError: no images, a folder that is not in `classes`, a class without any image.
    """
    root = pathlib.Path(root)
    if not root.is_dir():
      raise FileNotFoundError(f"{root} is not a folder; expected one folder per class in it.")
    if classes is None:
      classes = class_names.find_classes(root, root.parent)
    names = [
      path.relative_to(root).as_posix()
      for path in root.rglob("*")
      if path.suffix.lower() in images.SUFFIXES and not path.is_dir()
    ]
    classes, names, labels = _label(names, classes, root)
    super().__init__(root, names, labels, classes)


class ImageTar:
  """Records of a tar archive with members `CLASS/IMAGE`, read once and kept as encoded bytes.

  The bytes are one array, so that the source pickles fast and holds no open file. Attributes as
  in `ImageFolder`.
  """

  def __init__(self, path: str | pathlib.Path, *, classes: Sequence[str] | None = None):
    """Reads the archive (.tar, also with gz, xz or bz2 compression).

    Args:
      path: the archive.
      classes: class names in the order of their labels; default: `classes.json` beside the
        archive, else the members' first path components, sorted.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a readable archive, no images in it, or classes as in `ImageFolder`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(f"{path} is not a file; expected a tar archive of CLASS/IMAGE.")
    if classes is None:
      classes = class_names.find_classes(path, path.parent)
    contents = {}
    try:
      with tarfile.open(path) as archive:
        for member in archive:
          if not member.isfile():
            continue
          name = pathlib.PurePosixPath(member.name)
          if name.suffix.lower() in images.SUFFIXES:
            contents[name.as_posix()] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
      raise ValueError(
        f"{path} cannot be read as a tar archive to its end ({error}); download it again."
      ) from error
    except Exception as error:  # lzma and zlib have errors of their own, without a common base.
      raise ValueError(f"{path} is damaged ({error}); download it again.") from error
    self.classes, self.names, self.labels = _label(list(contents), classes, path)
    sizes = [len(contents[name]) for name in self.names]
    self._ends = np.cumsum(sizes)
    self._starts = self._ends - sizes
    self._bytes = np.frombuffer(b"".join(contents[name] for name in self.names), np.uint8)
    self.findings = findings.Findings(KINDS)

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record {image: encoded bytes, label: int32, name: member}."""
    index = range(len(self.names))[index]
    image = self._bytes[self._starts[index] : self._ends[index]].tobytes()
    return {"image": image, "label": self.labels[index], "name": self.names[index]}

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    sizes = (self._ends - self._starts).astype(np.int64)
    return {"file names": self.names, "labels": self.labels, "file sizes": sizes}

  def check(self) -> None:
    """As `ImageFolder.check`; the bytes of what is left out stay in memory."""
    errors = (image_checks.check_bytes(self[index]["image"], name) for index, name in enumerate(self.names))
    kept = self.findings.add_errors("image_unreadable", errors)
    self.findings.saw("images", len(self.names))
    self.names, self.labels = [self.names[index] for index in kept], self.labels[kept]
    self._starts, self._ends = self._starts[kept], self._ends[kept]


class Part:
  """Some records of a source, in the order of the positions.

  Attributes `classes`, `names`, `labels` and `findings` are as in `ImageFolder`.
  """

  def __init__(self, source: Any, positions: Int[np.ndarray, "n"]):
    self._source, self._positions = source, positions
    self.classes = source.classes
    self.names = [source.names[position] for position in positions]
    self.labels = source.labels[positions]
    self.findings = findings.Findings(KINDS)

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record, as the source has it."""
    return self._source[int(self._positions[index])]

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    return {
      name: [values[position] for position in self._positions]
      if name == "file names"
      else values[self._positions]
      for name, values in self._source.identity().items()
    }


def hold_out(source: ImageFolder | ImageTar, fraction: float) -> tuple[Part, Part]:
  """Splits a source into images to train on and images to evaluate on, class by class.

  The draw is the same for every seed of a run, so that all runs on the data are judged by the same images.

  Args:
    fraction: of the images of each class, between 0 and 1; of two images or more at least one is held out,
      and one is trained on.

  Returns:
    (training, validation); the findings of the source are the training's.

  Raises:
    ValueError: a fraction that is not between 0 and 1, or nothing to hold out.
  """
  if not 0 < fraction < 1:
    raise ValueError(f"The fraction of images held out is {fraction}; expected a number between 0 and 1.")
  held: list[int] = []
  for label in np.unique(source.labels):
    members = np.random.default_rng(int(label)).permutation(np.flatnonzero(source.labels == label))
    count = min(max(1, round(fraction * len(members))), len(members) - 1)
    held += members[:count].tolist()
  if not held:
    raise ValueError("No class has two images or more, so that none can be held out; give validation data.")
  kept = np.setdiff1d(np.arange(len(source)), held)
  train, validation = Part(source, kept), Part(source, np.sort(np.asarray(held)))
  train.findings = source.findings
  return train, validation


class DecodedImages:
  """All images of a source decoded once into one array: for many small images of one size.

  Decoding 32 x 32 JPEG costs more than all augmentation; 50,000 of them take 154 MB decoded.
  Attributes `classes`, `names`, `labels` are those of the source.
  """

  def __init__(self, source: Any, *, max_bytes: int = 2**30):
    """Decodes every record.

    Raises:
      ValueError: an unreadable image (named), sizes that differ, or more than `max_bytes`.
    """
    self.classes, self.names, self.labels = source.classes, source.names, source.labels
    self.findings = source.findings
    decoded = None
    for index, name in enumerate(self.names):
      image = record_image(source[index])
      if decoded is None:
        if len(source) * image.nbytes > max_bytes:
          raise ValueError(
            f"{len(source)} decoded images of shape {image.shape} take "
            f"{len(source) * image.nbytes} bytes, more than {max_bytes}; do not cache them."
          )
        decoded = np.empty((len(source), *image.shape), np.uint8)
      if image.shape != decoded.shape[1:]:
        raise ValueError(
          f"{name} has shape {image.shape} and {self.names[0]} has {decoded.shape[1:]}; decoded "
          "images are cached only when all have one size: do not cache this source."
        )
      decoded[index] = image
    self._images = decoded

  def __len__(self) -> int:
    return len(self.names)

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`; here the pixels are at hand."""
    return {"file names": self.names, "labels": self.labels, "pixels": self._images}

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record {image: uint8 [h,w,3], label: int32, name: path}."""
    return {"image": self._images[index], "label": self.labels[index], "name": self.names[index]}


def open_source(path: str | pathlib.Path, *, classes: Sequence[str] | None = None) -> ImageFolder | ImageTar:
  """The source for a path: a folder of class folders, or a tar archive.

  Raises:
    FileNotFoundError: nothing at the path.
    ValueError: neither a folder nor an archive, or as the sources raise.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return ImageFolder(path, classes=classes)
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; expected a folder of class folders or a tar.")
  if path.name.lower().endswith(TAR_SUFFIXES):
    return ImageTar(path, classes=classes)
  raise ValueError(f"{path} is neither a folder nor an archive ending in one of {', '.join(TAR_SUFFIXES)}.")


def record_image(record: dict[str, Any]) -> UInt8[np.ndarray, "h w 3"]:
  """The RGB image of a record, decoded if it holds encoded bytes.

  Raises:
    ImageError: a ValueError; the bytes are no readable image. The message has the record's name.
  """
  image = record["image"]
  if isinstance(image, np.ndarray):
    return image
  return images.decode_image(image, name=record["name"])


def _label(
  names: list[str], classes: Sequence[str] | None, where: pathlib.Path
) -> tuple[list[str], list[str], np.ndarray]:
  """(classes, names sorted by label then name, labels int32 [n]) of images `CLASS/...`."""
  # Members of archives may start with "./", and tools leave hidden files in both layouts.
  names = [n for n in names if not any(part.startswith(".") for part in n.split("/"))]
  loose = [name for name in names if "/" not in name]
  if loose:
    raise ValueError(f"{where} holds {loose[0]} outside of any class folder; expected CLASS/IMAGE.")
  found = sorted({name.split("/")[0] for name in names})
  if not found:
    raise ValueError(
      f"{where} holds no images; expected CLASS/IMAGE with one of the endings "
      f"{', '.join(sorted(images.SUFFIXES))}."
    )
  classes = found if classes is None else list(classes)
  if len(set(classes)) != len(classes):
    raise ValueError(f"The class list of {where} names a class twice: {classes}.")
  label_of = dict(zip(found, class_names.numbers(found, classes)))
  unknown = [name for name in found if label_of[name] is None]
  if unknown:
    raise ValueError(
      f"{where} holds the class folders {unknown[:5]}, which the class list does not name; "
      f"known are {len(classes)}: {classes[:10]}."
    )
  empty = [name for label, name in enumerate(classes) if label not in label_of.values()]
  if empty:
    raise ValueError(f"{where} holds no image of the listed classes {empty[:5]}.")
  names = sorted(names, key=lambda name: (label_of[name.split("/")[0]], name))
  labels = np.array([label_of[name.split("/")[0]] for name in names], np.int32)
  return classes, names, labels
