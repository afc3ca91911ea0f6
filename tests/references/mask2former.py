"""Writes what transformers' Mask2Former gives on small features; needs it, SciPy and PyTorch, not JAX.

  python tests/references/mask2former.py FOLDER [SEED]

`deformable_attention.npz`: the sampling core and its gradients. `mask2former_training.npz` and `.json`:
predictions, matching, losses, their gradients and the semantic map for three images, one with ignored pixels,
one without segments, one with more segments than queries. Weights, features and points come from their names
(`tests/golden_values.py`), so that the test has the same ones.
"""

import json
import math
import pathlib
import sys
import types

import numpy as np
import torch

try:
  import torchvision  # noqa: F401  # transformers imports it
except RuntimeError:  # a torchvision without its compiled operators, which Mask2Former does not need
  _LIBRARY = torch.library.Library("torchvision", "DEF")
  _LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  _LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  _LIBRARY.define(
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor"
  )
  for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
    del sys.modules[_name]

from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former import modeling_mask2former as modeling

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests import golden_values

SEED = int(sys.argv[2]) if len(sys.argv) > 2 else 0
ATTENTION = dict(batch=2, queries=9, heads=3, channels=5, points=4, shapes=[[3, 4], [5, 7], [10, 13]])
MODEL = dict(
  seed=SEED,
  image=[64, 96],
  channels=[8, 16, 32, 64],
  hidden_dim=32,
  mask_dim=24,
  num_heads=4,
  encoder_layers=2,
  encoder_ffn_dim=40,
  decoder_layers=4,
  decoder_ffn_dim=48,
  num_queries=6,
  num_classes=9,
  num_points=48,
  segments=8,
)


def deformable_attention():
  """Output and gradients of transformers' sampling, some of it outside of the maps."""
  spec = ATTENTION
  cells = sum(height * width for height, width in spec["shapes"])
  samples = (spec["batch"], spec["queries"], spec["heads"], len(spec["shapes"]), spec["points"])
  values = golden_values.values(SEED, "values", (spec["batch"], cells, spec["heads"], spec["channels"]))
  locations = golden_values.uniform(SEED, "locations", (*samples, 2)) * np.float32(1.4) - np.float32(0.2)
  weights = golden_values.uniform(SEED, "weights", samples)
  inputs = [torch.tensor(x, requires_grad=True) for x in (values, locations, weights)]
  output = modeling.multi_scale_deformable_attention(inputs[0], spec["shapes"], *inputs[1:])
  output.backward(torch.tensor(golden_values.values(SEED, "cotangent", tuple(output.shape))))
  names = ("values", "locations", "weights")
  return {"seed": np.asarray(SEED), "output": output.detach().numpy()} | {
    f"gradient.{name}": x.grad.numpy() for name, x in zip(names, inputs)
  }


class Features(torch.nn.Module):
  """Stands for the backbone."""

  def __init__(self, channels):
    super().__init__()
    self.channels = channels
    self.maps = None

  def forward(self, pixels):
    del pixels
    return types.SimpleNamespace(feature_maps=self.maps)


def build():
  swin = SwinConfig(
    embed_dim=MODEL["channels"][0],
    depths=[1, 1, 1, 1],
    num_heads=[1, 1, 1, 1],
    out_features=["stage1", "stage2", "stage3", "stage4"],
  )
  model = Mask2FormerForUniversalSegmentation(
    Mask2FormerConfig(
      backbone_config=swin,
      feature_size=MODEL["hidden_dim"],
      hidden_dim=MODEL["hidden_dim"],
      mask_feature_size=MODEL["mask_dim"],
      encoder_feedforward_dim=MODEL["encoder_ffn_dim"],
      dim_feedforward=MODEL["decoder_ffn_dim"],
      encoder_layers=MODEL["encoder_layers"],
      decoder_layers=MODEL["decoder_layers"] + 1,
      num_attention_heads=MODEL["num_heads"],
      num_queries=MODEL["num_queries"],
      num_labels=MODEL["num_classes"],
      train_num_points=MODEL["num_points"],
    )
  )
  model.model.pixel_level_module.encoder = Features(MODEL["channels"])
  entries = {}
  for name, value in model.state_dict().items():
    if name == "criterion.empty_weight":
      continue
    norm = value.ndim == 1 and name.endswith("weight")
    fan_in = math.prod(value.shape[1:]) if value.ndim > 1 else 0
    scale = 1 / math.sqrt(fan_in) if "embed" not in name and fan_in else 0.3
    if "sampling_offsets" in name:
      scale = 0.5  # cells
    if "queries_features" in name or "queries_embedder" in name:
      scale = 1.0
    entries[name] = {"shape": list(value.shape), "scale": scale, "offset": float(norm)}
  spec = MODEL | {"state_dict": entries}
  weights = {name: torch.tensor(x) for name, x in golden_values.state_dict(spec).items()}
  missing, unexpected = model.load_state_dict(weights, strict=False)
  assert missing == ["criterion.empty_weight"] and not unexpected, (missing, unexpected)
  return model, spec


