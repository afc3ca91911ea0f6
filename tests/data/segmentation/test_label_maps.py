"""Label images of every kind become the same label map, or an error that says why not."""

import io
import json
import struct
import zlib

import numpy as np
from PIL import Image
import pytest

from frozen_vision.data import images
from frozen_vision.data.segmentation import label_maps

LABEL = np.array([[0, 1, 2, 255], [2, 2, 0, 1]], np.uint8)
FORMAT = label_maps.LabelFormat(("road", "car", "sky"))


def encoded(image, **options):
  buffer = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG", **options)
  return buffer.getvalue()


def gray_png(values, bits):
  """A PNG of few bits, which Pillow reads and does not write."""
  rows = b""
  for row in values:
    text = "".join(f"{value:0{bits}b}" for value in row)
    text += "0" * (-len(text) % 8)
    rows += b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))

  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  )


def test_gray_palette_and_16_bits_are_numbers():
  palette = Image.fromarray(LABEL)
  palette.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tobytes())
  assert palette.mode == "P"
  for data in (
    encoded(LABEL),
    encoded(palette),
    encoded(LABEL.astype(np.uint16)),
    encoded(Image.merge("LA", [Image.fromarray(LABEL), Image.new("L", (4, 2), 255)])),
    label_maps.encode(LABEL),
    label_maps.encode(LABEL, [(1, 2, 3), (4, 5, 6), (7, 8, 9)]),
  ):
    found = FORMAT.decode(data, name="a.png")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, LABEL)
  image = Image.open(io.BytesIO(label_maps.encode(LABEL, [(1, 2, 3)] * 3)))
  assert image.convert("RGB").getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_not_stretched(bits):
  values = np.random.default_rng(bits).integers(0, min(2**bits, 3), (5, 7))
  np.testing.assert_array_equal(FORMAT.decode(gray_png(values, bits), name="a.png"), values)


def test_values_of_16_bits_that_a_byte_would_cut():
  form = label_maps.LabelFormat(("a", "b"), values=(1, 257), ignored=(0, 65535))
  stored = np.array([[1, 257, 0, 65535]], np.uint16)
  np.testing.assert_array_equal(form.decode(encoded(stored), name="a.png"), [[0, 1, 255, 255]])


def test_colours():
  form = label_maps.LabelFormat(
    ("road", "car", "sky"),
    colours=((128, 64, 128), (0, 0, 142), (70, 130, 180)),
    ignored_colours=((0, 0, 0),),
  )
  colours = np.zeros((256, 3), np.uint8)
  colours[:3] = form.colours
  palette = Image.fromarray(LABEL)
  palette.putpalette(colours.tobytes())
  for picture in (palette, palette.convert("RGB"), palette.convert("RGBA")):
    np.testing.assert_array_equal(form.decode(encoded(picture), name="a.png"), LABEL)
  pixels = np.array(palette.convert("RGB"))
  pixels[0, 0] = (1, 2, 3)
  with pytest.raises(
    images.ImageError, match=r"a.png: has labels outside .* rgb\(1, 2, 3\) \(1 pixels\).*3 classes"
  ):
    form.decode(encoded(pixels), name="a.png")
  with pytest.raises(images.ImageError, match="mode L, and the labels were said to be colours"):
    form.decode(encoded(LABEL), name="a.png")


def test_labels_outside_of_the_list_are_named_or_ignored():
  stored = LABEL.copy()
  stored[0, :3] = 7
  stored[1, 0] = 9
  with pytest.raises(images.ImageError) as caught:
    FORMAT.decode(encoded(stored), name="x/a.png")
  assert caught.value.kind == "unknown labels"
  assert str(caught.value).startswith(
    "x/a.png: has labels outside of the class list: 7 (3 pixels), 9 (1 pixels)"
  )
  assert "3 classes (0, 1, 2; ignored: 255)" in str(caught.value)
  lenient = label_maps.LabelFormat(FORMAT.class_names, unknown="ignore")
  np.testing.assert_array_equal(lenient.decode(encoded(stored), name="a"), [[255] * 4, [255, 2, 0, 1]])
  named = label_maps.LabelFormat(FORMAT.class_names, ignored=(7, 9, 255))
  np.testing.assert_array_equal(named.decode(encoded(stored), name="a"), [[255] * 4, [255, 2, 0, 1]])


