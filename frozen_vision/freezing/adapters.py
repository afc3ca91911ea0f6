"""Puts adapters that train into a frozen, folded backbone: gradients cross its blocks and reach nothing else.

What is frozen stays as it is stored, in int8 too, for its leaves are no `nnx.Param`; the adapters are, under
`backbone/stages/.../adapter/`.
"""

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any

from flax import nnx
import jax

from frozen_vision.backbones import base
from frozen_vision.config import AdapterOptions
from frozen_vision.layers import adapters
from frozen_vision.layers import storage as stored

# Paths of their parameters in a model.
PATTERN = r"backbone/.*/adapter/.*"
_STREAM = 0x61647074  # the adapters' random numbers are not those of neck and head


def attach(program: base.FoldedBackbone, options: AdapterOptions, seed: int) -> base.FoldedBackbone:
  """The program with an adapter in every block of the chosen stages.

  Args:
    program: of weights, or of shapes; then those of the adapters are shapes too. It is not changed.
    options: their kind is not "none".
    seed: of the random numbers that bottlenecks begin with.

  Raises:
    ValueError: a family that takes no adapters, or stages that it does not have.
  """
  program.block_shape(0, 0)  # refuses a family that takes none
  chosen = options.stages or tuple(range(len(program.stages)))
  absent = sorted(set(chosen) - set(range(len(program.stages))))
  if absent:
    raise ValueError(
      f"config.adapters.stages names {absent}; this backbone has stages 0 to {len(program.stages) - 1}. "
      "Leave it empty for all of them."
    )
  key = jax.random.fold_in(jax.random.key(seed), _STREAM)
  stages = list(program.stages)
  for index in chosen:
    stages[index] = _with_adapters(program, index, options, jax.random.fold_in(key, index))
  return dataclasses.replace(program, stages=tuple(stages), remat=options.remat)


def patterns(trainable: Sequence[str], options: AdapterOptions) -> tuple[str, ...]:
  """The patterns of all that trains on a frozen backbone: those given, and that of its adapters."""
  return (*trainable, *([PATTERN] if options.kind != "none" else []))


def identity(options: AdapterOptions) -> dict[str, Any]:
  """What decides the shapes and the effect of adapters, as JSON: a part of the feature key."""
  found: dict[str, Any] = {
    "kind": options.kind,
    "placement": options.placement,
    "stages": list(options.stages),
  }
  return {**found, "width": options.width} if options.kind == "bottleneck" else found


def _with_adapters(
  program: base.FoldedBackbone, stage: int, options: AdapterOptions, key: jax.Array
) -> dict[str, Any]:
  """A stage whose blocks have adapters: `first` where there is one, `repeated` and `blocks`."""
  numbers = itertools.count()

  def block(leaves: Any, index: int, *, stacked: bool = False) -> dict[str, Any]:
    weights = [leaf.get_value() for leaf in jax.tree.leaves(leaves, is_leaf=stored.is_variable)]
    shape = program.block_shape(stage, index)

    def make(key: jax.Array) -> Any:
      return adapters.initial(
        key,
        inputs=shape.inputs,
        outputs=shape.outputs,
        placement=options.placement,
        width=options.width if options.kind == "bottleneck" else 0,
        rows=weights[0].shape[0] if stacked else None,
      )

    own = jax.random.fold_in(key, next(numbers))
    shapes_only = isinstance(weights[0], jax.ShapeDtypeStruct)
    made = jax.eval_shape(make, own) if shapes_only else make(own)
    return {**leaves, "adapter": jax.tree.map(nnx.Param, made)}

  found = dict(program.stages[stage])
  if "first" in found:
    found["first"] = block(found["first"], 0)
  if found["repeated"] is not None:
    found["repeated"] = tuple(block(leaves, 1, stacked=True) for leaves in found["repeated"])
  found["blocks"] = tuple(block(leaves, 1) for leaves in found["blocks"])
  return found
