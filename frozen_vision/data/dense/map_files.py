"""Reads files of images, surface normals and depth, from their bytes: image formats and NumPy's `.npy`.

Normals are RGB images of 8 bits, v / 127.5 - 1 for each coordinate, or arrays [h, w, 3]. Depth is a gray
image of 16 bits in some unit, or an array [h, w] or [h, w, 1] in metres. Images may be arrays [h, w, 3] too,
of uint8 or of fractions in 0..1, as the preprocessed NYUv2 of Liu et al. (MTAN, 2019) has them.
"""

import io
import math

from jaxtyping import Float32, UInt8
import numpy as np

from frozen_vision.data import images
from frozen_vision.data.segmentation import label_files
from frozen_vision.files import numpy_file

ARRAY = ".npy"
# Shorter vectors have no direction: gray pixels of 8 bits, and zeros.
_SHORTEST = 0.5


def is_array(name: str) -> bool:
  """Whether a file is an array of NumPy, by its name."""
  return name.lower().endswith(ARRAY)


def read_image(data: bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
  """RGB of an image file or an array.

  Args:
    name: of the file, whose ending says which it is; what errors call it.

  Raises:
    ImageError: unusable; says why.
  """
  if not is_array(name):
    return images.decode_image(data, name=name)
  array = _array(data, name, "[h, w, 3]")
  if array.dtype == np.uint8:
    return array
  if array.dtype.kind != "f" or not array.min() >= -1e-3 or not array.max() <= 1 + 1e-3:
    raise images.ImageError(
      name,
      f"is {array.dtype} from {array.min()} to {array.max()}; expected uint8, or fractions in 0..1",
      "unsupported pixels",
    )
  return (np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)


def read_normals(data: bytes, name: str, signs: tuple[int, int, int]) -> Float32[np.ndarray, "h w 3"]:
  """Unit vectors, zeros where there is no direction; raises ImageError likewise.

  Args:
    signs: what x, y and z of the file are multiplied by.
  """
  if is_array(name):
    vectors = _array(data, name, "[h, w, 3]").astype(np.float32)
  else:
    vectors = images.decode_image(data, name=name).astype(np.float32) / 127.5 - 1
  vectors = np.where(np.isfinite(vectors).all(axis=-1, keepdims=True), vectors, 0)
  length = np.sqrt((vectors * vectors).sum(axis=-1, keepdims=True))
  unit = np.where(length >= _SHORTEST, vectors / np.maximum(length, _SHORTEST), 0)
  return (unit * np.asarray(signs)).astype(np.float32)


def read_depth(data: bytes, name: str, unit: float) -> Float32[np.ndarray, "h w"]:
  """Metres, 0 where there is no depth; raises ImageError likewise.

  Args:
    unit: metres of a step of a gray image.
  """
  if is_array(name):
    depth = _array(data, name, "[h, w] or [h, w, 1]").astype(np.float32)
  else:
    image, bits = label_files.open_label(data, name)
    if image.mode not in ("I", "I;16", "I;16B", "I;16L"):
      raise images.ImageError(
        name,
        f"has pixels of mode {image.mode}; expected depth as gray of 16 bits, or a .npy in metres",
        "unsupported pixels",
      )
    depth = np.empty((image.height, image.width), np.float32)
    for rows, values in label_files.pixel_values(image, bits, name):
      depth[rows] = values * unit
  return np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)


def _array(data: bytes, name: str, expected: str) -> np.ndarray:
  """The array of a `.npy` file, whose header is compared with the bytes before anything is made."""
  try:
    file = io.BytesIO(data)
    shape, dtype = numpy_file.read_header(file)
    left = len(data) - file.tell()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != left:
      raise ValueError(f"{left} bytes for {dtype} of shape {shape}")
    array = np.load(io.BytesIO(data), allow_pickle=False)
  except Exception as error:  # whatever a crafted header makes its reader raise
    raise images.ImageError(name, f"is no complete array of NumPy ({error})", "damaged") from error
  channels = 3 if expected == "[h, w, 3]" else 1
  if channels == 1 and array.ndim == 2:
    array = array[..., None]
  if array.ndim != 3 or array.shape[-1] != channels or 0 in array.shape or array.dtype.kind not in "fui":
    raise images.ImageError(
      name, f"is {array.dtype} of shape {array.shape}; expected numbers {expected}", "unsupported pixels"
    )
  return array if channels == 3 else array[..., 0]
