"""HTC on small random features: hard batches, presets, prediction in two steps."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads.htc import config as htc_config
from frozen_vision.heads.htc.box_head import BoxHead
from frozen_vision.heads.htc.detections import select_detections
from frozen_vision.heads.htc.htc import HTC
from frozen_vision.ops import boxes as box_ops

SIDE = 64
SPECS = tuple(FeatureSpec(stride, 8) for stride in (4, 8, 16, 32, 64))
TINY = dict(
  num_classes=3,
  rpn_channels=8,
  rpn_samples=32,
  train_pre_nms=40,
  train_proposals=20,
  test_pre_nms=40,
  test_proposals=20,
  roi_samples=16,
  fc_channels=16,
  mask_channels=8,
  mask_convs=1,
  box_roi_size=2,
  mask_roi_size=4,
  sampling_ratio=1,
  anchor_scales=(4.0,),
  max_detections=12,
  pre_nms_detections=60,
)
TWO_STAGES = dict(
  stage_ious=(0.5, 0.6), stage_stds=((0.1, 0.1, 0.2, 0.2),) * 2, stage_loss_weights=(1.0, 0.5)
)


@functools.cache
def features():
  keys = jax.random.split(jax.random.key(0), len(SPECS))
  return tuple(
    jax.random.normal(k, (2, SIDE // s.stride, SIDE // s.stride, s.channels)) for k, s in zip(keys, SPECS)
  )


def make_batch(objects, valid=None):
  """Both images have these boxes (padded to six); masks fill them."""
  boxes = np.zeros((2, 6, 4), np.float32)
  boxes[:, : len(objects)] = np.reshape(objects, (-1, 4))
  count = len(objects) if valid is None else valid
  masks = np.zeros((2, 6, SIDE, SIDE), bool)
  for j, (x1, y1, x2, y2) in enumerate(boxes[0].astype(int)):
    masks[:, j, y1:y2, x1:x2] = True
  return {
    "image_size": jnp.asarray([[SIDE, SIDE], [48, 56]], jnp.int32),
    "boxes": jnp.asarray(boxes),
    "labels": jnp.broadcast_to(jnp.arange(6) % 3, (2, 6)).astype(jnp.int32),
    "masks": jnp.asarray(np.packbits(masks, axis=-1)),
    "valid": jnp.broadcast_to(jnp.arange(6) < count, (2, 6)),
    "semantic": jnp.zeros((2, SIDE // 8, SIDE // 8), jnp.int32),
  }


BATCHES = {
  "several": make_batch([[4, 4, 30, 28], [20, 10, 50, 44], [2, 30, 20, 47]]),
  "none": make_batch([]),
  "one": make_batch([[10, 12, 40, 40]]),
  "all invalid": make_batch([[4, 4, 30, 28], [20, 10, 50, 44]], valid=0),
  "without area": make_batch([[10, 10, 10, 30], [5, 5, 5, 5]]),
  "crowded": make_batch([[10, 10, 40, 40]] * 6),
  "tiny": make_batch([[10, 10, 10.2, 10.3]]),
}


@pytest.fixture(scope="module")
def step():
  """Compiled losses and gradients of a two-stage HTC with a semantic branch."""
  config = htc_config.htc(semantic_classes=4, semantic_channels=8, semantic_convs=1, **TINY, **TWO_STAGES)
  head = HTC(SPECS, config, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(head)

  @jax.jit
  def run(params, features, batch, key):
    def loss(params, features):
      losses, metrics = nnx.merge(graphdef, params).losses(features, batch, key)
      return sum(losses.values()), (losses, metrics)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, features)

  return functools.partial(run, params)


@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients_are_finite(step, name):
  (total, (losses, metrics)), gradients = step(features(), BATCHES[name], jax.random.key(1))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((total, losses, metrics, gradients)))
  assert sorted(losses) == sorted(
    ["rpn_class", "rpn_box", "semantic"] + [f"stage{i}_{k}" for i in (0, 1) for k in ("class", "box", "mask")]
  )
  objects = name in ("several", "one", "crowded", "tiny")
  for stage in (0, 1):
    assert (losses[f"stage{stage}_mask"] > 0) == objects
    assert (metrics[f"positives/stage{stage}"] > 0) == objects
    assert losses[f"stage{stage}_class"] > 0
  if not objects:
    assert losses["rpn_box"] == losses["stage0_box"] == losses["stage1_box"] == 0


def test_every_parameter_and_level_gets_a_gradient(step):
  _, (gradients, feature_gradients) = step(features(), BATCHES["several"], jax.random.key(1))
  silent = ["/".join(map(str, p)) for p, g in nnx.to_flat_state(gradients) if not np.any(g[...])]
  assert not silent
  assert all(np.any(g) for g in feature_gradients)


def test_the_key_alone_decides_what_is_sampled(step):
  first, again, other = (step(features(), BATCHES["several"], jax.random.key(k))[0][0] for k in (1, 1, 2))
  assert first == again != other


def test_labels_of_padding_do_not_matter(step):
  batch = BATCHES["one"]
  noise = jax.random.randint(jax.random.key(3), batch["masks"].shape, 0, 255).astype(jnp.uint8)
  pad = ~batch["valid"]
  changed = batch | {
    "boxes": jnp.where(pad[..., None], jnp.asarray([3.0, 3.0, 33.0, 43.0]), batch["boxes"]),
    "labels": jnp.where(pad, 999, batch["labels"]),
    "masks": jnp.where(pad[..., None, None], noise, batch["masks"]),
  }
  losses = [step(features(), b, jax.random.key(1))[0][1][0] for b in (batch, changed)]
  for name in losses[0]:
    np.testing.assert_array_equal(losses[0][name], losses[1][name], err_msg=name)


@pytest.mark.parametrize(
  "preset, stages, masks",
  [
    (htc_config.htc(), 3, True),
    (htc_config.htc(with_masks=False), 3, False),
    (htc_config.cascade_mask_rcnn(), 3, True),
    (htc_config.mask_rcnn(), 1, True),
    (htc_config.preset("tf_mask_rcnn", with_masks=False), 1, False),
    (htc_config.preset("tf_cascade_mask_rcnn"), 3, True),
  ],
)
def test_presets_at_published_sizes(preset, stages, masks):
  """Traced only: names, dtypes and shapes, with float32 losses in bfloat16 compute."""
  specs = tuple(FeatureSpec(s.stride, 256) for s in SPECS)
  batch = BATCHES["several"]
  pyramid = tuple(
    jax.ShapeDtypeStruct((2, SIDE // s.stride, SIDE // s.stride, 256), jnp.bfloat16) for s in specs
  )
  head = nnx.eval_shape(lambda: HTC(specs, preset, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(head))} == {jnp.dtype("float32")}
  assert sum(m.flow is not None for m in head.mask_heads) == (2 if preset.mask_info_flow and masks else 0)
  graphdef, params = nnx.split(head)
  losses, _ = jax.eval_shape(
    lambda p, f: nnx.merge(graphdef, p).losses(f, batch, jax.random.key(0)), params, pyramid
  )
  kinds = ("class", "box", "mask") if masks else ("class", "box")
  assert set(losses) == {"rpn_class", "rpn_box"} | {f"stage{i}_{k}" for i in range(stages) for k in kinds}
  assert all(x.shape == () and x.dtype == jnp.float32 for x in losses.values())
  found = jax.eval_shape(
    lambda p, f: nnx.merge(graphdef, p).predict_boxes(f, batch["image_size"]), params, pyramid
  )
  assert {k: (v.shape, str(v.dtype)) for k, v in found.items()} == {
    "boxes": ((2, 100, 4), "float32"),
    "scores": ((2, 100), "float32"),
    "labels": ((2, 100), "int32"),
    "valid": ((2, 100), "bool"),
  }
  if masks:
    shape = jax.eval_shape(
      lambda p, f, b, labels: nnx.merge(graphdef, p).predict_masks(f, b, labels),
      params,
      pyramid,
      found["boxes"],
      found["labels"],
    )
    assert shape.shape == (2, 100, 28, 28)


@pytest.mark.parametrize("preset", [htc_config.mask_rcnn, htc_config.htc])
def test_two_step_prediction(preset):
  config = preset(**(TINY | dict(score_threshold=0.2)), **(TWO_STAGES if preset is htc_config.htc else {}))
  head = HTC(SPECS, config, rngs=nnx.Rngs(0))
  image_size = BATCHES["one"]["image_size"]
  found = jax.jit(head.predict_boxes)(features(), image_size)
  masks = jax.jit(head.predict_masks)(features(), found["boxes"], found["labels"])
  boxes, scores, valid = (np.asarray(found[name]) for name in ("boxes", "scores", "valid"))
  assert valid.any() and (np.diff(scores) <= 0).all()
  assert (scores[valid] > 0.2).all() and not scores[~valid].any() and not boxes[~valid].any()
  assert (boxes >= 0).all() and (boxes <= np.asarray(image_size)[:, None, [1, 0, 1, 0]]).all()
  assert masks.shape == (2, 12, 8, 8) and (0 < masks).all() and (masks < 1).all()


def test_class_average():
  """Probabilities of two stages on the same rois, averaged before the softmax or after it."""
  config = htc_config.htc(**TINY, **TWO_STAGES)
  head = HTC(SPECS, config, rngs=nnx.Rngs(0))
  image_size = BATCHES["one"]["image_size"]
  proposals = head.propose(features(), image_size)
  first = head.box_outputs(0, features(), proposals.boxes)
  second = head.box_outputs(1, features(), head.box_heads[0].refine(first, proposals.boxes, image_size))
  logits = 30 * np.stack([first.logits, second.logits])  # far from where both ways give the same
  for box_head in head.box_heads:
    box_head.classes.kernel[...] *= 30
    box_head.classes.bias[...] *= 30
  for average, wanted in (
    ("logits", jax.nn.softmax(logits.mean(0), axis=-1)),
    ("probabilities", jax.nn.softmax(logits, axis=-1).mean(0)),
  ):
    head.config = dataclasses.replace(config, class_average=average)
    found = head.score_boxes(features(), image_size, proposals)[1]
    np.testing.assert_allclose(found, wanted[..., :-1], atol=1e-4)
  assert np.abs(jax.nn.softmax(logits.mean(0), axis=-1) - wanted).max() > 0.01


def test_mask_average():
  head = HTC(SPECS, htc_config.htc(**TINY, **TWO_STAGES), rngs=nnx.Rngs(0))
  boxes = jnp.asarray([[[4, 4, 30, 28], [20, 10, 50, 44]]] * 2, jnp.float32)
  labels = jnp.asarray([[0, 2]] * 2)
  stages = [
    jax.nn.sigmoid(
      jnp.take_along_axis(head.mask_logits(stage, features(), boxes), labels[..., None, None, None], axis=-1)
    )[..., 0]
    for stage in (0, 1)
  ]
  np.testing.assert_allclose(head.predict_masks(features(), boxes, labels), sum(stages) / 2, atol=1e-5)
  head.config = dataclasses.replace(head.config, mask_average="last")
  np.testing.assert_allclose(head.predict_masks(features(), boxes, labels), stages[1], atol=1e-5)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("kind", ["soft_linear", "soft_gaussian"])
def test_soft_nms_keeps_what_hard_nms_drops(kind, per_class):
  config = htc_config.HTCConfig(
    num_classes=2, score_threshold=0.3, nms_iou=0.5, max_detections=5, nms_kind=kind
  )
  box, moved, far = [0, 0, 10, 10], [2, 0, 12, 10], [30, 30, 40, 40]
  boxes = jnp.asarray([[box, moved, far, box]], jnp.float32)[:, :, None]
  boxes = boxes.repeat(2, 2) if per_class else boxes
  scores = jnp.asarray([[[0.9, 0.0], [0.8, 0.4], [0.5, 0.2], [1.0, 1.0]]])
  valid = jnp.asarray([[True, True, True, False]])
  found = select_detections(boxes, scores, valid, config)
  overlap = 80 / 120
  lowered = 0.8 * (1 - overlap if kind == "soft_linear" else np.exp(-(overlap**2) / 0.5))
  rows = [(0.9, 0, box), (0.5, 0, far), (0.4, 1, moved), (lowered, 0, moved)]
  rows.sort(key=lambda row: -row[0])
  np.testing.assert_array_equal(found["valid"][0], [True] * 4 + [False])
  np.testing.assert_allclose(found["scores"][0, :4], [r[0] for r in rows], rtol=1e-5)
  np.testing.assert_array_equal(found["labels"][0, :4], [r[1] for r in rows])
  np.testing.assert_array_equal(found["boxes"][0, :4], [r[2] for r in rows])


def test_published_box_heads():
  """Parameters of the shared layers, as the layer sizes of Shared2FC and Shared4Conv1FC give."""

  def count(**changes):
    config = htc_config.htc(**changes)
    head = nnx.eval_shape(
      lambda: BoxHead(256, config, config.stage_stds[0], dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    outputs = 1024 * (81 + 4) + 81 + 4
    return sum(x.size for x in jax.tree.leaves(nnx.state(head))) - outputs

  fc = 256 * 49 * 1024 + 1024
  assert count() == fc + 1024 * 1024 + 1024
  assert count(num_box_convs=4, num_fcs=1) == fc + 4 * (256 * 256 * 9 + 256)
  grouped = count(num_box_convs=4, num_fcs=1, box_conv_norm="group")
  assert grouped == fc + 4 * (256 * 256 * 9 + 2 * 256)


@pytest.mark.parametrize("norm", ["none", "group"])
def test_box_convolutions_see_one_roi_at_a_time(norm):
  config = htc_config.htc(**TINY, num_box_convs=2, num_fcs=1, box_conv_channels=32, box_conv_norm=norm)
  head = BoxHead(8, config, config.stage_stds[0], dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 8))
  run = jax.jit(head.__call__)
  together = run(x)
  alone = run(jnp.zeros_like(x).at[1, 2].set(7 * x[1, 2]))
  if norm == "group":  # the first norm takes the factor out again, up to its epsilon
    np.testing.assert_allclose(alone.logits[1, 2], together.logits[1, 2], atol=1e-3)
  else:  # biases begin at zero
    np.testing.assert_allclose(alone.logits[1, 2], 7 * together.logits[1, 2], rtol=1e-4)


@pytest.mark.parametrize("per_class", [False, True])
def test_detections_are_those_of_greedy_nms_per_class(per_class):
  config = htc_config.HTCConfig(num_classes=3, score_threshold=0.3, nms_iou=0.5, max_detections=40)
  rng = np.random.default_rng(0)
  corner = rng.uniform(0, 60, (2, 30, 3 if per_class else 1, 2))
  boxes = np.concatenate([corner, corner + rng.uniform(10, 40, corner.shape)], -1).astype(np.float32)
  scores = rng.uniform(0, 1, (2, 30, 3)).astype(np.float32)
  valid = rng.uniform(size=(2, 30)) < 0.8
  found = jax.tree.map(np.asarray, jax.jit(select_detections, static_argnums=3)(boxes, scores, valid, config))
  for i in range(2):
    expected = []
    for label in range(3):
      own = boxes[i, :, label if per_class else 0]
      overlaps = np.asarray(box_ops.pairwise_iou(own, own))
      kept = []
      for row in np.argsort(-scores[i, :, label]):
        if valid[i, row] and scores[i, row, label] > 0.3 and all(overlaps[row, k] <= 0.5 for k in kept):
          kept.append(row)
      expected += [(scores[i, row, label], label, *own[row]) for row in kept]
    expected = sorted(expected, reverse=True)[:40]
    ours = np.column_stack([found["scores"][i], found["labels"][i], found["boxes"][i]])[found["valid"][i]]
    np.testing.assert_allclose(ours, np.array(expected), rtol=1e-6)


def test_errors_name_what_was_found(without_type_checks):
  with pytest.raises(ValueError, match="'stage_ious': 1, 'stage_stds': 3"):
    htc_config.htc(stage_ious=(0.5,))
  with pytest.raises(ValueError, match="mask_average is 'none'"):
    htc_config.htc(mask_average="none")
  with pytest.raises(ValueError, match="nms_kind is 'soft'; known: .*'soft_linear'"):
    htc_config.htc(nms_kind="soft")
  with pytest.raises(ValueError, match="32 groups, but box_conv_channels is 40"):
    htc_config.htc(num_box_convs=1, box_conv_channels=40, box_conv_norm="group")
  with pytest.raises(ValueError, match="at least 4 levels"):
    HTC(SPECS[:3], htc_config.htc(**TINY), rngs=nnx.Rngs(0))
  head = HTC(SPECS, htc_config.htc(with_masks=False, semantic_classes=4, **TINY), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="with_masks=False"):
    head.predict_masks(features(), jnp.zeros((2, 1, 4)), jnp.zeros((2, 1), int))
  with pytest.raises(ValueError, match="at stride 8"):
    head.semantic_head.loss(jnp.zeros((2, 8, 8, 4)), jnp.zeros((2, 64, 64), int))
