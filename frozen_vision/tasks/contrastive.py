"""MoCo v3 (arXiv 2104.02057): two views of an image shall agree, against all other images of the batch.

The numbers follow github.com/facebookresearch/moco-v3. The momentum encoder is the task's own state: it is
saved, restored and sharded with the rest of what training changes, and never differentiated.
"""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.data.classification import views
from frozen_vision.ops import vectors
from frozen_vision.ops.arrays import Array
from frozen_vision.tasks import base, common, view_data
from frozen_vision.tasks.contrastive_options import ContrastiveConfig


def default_config() -> ml_collections.ConfigDict:
  """Every option at its default, for a config file to change."""
  return config_lib.config_dict(ContrastiveConfig())


class ProjectionMlp(nnx.Module):
  """Linear layers without biases, each with a BatchNorm; ReLU between them, no scale and shift at the end."""

  def __init__(self, sizes: tuple[int, ...], *, rngs: nnx.Rngs):
    """Makes a layer between each two of `sizes`, drawn as PyTorch draws linear layers."""
    self.linear = nnx.List()
    self.norm = nnx.List()
    for number, (inputs, outputs) in enumerate(zip(sizes, sizes[1:]), 1):
      is_last = number == len(sizes) - 1
      draw = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
      self.linear.append(nnx.Linear(inputs, outputs, use_bias=False, kernel_init=draw, rngs=rngs))
      self.norm.append(
        nnx.BatchNorm(
          outputs,
          momentum=0.9,
          epsilon=1e-5,
          use_fast_variance=False,
          use_scale=not is_last,
          use_bias=not is_last,
          rngs=rngs,
        )
      )

  def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b d"]:
    x = x.astype(jnp.float32)
    for number, (linear, norm) in enumerate(zip(self.linear, self.norm), 1):
      x = norm(linear(x))
      if number < len(self.linear):
        x = jax.nn.relu(x)
    return x


class MoCo(nnx.Module):
  """A backbone, the projector that the momentum encoder has too, and the predictor that it has not."""

  def __init__(self, backbone: nnx.Module, channels: int, hidden: int, layers: int, *, rngs: nnx.Rngs):
    self.backbone = backbone
    self.projector = ProjectionMlp((backbone.embed_dim, *[hidden] * (layers - 1), channels), rngs=rngs)
    self.predictor = ProjectionMlp((channels, hidden, channels), rngs=rngs)


def contrastive_loss(
  queries: Float[Array, "b d"], keys: Float[Array, "b d"], temperature: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """(InfoNCE times 2 x temperature, fraction of queries that are nearest to their own key).

  Args:
    queries, keys: of any length; key i belongs to query i, all others are negatives.
  """
  logits = vectors.unit(queries) @ vectors.unit(keys).T / temperature
  own = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
  correct = jnp.argmax(logits, axis=1) == jnp.arange(logits.shape[0])
  return -2 * temperature * jnp.mean(own), jnp.mean(correct)


class ContrastiveTask(view_data.ViewData, base.Task):
  """Two views of every image; labels are read by evaluation alone."""

  def __init__(self, config: ContrastiveConfig, classes: base.Classes | None = None):
    self.open_data(config, classes, "Contrastive pretraining")

  def build_model(self, backbone: nnx.Module | None = None) -> MoCo:
    options = self._options
    return MoCo(
      backbone or common.build_backbone(self._config),
      options.channels,
      options.hidden,
      options.projector_layers,
      rngs=nnx.Rngs(self._config.seed),
    )

  def initial_state(self, model: MoCo) -> dict[str, Any]:
    """The momentum encoder, equal to the model at first, and the number of the step."""
    networks = {"backbone": model.backbone, "projector": model.projector}
    copies = {name: jax.tree.map(jnp.copy, nnx.state(part, nnx.Param)) for name, part in networks.items()}
    return {**copies, "step": jnp.zeros((), jnp.int32)}

  def _train_transform(self) -> views.TwoViews:
    options = self._options
    return views.TwoViews(
      *(
        views.View(
          options.image_size,
          crop_scale=tuple(options.crop_scale),
          blur=blur,
          blur_sigma=tuple(options.blur_sigma),
          solarise=solarise,
        )
        for blur, solarise in zip(options.blur, options.solarise)
      )
    )

  def features(self, model: MoCo, batch: base.Batch, rng: jax.Array | None) -> base.Features:
    """The embedding of every view; in evaluation of the image, and its last map."""
    normalise = model.backbone.preprocessing.normalise
    if "second_image" in batch:
      keys = (None, None) if rng is None else jax.random.split(rng)
      images = batch["image"], batch["second_image"]
      return tuple(model.backbone.embed(normalise(x), rng=key) for x, key in zip(images, keys))
    return self.evaluated_features(model, batch)

  def loss(
    self, model: MoCo, batch: base.Batch, features: base.Features, rng: jax.Array, state: dict[str, Any]
  ) -> base.Losses:
    options = self._options
    queries = [model.predictor(model.projector(x)) for x in features]
    momentum = view_data.momentum_at(state["step"], self._config.steps, options.momentum)
    keys, state = self._keys(model, batch, momentum, state)
    losses, correct = zip(
      *(contrastive_loss(query, key, options.temperature) for query, key in zip(queries, keys[::-1]))
    )
    return base.Losses({"info_nce": sum(losses)}, {"top1": sum(correct) / 2, "momentum": momentum}, state)

  def _keys(
    self, model: MoCo, batch: base.Batch, momentum: Float[Array, ""], state: dict[str, Any]
  ) -> tuple[list[Float[Array, "b d"]], dict[str, Any]]:
    """Keys of both views by the momentum encoder, which is moved towards the model first; and the new state.

    Its BatchNorms normalise by the batch, as the model's do, and it has no stochastic depth.
    """
    common.check_backbone_trains(model.backbone, self._config)
    encoders, moved = {}, {"step": state["step"] + 1}
    for name in ("backbone", "projector"):
      graphdef, newest, rest = nnx.split(getattr(model, name), nnx.Param, ...)
      newest = jax.lax.stop_gradient(newest)
      # Of what does not train, the difference is zero and stays so.
      moved[name] = jax.tree.map(
        lambda old, new: old + (1 - momentum) * (new.astype(old.dtype) - old), state[name], newest
      )
      encoders[name] = nnx.merge(graphdef, moved[name], rest, copy=True)
    normalise = model.backbone.preprocessing.normalise
    keys = [
      encoders["projector"](encoders["backbone"].embed(normalise(batch[name])))
      for name in ("image", "second_image")
    ]
    return [jax.lax.stop_gradient(key) for key in keys], moved
