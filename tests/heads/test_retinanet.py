"""RetinaNet equals an independent implementation: losses, gradients, detections; the task runs it."""

import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.files import trees
from frozen_vision.heads import retinanet
from frozen_vision.runs import checkpoints
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop
from tests import tiny

_GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "retinanet.npz"
_SPECS = (FeatureSpec(8, 6), FeatureSpec(16, 6))
_CONFIG = retinanet.RetinaNetConfig(
  num_classes=3, anchor_scales=(2.0, 3.0), channels=8, convs=2, max_detections=300, pre_nms_detections=5000
)
_LEAVES = {"kernel": "weight", "scale": "weight"}


def _from_torch(path, golden, kind):
  layer, leaf = path.rsplit("/", 1)
  array = golden[f"{kind}.{layer.replace('/', '.')}.{_LEAVES.get(leaf, leaf)}"]
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


@pytest.fixture(scope="module")
def golden():
  return dict(np.load(_GOLDEN))


@pytest.fixture(scope="module")
def head(golden):
  """(graphdef, parameters of the reference, other variables)."""
  module = retinanet.RetinaNet(_SPECS, _CONFIG, rngs=nnx.Rngs(0))
  graphdef, params, rest = nnx.split(module, nnx.Param, ...)
  flat = nnx.to_flat_state(params)
  assert len(flat) == sum(key.startswith("parameter.") for key in golden)
  leaves = [
    (path, leaf.replace(jnp.asarray(_from_torch(trees.path_string(path), golden, "parameter"))))
    for path, leaf in flat
  ]
  return graphdef, nnx.from_flat_state(leaves), rest


def _assert_close(found, wanted, name, tolerance=1e-5):
  found, wanted = np.asarray(found), np.asarray(wanted)
  assert found.shape == wanted.shape, name
  assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max(), name


def test_losses_and_gradients(golden, head):
  graphdef, params, rest = head
  maps = [golden[f"map.{level}"].transpose(0, 2, 3, 1) for level in range(2)]
  boxes, labels, valid = np.zeros((3, 4, 4), np.float32), np.zeros((3, 4), np.int32), np.zeros((3, 4), bool)
  for image in range(3):
    count = len(golden[f"labels.{image}"])
    boxes[image, :count], labels[image, :count] = golden[f"boxes.{image}"], golden[f"labels.{image}"]
    valid[image, :count] = True
  boxes[1, 0] = (3, 3, 3, 9)  # without an area: no object
  valid[1, 0] = True
  batch = dict(boxes=boxes, labels=labels, valid=valid, image_size=golden["content"].astype(np.int32))

  def loss(params, maps, rest):
    module = nnx.merge(graphdef, params, rest, copy=True)
    terms, metrics = module.losses(maps, batch, jax.random.key(0))
    return sum(terms.values()), (terms, metrics, module(maps))

  gradients, (terms, metrics, levels) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
    params, maps, rest
  )
  _assert_close(jnp.concatenate([anchors for *_, anchors in levels]), golden["anchors"], "anchors")
  assert set(terms) == {"class", "box"} and float(metrics["positives"]) > 1
  for name, value in terms.items():
    _assert_close(value, golden[name], name)
  for level, gradient in enumerate(gradients[1]):
    _assert_close(gradient, golden[f"grad.map.{level}"].transpose(0, 2, 3, 1), level, 2e-5)
  for name, gradient in trees.flatten(gradients[0]).items():
    _assert_close(gradient, _from_torch(name, golden, "grad"), name, 2e-5)


def test_detections(golden):
  levels, start = [], 0
  for cells in (8 * 12, 4 * 6):
    part = slice(start, start + 6 * cells)
    levels.append([jnp.asarray(golden[name][..., part, :]) for name in ("logits", "deltas", "anchors")])
    start = part.stop

  class Given(retinanet.RetinaNet):
    """Its outputs are the reference's."""

    def __call__(self, features):
      return levels

  given = Given(_SPECS, _CONFIG, rngs=nnx.Rngs(0))
  predict = jax.jit(lambda image_size: given.select(*given.score_boxes([], image_size)))
  found = predict(golden["content"].astype(np.int32))
  for image in range(3):
    wanted = golden[f"found.{image}"][:300]
    count = len(wanted)
    assert found["valid"][image].sum() == count > 20
    np.testing.assert_allclose(found["scores"][image, :count], wanted[:, 0], atol=1e-6)
    np.testing.assert_array_equal(found["labels"][image, :count], wanted[:, 1])
    np.testing.assert_allclose(found["boxes"][image, :count], wanted[:, 2:], atol=1e-3)


def test_levels_of_several_widths_are_refused():
  with pytest.raises(ValueError, match="expected levels with one number of channels"):
    retinanet.RetinaNet([FeatureSpec(8, 6), FeatureSpec(16, 8)], _CONFIG, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_it_trains_on_a_nas_fpn_whose_statistics_are_kept(tmp_path):
  config = tiny.detection()
  config.update(dict(steps=2, checkpoint_every=2, eval_every=2))
  config.detection.neck = dict(name="nas_fpn", channels=8, repeats=1)
  config.detection.head = dict(name="retinanet", channels=8, convs=1, pre_nms=50, max_detections=10)
  metrics = loop.train(config, tmp_path)
  assert "box_AP" in metrics and "mask_AP" not in metrics
  losses = tiny.metrics(tmp_path)
  assert len(losses["train/loss/class"]) == len(losses["train/loss/box"]) == 2
  model = loop.build_model(tasks_build.build_task(config), config)
  with checkpoints.Checkpoints(tmp_path) as saved:
    state, _ = saved.restore({"mutable": model.mutable}, partial=True)
  means = {name: value for name, value in trees.flatten(state["mutable"]).items() if name.endswith("mean")}
  assert len(means) == 7 + 3 + 2 * 5  # nodes, laterals, and a norm for each level in both towers
  assert all(np.any(np.asarray(value)) for value in means.values())
