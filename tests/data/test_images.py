"""Decoding: every odd file is read right, or refused by name."""

import io
import json
import pickle
import struct
import warnings
import zlib

import numpy as np
from PIL import Image
import pytest

from frozen_vision.data import images as image_io
from tests import paths

# What is wrong with the files of odd_images that must be refused.
BAD = {
  "truncated.jpg": "damaged",
  "truncated.png": "damaged",
  "truncated_end_chunk.png": "damaged",  # all pixels are there, but the file is cut
  "broken_data_stream.png": "damaged",  # Pillow "reads" it at the second attempt, partly black
  "broken.png": "not an image",
  "zero_width.gif": "not an image",
  "decompression_bomb.gif": "too many pixels",
  "bad_width.bmp": "too many pixels",
  "bad_palette_size.bmp": "damaged",
  "derived_truncated_half.jpg": "damaged",
  "derived_header_only.jpg": "damaged",
  "derived_empty.jpg": "empty",
  "derived_text_as.jpg": "not an image",
  "derived_bitflips.jpg": "damaged",
}
WIDE = ("gray16.png_like.tif", "gray16.pgm", "gray_12in16.tif", "derived_gray16.png", "derived_float32.tif")


@pytest.fixture(autouse=True)
def _no_pillow_warnings():
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    yield


def _encode(image: Image.Image, image_format: str, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, image_format, **options)
  return buffer.getvalue()


def _picture(height: int = 48, width: int = 64) -> Image.Image:
  rng = np.random.default_rng(0)
  small = rng.integers(0, 256, (6, 8, 3), np.uint8)
  return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _exif(orientation: int) -> Image.Exif:
  exif = Image.Exif()
  exif[0x0112] = orientation
  return exif


