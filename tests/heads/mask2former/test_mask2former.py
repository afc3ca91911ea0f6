"""Mask2Former's parts on small random input: points, matching, hard batches, prediction, memory."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads.mask2former import criterion, points
from frozen_vision.heads.mask2former.config import Mask2FormerConfig
from frozen_vision.heads.mask2former.mask2former import Mask2Former
from frozen_vision.heads.mask2former.transformer_decoder import Predictions, TransformerDecoder

SIDE = 32
SPECS = tuple(FeatureSpec(4 << i, 4) for i in range(4))
TINY = Mask2FormerConfig(
  num_classes=3,
  num_queries=4,
  hidden_dim=8,
  mask_dim=4,
  num_heads=2,
  encoder_layers=1,
  encoder_points=2,
  encoder_ffn_dim=8,
  decoder_layers=2,
  decoder_ffn_dim=8,
  norm_groups=2,
  num_points=24,
)


def build(dtype=jnp.float32, **changes):
  return Mask2Former(SPECS, dataclasses.replace(TINY, **changes), dtype=dtype, rngs=nnx.Rngs(0))


def features(batch, side=SIDE):
  rng = np.random.default_rng(0)
  shapes = [(batch, side // s.stride, side // s.stride, s.channels) for s in SPECS]
  return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def sample_slowly(image, points_):
  """Bilinear samples of one map, point by point; cells outside are zero."""
  height, width = image.shape
  found = []
  for x, y in points_ * [width, height] - 0.5:
    cells = [(int(np.floor(y)) + j, int(np.floor(x)) + i) for j in (0, 1) for i in (0, 1)]
    inside = [(j, i) for j, i in cells if 0 <= j < height and 0 <= i < width]
    found.append(sum(image[j, i] * (1 - abs(y - j)) * (1 - abs(x - i)) for j, i in inside))
  return np.array(found)


def test_sampling_maps_and_segments():
  rng = np.random.default_rng(0)
  maps = rng.standard_normal((2, 3, 5, 7)).astype(np.float32)
  labels = rng.integers(0, 3, (2, 9, 6)).astype(np.uint8)
  classes = np.array([[2, 0, 1], [1, 2, 200]], np.int32)
  places = rng.random((2, 3, 11, 2), np.float32)
  places[0, 0, :2] = [[0, 0], [1, 1]]  # corners: a quarter of the outermost cell
  segments = points.sample_segments(labels, classes, places)
  found = points.sample_maps(maps, places)
  shared = points.sample_shared(np.moveaxis(maps, 1, -1), places[:, 0])
  for i, j in np.ndindex(2, 3):
    np.testing.assert_allclose(found[i, j], sample_slowly(maps[i, j], places[i, j]), atol=1e-5)
    np.testing.assert_allclose(shared[i, :, j], sample_slowly(maps[i, j], places[i, 0]), atol=1e-5)
    mask = labels[i] == classes[i, j]
    np.testing.assert_allclose(segments[i, j], sample_slowly(mask, places[i, j]), atol=1e-5)
  np.testing.assert_array_equal(segments[1, 2], 0)
  np.testing.assert_allclose(found[0, 0, :2], maps[0, 0, [0, -1], [0, -1]] / 4, rtol=1e-6)


def test_points_lie_where_the_mask_is_least_certain():
  maps = np.broadcast_to(np.linspace(-7, 7, 8, dtype=np.float32), (1, 1, 8, 8))  # undecided in the middle
  rng = np.random.default_rng(0)
  candidates, others = (0.1 + 0.8 * rng.random((1, 1, n, 2), np.float32) for n in (60, 3))
  found = np.asarray(points.choose_points(maps, candidates, others, 10))[0, 0]
  distance = np.abs(candidates[0, 0, :, 0] - 0.5)
  assert set(np.abs(found[:10, 0] - 0.5)) == set(np.sort(distance)[:10])
  np.testing.assert_array_equal(found[10:], others[0, 0])


@pytest.mark.parametrize("segments, queries", ((5, 8), (6, 6), (9, 4)))
def test_matching_is_the_cheapest(segments, queries):
  """Against SciPy on the valid segments alone, for any number of them, with costs of any size."""
  rng = np.random.default_rng(segments)
  counts = np.arange(segments + 1)
  valid = np.zeros((len(counts), segments), bool)
  for row, count in zip(valid, counts):
    row[rng.permutation(segments)[:count]] = True
  cost = rng.standard_normal((3, len(counts), segments, queries)).astype(np.float32)
  cost *= np.array([1, 1e-3, 100], np.float32)[:, None, None, None]
  cost[0, -1] = np.round(cost[0, -1])  # ties
  cost = np.where(valid[..., None], cost, -1e5)  # what an invalid segment costs is of no account
  found = criterion.match(jnp.asarray(cost), jnp.asarray(valid))
  for p, i in np.ndindex(cost.shape[:2]):
    matched = np.asarray(found.matched[p, i])
    chosen = np.asarray(found.query[p, i])[matched]
    rows, columns = optimize.linear_sum_assignment(cost[p, i][valid[i]])
    assert matched.sum() == len(rows) == min(counts[i], queries) == len(set(chosen))
    assert not (matched & ~valid[i]).any() and ((0 <= chosen) & (chosen < queries)).all()
    best = cost[p, i][valid[i]][rows, columns].sum(dtype=np.float64)
    total = cost[p, i][matched, chosen].sum(dtype=np.float64)
    size = np.abs(cost[p, i][valid[i]]).max(initial=1e-9)
    np.testing.assert_allclose(total, best, rtol=1e-5, atol=1e-5 * size)


def test_costs_that_are_no_numbers_are_taken_last():
  cost = jnp.asarray([[[jnp.nan, 1.0, 2.0], [0.0, jnp.inf, -jnp.inf]]])
  found = criterion.match(cost, jnp.ones((1, 2), bool))
  np.testing.assert_array_equal(found.query, [[1, 0]])
  assert found.matched.all()


# Labels of one image, and its segments as (class, valid).
IMAGES = {
  "no segments": (np.zeros((SIDE, SIDE)), [(0, False), (0, False)]),
  "all ignored": (np.full((SIDE, SIDE), 255), [(255, False), (-1, False)]),
  "one covers all": (np.full((SIDE, SIDE), 2), [(2, True), (0, False)]),
  "two": (np.arange(SIDE)[:, None] // 20 + np.zeros((1, SIDE)), [(1, True), (0, True)]),
  "no such class": (np.full((SIDE, SIDE), 7), [(7, True), (0, False)]),
}


def batch_of(names):
  rows = [IMAGES[name] for name in names]
  return {
    "labels": jnp.asarray(np.stack([labels for labels, _ in rows]).astype(np.uint8)),
    "segment_labels": jnp.asarray([[c for c, _ in segments] for _, segments in rows], jnp.int32),
    "segment_valid": jnp.asarray([[v for _, v in segments] for _, segments in rows]),
  }


@functools.cache
def loss_and_gradients(dtype):
  """Compiled once: every batch has the same shapes."""
  graphdef, state = nnx.split(build(dtype))

  def loss(state, batch, rng):
    losses, metrics = nnx.merge(graphdef, state).losses(features(2), batch, rng)
    return sum(losses.values()), (losses, metrics)

  return functools.partial(jax.jit(jax.value_and_grad(loss, has_aux=True)), state)


@pytest.mark.parametrize(
  "names",
  (
    ("no segments", "no segments"),
    ("all ignored", "one covers all"),
    ("two", "no segments"),
    ("no such class", "all ignored"),
  ),
)
def test_losses_and_gradients_are_finite(names):
  (_, (losses, metrics)), gradients = loss_and_gradients(jnp.float32)(batch_of(names), jax.random.key(0))
  assert set(losses) == {f"{name}{end}" for name in ("class", "mask", "dice") for end in ("", "_earlier")}
  assert all(np.isfinite(x) for x in (*losses.values(), *metrics.values()))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
  segments = sum(valid and label < TINY.num_classes for name in names for label, valid in IMAGES[name][1])
  assert (losses["mask"] > 0) == (losses["dice"] > 0) == (segments > 0)
  mask_only = jnp.abs(gradients["pixel_decoder"]["mask_features"]["bias"][...]).max()
  assert (mask_only > 0) == (segments > 0)
  assert losses["class"] > 0 and losses["class_earlier"] > losses["class"] / 10


def test_half_precision_stays_near():
  """The same losses within what bfloat16 can tell; parameters and their gradients are float32."""
  batch, rng = batch_of(("two", "one covers all")), jax.random.key(1)
  (exact, _), _ = loss_and_gradients(jnp.float32)(batch, rng)
  (rounded, _), gradients = loss_and_gradients(jnp.bfloat16)(batch, rng)
  assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
  np.testing.assert_allclose(rounded, exact, rtol=0.1)
  assert rounded != exact


def test_invalid_segments_and_padding_of_segments_change_nothing():
  """The same image with its segments among others, and with what an invalid segment names in the image."""
  config = dataclasses.replace(TINY, num_points=400)
  rng = np.random.default_rng(0)
  b, p = 1, config.num_predictions
  predictions = Predictions(
    jnp.asarray(rng.standard_normal((p, b, 4, 4)), jnp.float32),
    jnp.asarray(rng.standard_normal((p, b, 4, 4)), jnp.float32),
    jnp.asarray(rng.standard_normal((b, 8, 8, 4)), jnp.float32),
  )
  labels = jnp.asarray(rng.integers(0, 3, (1, 16, 16)), jnp.uint8)
  shared = jnp.asarray(rng.random((p, b, 400, 2)), jnp.float32)
  own = {c: (rng.random((p, b, 1, 1200, 2)), rng.random((p, b, 1, 100, 2))) for c in range(3)}

  def run(classes, valid):
    candidates, others = (
      jnp.asarray(np.concatenate([own[c][i] for c in classes], axis=2), jnp.float32) for i in (0, 1)
    )
    targets = criterion.Targets(labels, jnp.asarray([classes]), jnp.asarray([valid]))
    return criterion.criterion(predictions, targets, config, criterion.Points(shared, candidates, others))

  losses, matches = run([2, 0], [True, True])
  padded, padded_matches = run([1, 2, 1, 0, 1], [False, True, False, True, False])  # more rows than queries
  np.testing.assert_array_equal(matches.query, padded_matches.query[..., jnp.array([1, 3])])
  for name in losses:
    np.testing.assert_allclose(padded[name], losses[name], rtol=1e-5, err_msg=name)


def test_rows_that_are_blocked_everywhere_attend_everywhere():
  decoder = TransformerDecoder(TINY, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (1, 4, 8))
  embeddings = decoder._mask_embeddings(decoder.norm(x))
  direction = embeddings[0, 0] / jnp.linalg.norm(embeddings[0, 0])
  coarse = jnp.stack([-direction, -2 * direction]).reshape(1, 1, 2, -1)  # query 0 is off in both cells
  logits = np.einsum("qc,sc->qs", embeddings[0], coarse[0, 0])
  blocked = np.asarray(decoder._blocked(x, coarse))[0]
  assert (logits[0] < 0).all() and not blocked[0].any()
  np.testing.assert_array_equal(blocked, np.where((logits < 0).all(1, keepdims=True), False, logits < 0))


def test_prediction_in_bands_of_rows(monkeypatch):
  """Scores do not depend on how many rows are computed at once; they are the resized masks' sums."""
  head, size = build(), (30, 21)

  def predict():
    return jax.jit(lambda x: head.predict_semantic(x, size))(features(2))

  scores = predict()
  assert scores.shape == (2, *size, 3) and scores.dtype == jnp.float32
  monkeypatch.setattr("frozen_vision.heads.mask2former.mask_head._BAND", 7)
  np.testing.assert_allclose(predict(), scores, rtol=1e-5)
  predictions = jax.jit(lambda x: head(x))(features(2))
  masks = jax.image.resize(predictions.mask_logits(-1), (2, 4, *size), "linear", antialias=False)
  masks = jax.nn.sigmoid(masks)
  classes = jax.nn.softmax(predictions.class_logits[-1])[..., :-1]
  np.testing.assert_allclose(scores, jnp.einsum("bqk,bqyx->byxk", classes, masks), rtol=1e-4)


