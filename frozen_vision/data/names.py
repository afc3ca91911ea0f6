"""Names that stand in data: matched with files in any Unicode form, and never trusted as paths.

"größe.png" can be spelled with one character for "ö" (NFC, as most programs write it) or with two (NFD, as
macOS stores it). Both look the same and compare as different.

A name in data may have sub-folders. `..`, absolute paths and what else leads out of its folder are refused
for reading, unless the caller allows them, and are escaped where a name becomes that of a file to write.
"""

import collections
from collections.abc import Iterable, Iterator
import hashlib
import os
import pathlib
import re
import unicodedata

# Filesystems take 255 bytes; endings such as ".png" come on top.
_LONGEST_PART = 200
_DRIVE = re.compile(r"[A-Za-z]:")
_UNUSABLE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')


class OutsideError(ValueError):
  """A name in data that leads out of the folder it belongs to."""


def normalised(name: str) -> str:
  """The name in the one form (NFC) that all its spellings share."""
  return unicodedata.normalize("NFC", name)


class Lookup:
  """Finds names among others: as they are, else in another Unicode form where only one name fits."""

  def __init__(self, names: Iterable[str]):
    self._names = set(names)
    spellings = collections.defaultdict(list)
    for name in self._names:
      spellings[normalised(name)].append(name)
    self._unique = {form: found[0] for form, found in spellings.items() if len(found) == 1}

  def find(self, name: str) -> str | None:
    """The name as it is spelled here; None where it is absent, or several would fit."""
    return name if name in self._names else self._unique.get(normalised(name))


class Files:
  """The files below a folder by name, in any Unicode form; every folder is listed once."""

  def __init__(self, folder: str | os.PathLike[str]):
    self._folder = pathlib.Path(folder)
    self._listed: dict[pathlib.Path, Lookup] = {}

  def find(self, name: str) -> pathlib.Path | None:
    """The path that a name means; None if there is none."""
    if leads_outside(name):
      path = self._folder / name
      return path if os.path.exists(path) else None
    path = self._folder
    for part in pathlib.PurePath(name).parts:
      if path not in self._listed:
        try:
          self._listed[path] = Lookup(os.listdir(path))
        except OSError:
          self._listed[path] = Lookup(())
      found = self._listed[path].find(part)
      if found is None:
        return None
      path /= found
    return path


def files_below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """All files below a folder in the order of their paths, without hidden ones and those in hidden folders.

  Named pipes and links that lead nowhere are among them: readers refuse them by name.
  """
  for path in sorted(folder.rglob("*")):
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    if not hidden and not path.is_dir():
      yield path


def leads_outside(name: str) -> bool:
  """Whether a name is absolute, has `..` in it, or is no name of a file at all."""
  parts = name.replace("\\", "/").split("/")
  return not name or "\0" in name or parts[0] == "" or ".." in parts or bool(_DRIVE.match(name))


def require_inside(name: str, where: str, *, allow_outside: bool | None = None) -> str:
  """Returns the name of a file to read, if it stays below its folder.

  Args:
    where: which file has the name, for the error.
    allow_outside: takes any name; None where no option of a user decides it.

  Raises:
    OutsideError: names the option that allows it, if one does.
  """
  if leads_outside(name) and not (allow_outside and name and "\0" not in name):
    advice = "Get the file again, or correct the name."
    if allow_outside is not None:
      advice = (
        "If you trust the file, set --config.data.allow_outside=True (in preparation: --allow-outside)."
      )
    raise OutsideError(
      f"{where} has the file name {name!r}, which leads out of its folder; expected a path below the folder. "
      + advice
    )
  return name


def output_name(name: str) -> str:
  """A relative path, safe to write to below any folder, for a name in data; ordinary names stay as they are.

  `..`, leading slashes and characters that some file systems refuse are written as %XX; a part that is too
  long ends in a digest of it.
  """
  parts = ["%2F"] if name.startswith("/") else []
  for part in name.split("/"):
    if part in ("", "."):
      continue
    part = "%2E%2E" if part == ".." else _UNUSABLE.sub(lambda match: f"%{ord(match[0]):02X}", part)
    encoded = part.encode("utf-8", "surrogateescape")
    if len(encoded) > _LONGEST_PART:
      digest = hashlib.sha256(encoded).hexdigest()[:12]
      part = f"{encoded[: _LONGEST_PART - 13].decode('utf-8', 'ignore')}-{digest}"
    parts.append(part)
  return "/".join(parts) or "%2E"
