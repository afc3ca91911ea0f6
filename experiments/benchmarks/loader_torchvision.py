"""PyTorch's loader with torchvision's transforms, for `loader.py`; needs no JAX.

  python loader_torchvision.py ANNOTATIONS IMAGES SIDE BATCH WORKERS

For every number N that it reads it starts a pass, takes a batch, and prints the seconds that the next N
batches took; the first line that it prints is JSON of versions.
"""

import collections
import itertools
import json
import pathlib
import sys
import time

import numpy as np
import PIL
from PIL import Image
from pycocotools import mask as coco_mask
import torch

try:
  import torchvision
except RuntimeError:  # a torchvision without its compiled operators, which no transform here needs
  _LIBRARY = torch.library.Library("torchvision", "DEF")
  for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
    del sys.modules[_name]
  import torchvision
from torchvision import tv_tensors
from torchvision.transforms import v2


class Photographs(torch.utils.data.Dataset):
  """Images with boxes and masks, as torchvision's CocoDetection and its reference for detection read them."""

  def __init__(self, annotations: str, images: str, side: int):
    content = json.loads(pathlib.Path(annotations).read_text())
    objects = collections.defaultdict(list)
    for annotation in content["annotations"]:
      if not annotation["iscrowd"]:
        objects[annotation["image_id"]].append(annotation)
    self.images = [(pathlib.Path(images) / row["file_name"], objects[row["id"]]) for row in content["images"]]
    # Large-scale jitter as torchvision's references write it.
    self.transform = v2.Compose([
      v2.ScaleJitter((side, side), scale_range=(0.1, 2.0), antialias=True),
      v2.RandomCrop((side, side), pad_if_needed=True),
      v2.RandomHorizontalFlip(),
      v2.SanitizeBoundingBoxes(labels_getter=lambda sample: (sample[1]["labels"], sample[1]["masks"])),
    ])  # fmt: skip

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int):
    path, objects = self.images[index]
    image = v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
    height, width = image.shape[1:]
    boxes = torch.tensor([row["bbox"] for row in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = [coco_mask.decode(_rle(row["segmentation"], height, width)) for row in objects]
    masks = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
    target = {
      "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
      "labels": torch.tensor([row["category_id"] for row in objects]),
      "masks": tv_tensors.Mask(torch.from_numpy(masks)),
    }
    return self.transform(tv_tensors.Image(image), target)


def _rle(segmentation, height: int, width: int):
  rle = coco_mask.frPyObjects(segmentation, height, width)
  return coco_mask.merge(rle) if isinstance(rle, list) else rle


def main(annotations: str, images: str, side: int, batch: int, workers: int) -> None:
  """Answers the numbers of standard input."""
  torch.manual_seed(0)
  torch.set_num_threads(1)
  photographs = Photographs(annotations, images, side)
  loader = torch.utils.data.DataLoader(
    photographs,
    batch_size=batch,
    sampler=torch.utils.data.RandomSampler(photographs, replacement=True, num_samples=10**6),
    num_workers=workers,
    collate_fn=lambda examples: tuple(zip(*examples, strict=True)),
  )
  versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "Pillow": PIL.__version__}
  print(json.dumps(versions), flush=True)
  for line in sys.stdin:
    batches = iter(loader)
    next(batches)
    started = time.perf_counter()
    for _ in itertools.islice(batches, int(line)):
      pass
    print(time.perf_counter() - started, flush=True)
    del batches


if __name__ == "__main__":
  main(*sys.argv[1:3], *map(int, sys.argv[3:6]))