def _png(bit_depth: int, colour_type: int, rows: np.ndarray, transparent: bytes = b"") -> bytes:
  """A PNG written by hand, since Pillow writes no 16-bit colour."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  height, width = rows.shape[:2]
  header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
  lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
  parts = [chunk(b"IHDR", header), chunk(b"tRNS", transparent) if transparent else b""]
  parts += [chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_every_odd_file_is_read_right_or_refused_by_name():
  folder = paths.data_dir("odd_images")
  entries = json.loads((folder / "manifest.json").read_text())["files"]
  assert len(entries) == 81
  refused = {}
  for entry in entries:
    name = entry["file"]
    path = folder / "files" / name
    try:
      image = image_io.decode_image(path)
    except image_io.ImageError as error:
      assert str(path) in str(error) and error.reason and "0x" not in str(error)
      refused[name] = error.kind
      continue
    assert image.dtype == np.uint8 and image.flags.writeable and image.flags.c_contiguous
    assert image.shape == (*entry["rgb_size_after_transpose"][::-1], 3), name
    assert image_io.read_size(path) == image.shape[:2], name
    if name in WIDE:
      continue
    raw = Image.open(path)
    if raw.has_transparency_data:  # the manifest's mean just drops the transparency
      rgba = np.asarray(raw.convert("RGBA"), np.float64)
      alpha = rgba[..., 3:] / 255
      expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
      assert np.abs(image - expected).max() <= 0.51, name
    else:
      mean = image.reshape(-1, 3).mean(0)
      np.testing.assert_allclose(mean, entry["rgb_mean"], atol=0.02, err_msg=name)
  assert refused == BAD


@pytest.mark.parametrize("name", WIDE)
def test_wide_gray_is_scaled_by_its_range(name):
  path = paths.data_dir("odd_images") / "files" / name
  values = np.asarray(Image.open(path), np.float64)
  image = image_io.decode_image(path)
  expected = values * 255 / (1.0 if "float" in name else 65535.0)
  assert np.abs(image - expected[..., None]).max() <= 0.5 + 1e-6
  notes = image_io.inspect_image(path).notes
  assert bool(notes) == (name in ("gray16.png_like.tif", "gray_12in16.tif"))


def test_exif_rotations_agree_with_the_upright_picture():
  folder = paths.data_dir("odd_images") / "files"
  upright = image_io.decode_image(folder / "rgb.jpg").astype(int)
  for orientation in range(2, 9):
    turned = image_io.decode_image(folder / f"exif_orientation_{orientation}_pil.jpg")
    assert np.abs(turned - upright).mean() < 6, orientation
  for kind, others in (("landscape", (3, 6, 8)), ("portrait", (5, 6, 8))):
    upright = image_io.decode_image(folder / f"{kind}_1.jpg")[::8, ::8].astype(int)
    # The corner spells the file's number; the rest is the same picture.
    for other in others:
      turned = image_io.decode_image(folder / f"{kind}_{other}.jpg")[::8, ::8]
      assert np.abs(turned - upright).mean() < 12, (kind, other)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_applied_in_every_format(image_format, orientation):
  array = np.zeros((32, 48, 3), np.uint8)
  array[:16, :24] = 255  # white at the top left
  data = _encode(Image.fromarray(array), image_format, exif=_exif(orientation))
  image = image_io.decode_image(data)
  turned = orientation >= 5
  assert image.shape == ((48, 32, 3) if turned else (32, 48, 3))
  assert image_io.read_size(data) == image.shape[:2]
  assert image_io.read_size(data, apply_exif=False) == (32, 48)
  # The corner in which the stored top left one is shown (TIFF 6.0, section 8).
  bottom, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
  quarter = image[8 if not bottom else -8, 8 if not right else -8]
  assert quarter.min() > 200
  assert image[8 if bottom else -8, 8 if right else -8].max() < 50


@pytest.mark.parametrize(
  "image_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM"]
)
def test_half_a_file_is_refused_in_every_format(image_format):
  data = _encode(_picture(), image_format)
  assert image_io.decode_image(data).shape == (48, 64, 3)
  for share in (0.3, 0.5, 0.9):
    with pytest.raises(image_io.ImageError, match="^photo: "):
      image_io.decode_image(data[: int(share * len(data))], name="photo")


@pytest.mark.parametrize("fill", [0, 1])
def test_sixteen_bit_colour_png(fill):
  values = np.random.default_rng(fill).integers(0, 65536, (5, 7, 3))
  image = image_io.decode_image(_png(16, 2, values))
  np.testing.assert_array_equal(image, values >> 8)
  key = struct.pack(">HHH", *values[2, 3])
  image = image_io.decode_image(_png(16, 2, values, key), background=(9, 8, 7))
  assert tuple(image[2, 3]) == (9, 8, 7)
  np.testing.assert_array_equal(image[0], values[0] >> 8)


def test_sixteen_bit_gray_png_with_colour_key():
  values = np.array([[0, 257, 65535, 300]])
  np.testing.assert_array_equal(image_io.decode_image(_png(16, 0, values))[0, :, 1], [0, 1, 255, 1])
  image = image_io.decode_image(_png(16, 0, values, struct.pack(">H", 300)))
  np.testing.assert_array_equal(image[0, :, 1], [0, 1, 255, 255])


def test_sixteen_bit_tiff_with_inverted_gray():
  values = np.array([[0, 32768, 65535]], np.uint16)
  data = _encode(Image.fromarray(values), "TIFF")
  np.testing.assert_array_equal(image_io.decode_image(data)[0, :, 0], [0, 128, 255])
  tag = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
  assert data.count(tag) == 1
  inverted = data.replace(tag, struct.pack("<HHIHH", 262, 3, 1, 0, 0))  # white is zero
  np.testing.assert_array_equal(image_io.decode_image(inverted)[0, :, 0], [255, 127, 0])


@pytest.mark.parametrize(
  "values",
  [
    np.array([[0.0, 200.0]], np.float32),
    np.array([[0.0, np.nan]], np.float32),
    np.array([[0, 70000]], np.int32),
  ],
)
def test_pixels_without_a_defined_range_are_refused(values):
  with pytest.raises(image_io.ImageError, match="Convert the file to 8 or 16 bits") as caught:
    image_io.decode_image(_encode(Image.fromarray(values), "TIFF"))
  assert caught.value.kind == "unsupported pixels"


def test_transparency_shows_the_background():
  rgba = np.zeros((2, 2, 4), np.uint8)
  rgba[0, 0] = (10, 20, 30, 255)
  rgba[0, 1] = (100, 100, 100, 128)
  data = _encode(Image.fromarray(rgba), "PNG")
  image = image_io.decode_image(data)
  assert tuple(image[0, 0]) == (10, 20, 30) and tuple(image[1, 1]) == (255, 255, 255)
  assert tuple(image[0, 1]) == (177, 177, 177)
  assert tuple(image_io.decode_image(data, background=(1, 2, 3))[1, 1]) == (1, 2, 3)


def test_first_frame_of_an_animation():
  frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
  for image_format in ("GIF", "WEBP", "TIFF"):
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = _encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    assert tuple(image_io.decode_image(data)[4, 4]) == (255, 0, 0)
    assert "first of several frames read" in image_io.inspect_image(data).notes


def test_limits_and_hostile_input(tmp_path):
  with pytest.raises(image_io.ImageError, match="64 x 48 pixels, more than the limit of 100"):
    image_io.decode_image(_encode(_picture(), "PNG"), max_pixels=100)
  postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
  with pytest.raises(image_io.ImageError, match="not a readable image"):
    image_io.decode_image(postscript)
  for call in (image_io.decode_image, image_io.read_size, image_io.inspect_image):
    with pytest.raises(image_io.ImageError, match="absent.jpg: cannot be read") as caught:
      call(tmp_path / "absent.jpg")
    with pytest.raises(image_io.ImageError):
      call(tmp_path)
    with pytest.raises(image_io.ImageError, match="empty"):
      call(b"")
  copied = pickle.loads(pickle.dumps(caught.value))
  assert (copied.name, copied.reason, copied.kind) == (caught.value.name, caught.value.reason, "missing")


def test_random_damage_never_escapes_as_another_exception():
  rng = np.random.default_rng(0)
  for image_format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
    data = np.frombuffer(_encode(_picture(), image_format), np.uint8)
    for _ in range(40):
      damaged = data.copy()
      places = rng.integers(0, min(len(data), 400), 4)
      damaged[places] = rng.integers(0, 256, 4)
      try:
        image = image_io.decode_image(damaged.tobytes(), max_pixels=1_000_000)
        assert image.ndim == 3
      except image_io.ImageError:
        pass
