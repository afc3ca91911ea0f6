"""Images with normals and depth from files: a folder for each, or NYUv2 as people keep it.

Files of one image have one name in their folders, without the ending. Where a folder has a name both as
`.npy` and as an image, the array is read.
"""

import abc
from collections.abc import Mapping, Sequence
import copy
import dataclasses
import functools
import os
import pathlib
from typing import Any, Self

from jaxtyping import UInt8
import numpy as np

from frozen_vision.data import findings, fingerprint, image_checks, images
from frozen_vision.data import names as data_names
from frozen_vision.data.dense import map_files, sources

HOW_TO_GET = (
  "NYUv2 is nyu_depth_v2_labeled.mat of https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html; normals are "
  "in https://dl.fbaipublicfiles.com/fair_self_supervision_benchmark/nyuv2_surfacenormal_metadata.zip. "
  "extract_nyuv2.py of github.com/nidham-sony/nyuv2-python-toolkit makes folders of both; or take the "
  "preprocessed set of github.com/lorenmt/mtan. Give the folder with --config.dense_regression.root=FOLDER."
)
KINDS = {
  "unreadable": findings.Kind("images of which a file cannot be used: dropped", "images"),
  "incomplete": findings.Kind("images without normals or depth of their name: dropped", "images"),
}
# Rows and columns of a 480 x 640 depth map that are evaluated (Eigen, Puhrsch and Fergus 2014).
_EIGEN_SIZE, _EIGEN_ROWS, _EIGEN_COLUMNS = (480, 640), slice(45, 471), slice(41, 601)
_LAYOUTS = {"train": ("{}/train", "train/{}"), "test": ("{}/test", "test/{}", "val/{}")}
_FOLDERS = {"image": "image", "normals": "normal", "depth": "depth"}


@dataclasses.dataclass(frozen=True)
class MapFormat:
  """How files of maps are meant.

  Attributes:
    signs: what x, y and z of normals are multiplied by, to have x to the right, y up, z towards the camera.
      Whatever y and z are, x has to be horizontal, since it changes its sign when an image is mirrored.
    depth_unit: metres of a step of a depth image; NYUv2's are millimetres.
    eigen_crop: depth of 480 x 640 images is known inside of Eigen's crop only, for evaluation.
  """

  signs: tuple[int, int, int] = (1, 1, 1)
  depth_unit: float = 0.001
  eigen_crop: bool = False


class EncodedDense(sources.DenseSource):
  """Base of sources that keep every map as the bytes of a file: decoded here, and compared in size."""

  format: MapFormat

  @abc.abstractmethod
  def encoded(self, index: int, what: str) -> tuple[str, bytes]:
    """(name with its ending, bytes) of the file of "image", "normals" or "depth"; raises ImageError."""

  def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
    """See `DenseSource`; raises ImageError."""
    name, data = self.encoded(index, "image")
    return map_files.read_image(data, name)

  def truth(self, index: int) -> sources.Truth:
    """See `DenseSource`; raises ImageError."""
    found: sources.Truth = {}
    if "normals" in self.targets:
      name, data = self.encoded(index, "normals")
      found["normals"] = map_files.read_normals(data, name, self.format.signs)
    if "depth" in self.targets:
      name, data = self.encoded(index, "depth")
      depth = map_files.read_depth(data, name, self.format.depth_unit)
      found["depth"] = _cropped(depth, name) if self.format.eigen_crop else depth
    return found

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record at `index`.

    Raises:
      IndexError: outside of [0, len).
      ImageError: a file that is unusable, or maps of another size than the image.
    """
    record = super().__getitem__(index)
    self._compare_sizes(index, record, record["image"].shape[:2])
    return record

  def _compare_sizes(self, index: int, maps: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Raises ImageError where a map has another size (height, width) than the image."""
    for target in self.targets:
      if maps[target].shape[:2] != size:
        raise images.ImageError(
          self.encoded(index, target)[0],
          f"is {maps[target].shape[:2]} (height, width), and its image {size}",
          "wrong size",
        )


def _cropped(depth: np.ndarray, name: str) -> np.ndarray:
  """Depth without what lies outside of Eigen's crop."""
  if depth.shape != _EIGEN_SIZE:
    raise images.ImageError(
      name,
      f"is {depth.shape} (height, width); Eigen's crop is of {_EIGEN_SIZE}. Set "
      "--config.dense_regression.eigen_crop=False",
      "wrong size",
    )
  kept = np.zeros_like(depth)
  kept[_EIGEN_ROWS, _EIGEN_COLUMNS] = depth[_EIGEN_ROWS, _EIGEN_COLUMNS]
  return kept


