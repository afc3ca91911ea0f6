"""Label images of every kind become the same label map, or an error that says why not."""

import io
import json
import struct
import zlib

import numpy as np
from PIL import Image
import pytest

from frozen_vision.data import images
from frozen_vision.data.segmentation import class_lists, label_maps
from tests import paths

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
  with pytest.raises(images.ImageError, match="mode L, but the classes are given by their colours"):
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
    return class_lists.read_format(tmp_path / name, **options)

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
    ([], "lists no class"),
    ([str(i) for i in range(257)], "257 classes"),
    ([{"name": "a", "value": 70000}], "pixel value 70000"),
    ("{", "line 1, column 2: not valid JSON"),
  ):
    with pytest.raises(ValueError, match=f"e.json.*{message}"):
      read("e.json", content)
  with pytest.raises(FileNotFoundError, match="absent.txt does not exist"):
    class_lists.read_format(tmp_path / "absent.txt")
  with pytest.raises(ValueError, match="known: error, ignore"):
    read("a.txt", "a", unknown="keep")
  (tmp_path / "p.json").write_text("{}")
  with pytest.raises(ValueError, match="p.json is no COCO panoptic JSON"):
    class_lists.read_segments(tmp_path / "p.json")


def test_a_class_of_value_255_is_a_class(tmp_path):
  pixels = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8))
  path = tmp_path / "classes.json"
  entries = [{"name": "background", "value": 0}, {"name": "lesion", "value": 255}]
  categories = [{"name": "background", "id": 0}, {"name": "lesion", "id": 255}]
  for content in ({"classes": entries}, entries, {"categories": categories}):
    path.write_text(json.dumps(content))
    form = class_lists.read_format(path)
    assert form.class_names == ("background", "lesion")
    np.testing.assert_array_equal(form.decode(encoded(pixels), name="a"), [[0, 1], [1, 0]])
  # Named as ignored, in the file or by the caller, it is none.
  assert class_lists.read_format(path, ignored=[255]).class_names == ("background",)
  path.write_text(json.dumps({"classes": entries, "ignore_index": 255}))
  assert class_lists.read_format(path).class_names == ("background",)
  direct = label_maps.LabelFormat(("a", "b"), values=(0, 255))
  np.testing.assert_array_equal(direct.decode(encoded(pixels), name="a"), [[0, 1], [1, 0]])
  # A list of names has values too: the 256th is 255, and label maps cannot hold so many.
  (tmp_path / "many.txt").write_text("\n".join(map(str, range(256))))
  with pytest.raises(ValueError, match="many.txt: 256 classes; expected 1 to 255"):
    class_lists.read_format(tmp_path / "many.txt")


def test_labels_in_no_list_are_counted():
  form = label_maps.LabelFormat(("a", "b"), unknown="ignore")
  pixels = Image.fromarray(np.array([[0, 7, 7], [9, 1, 255]], np.uint8))
  labels, unknown = form.decode_counting(encoded(pixels), name="a")
  np.testing.assert_array_equal(labels, [[0, 255, 255], [255, 1, 255]])
  assert unknown == {"7": 2, "9": 1}


def test_large_label_images_are_read_in_strips(monkeypatch):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 3, (50, 40), np.uint8)
  for image, form in (
    (Image.fromarray(pixels), label_maps.LabelFormat(("a", "b", "c"))),
    (
      Image.fromarray(np.stack([pixels, pixels, pixels], axis=-1)),
      label_maps.LabelFormat(("a", "b", "c"), colours=((0, 0, 0), (1, 1, 1), (2, 2, 2))),
    ),
  ):
    monkeypatch.setattr(images, "_STRIP_PIXELS", 130)
    np.testing.assert_array_equal(form.decode(encoded(image), name="a"), pixels)
    monkeypatch.setattr(images, "MAX_BYTES", 50 * 40 * 2 - 1)
    with pytest.raises(images.ImageError, match="claims 40 x 50 pixels of mode .* the limits are"):
      form.decode(encoded(image), name="a")
    monkeypatch.undo()


@pytest.mark.parametrize(
  "name, content, expected",
  [
    ("bom.txt", b"\xef\xbb\xbfbackground\r\nlesion\r\n", ("background", "lesion")),
    ("a.txt", "a, b\n c \n\n".encode("utf-16"), ("a, b", "c")),
    ("a.txt", b'"a"\n"b ""c"""\n', ("a", 'b "c"')),
    ("a.csv", b"name,r,g,b\nroad,1,2,3\nsky,4,5,6\n", ("road", "sky")),
    ("a.csv", b'"","name","value"\n"1","road, paved",5\n"2","sky",6\n', ("road, paved", "sky")),
    ("a.json", b'[{"name": "a", "color": "#ff0000"}, {"name": "b", "color": "00ff00"}]', ("a", "b")),
  ],
)
def test_class_lists_as_programs_export_them(tmp_path, name, content, expected):
  (tmp_path / name).write_bytes(content)
  form = class_lists.read_format(tmp_path / name)
  assert form.class_names == expected
  if b"#ff" in content:
    assert form.colours == ((255, 0, 0), (0, 255, 0))
  if b"r,g,b" in content:
    assert form.colours == ((1, 2, 3), (4, 5, 6))
  if b"value" in content:
    assert form.values == (5, 6)


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("a.txt", b"stra\xdfe\nhaus\n", "line 1: is not UTF-8"),
    ("a.json", b'{"categories": [{"id": 1, "name": "a"}, {"id": 3}]}', "category 1 .id 3. has no name"),
    ("a.json", b'{"categories": [{"name": "a"}]}', "category 0 is .*expected an `id`"),
    ("a.json", b'[{"name": "a", "color": "red"}]', "entry 0 .'a'. has the color 'red'; expected"),
    ("a.json", b'[{"name": "a", "color": [1, 2, 300]}]', "has the color"),
    ("a.json", b'[{"name": "a", "value": "x"}]', "has the pixel value 'x'"),
    ("a.json", b'[{"name": "a", "value": 1e999}]', "has the pixel value inf"),
    ("a.json", b'{"classes": ["a"], "ignore_index": "none"}', "ignore_index is 'none'"),
    ("a.csv", b"name,value\nroad,x\n", "line 2 .'road'. has the pixel value 'x'"),
    ("a.csv", b"name,value\n,3\n", "line 2 has no name"),
  ],
)
def test_class_lists_that_cannot_be_used_name_the_file_and_the_class(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=f"{name}(, |: ).*{message}"):
    class_lists.read_format(tmp_path / name)


def test_class_lists_of_bug_reports():
  folder = paths.faults_dir("text_encodings")
  assert class_lists.read_format(folder / "bom.txt").class_names == ("background", "lesion")
  assert class_lists.read_format(folder / "hex.json").colours == ((255, 0, 0), (0, 255, 0))
  with pytest.raises(ValueError, match="lat.txt, line 1: is not UTF-8"):
    class_lists.read_format(folder / "lat.txt")
  folder = paths.faults_dir("label_value_255")
  form = class_lists.read_format(folder / "classes.json")
  label = form.decode((folder / "lab/i0.png").read_bytes(), name="i0.png")
  assert form.class_names[1] == "lesion" and np.count_nonzero(label == 1) == 400
