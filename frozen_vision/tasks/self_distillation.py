"""DINO (arXiv 2104.14294): a student predicts from one crop what its teacher says of another.

The numbers follow github.com/facebookresearch/dino. The teacher is the run's average of the student: what is
evaluated, kept as the best and exported.
"""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.data.classification import views
from frozen_vision.layers.mlp import gelu, linear
from frozen_vision.ops import vectors
from frozen_vision.ops.arrays import Array
from frozen_vision.tasks import base, common, view_data
from frozen_vision.tasks.self_distillation_options import SelfDistillationConfig, SelfDistillationOptions


def default_config() -> ml_collections.ConfigDict:
  """Every option at its default, for a config file to change."""
  return config_lib.config_dict(SelfDistillationConfig())


class Prototypes(nnx.Module):
  """A linear layer without bias whose columns have length one, or lengths that train."""

  def __init__(self, channels: int, count: int, *, fixed_norm: bool, rngs: nnx.Rngs):
    bound = channels**-0.5  # as PyTorch draws a linear layer
    self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (channels, count), minval=-bound, maxval=bound))
    # A matrix, which weight decay applies to as in the released code.
    self.norm = nnx.data(None if fixed_norm else nnx.Param(jnp.ones((1, count))))

  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... k"]:
    directions = vectors.unit(self.kernel[...].T).T
    return x @ (directions if self.norm is None else directions * self.norm[...])


class DinoHead(nnx.Module):
  """Linear layers with GELU between them, a vector of length one, and its products with the prototypes."""

  def __init__(self, channels: int, options: SelfDistillationOptions, *, rngs: nnx.Rngs):
    sizes = (channels, *[options.hidden] * (options.head_layers - 1), options.bottleneck)
    self.layers = nnx.List(
      [linear(inputs, outputs, dtype=jnp.float32, rngs=rngs) for inputs, outputs in zip(sizes, sizes[1:])]
    )
    self.prototypes = Prototypes(
      options.bottleneck, options.prototypes, fixed_norm=options.fixed_norm, rngs=rngs
    )

  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... k"]:
    x = x.astype(jnp.float32)
    for number, layer in enumerate(self.layers, 1):
      x = layer(x)
      if number < len(self.layers):
        x = gelu(x)
    return self.prototypes(vectors.unit(x))


class Dino(nnx.Module):
  """A backbone and the head on its embedding; training adds the `teacher`, another one."""

  def __init__(self, backbone: nnx.Module, options: SelfDistillationOptions, *, rngs: nnx.Rngs):
    self.backbone = backbone
    self.head = DinoHead(backbone.embed_dim, options, rngs=rngs)


def targets_of(
  logits: Float[Array, "b 2 k"], center: Float[Array, "k"], temperature: float | Float[Array, ""]
) -> Float[Array, "b 2 k"]:
  """The teacher's distributions: centered, so that no prototype wins always, and sharpened."""
  return jax.nn.softmax((logits - center) / temperature, axis=-1)


def dino_loss(
  logits: Float[Array, "b views k"], targets: Float[Array, "b 2 k"], temperature: float
) -> Float[Array, ""]:
  """Mean cross-entropy over all pairs of a target and another view of its image.

  Args:
    logits: of the student, the global crops first.
    targets: of the teacher, for the global crops.
    temperature: of the student.
  """
  log_probabilities = jax.nn.log_softmax(logits / temperature, axis=-1)
  of_all = jnp.sum(log_probabilities, axis=1, keepdims=True)
  others = of_all - log_probabilities[:, : targets.shape[1]]
  pairs = targets.shape[1] * (logits.shape[1] - 1)
  return -jnp.sum(jnp.mean(targets * others, axis=0)) / pairs