def label_maps():
  """Label maps [3, H, W]; the classes of their segments, padded with -1."""
  height, width = MODEL["image"]
  labels = np.full((3, height, width), 255, np.uint8)
  labels[0, :40, :30], labels[0, 10:50, 40:70], labels[0, 45:, 75:] = 2, 7, 0
  y, x = np.mgrid[:height, :width]
  labels[2] = (y // 22) * 3 + x // 32
  labels[2, labels[2] == 8] = 255
  classes = np.full((3, MODEL["segments"]), -1, np.int64)
  for i, image in enumerate(labels):
    found = np.unique(image)
    found = found[found != 255]
    classes[i, : len(found)] = found[::-1]
  return labels, classes


class GivenPoints:
  """Lets the loss of `model` draw the points that belong to its prediction, image and segment."""

  def __init__(self, model, predictions):
    self.queue, self.matches = [], []
    self.batch, self.segments = 3, MODEL["segments"]
    # The last prediction is scored first, then those before in their order.
    self.order = [predictions - 1, *range(predictions - 1)]
    criterion = model.criterion
    matcher, loss_masks = criterion.matcher.forward, criterion.loss_masks
    n = MODEL["num_points"]

    def match(*args):
      index = self.order[len(self.matches)]
      points = golden_values.uniform(SEED, f"matching.{index}", (self.batch, n, 2))
      self.queue = [points[i : i + 1] for i in range(self.batch)]
      self.matches.append(matcher(*args))
      return self.matches[-1]

    def masks(logits, labels, indices, count):
      index = self.order[len(self.matches) - 1]
      places = [(i, j) for i, (_, segments) in enumerate(indices) for j in segments.tolist()]
      rows, columns = (np.asarray(x) for x in zip(*places))
      candidates = golden_values.uniform(SEED, f"candidates.{index}", (self.batch, self.segments, 3 * n, 2))
      rest = n - int(0.75 * n)
      others = golden_values.uniform(SEED, f"others.{index}", (self.batch, self.segments, rest, 2))
      self.queue = [candidates[rows, columns], others[rows, columns]]
      return loss_masks(logits, labels, indices, count)

    criterion.matcher.forward, criterion.loss_masks = match, masks

  def rand(self, *shape, device=None):
    del device
    points = self.queue.pop(0)
    assert points.shape == shape, (points.shape, shape)
    return torch.tensor(points)


def losses():
  """Everything from features to losses, and back."""
  model, spec = build()
  (height, width), channels = MODEL["image"], MODEL["channels"]
  shapes = [(3, c, height >> i + 2, width >> i + 2) for i, c in enumerate(channels)]
  maps = [
    torch.tensor(golden_values.values(SEED, f"features.{i}", shape), requires_grad=True)
    for i, shape in enumerate(shapes)
  ]
  model.model.pixel_level_module.encoder.maps = maps
  labels, classes = label_maps()
  present = [row[row >= 0] for row in classes]
  count = MODEL["decoder_layers"] + 1
  given = GivenPoints(model, count)
  random, torch.rand = torch.rand, given.rand
  try:
    output = model(
      torch.zeros(3, 3, height, width),
      output_auxiliary_logits=True,
      mask_labels=[
        torch.tensor(np.stack([image == c for c in row]).reshape(-1, height, width), dtype=torch.float32)
        if len(row)
        else torch.zeros(0, height, width)
        for image, row in zip(labels, present)
      ],
      class_labels=[torch.tensor(row) for row in present],
    )
  finally:
    torch.rand = random
  output.loss.backward()
  predictions = [
    *output.auxiliary_logits,
    {
      "class_queries_logits": output.class_queries_logits,
      "masks_queries_logits": output.masks_queries_logits,
    },
  ]
  arrays = {"labels": labels, "segment_labels": classes, "loss": output.loss.detach().numpy()}
  for i, prediction in enumerate(predictions):
    arrays[f"class_logits.{i}"] = prediction["class_queries_logits"].detach().numpy()
    arrays[f"mask_logits.{i}"] = prediction["masks_queries_logits"].detach().numpy()[:, :, ::4, ::4]
    assigned = np.full((3, MODEL["segments"]), -1, np.int32)
    for row, (queries, segments) in zip(assigned, given.matches[given.order.index(i)]):
      row[segments.numpy()] = queries.numpy()
    arrays[f"assigned.{i}"] = assigned
  arrays |= {f"gradient.{i}": x.grad.numpy()[:, :, ::2, ::2] for i, x in enumerate(maps)}
  # The official code's semantic inference.
  masks = torch.nn.functional.interpolate(
    output.masks_queries_logits, size=(height, width), mode="bilinear", align_corners=False
  ).sigmoid()
  probabilities = output.class_queries_logits.softmax(-1)[..., :-1]
  semantic = torch.einsum("bqc,bqhw->bchw", probabilities, masks).detach().numpy()
  arrays["semantic"] = semantic[:, :, 1::4, 2::4]
  for name, found in _losses(model, given, predictions, labels, present).items():
    arrays[name] = np.asarray(found, np.float32)
  return arrays, spec


def _losses(model, given, predictions, labels, present):
  """{class, mask, dice}: [p], the weighted losses of each prediction alone."""
  height, width = MODEL["image"]
  truth = [
    torch.tensor(np.stack([image == c for c in row]), dtype=torch.float32)
    if len(row)
    else torch.zeros(0, height, width)
    for image, row in zip(labels, present)
  ]
  found = {"class": [], "mask": [], "dice": []}
  names = {"class": "loss_cross_entropy", "mask": "loss_mask", "dice": "loss_dice"}
  for i, prediction in enumerate(predictions):
    given.order, given.matches = [i], []
    random, torch.rand = torch.rand, given.rand
    try:
      losses = model.get_loss_dict(
        prediction["masks_queries_logits"].detach(),
        prediction["class_queries_logits"].detach(),
        truth,
        [torch.tensor(row) for row in present],
        None,
      )
    finally:
      torch.rand = random
    for name, key in names.items():
      found[name].append(float(losses[key]))
  return {f"losses.{name}": values for name, values in found.items()}


def main(folder):
  folder.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(folder / "deformable_attention.npz", **deformable_attention())
  arrays, spec = losses()
  np.savez_compressed(folder / "mask2former_training.npz", **arrays)
  (folder / "mask2former_training.json").write_text(json.dumps(spec, separators=(",", ":")) + "\n")


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