def test_what_is_no_label_image_is_refused():
  jpeg = io.BytesIO()
  Image.fromarray(LABEL).save(jpeg, "JPEG")
  png = encoded(np.random.default_rng(0).integers(0, 3, (64, 64), dtype=np.uint8))
  for data, message in (
    (b"", "is empty"),
    (jpeg.getvalue(), "lossless PNG"),
    (b"text", "lossless PNG"),
    (png[:200], "cannot be decoded"),
    (
      encoded(np.stack([LABEL] * 3, axis=-1)),
      "mode RGB, .* give every class its `color`; for COCO's panoptic",
    ),
    (encoded(Image.merge("LA", [Image.fromarray(LABEL)] * 2)), "mode LA"),
  ):
    with pytest.raises(images.ImageError, match=f"b.png:? ?.*{message}"):
      FORMAT.decode(data, name="b.png")


def test_panoptic_segments():
  form = label_maps.LabelFormat(("person", "sky"), values=(1, 187), ignored=(0,))
  ids = np.array([[0, 70000, 300], [300, 5, 5]])
  pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
  segments = {70000: 187, 300: 1, 5: 1}
  np.testing.assert_array_equal(
    form.decode(encoded(pixels), name="a", segments=segments), [[255, 1, 0], [0, 0, 0]]
  )
  with pytest.raises(images.ImageError, match=r"outside of the class list: segment 5 \(2 pixels\)"):
    form.decode(encoded(pixels), name="a", segments={70000: 187, 300: 1})
  with pytest.raises(images.ImageError, match=r"segment 5 of category 3 \(2 pixels\)"):
    form.decode(encoded(pixels), name="a", segments=segments | {5: 3})


def test_class_lists(tmp_path):
  def read(name, content, **options):
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return label_maps.read_format(tmp_path / name, **options)

  names = ("road", "car", "sky")
  assert read("a.txt", "road\ncar\n\nsky\n").class_names == names
  assert read("a.json", ["road", "car", "sky"]).values == (0, 1, 2)
  void = read("b.json", {"classes": ["road", "void", "sky"], "ignore_index": 1})
  assert (void.class_names, void.values, void.ignored) == (("road", "sky"), (0, 2), (1, 255))
  coco = read(
    "c.json",
    {"categories": [{"id": 1, "name": "person", "color": [1, 2, 3]}, {"id": 200, "name": "rug"}]},
    ignored=(7,),
  )
  assert (coco.values, coco.ignored, coco.colours) == ((1, 200), (0, 7, 255), None)
  coloured = read(
    "d.json",
    {
      "classes": [
        {"name": "void", "value": 0, "color": [0, 0, 0]},
        {"name": "road", "value": 5, "color": [9, 9, 9]},
      ],
      "ignore_index": 0,
    },
  )
  assert coloured.class_names == ("road",) and coloured.colours == ((9, 9, 9),)
  assert coloured.ignored_colours == ((0, 0, 0),)
  for content, message in (
    ({"names": []}, "no class list; expected"),
    (["a", 3], "entry 1 is 3"),
    (["a", "a"], "class name 'a' twice"),
    ([{"name": "a", "color": [0, 0, 0]}, "b"], "'b' has no color"),
    ([], "0 classes; expected 1 to 255"),
    ([str(i) for i in range(257)], "256 classes"),
    ([{"name": "a", "value": 70000}], "pixel value 70000"),
    ("{", "is no JSON"),
  ):
    with pytest.raises(ValueError, match=f"e.json.*{message}"):
      read("e.json", content)
  with pytest.raises(FileNotFoundError, match="absent.txt does not exist"):
    label_maps.read_format(tmp_path / "absent.txt")
  with pytest.raises(ValueError, match="known: error, ignore"):
    read("a.txt", "a", unknown="keep")
  (tmp_path / "p.json").write_text("{}")
  with pytest.raises(ValueError, match="p.json is no COCO panoptic JSON"):
    label_maps.read_segments(tmp_path / "p.json")
