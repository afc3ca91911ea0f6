"""Class losses for long tails against an independent PyTorch implementation, and which classes are drawn."""

import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.heads import class_losses
from frozen_vision.heads.htc import box_head
from frozen_vision.heads.htc import config as htc_config

_GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "federated_loss.npz"
_BETA = 0.99  # of the reference


@pytest.fixture(scope="module")
def golden():
  return dict(np.load(_GOLDEN))


def _close(found, wanted):
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_federated_loss_and_its_gradient(golden):
  valid = golden["valid"]

  def loss(logits):
    looked_at = class_losses.searched_classes(
      golden["drawn"], golden["labels"], golden["negative"], golden["not_exhaustive"]
    )
    each = class_losses.sigmoid_loss(logits[..., :-1], golden["labels"], looked_at)
    return jnp.where(valid, each, 0).sum() / valid.sum()

  value, gradient = jax.value_and_grad(loss)(jnp.asarray(golden["logits"]))
  _close(value, golden["federated"])
  _close(gradient, golden["grad.federated"])


def _head(**changes):
  config = htc_config.preset(
    "tf_mask_rcnn", num_classes=6, fc_channels=4, num_fcs=1, num_box_convs=0, **changes
  )
  return box_head.BoxHead(2, config, (0.1, 0.1, 0.2, 0.2), dtype=jnp.float32, rngs=nnx.Rngs(0))


def _class_loss(head, golden, logits, batch):
  labels, valid = jnp.asarray(golden["labels"]), jnp.asarray(golden["valid"])
  boxes = jnp.tile(jnp.asarray([0.0, 0.0, 8.0, 8.0]), (*labels.shape, 1))
  output = box_head.BoxOutput(logits, jnp.zeros((*labels.shape, 6, 4)))
  return head.losses(output, boxes, labels, boxes, valid & (labels < 6), valid, batch, jax.random.key(0))[0]


def test_the_class_balanced_loss_and_its_gradient(golden):
  head, batch = _head(class_balance=_BETA), {"class_objects": jnp.asarray(golden["objects"], jnp.float32)}
  value, gradient = jax.value_and_grad(lambda logits: _class_loss(head, golden, logits, batch))(
    jnp.asarray(golden["logits"])
  )
  _close(value, golden["balanced"])
  _close(gradient, golden["grad.balanced"])


def test_the_head_looks_at_all_classes_where_so_many_are_drawn(golden):
  batch = {
    "class_images": jnp.ones(6),
    "negative": jnp.zeros((2, 6), bool),
    "not_exhaustive": jnp.zeros((2, 6), bool),
  }
  logits = jnp.asarray(golden["logits"])
  drawn = _class_loss(_head(class_loss="sigmoid", federated_classes=7), golden, logits, batch)
  _close(drawn, _class_loss(_head(class_loss="sigmoid"), golden, logits, {}))
  fewer = _class_loss(_head(class_loss="sigmoid", federated_classes=1), golden, logits, batch)
  assert fewer < drawn
  probabilities = _head(class_loss="sigmoid").probabilities(logits)
  _close(probabilities, 1 / (1 + np.exp(-golden["logits"])))


def test_classes_are_drawn_by_frequency_and_those_of_the_rois_are_there():
  frequency = jnp.asarray([4.0, 1.0, 0.0, 2.0, 1.0, 8.0])
  labels, valid = jnp.asarray([[5, 6, 1]]), jnp.asarray([[True, True, False]])
  draw = jax.jit(jax.vmap(lambda key: class_losses.federated_classes(key, labels, valid, frequency, 3)))
  found = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
  # Class 5 is a roi's, the background counts as one, and so one more is drawn; class 1 is of no valid roi.
  assert np.all(found[:, 5]) and np.all(found.sum(1) == 2)
  np.testing.assert_allclose(found.mean(0)[:5], np.array([4, 1, 0, 2, 1]) / 8, atol=0.03)
  few = class_losses.federated_classes(jax.random.key(0), labels, valid, frequency, 1)
  assert np.flatnonzero(few).tolist() == [5]
  every = class_losses.federated_classes(jax.random.key(0), labels, valid, frequency, 50)
  assert np.flatnonzero(~np.asarray(every)).tolist() == [2]  # no image has it


def test_options_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="federated_classes is 50, and a softmax is over all classes"):
    _head(federated_classes=50)
  with pytest.raises(ValueError, match="class_balance is 1.0; expected below 1"):
    _head(class_balance=1.0)