class SelfDistillationTask(view_data.ViewData, base.Task):
  """Two global crops of every image and smaller local ones; labels are read by evaluation alone."""

  averaged_teacher = True

  def __init__(self, config: SelfDistillationConfig, classes: base.Classes | None = None):
    self.open_data(config, classes, "Self-distillation")

  def build_model(self, backbone: nnx.Module | None = None) -> Dino:
    config = self._config
    return Dino(backbone or common.build_backbone(config), self._options, rngs=nnx.Rngs(config.seed))

  def initial_state(self, model: Dino) -> dict[str, jax.Array]:
    """The center of the teacher's logits, and the number of the step."""
    return {"center": jnp.zeros(self._options.prototypes), "step": jnp.zeros((), jnp.int32)}

  def average_decay(self, step: jax.Array) -> jax.Array:
    """The teacher's momentum at a step."""
    return view_data.momentum_at(step, self._config.steps, self._config.ema_decay)

  def teacher_temperature(self, step: jax.Array) -> jax.Array:
    """The temperature of the targets at a step: grows linearly, then stays."""
    options = self._options
    fraction = jnp.minimum(step / max(options.temperature_steps, 1), 1) if options.temperature_steps else 1.0
    first, last = options.first_teacher_temperature, options.teacher_temperature
    return jnp.asarray(first + fraction * (last - first), jnp.float32)

  def _train_transform(self) -> views.MultiCrop:
    options = self._options
    common_options = dict(blur_sigma=tuple(options.blur_sigma))
    first, second = (
      views.View(
        options.image_size,
        crop_scale=tuple(options.crop_scale),
        blur=blur,
        solarise=solarise,
        **common_options,
      )
      for blur, solarise in zip(options.blur, options.solarise)
    )
    local = views.View(
      options.local_size,
      crop_scale=tuple(options.local_crop_scale),
      blur=options.local_blur,
      **common_options,
    )
    return views.MultiCrop(views.TwoViews(first, second), local, options.local_crops)

  def features(self, model: Dino, batch: base.Batch, rng: jax.Array | None) -> base.Features:
    """Embeddings [b, crops, d] of the two global and of the local crops; in evaluation as for all views."""
    if "second_image" not in batch:
      return self.evaluated_features(model, batch)
    common.check_backbone_trains(model.backbone, self._config)
    keys = (None, None) if rng is None else jax.random.split(rng)
    found = (_embeddings(model.backbone, _global_crops(batch), keys[0]),)
    if not self._options.local_crops:
      return found
    return *found, _embeddings(model.backbone, batch["local_images"].astype(jnp.float32), keys[1])

  def loss(
    self, model: Dino, batch: base.Batch, features: base.Features, rng: jax.Array, state: dict[str, Any]
  ) -> base.Losses:
    options, teacher = self._options, model.teacher
    temperature = self.teacher_temperature(state["step"])
    logits = jax.lax.stop_gradient(teacher.head(_embeddings(teacher.backbone, _global_crops(batch), None)))
    targets = targets_of(logits, state["center"], temperature)
    loss = dino_loss(model.head(jnp.concatenate(features, axis=1)), targets, options.student_temperature)
    momentum = options.center_momentum
    center = momentum * state["center"] + (1 - momentum) * jnp.mean(logits, axis=(0, 1))
    entropy = -jnp.mean(jnp.sum(targets * jnp.log(jnp.maximum(targets, 1e-30)), axis=-1))
    metrics = {
      "momentum": self.average_decay(state["step"]),
      "teacher_temperature": temperature,
      # 0 or log(prototypes) where the networks have collapsed.
      "teacher_entropy": entropy,
    }
    return base.Losses({"cross_entropy": loss}, metrics, {"center": center, "step": state["step"] + 1})


def _global_crops(batch: base.Batch) -> Float[Array, "b 2 h w 3"]:
  # Beside each other, not one behind the other: the crops of an image stay on its device.
  return jnp.stack([batch["image"], batch["second_image"]], axis=1)


def _embeddings(
  backbone: nnx.Module, crops: Float[Array, "b n h w 3"], rng: jax.Array | None
) -> Float[Array, "b n d"]:
  """Embeddings of crops of one size, all in one pass, which is what BatchNorms normalise by."""
  b, n, *shape = crops.shape
  images = backbone.preprocessing.normalise(crops.reshape(b * n, *shape))
  return backbone.embed(images, rng=rng).reshape(b, n, -1)
