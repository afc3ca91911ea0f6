"""FPN and HTC against mmdet 3.3.0: every array of tests/golden/htc, in float32."""

import dataclasses
import functools
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads.htc import checkpoints, mask_head
from frozen_vision.heads.htc.config import HTCConfig
from frozen_vision.heads.htc.detections import select_detections
from frozen_vision.heads.htc.htc import HTC
from frozen_vision.heads.htc.rpn import Proposals
from frozen_vision.necks.fpn import FPN
from frozen_vision.ops import masks as mask_ops
from frozen_vision.ops import roi_align as roi_ops
from tests import golden_values, paths

RELATIVE = 1e-4  # of an array's largest magnitude


class Detector(nnx.Module):
  """What the converter fills: a neck and a head."""

  def __init__(self, feature_specs, channels, config):
    self.neck = FPN(feature_specs, channels, input_norm=False, rngs=nnx.Rngs(0))
    self.head = HTC(self.neck.feature_specs, config, rngs=nnx.Rngs(0))


class Golden:
  """Reference arrays, our modules with the reference's weights, and the features, computed once."""

  def __init__(self, folder):
    self.spec = spec = json.loads((folder / "htc.json").read_text())
    self.arrays = np.load(folder / "htc.npz")
    rcnn, rpn = spec["config"]["train_cfg"]["rcnn"][0], spec["config"]["train_cfg"]["rpn"]
    train = spec["config"]["train_cfg"]["rpn_proposal"]
    test = spec["config"]["test_cfg"]
    channels = spec["fpn_channels"]
    self.config = HTCConfig(
      num_classes=spec["classes"],
      rpn_channels=channels,
      rpn_samples=rpn["sampler"]["num"],
      train_pre_nms=train["nms_pre"],
      train_proposals=train["max_per_img"],
      test_pre_nms=test["rpn"]["nms_pre"],
      test_proposals=test["rpn"]["max_per_img"],
      roi_samples=rcnn["sampler"]["num"],
      sampling_ratio=None,
      fc_channels=spec["fc_channels"],
      mask_channels=channels,
      mask_average="last",
      score_threshold=test["rcnn"]["score_thr"],
      max_detections=test["rcnn"]["max_per_img"],
      semantic_classes=spec["semantic_classes"],
      semantic_channels=channels,
    )
    specs = [FeatureSpec(4 * 2**i, c) for i, c in enumerate(spec["feature_channels"])]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Detector(specs, channels, self.config)))
    detector = nnx.merge(graphdef, checkpoints.convert(golden_values.state_dict(spec), state))
    self.neck, self.head = detector.neck, detector.head
    self.image_size = jnp.asarray(spec["image_sizes"], jnp.int32)
    h, w = spec["batch_shape"]
    inputs = [
      golden_values.values(spec["seed"], f"features.{i}", (2, s.channels, h // s.stride, w // s.stride))
      for i, s in enumerate(specs)
    ]
    self.features = jax.jit(self.neck.__call__)(tuple(jnp.asarray(x.transpose(0, 2, 3, 1)) for x in inputs))
    self.semantic = jax.jit(self.head.semantic)(self.features)
    self.rois = jnp.stack([self.arrays["rois.0"], self.arrays["rois.1"]])

  @functools.cached_property
  def rpn(self):
    return jax.jit(self.head.rpn.__call__)(self.features)

  @functools.cached_property
  def stages(self):
    """(output, refined boxes) of every stage, all from the fixed boxes."""

    @jax.jit
    def run(features, embedding, rois):
      outputs = [self.head.box_outputs(i, features, rois, embedding) for i in range(3)]
      heads = self.head.box_heads
      return [(x, h.refine(x, rois, self.image_size)) for x, h in zip(outputs, heads)]

    return run(self.features, self.semantic[1], self.rois)

  @functools.cached_property
  def scored_boxes(self):
    """What `predict_boxes` gives to `select_detections`, from the fixed boxes."""
    proposals = Proposals(self.rois, jnp.ones(self.rois.shape[:2]), jnp.ones(self.rois.shape[:2], bool))
    return jax.jit(self.head.score_boxes)(self.features, self.image_size, proposals)

  @functools.cached_property
  def batch(self):
    """The training batch; image 1 has three objects, image 0 four."""
    count = max(len(self.arrays[f"gt.{i}.boxes"]) for i in (0, 1))

    def padded(name):
      rows = [self.arrays[f"gt.{i}.{name}"] for i in (0, 1)]
      return jnp.stack([np.pad(r, [(0, count - len(r))] + [(0, 0)] * (r.ndim - 1)) for r in rows])

    valid = [np.arange(count) < len(self.arrays[f"gt.{i}.boxes"]) for i in (0, 1)]
    return {
      "image_size": self.image_size,
      "boxes": padded("boxes"),
      "labels": padded("labels").astype(jnp.int32),
      "masks": padded("masks_packed"),
      "valid": jnp.stack(valid),
      "semantic": jnp.asarray(self.arrays["gt.semantic_stride8"], jnp.int32),
    }


@pytest.fixture(scope="module")
def golden():
  return Golden(paths.golden_dir() / "htc")


def check(actual, expected, name=""):
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape, name
  np.testing.assert_allclose(actual, expected, rtol=0, atol=RELATIVE * np.abs(expected).max(), err_msg=name)


def channels_first(x):
  return np.moveaxis(np.asarray(x), -1, 1)


def check_sets(boxes, scores, labels, expected_boxes, expected_scores, expected_labels):
  """One partner per row: same label, within 0.05 px and 1e-4 of the score; none left over."""
  assert len(boxes) == len(expected_boxes)
  distance = np.abs(boxes[:, None] - expected_boxes[None]).max(-1)
  near = (distance < 0.05) & (np.abs(scores[:, None] - expected_scores[None]) < 1e-4)
  near &= labels[:, None] == expected_labels[None]
  free = np.ones(len(boxes), bool)
  for j in range(len(expected_boxes)):
    candidates = np.flatnonzero(near[:, j] & free)
    assert candidates.size, f"no partner for row {j}: {expected_boxes[j]} {expected_scores[j]}"
    free[candidates[distance[candidates, j].argmin()]] = False


def test_fpn(golden):
  for i, x in enumerate(golden.features):
    check(channels_first(x)[:, ::2], golden.arrays[f"fpn.{i}"], f"fpn.{i}")


def test_rpn(golden):
  for i, output in enumerate(golden.rpn):
    check(channels_first(output.logits), golden.arrays[f"rpn.cls.{i}"], f"rpn.cls.{i}")
    check(channels_first(output.deltas), golden.arrays[f"rpn.reg.{i}"], f"rpn.reg.{i}")


def test_proposals(golden):
  config = golden.config
  found = jax.jit(
    functools.partial(golden.head.rpn.proposals, pre_nms=config.test_pre_nms, count=config.test_proposals)
  )(golden.rpn, golden.image_size)
  for i in (0, 1):
    valid = np.asarray(found.valid[i])
    boxes, scores = (golden.arrays[f"proposals.{i}.{name}"] for name in ("boxes", "scores"))
    check_sets(
      np.asarray(found.boxes[i])[valid],
      np.asarray(found.scores[i])[valid],
      np.zeros(valid.sum()),
      boxes,
      scores,
      np.zeros(len(boxes)),
    )


def test_training_proposals(golden):
  config = golden.config
  found = jax.jit(
    functools.partial(golden.head.rpn.proposals, pre_nms=config.train_pre_nms, count=config.train_proposals)
  )(golden.rpn, golden.image_size)
  for i in (0, 1):
    expected = golden.arrays[f"train.rpn_proposals.{i}.boxes"]
    boxes = np.asarray(found.boxes[i])[np.asarray(found.valid[i])]
    zeros = np.zeros(len(boxes))
    check_sets(boxes, zeros, zeros, expected, np.zeros(len(expected)), np.zeros(len(expected)))


def test_semantic(golden):
  logits, embedding = golden.semantic
  check(channels_first(logits)[:, ::4, ::2, ::2], golden.arrays["semantic.logits"])
  check(channels_first(embedding)[:, ::8], golden.arrays["semantic.embedding"])


@pytest.mark.parametrize("stage", range(3))
def test_stage(golden, stage):
  output, refined = golden.stages[stage]

  def flat(x):
    return np.asarray(x).reshape(-1, *x.shape[2:])

  check(flat(output.logits), golden.arrays[f"stage{stage}.cls"], "cls")
  check(flat(output.deltas)[:, 0], golden.arrays[f"stage{stage}.reg"], "reg")
  check(flat(refined), golden.arrays[f"stage{stage}.refined"], "refined")


def test_stage_masks(golden):
  """The golden masks belong to the boxes [::10], but their semantic features to the first 24 boxes.

  mmcv's RoIAlign reads its rois as one block of memory. With several levels mmdet makes a copy of
  them first; for the one semantic level the strided view [::10] went in as it was, and rows 0..23,
  all of image 0, were read. Only the first box is its own. Masks with the right semantic features
  are compared in test_predict_masks.
  """
  head, config = golden.head, golden.config
  size = config.mask_roi_size

  @jax.jit
  def run(features, embedding, rois):
    first = rois.reshape(1, -1, 4)[:, :24]
    x = head._roi_features(features, None, rois[:, ::10], size).reshape(24, size, size, -1)
    x += roi_ops.roi_align(
      (embedding[:1],),
      first,
      strides=(8,),
      output_size=size,
      sampling_ratio=config.sampling_ratio,
    )[0]
    states = mask_head.mask_flow(head.mask_heads, 2, x, flow=True)
    return [h.predict(state) for h, state in zip(head.mask_heads, states)]

  for stage, masks in enumerate(run(golden.features, golden.semantic[1], golden.rois)):
    check(channels_first(masks)[:, :3], golden.arrays[f"stage{stage}.mask_logits"], f"stage{stage}")


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_predict(golden, kind):
  config = golden.config
  if kind == "soft":
    config = dataclasses.replace(config, nms_kind="soft_linear")
  found = jax.jit(select_detections, static_argnums=3)(*golden.scored_boxes, config)
  found = jax.tree.map(np.asarray, found)
  for i in (0, 1):
    names = ("boxes", "scores", "labels")
    expected = [golden.arrays[f"predict.{kind}.{i}.{name}"] for name in names]
    valid = found["valid"][i]
    check_sets(*(found[name][i][valid] for name in names), *expected)


def test_predict_masks(golden):
  boxes = jnp.stack([golden.arrays[f"predict.hard.{i}.boxes"][:24] for i in (0, 1)])
  labels = jnp.stack([golden.arrays[f"predict.hard.{i}.labels"][:24] for i in (0, 1)]).astype(jnp.int32)
  masks = np.asarray(jax.jit(golden.head.predict_masks)(golden.features, boxes, labels))
  for i in (0, 1):
    height, width = golden.spec["image_sizes"][i]
    check(np.log(masks[i]) - np.log1p(-masks[i]), golden.arrays[f"predict.hard.{i}.mask_logits"])
    pasted = [mask_ops.paste_mask(m, b, height, width) for m, b in zip(masks[i], np.asarray(boxes[i]))]
    expected = mask_ops.unpack(golden.arrays[f"predict.hard.{i}.masks_packed"], width)
    # A pixel whose probability is 0.5 to the last bit may fall on either side.
    assert (np.stack(pasted) != expected).mean() < 1e-5


def test_rpn_losses(golden):
  batch = golden.batch
  losses, _ = jax.jit(golden.head.rpn.losses)(
    golden.rpn, batch["boxes"], batch["valid"], golden.image_size, jax.random.key(0)
  )
  check(losses["rpn_class"], golden.arrays["loss.loss_rpn_cls"], "cls")
  check(losses["rpn_box"], golden.arrays["loss.loss_rpn_bbox"], "bbox")


def test_roi_losses(golden):
  proposals = jnp.stack([golden.arrays[f"train.proposals.{i}.boxes"] for i in (0, 1)])
  valid = jnp.ones(proposals.shape[:2], bool)
  losses, metrics = jax.jit(golden.head.roi_losses)(
    golden.features, proposals, valid, golden.batch, jax.random.key(0)
  )
  check(losses.pop("semantic"), golden.arrays["loss.loss_semantic_seg"], "semantic")
  for stage in range(3):
    for ours, theirs in [("class", "loss_cls"), ("box", "loss_bbox"), ("mask", "loss_mask")]:
      expected = golden.arrays[f"loss.s{stage}.{theirs}"].reshape(())
      check(losses.pop(f"stage{stage}_{ours}"), expected, f"s{stage}.{theirs}")
    check(metrics[f"accuracy/stage{stage}"], golden.arrays[f"loss.s{stage}.acc"][0], f"s{stage}.acc")
  assert not losses
