"""What is looked at before a run begins: images, label maps, videos, folders; the memory of an image."""

import io
import json
import os
import tarfile
import tracemalloc

import numpy as np
from PIL import Image
import pytest

from frozen_vision.data import findings, image_checks, images, reports
from frozen_vision.data.classification import folders
from frozen_vision.data.segmentation import class_lists, label_maps, sources
from frozen_vision.data.segmentation import survey as segmentation_survey
from frozen_vision.data.video import decoding, lists
from frozen_vision.data.video import survey as video_survey
from frozen_vision.metrics import mean_iou


def _encoded(kind, size=(64, 48), mode="RGB"):
  file = io.BytesIO()
  noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
  Image.fromarray(noise).convert(mode).save(file, kind)
  return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_images_are_found_and_whole_ones_are_not_decoded(tmp_path, kind, monkeypatch):
  path, data = tmp_path / "a", _encoded(kind)
  path.write_bytes(data)
  assert image_checks.check_file(path, "a") is None and image_checks.check_bytes(data, "a") is None
  decoded = []
  monkeypatch.setattr(images, "decode_image", lambda *args, **options: decoded.append(1))
  image_checks.check_file(path, "a")
  assert len(decoded) == (kind in ("GIF", "BMP"))
  monkeypatch.undo()
  path.write_bytes(data[: len(data) // 2])
  for error in (image_checks.check_file(path, "a"), image_checks.check_bytes(data[: len(data) // 2], "a")):
    assert error is not None and str(error).startswith("a: ")


def test_files_that_are_no_images(tmp_path):
  (tmp_path / "empty.png").touch()
  (tmp_path / "text.png").write_text("no image")
  # Whole, and with something behind: read as it is.
  (tmp_path / "longer.jpg").write_bytes(_encoded("JPEG") + b"\0" * 500)
  names = ["absent.png", "empty.png", "text.png", "longer.jpg"]
  errors = list(image_checks.check_files((tmp_path / name for name in names), names))
  assert [error and error.kind for error in errors] == ["missing", "empty", "not an image", None]


def test_what_is_no_file_is_named_without_opening_it(tmp_path):
  for label, name in (("a", "good.png"), ("b", "good.png")):
    (tmp_path / label).mkdir()
    (tmp_path / label / name).write_bytes(_encoded("PNG"))
  os.mkfifo(tmp_path / "a" / "pipe.png")  # opening one waits for its writer
  (tmp_path / "b" / "link.png").symlink_to("nowhere")
  pipe, link = tmp_path / "a" / "pipe.png", tmp_path / "b" / "link.png"
  readers = (images.decode_image, images.read_bytes, images.read_size, decoding.Video)
  for path, reason in ((pipe, "is a named pipe, not a file"), (link, "a link to what is not there")):
    for read in readers:
      with pytest.raises(images.FileError, match=reason):
        read(path)
    assert reason in image_checks.check_file(path, "x").reason
  with pytest.raises(images.FileError, match="is a folder, not a file"):
    images.decode_image(tmp_path)
  source = folders.ImageFolder(tmp_path)
  source.check()
  assert source.names == ["a/good.png", "b/good.png"]
  assert source.findings.dropped() == {"images": (2, 4)}


def _labelled(folder, values, *, unknown="error"):
  for kind in ("img", "lab"):
    (folder / kind).mkdir(parents=True)
  for i, row in enumerate(values):
    (folder / "img" / f"{i}.png").write_bytes(_encoded("PNG", (len(row), 4)))
    Image.fromarray(np.tile(np.uint8(row), (4, 1))).save(folder / "lab" / f"{i}.png")
  form = label_maps.LabelFormat(("a", "b", "c"), unknown=unknown)
  return sources.LabelledImages(folder / "img", folder / "lab", form)


def test_classes_that_never_occur_and_label_images_that_cannot_be_used(tmp_path):
  source = _labelled(tmp_path, [[0, 0, 1]] * 30)
  (tmp_path / "lab" / "3.png").write_bytes(b"damaged")
  (tmp_path / "img" / "4.png").write_bytes((tmp_path / "img" / "4.png").read_bytes()[:50])
  found = segmentation_survey.survey(source)
  assert found.findings.counts == {"image_unreadable": 1, "label_unreadable": 1, "class_absent": 1}
  assert found.findings.examples["class_absent"] == ["c"] and len(found) == 28
  assert found.findings.dropped() == {"images": (2, 30)}
  assert reports.check({"training": found})["training"]["found"][2]["what"].startswith(
    "classes without a pixel"
  )
  assert not source.findings and len(source) == 30
  assert "class_absent" not in segmentation_survey.survey(source, absent_classes=False).findings.counts


def test_labels_in_no_list_are_an_error_or_counted(tmp_path):
  source = _labelled(tmp_path / "one", [[0, 1, 2, 9]] + [[0, 1, 2, 0]] * 20)
  found = segmentation_survey.survey(source)
  assert found.findings.counts == {"label_unreadable": 1} and "9 (4 pixels)" in str(found.findings)
  source = _labelled(tmp_path / "two", [[0, 1, 2, 9, 9]] * 3, unknown="ignore")
  found = segmentation_survey.survey(source)
  assert found.findings.dropped() == {"pixels": (24, 60)} and len(found) == 3
  with pytest.raises(
    findings.DroppedError, match="24 pixels with a label that is in no list.*8 of label 9 in 0"
  ):
    reports.check({"training": found})


def test_large_sets_are_looked_at_until_every_class_was_seen(tmp_path, monkeypatch):
  monkeypatch.setattr(segmentation_survey, "_ENOUGH", 4)
  monkeypatch.setattr(segmentation_survey, "_STEP", 3)
  source = _labelled(tmp_path / "one", [[0, 1]] * 5 + [[0, 2]] + [[0, 1]] * 14)
  found = segmentation_survey.survey(source)
  assert not found.findings.counts and "label maps were looked at" in found.findings.notes[0]
  source = _labelled(tmp_path / "two", [[0, 1]] * 20)
  found = segmentation_survey.survey(source)
  assert found.findings.counts == {"class_absent": 1} and not found.findings.notes


def test_names_of_images_and_labels_in_different_unicode_forms(tmp_path):
  source = _labelled(tmp_path, [[0, 1, 2]])
  (tmp_path / "img" / "0.png").rename(tmp_path / "img" / "größe.png")
  (tmp_path / "lab" / "0.png").rename(tmp_path / "lab" / "gro\u0308ße.png")
  source = sources.LabelledImages(tmp_path / "img", tmp_path / "lab", source.label_format)
  assert source.name(0) == "größe" and source[0]["label"].shape == (4, 3)


def test_videos_that_cannot_be_read(tmp_path, monkeypatch):
  for name in ("a", "b", "c"):
    (tmp_path / f"{name}.mp4").write_bytes(b"no video")
  (tmp_path / "l.txt").write_text("a.mp4 0\nb.mp4 1\nc.mp4 1\n")
  source = lists.open_videos(tmp_path / "l.txt")

  def error(path):
    return decoding.VideoError(path, "damaged", "damaged") if path.endswith("b.mp4") else None

  monkeypatch.setattr(video_survey, "_error", error)
  kept = video_survey.survey(source)
  assert kept.labels.tolist() == [0, 1] and kept.findings.dropped() == {"videos": (1, 3)}
  monkeypatch.setattr(video_survey, "_ENOUGH", 2)
  assert "2 of 3 videos were opened" in video_survey.survey(source).findings.notes
  monkeypatch.undo()
  assert len(video_survey.survey(source)) == 0


def test_image_folders_and_archives(tmp_path):
  for label in ("x", "y"):
    (tmp_path / "all" / label).mkdir(parents=True)
    for i in range(3):
      (tmp_path / "all" / label / f"{i}.png").write_bytes(_encoded("PNG"))
  (tmp_path / "all" / "y" / "1.png").write_bytes(_encoded("PNG")[:100])
  with tarfile.open(tmp_path / "all.tar", "w") as archive:
    archive.add(tmp_path / "all", arcname=".")
  for source in (folders.ImageFolder(tmp_path / "all"), folders.ImageTar(tmp_path / "all.tar")):
    last = source[5]
    source.check()
    assert len(source) == 5 and source.labels.tolist() == [0, 0, 0, 1, 1]
    assert source.findings.dropped() == {"images": (1, 6)} and source[4]["image"] == last["image"]
    assert source[4]["name"] == "y/2.png"


@pytest.mark.parametrize("name", ["../../../x", "/etc/x", "a/../../x"])
def test_evaluation_writes_below_its_folder_whatever_a_name_says(tmp_path, name):
  evaluator = mean_iou.MeanIoUEvaluator(("a",), lambda index: None, lambda index: name, 1)
  evaluator.update(
    {"label_map": np.zeros((1, 4, 4), np.uint8)},
    {"index": np.array([0]), "original_size": np.array([[4, 4]])},
  )
  evaluator.write(tmp_path / "a" / "b" / "c")
  files = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert len(files) == 2 and all(path.is_relative_to(tmp_path / "a/b/c") for path in files)


@pytest.mark.parametrize("mode", ["I;16", "L", "RGB", "RGBA", "P"])
def test_memory_of_a_large_image_is_in_proportion_to_its_pixels(mode):
  side, file = 2000, io.BytesIO()
  pixels = np.linspace(0, 60_000, side * side).reshape(side, side)
  image = Image.fromarray(pixels.astype(np.uint16)) if mode == "I;16" else Image.new(mode, (side, side), 3)
  image.save(file, "PNG")
  tracemalloc.start()
  decoded = images.decode_image(file.getvalue())
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # Beside the pixels that Pillow holds there are the result and what converting a strip takes.
  assert decoded.shape == (side, side, 3) and peak < 3 * side * side + 60 * images._STRIP_PIXELS


def test_the_limit_is_in_bytes(monkeypatch):
  data = _encoded("PNG", (40, 30), "L")
  monkeypatch.setattr(images, "MAX_BYTES", 40 * 30 * 4)
  assert images.decode_image(data).shape == (30, 40, 3)
  monkeypatch.setattr(images, "MAX_BYTES", 40 * 30 * 4 - 1)
  with pytest.raises(
    images.ImageError, match="claims 40 x 30 pixels of mode L, which take 0 MB; the limits are"
  ):
    images.decode_image(data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_strips_change_no_pixel(monkeypatch, orientation):
  noise = np.random.default_rng(0).integers(0, 255, (37, 23, 4), np.uint8)
  exif = Image.Exif()
  exif[0x0112] = orientation
  for image in (
    Image.fromarray(noise),
    Image.fromarray(noise[..., :3]),
    Image.fromarray(noise[..., 0]),
    Image.fromarray(noise[..., 0].astype(np.uint16) * 200),
    Image.fromarray(noise[..., :3]).convert("P"),
  ):
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    whole = images.decode_image(file.getvalue())
    with monkeypatch.context() as patch:
      patch.setattr(images, "_STRIP_PIXELS", 100)
      np.testing.assert_array_equal(images.decode_image(file.getvalue()), whole)


def test_class_lists_of_a_label_value_255_reach_the_source(tmp_path):
  source = _labelled(tmp_path, [[0, 255, 255]] * 3)
  path = tmp_path / "classes.json"
  path.write_text(json.dumps({"classes": [{"name": "back", "value": 0}, {"name": "lesion", "value": 255}]}))
  form = class_lists.read_format(path)
  source = segmentation_survey.survey(sources.LabelledImages(tmp_path / "img", tmp_path / "lab", form))
  assert not source.findings and (source.label(0) == [0, 1, 1]).all()
