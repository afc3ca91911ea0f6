"""Box head of one cascade stage: layers shared by class logits and deltas (Shared2FC, 4Conv1FC)."""

from collections.abc import Mapping
import math
from types import MappingProxyType
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, PRNGKeyArray
import optax

from frozen_vision.heads import class_losses
from frozen_vision.heads import detection_losses as loss_ops
from frozen_vision.heads.htc.config import HTCConfig, Quad
from frozen_vision.layers import norms
from frozen_vision.layers.activations import ACTIVATIONS
from frozen_vision.layers.convolution import MapConv
from frozen_vision.ops import boxes as box_ops
from frozen_vision.ops.arrays import Array

# The logit of 0.01, which every class has before training, as in CenterNet2 (RetinaNet, section 3.3).
_PRIOR_LOGIT = math.log(0.01 / 0.99)
_KAIMING = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class BoxOutput(NamedTuple):
  """float32 logits [b, n, classes + 1], background last; deltas [b, n, k, 4], k = 1 or classes."""

  logits: Float[Array, "b n c"]
  deltas: Float[Array, "b n k 4"]


class BoxConv(nnx.Module):
  """3x3 convolution, a norm over each roi (or none), activation."""

  def __init__(self, channels_in: int, config: HTCConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    norm, channels_out = config.box_conv_norm, config.box_conv_channels
    self.conv = MapConv(
      channels_in,
      channels_out,
      (3, 3),
      use_bias=norm == "none",
      dtype=dtype,
      kernel_init=_KAIMING,
      rngs=rngs,
    )
    self.norm = norms.group_norm(channels_out, dtype=dtype, rngs=rngs) if norm == "group" else None
    self.activation = ACTIVATIONS[config.activation]

  def __call__(self, x: Float[Array, "r s s c"]) -> Float[Array, "r s s d"]:
    x = self.conv(x)
    return self.activation(x if self.norm is None else self.norm(x))


class BoxHead(nnx.Module):
  """Roi features -> class logits and deltas; knows the scale (`stds`) of its deltas."""

  def __init__(self, channels: int, config: HTCConfig, stds: Quad, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.stds = stds
    self.config = config
    convs = []
    for _ in range(config.num_box_convs):
      convs.append(BoxConv(channels, config, dtype=dtype, rngs=rngs))
      channels = config.box_conv_channels
    self.convs = nnx.List(convs)
    size = config.box_roi_size**2 * channels
    xavier = nnx.initializers.xavier_uniform()
    fcs = []
    for _ in range(config.num_fcs):
      fcs.append(nnx.Linear(size, config.fc_channels, dtype=dtype, kernel_init=xavier, rngs=rngs))
      size = config.fc_channels
    self.fcs = nnx.List(fcs)
    boxes = config.num_classes if config.class_specific_boxes else 1
    self.classes = nnx.Linear(
      size,
      config.num_classes + 1,
      dtype=dtype,
      kernel_init=nnx.initializers.normal(0.01),
      bias_init=nnx.initializers.constant(_PRIOR_LOGIT if config.class_loss == "sigmoid" else 0.0),
      rngs=rngs,
    )
    self.boxes = nnx.Linear(
      size, 4 * boxes, dtype=dtype, kernel_init=nnx.initializers.normal(0.001), rngs=rngs
    )

  def __call__(self, x: Float[Array, "b n s s c"]) -> BoxOutput:
    leading = x.shape[:2]
    x = x.reshape(-1, *x.shape[2:])  # a GroupNorm must not see several rois as one map
    for conv in self.convs:
      x = conv(x)
    x = x.reshape(*leading, -1)
    for fc in self.fcs:
      x = ACTIVATIONS[self.config.activation](fc(x))
    logits = self.classes(x).astype(jnp.float32)
    deltas = self.boxes(x).astype(jnp.float32)
    return BoxOutput(logits, deltas.reshape(*deltas.shape[:2], -1, 4))

  def _deltas_of(self, deltas: Float[Array, "b n k 4"], labels: Int[Array, "b n"]) -> Float[Array, "b n 4"]:
    """The deltas of each roi's class; of its only box where boxes are class-agnostic."""
    if deltas.shape[2] == 1:
      return deltas[:, :, 0]
    index = jnp.minimum(labels, deltas.shape[2] - 1)[..., None, None]
    return jnp.take_along_axis(deltas, index, axis=2)[:, :, 0]

  def losses(
    self,
    output: BoxOutput,
    rois: Float[Array, "b n 4"],
    labels: Int[Array, "b n"],
    targets: Float[Array, "b n 4"],
    positive: Bool[Array, "b n"],
    valid: Bool[Array, "b n"],
    batch: Mapping[str, Array] = MappingProxyType({}),
    rng: PRNGKeyArray | None = None,
  ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Class loss, box loss, accuracy in percent; each over all valid rois of the batch.

    Args:
      output: of `__call__` on the rois' features.
      labels: class of the object for positive rois, `num_classes` (background) for the others.
      targets: the object's box for positive rois, in pixels; ignored for the others.
      batch: of `DetectionHead.losses`, for class losses that read more than logits and labels.
      rng: for what they sample.
    """
    wanted = box_ops.encode_deltas(rois, targets, self.stds)
    # Cleaned here, because a gradient that is masked later would still be NaN.
    wanted = jnp.where(positive[..., None], wanted, 0.0)
    box_loss = loss_ops.smooth_l1(self._deltas_of(output.deltas, labels) - wanted, self.config.box_beta).sum(
      -1
    )
    class_loss = self._class_loss(output.logits, labels, valid, batch, rng)
    if self.config.class_balance:
      weights = class_losses.balanced_weights(batch["class_objects"], self.config.class_balance)
      class_loss = class_loss * jnp.append(weights, 1.0)[labels]
    count = valid.sum()
    accuracy = 100.0 * loss_ops.masked_mean(self._likeliest(output.logits) == labels, valid)
    return (
      loss_ops.masked_mean(class_loss, valid),
      loss_ops.masked_mean(box_loss, positive & valid, count),
      accuracy,
    )

  def _class_loss(
    self,
    logits: Float[Array, "b n c"],
    labels: Int[Array, "b n"],
    valid: Bool[Array, "b n"],
    batch: Mapping[str, Array],
    rng: PRNGKeyArray | None,
  ) -> Float[Array, "b n"]:
    config = self.config
    if config.class_loss == "softmax":
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    looked_at = None
    if config.federated_classes:
      frequency = batch["class_images"] ** config.federated_power
      drawn = class_losses.federated_classes(rng, labels, valid, frequency, config.federated_classes)
      looked_at = class_losses.searched_classes(drawn, labels, batch["negative"], batch["not_exhaustive"])
    return class_losses.sigmoid_loss(logits[..., :-1], labels, looked_at)

  def probabilities(self, logits: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    """Probabilities of every class, the background last; with a sigmoid loss the last column is not one."""
    return jax.nn.softmax(logits, axis=-1) if self.config.class_loss == "softmax" else jax.nn.sigmoid(logits)

  def _likeliest(self, logits: Float[Array, "b n c"]) -> Int[Array, "b n"]:
    """The class of each roi; the background where every class has a probability below one half."""
    if self.config.class_loss == "sigmoid":
      logits = logits.at[..., -1].set(0.0)
    return logits.argmax(-1)

  def refine(
    self,
    output: BoxOutput,
    rois: Float[Array, "b n 4"],
    image_size: Int[Array, "b 2"],
    labels: Int[Array, "b n"] | None = None,
  ) -> Float[Array, "b n 4"]:
    """Moves rois by the deltas of one class; no gradient passes.

    The class is `labels` where that is not the background, else the likeliest foreground class.
    """
    likeliest = output.logits[..., :-1].argmax(-1)
    if labels is not None:
      likeliest = jnp.where(labels < self.config.num_classes, labels, likeliest)
    boxes = box_ops.decode_deltas(rois, self._deltas_of(output.deltas, likeliest), self.stds, image_size)
    return jax.lax.stop_gradient(boxes)

  def decode(
    self, output: BoxOutput, rois: Float[Array, "b n 4"], image_size: Int[Array, "b 2"]
  ) -> Float[Array, "b n k 4"]:
    """Boxes of all classes (k = classes) or the only one (k = 1), clipped to the image."""
    return box_ops.decode_deltas(rois[:, :, None], output.deltas, self.stds, image_size)
