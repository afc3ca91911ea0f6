"""Data sets in the layouts that people have on disk, made of what ships with the package."""

import csv
import itertools
import json
import pathlib
import shutil
from typing import Any

import av
import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from frozen_vision.data.detection import photos
from frozen_vision.data.generated import motion_clips, semantic_scenes


def _as_crowd(annotation: dict[str, Any], height: int, width: int) -> dict[str, Any]:
  """The same annotation as a crowd, whose mask COCO stores as run lengths down the columns."""
  polygons = mask_utils.frPyObjects(annotation["segmentation"], height, width)
  bits = mask_utils.decode(mask_utils.merge(polygons)).reshape(-1, order="F")
  runs = [(value, len(list(group))) for value, group in itertools.groupby(bits)]
  counts = ([0] if runs[0][0] else []) + [length for _, length in runs]
  return annotation | dict(iscrowd=1, segmentation=dict(size=[height, width], counts=counts))


def coco_root(folder: pathlib.Path) -> pathlib.Path:
  """COCO's layout with 15 of the package's photographs, 10 to train on and 5 to validate.

  The first image of a split has a crowd, and its last image no objects.
  """
  source = photos.sample_photos()
  content = json.loads(source.annotations.read_text())
  (folder / "annotations").mkdir(parents=True)
  for split, images in (("train", content["images"][:10]), ("val", content["images"][10:15])):
    (folder / f"{split}2017").mkdir()
    for image in images:
      shutil.copy(source.images / image["file_name"], folder / f"{split}2017")
    with_objects = {image["id"] for image in images[:-1]}
    rows = [row for row in content["annotations"] if row["image_id"] in with_objects]
    of_first = [i for i, row in enumerate(rows) if row["image_id"] == images[0]["id"] and not row["iscrowd"]]
    rows[of_first[0]] = _as_crowd(rows[of_first[0]], images[0]["height"], images[0]["width"])
    path = folder / "annotations" / f"instances_{split}2017.json"
    path.write_text(json.dumps(content | dict(images=images, annotations=rows)))
  return folder


def segmentation_root(folder: pathlib.Path) -> pathlib.Path:
  """CamVid's layout with generated scenes of 90 x 120 pixels, 6 to train on and 4 to validate.

  The last class of `meta.json` is the void class; the first row of every label has it.
  """
  for split, name, count in (("train", "train", 6), ("validation", "val", 4)):
    scenes = semantic_scenes.SemanticScenes(count, (90, 120), split=split)
    void = len(scenes.class_names)
    for kind in ("images", "labels"):
      (folder / name / kind).mkdir(parents=True)
    for i in range(count):
      scene = scenes[i]
      scene["label"][0] = void
      Image.fromarray(scene["image"]).save(folder / name / "images" / f"{i}.png")
      Image.fromarray(scene["label"]).save(folder / name / "labels" / f"{i}.png")
  meta = dict(classes=[*semantic_scenes.SemanticScenes.class_names, "Unlabelled"], ignore_index=void)
  (folder / "meta.json").write_text(json.dumps(meta))
  return folder


def video_root(folder: pathlib.Path) -> pathlib.Path:
  """Folders `train` and `val` of 12 and 8 generated videos, growing or shrinking, with lists beside them.

  A list is a CSV file with columns path, label and scene_group; two videos that follow each other are of one
  group.
  """
  for split, name, count in (("train", "train", 12), ("validation", "val", 8)):
    clips = motion_clips.MotionClipSource(count, 16, 64, split=split)
    (folder / name).mkdir(parents=True)
    rows = []
    for i in range(count):
      label = i // 2 % 2
      motion = motion_clips.CLASS_NAMES.index(("growing", "shrinking")[label])
      _write_video(folder / name / f"{i}.mp4", clips.render(i, motion))
      rows.append(dict(path=f"{i}.mp4", label=label, scene_group=f"{name}{i // 2}"))
    with open(folder / f"{name}.csv", "w", newline="") as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)
  return folder


def _write_video(path: pathlib.Path, frames: np.ndarray) -> None:
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mpeg4", rate=10, options={"qscale": "2"})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    for frame in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
    container.mux(stream.encode())
