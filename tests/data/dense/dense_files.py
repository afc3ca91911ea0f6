"""Tiny folders of images with normals and depth."""

import pathlib

import numpy as np
from PIL import Image

from frozen_vision.data.generated import rooms

SIZE = (40, 48)


def toolkit(root: pathlib.Path, count: int = 3) -> rooms.Rooms:
  """Rooms as nyuv2-python-toolkit keeps NYUv2: PNGs, of normals `.npy` besides."""
  source = rooms.Rooms(count, SIZE)
  for split in ("train", "test"):
    for kind in ("image", "normal", "depth"):
      (root / kind / split).mkdir(parents=True)
    for index in range(count):
      record, name = source[index], f"{index + 3:05d}"
      Image.fromarray(record["image"]).save(root / "image" / split / f"{name}.png")
      millimetres = (record["depth"] * 1000 + 0.5).astype(np.uint16)
      Image.fromarray(millimetres).save(root / "depth" / split / f"{name}.png")
      np.save(root / "normal" / split / f"{name}.npy", record["normals"])
      colours = np.clip((record["normals"] + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
      Image.fromarray(colours).save(root / "normal" / split / f"{name}.png")
  return source


def mtan(root: pathlib.Path, count: int = 3) -> rooms.Rooms:
  """The same as MTAN's preprocessed NYUv2: arrays."""
  source = rooms.Rooms(count, SIZE)
  for split in ("train", "val"):
    for kind in ("image", "normal", "depth"):
      (root / split / kind).mkdir(parents=True)
    for index in range(count):
      record = source[index]
      np.save(root / split / "image" / f"{index}.npy", record["image"] / 255)
      np.save(root / split / "normal" / f"{index}.npy", record["normals"])
      np.save(root / split / "depth" / f"{index}.npy", record["depth"][..., None])
  return source
