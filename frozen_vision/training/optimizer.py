"""Optimizers from config, over the trainable tree alone."""

from collections.abc import Callable, Sequence
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
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


def weight_decay(config: OptimizerOptions, steps: int, *, start: int = 0) -> float | optax.Schedule:
  """Weight decay, a number, or by step where it has a final value; its count begins with step `start`."""
  first, last = config.weight_decay, config.final_weight_decay
  if last is None:
    return first
  return lambda count: last + 0.5 * (first - last) * (1 + jnp.cos(jnp.pi * (count + start) / steps))


def clip_each_by_norm(largest: float) -> optax.GradientTransformation:
  """Scales down every gradient whose l2 norm is above `largest`, each by its own, as DINO's code does."""

  def clip(gradient: jax.Array) -> jax.Array:
    return gradient * jnp.minimum(1.0, largest / (jnp.linalg.norm(gradient.ravel()) + 1e-6))

  return optax.stateless(lambda updates, _: jax.tree.map(clip, updates))


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
  chain = []
  if config.clip_norm:
    chain.append((clip_each_by_norm if config.clip_each else optax.clip_by_global_norm)(config.clip_norm))
  match config.name:
    case "adamw":
      rule = optax.scale_by_adam(b1=config.b1, b2=config.b2)
    case "muon":
      rule = _scale_by_muon(config, mask)
    case "sgd":
      rule = optax.trace(config.momentum, nesterov=config.nesterov)
    case other:
      raise ValueError(f"optimizer.name is {other!r}; known: adamw, muon, sgd.")

  def with_decay(start: int) -> list[optax.GradientTransformation]:
    decay = weight_decay(config, steps, start=start)
    if config.l2:
      return [optax.add_decayed_weights(decay), rule]
    return [rule, optax.add_decayed_weights(decay, mask=mask)]

  if config.delay_steps:
    late = _waiting(optax.chain(*with_decay(config.delay_steps)), config.delay_steps)
    rules = {"at once": optax.chain(*with_decay(0)), "late": late}
    chain.append(optax.partition(rules, _delays(config, trainable)))
  else:
    chain += with_decay(0)
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


def _delays(config: OptimizerOptions, trainable: nnx.State) -> Any:
  """A tree of "late" for parameters that `config.delayed` matches, "at once" for the others.

  Late ones stay as they are at first. Their moments begin with the first gradient that counts, as in PyTorch,
  where a parameter without a gradient is passed over.

  Raises:
    ValueError: a pattern that matches no parameter that trains.
  """
  patterns = [re.compile(pattern) for pattern in config.delayed]
  names = [trees.path_string(path) for path, _ in nnx.to_flat_state(trainable)]
  for pattern in patterns:
    if not any(pattern.fullmatch(name) for name in names):
      raise ValueError(
        f"optimizer.delayed has {pattern.pattern!r}, which matches no parameter that trains; their paths are "
        f"such as {', '.join(names[:3])}."
      )
  return _map_paths(
    trainable, lambda path, _: "late" if any(p.fullmatch(path) for p in patterns) else "at once"
  )


def _waiting(rule: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
  """`rule` after so many steps, before which updates are 0 and its state stays as it was."""

  def init(params: Any) -> tuple[jax.Array, Any]:
    return jnp.zeros((), jnp.int32), rule.init(params)

  def update(updates: Any, state: tuple[jax.Array, Any], params: Any = None) -> tuple[Any, Any]:
    count, before = state
    updates, after = rule.update(updates, before, params)
    has_begun = count >= steps
    updates = jax.tree.map(lambda update: jnp.where(has_begun, update, 0), updates)
    after = jax.tree.map(lambda new, old: jnp.where(has_begun, new, old), after, before)
    return updates, (count + 1, after)

  return optax.GradientTransformation(init, update)


def _scale_by_muon(config: OptimizerOptions, decayed: Any) -> optax.GradientTransformation:
  """Orthogonalised momentum for the matrices among the decayed parameters, Adam for the rest.

  Muon (Jordan 2024) with the scale of arXiv 2502.16982, 0.2 * sqrt(max(rows, columns)): its updates then have
  AdamW's size, so that learning rate and decay carry over.
  """

  def kinds(updates: Any) -> Any:
    # `decayed` first: of updates, some may be left to another rule.
    return jax.tree.map(
      lambda kernel, leaf: "muon" if kernel and getattr(leaf, "ndim", 0) == 2 else "adam", decayed, updates
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
