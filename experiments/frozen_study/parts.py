"""A part of a large archive of images, so that a study of many runs reads as much of it as it can use."""

import collections
import io
import os
import pathlib
import tarfile

from frozen_vision.files import atomic

# Images of each class of CIFAR-10's training and test archives.
PER_CLASS = {"train": 500, "test": 200}


def write(source: str | os.PathLike[str], target: pathlib.Path, per_class: int) -> None:
  """Copies the first images of every class, in the order of their names, of an archive of CLASS/IMAGE.

  An archive that is there already is left as it is.
  """
  if target.exists():
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(source) as archive:
    contents = {
      pathlib.PurePosixPath(member.name): archive.extractfile(member).read()
      for member in archive
      if member.isfile()
    }
  counts: dict[str, int] = collections.Counter()
  with atomic.open_aside(target) as file, tarfile.open(fileobj=file, mode="w") as part:
    for name in sorted(contents):
      folder = name.parent.name
      if counts[folder] < per_class:
        counts[folder] += 1
        member = tarfile.TarInfo(f"{folder}/{name.name}")
        member.size = len(contents[name])
        part.addfile(member, io.BytesIO(contents[name]))


def of_cifar10(data: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes `train.tar` and `test.tar` into `folder`, from `cifar10_jpeg` below `data`."""
  for split, per_class in PER_CLASS.items():
    write(data / "cifar10_jpeg" / f"{split}.tar.xz", folder / f"{split}.tar", per_class)
