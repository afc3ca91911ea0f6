"""Optimizers from config, over the trainable tree alone."""

from collections.abc import Callable, Sequence
import re
from typing import Any

from flax import nnx
import jax
import optax

from frozen_vision.config import Config, OptimizerOptions
from frozen_vision.files import trees
from frozen_vision.freezing import prepare

# Names whose parameters are not decayed whatever their rank: Swin's released code exempts position biases,
# Mask2Former's the embeddings, next to everything one-dimensional. What a backbone exempts, it says itself.
_UNDECAYED = ("position_bias", "level_embed", "query_features", "query_positions")


def schedule(config: OptimizerOptions, steps: int) -> optax.Schedule:
  """Learning rate by step: a linear warm-up, then what `config.schedule` names."""
  peak, warmup = config.learning_rate, config.warmup_steps
  rest = max(steps - warmup, 1)
  match config.schedule:
    case "cosine":
      main = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    case "linear":
      main = optax.linear_schedule(peak, peak * config.final_fraction, rest)
    case "steps":
      main = optax.piecewise_constant_schedule(peak, {int(step) - warmup: 0.1 for step in config.decay_at})
    case "constant":
      main = optax.constant_schedule(peak)
    case other:
      raise ValueError(f"optimizer.schedule is {other!r}; known: cosine, linear, steps, constant.")
  if not warmup:
    return main
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def decay_mask(trainable: nnx.State, no_weight_decay: Sequence[str] = ()) -> Any:
  """True where weight decay applies: kernels, but neither embeddings nor what matches `no_weight_decay`."""
  patterns = [re.compile(pattern) for pattern in no_weight_decay]

  def decays(path: str, leaf: Any) -> bool:
    exempt = any(name in path for name in _UNDECAYED) or any(one.fullmatch(path) for one in patterns)
    return leaf.ndim > 1 and not exempt

  return _map_paths(trainable, decays)


def of_run(config: Config, model: prepare.Model) -> optax.GradientTransformation:
  """The update rule of a run: `build` for what trains of its model, with the rules of its backbone."""
  return build(
    config.optimizer,
    steps=config.steps,
    trainable=model.trainable,
    layer_of=model.layer_of,
    no_weight_decay=model.no_weight_decay,
  )


def build(
  config: OptimizerOptions,
  *,
  steps: int,
  trainable: nnx.State,
  layer_of: Callable[[str], int],
  no_weight_decay: Sequence[str] = (),
) -> optax.GradientTransformation:
  """The update rule.

  Args:
    config: the section of a config.
    steps: length of the run, for the schedule.
    trainable: the parameters (arrays or shapes) that will be optimized.
    layer_of: path -> depth, 0 for the stem up to the head's; needed for `layer_decay` below 1, where a
      parameter's learning rate is multiplied by layer_decay ** (deepest - depth).
    no_weight_decay: patterns of whole paths that are not decayed, beside vectors.
  """
  rate = schedule(config, steps)
  mask = decay_mask(trainable, no_weight_decay)
  chain = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  match config.name:
    case "adamw":
      chain.append(optax.scale_by_adam(b1=config.b1, b2=config.b2))
    case "muon":
      chain.append(_scale_by_muon(config, mask))
    case "sgd":
      if config.l2:
        chain.append(optax.add_decayed_weights(config.weight_decay))
      chain.append(optax.trace(config.momentum, nesterov=config.nesterov))
    case other:
      raise ValueError(f"optimizer.name is {other!r}; known: adamw, muon, sgd.")
  if not config.l2:
    chain.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
  if config.layer_decay != 1.0:
    depths = _map_paths(trainable, lambda path, leaf: layer_of(path))
    deepest = max(jax.tree.leaves(depths))
    factors = jax.tree.map(lambda depth: config.layer_decay ** (deepest - depth), depths)
    chain.append(
      optax.stateless(
        lambda updates, _: jax.tree.map(lambda update, factor: update * factor, updates, factors)
      )
    )
  chain.append(optax.scale_by_learning_rate(rate))
  return optax.chain(*chain)


def _scale_by_muon(config: OptimizerOptions, decayed: Any) -> optax.GradientTransformation:
  """Orthogonalised momentum for the matrices among the decayed parameters, Adam for the rest.

  Muon (Jordan 2024) with the scale of arXiv 2502.16982, 0.2 * sqrt(max(rows, columns)): its updates then have
  AdamW's size, so that learning rate and decay carry over.
  """

  def kinds(updates: Any) -> Any:
    return jax.tree.map(
      lambda leaf, kernel: "muon" if kernel and leaf.ndim == 2 else "adam", updates, decayed
    )

  def dimensions(updates: Any) -> Any:
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), updates)

  muon = optax.chain(
    optax.contrib.scale_by_muon(weight_dimension_numbers=dimensions),
    optax.stateless(
      lambda updates, _: jax.tree.map(lambda update: update * (0.2 * max(update.shape) ** 0.5), updates)
    ),
  )
  return optax.partition({"muon": muon, "adam": optax.scale_by_adam(b1=config.b1, b2=config.b2)}, kinds)


def _map_paths(state: nnx.State, function: Callable[[str, Any], Any]) -> Any:
  """A tree of `function(path, leaf)` with the structure of `state`."""
  flat = [trees.path_string(path) for path, _ in nnx.to_flat_state(state)]
  leaves, structure = jax.tree.flatten(state)
  assert len(flat) == len(leaves)
  return jax.tree.unflatten(structure, [function(path, leaf) for path, leaf in zip(flat, leaves)])
