"""Residual adapters: small 1 x 1 layers that train beside or behind the frozen blocks of a backbone.

An adapter is part of its block's leaves, under `adapter`, so that it is stacked and scanned with the block.
It is zero at first: the features are then those of the frozen backbone. Rebuffi et al. (arXiv 1705.08045 and
1803.10082) place 1 x 1 convolutions in series and in parallel, Houlsby et al. (arXiv 1902.00751) bottlenecks
in series; which of them Proper Reuse (arXiv 2204.00484, table 7) took is not known.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.ops.arrays import Array

Tree = Any


def initial(
  key: jax.Array, *, inputs: int, outputs: int, placement: str, width: int = 0, rows: int | None = None
) -> Tree:
  """The arrays of an adapter, float32.

  Args:
    key: of the first layer of a bottleneck; the last layer is zero.
    inputs: channels that enter the block; read where the adapter is parallel to it.
    outputs: channels that leave the block.
    placement: "parallel", on what enters the block, or "series", on what leaves it.
    width: channels between the two layers of a bottleneck; 0 for a single layer.
    rows: adapters of a stack of so many blocks; None for one.
  """
  lead = () if rows is None else (rows,)
  inputs = inputs if placement == "parallel" else outputs
  if not width:
    return {placement: {"up": {"kernel": jnp.zeros((*lead, inputs, outputs))}}}
  # ReLU halves the variance of what the kernel gives (He et al. 2015).
  down = jax.random.normal(key, (*lead, inputs, width)) * (2 / inputs) ** 0.5
  return {placement: {"down": {"kernel": down}, "up": {"kernel": jnp.zeros((*lead, width, outputs))}}}


def adapted(
  x: Float[Array, "b *_size _c"], y: Float[Array, "b *_size2 _d"], leaves: Tree
) -> Float[Array, "b *_size2 _d"]:
  """The output of a block with what its adapter adds; as it is where the block has none.

  Args:
    x: what entered the block: tokens [b, n, c] or a map [b, h, w, c].
    y: what the frozen block made of it; smaller than `x` where the block has a stride.
    leaves: of the block.
  """
  adapter = leaves.get("adapter")
  if adapter is None:
    return y
  [(placement, weights)] = adapter.items()
  source = _strided(x, y) if placement == "parallel" else y
  if "down" in weights:
    source = jax.nn.relu(source @ weights["down"]["kernel"].astype(source.dtype))
  return y + (source @ weights["up"]["kernel"].astype(source.dtype)).astype(y.dtype)


def _strided(x: Float[Array, "b *_size _c"], y: Float[Array, "b *_size2 _d"]) -> Float[Array, "b *_size2 _c"]:
  """The cells of `x` that a 1 x 1 convolution with the stride of a block reads."""
  if x.shape[1:-1] == y.shape[1:-1]:
    return x
  strides = [-(-before // after) for before, after in zip(x.shape[1:-1], y.shape[1:-1], strict=True)]
  return x[:, :: strides[0], :: strides[1]]