def test_maps_of_any_size():
  """Levels need not be halves of each other, nor square."""
  sizes = ((13, 9), (7, 5), (4, 3), (2, 2))
  maps = tuple(jnp.ones((1, *size, 4)) for size in sizes)
  scores = jax.jit(lambda x: build().predict_semantic(x, (50, 33)))(maps)
  assert scores.shape == (1, 50, 33, 3) and np.isfinite(scores).all()


@pytest.mark.parametrize("input_norm", (True, False))
def test_input_norm(input_norm):
  """With it, how large the features of a pixel are is of no account."""
  decoder = build(input_norm=input_norm).pixel_decoder
  assert len(decoder.norms) == 4 * input_norm
  rng = np.random.default_rng(1)
  maps = features(1)
  scaled = tuple(x * (1 + rng.random((*x.shape[:3], 1), np.float32)) for x in maps)
  run = jax.jit(lambda x: decoder(x).masks)
  assert np.allclose(run(maps), run(scaled), rtol=1e-3, atol=1e-3) == input_norm


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="at least 3 .*fine to coarse"):
    Mask2Former(SPECS[:2], TINY, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="fine to coarse"):
    Mask2Former(SPECS[::-1], TINY, rngs=nnx.Rngs(0))
  head = build()
  with pytest.raises(ValueError, match=r"channels \[4, 4, 4\], was built for \[4, 4, 4, 4\]"):
    head(features(1)[:3])
  batch, key = batch_of(("two",)), jax.random.key(0)
  with pytest.raises(ValueError, match="has no columns; pad it"):
    head.losses(features(1), batch | {x: batch[x][:, :0] for x in ("segment_labels", "segment_valid")}, key)
  with pytest.raises(ValueError, match=r"expected labels \[b, H, W\]"):
    head.losses(features(1), batch | {"labels": batch["labels"][0]}, key)
  for change, text in (
    (dict(hidden_dim=10), "multiple of 4"),
    (dict(hidden_dim=12, num_heads=8), r"multiple of num_heads \(8\)"),
    (dict(num_queries=0), "num_queries is 0"),
    (dict(importance_ratio=1.5), "a fraction between 0 and 1"),
  ):
    with pytest.raises(ValueError, match=text):
      dataclasses.replace(TINY, **change)


@pytest.mark.slow
def test_memory_hardly_grows_with_the_number_of_predictions():
  """Temporaries of a training step at 640 px with 5 predictions and with 10; the encoder is one layer."""
  side, segments = 640, 16
  specs = tuple(FeatureSpec(4 << i, 96 << i) for i in range(4))

  def shape(*s, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(s, dtype)

  maps = tuple(shape(1, side // s.stride, side // s.stride, s.channels) for s in specs)
  batch = {
    "labels": shape(1, side, side, dtype=jnp.uint8),
    "segment_labels": shape(1, segments, dtype=jnp.int32),
    "segment_valid": shape(1, segments, dtype=jnp.bool_),
  }
  temporaries = []
  for decoder_layers in (4, 9):
    config = Mask2FormerConfig(encoder_layers=1, decoder_layers=decoder_layers)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Mask2Former(specs, config, rngs=nnx.Rngs(0))))

    def loss(state, maps, batch, rng):
      return sum(nnx.merge(graphdef, state).losses(maps, batch, rng)[0].values())

    rng = jax.eval_shape(lambda: jax.random.key(0))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(state, maps, batch, rng).compile()
    temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
  assert temporaries[1] < 1.25 * temporaries[0], temporaries