class DenseFolders(EncodedDense):
  """Images below one folder, normals and depth of the same names below others; read when asked for.

  Attributes:
    findings: what was left out.
  """

  def __init__(
    self,
    image_dir: str | os.PathLike[str],
    map_dirs: Mapping[sources.Target, str | os.PathLike[str]],
    format: MapFormat = MapFormat(),
  ):
    """Lists the files.

    Args:
      image_dir: searched recursively.
      map_dirs: folders of the maps that there are.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: no map is given, or no image has all of them.
    """
    self.targets = tuple(name for name in sources.TARGETS if name in map_dirs)
    if not self.targets:
      raise ValueError("Neither a folder of normals nor one of depth is given; expected one at least.")
    self.format = format
    self.findings = findings.Findings(KINDS)
    self._folders = {"image": pathlib.Path(image_dir)}
    self._folders |= {name: pathlib.Path(map_dirs[name]) for name in self.targets}
    listed = {what: _list(folder) for what, folder in self._folders.items()}
    self.findings.saw("images", len(listed["image"]))
    self._names = []
    for name in sorted(listed["image"]):
      lacking = [target for target in self.targets if name not in listed[target]]
      if lacking:
        self.findings.add("incomplete", f"{listed['image'][name]} has no {' and no '.join(lacking)}")
      else:
        self._names.append(name)
    if not self._names:
      folders = " and ".join(str(self._folders[target]) for target in self.targets)
      raise ValueError(f"No image of {image_dir} has a file of its name in {folders}.")
    self._files = {what: [listed[what][name] for name in self._names] for what in listed}

  def __len__(self) -> int:
    return len(self._names)

  def __repr__(self) -> str:  # Grain writes it into its messages
    return f"DenseFolders({self._folders['image']}, {len(self)} images, {' and '.join(self.targets)})"

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    return {
      "file names": self._files,
      "file sizes": fingerprint.file_sizes(self.files()),
      "format": repr(self.format),
    }

  def name(self, index: int) -> str:
    return self._names[index]

  def path(self, index: int, what: str) -> pathlib.Path:
    """The file of "image", "normals" or "depth"."""
    return self._folders[what] / self._files[what][index]

  def files(self) -> list[pathlib.Path]:
    """All files of every record; see `data.content`."""
    return [self.path(index, what) for index in range(len(self)) for what in self._folders]

  def encoded(self, index: int, what: str) -> tuple[str, bytes]:
    """See `EncodedDense`."""
    if not 0 <= index < len(self):
      raise IndexError(f"image {index} of {len(self)}.")
    path = self.path(index, what)
    return str(path), images.read_bytes(path)

  @functools.cached_property
  def largest_size(self) -> tuple[int, int]:
    return tuple(max(sides) for sides in zip(*map(self._image_size, range(len(self)))))

  def _image_size(self, index: int) -> tuple[int, int]:
    """(height, width) of an image, from its header where it has one."""
    path = self.path(index, "image")
    return self.image(index).shape[:2] if map_files.is_array(path.name) else images.read_size(path)

  def take(self, indices: Sequence[int]) -> Self:
    """The same source with these images only."""
    other = copy.copy(self)
    other.__dict__.pop("largest_size", None)
    other.findings = copy.deepcopy(self.findings)
    other._names = [self._names[i] for i in indices]
    other._files = {what: [files[i] for i in indices] for what, files in self._files.items()}
    return other

  def checked(self) -> Self:
    """The source without images of which a file cannot be used; its findings say which."""
    bad: dict[int, images.ImageError] = {}
    with_arrays = set()
    for what, files in self._files.items():
      arrays = {index for index, file in enumerate(files) if map_files.is_array(file)}
      others = [index for index in range(len(self)) if index not in arrays]
      paths = [self.path(index, what) for index in others]
      errors = dict(zip(others, image_checks.check_files(paths, map(str, paths))))
      bad |= {index: error for index, error in errors.items() if error is not None and index not in bad}
      with_arrays |= arrays
    for index in sorted(with_arrays - set(bad)):
      try:  # an array has no end by which to tell, so it is read
        self._compare_sizes(index, self.truth(index), self._image_size(index))
      except images.ImageError as error:
        bad[index] = error
    for _, error in sorted(bad.items()):
      self.findings.add("unreadable", str(error))
    return self.take([index for index in range(len(self)) if index not in bad])


def _list(folder: pathlib.Path) -> dict[str, str]:
  """{path below the folder, without its ending: path below the folder} of arrays and images."""
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: no such folder.")
  found: dict[str, str] = {}
  for path in data_names.files_below(folder):
    if path.suffix.lower() not in images.SUFFIXES | {map_files.ARRAY}:
      continue
    relative = path.relative_to(folder)
    name = data_names.normalised(relative.with_suffix("").as_posix())
    if name not in found or map_files.is_array(path.name):
      found[name] = relative.as_posix()
  return found


def nyuv2(
  root: str | os.PathLike[str],
  split: str,
  targets: Sequence[sources.Target] = sources.TARGETS,
  format: MapFormat = MapFormat(),
) -> DenseFolders:
  """NYUv2's 795 training or 654 test images, in one of two layouts.

  ROOT/image/train/00003.png, ROOT/depth/train/..., ROOT/normal/train/... (nyuv2-python-toolkit), or
  ROOT/train/image/0.npy, ROOT/train/depth/..., ROOT/train/normal/... (MTAN's; its test images are in val).

  Args:
    split: "train" or "test".

  Raises:
    FileNotFoundError: neither; says what was looked for, and how to get it.
    ValueError: an unknown split.
  """
  if split not in _LAYOUTS:
    raise ValueError(f"split is {split!r}; expected train or test.")
  root = pathlib.Path(root)
  looked = []
  for layout in _LAYOUTS[split]:
    folders = {what: root / layout.format(_FOLDERS[what]) for what in ("image", *targets)}
    if all(folder.is_dir() for folder in folders.values()):
      return DenseFolders(folders.pop("image"), folders, format)
    looked.append(", ".join(str(folder) for folder in folders.values()))
  raise FileNotFoundError(
    f"NYUv2's {split} images are not below {root}; looked for {'; or '.join(looked)}. {HOW_TO_GET}"
  )
