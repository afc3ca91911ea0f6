"""Stored weights of frozen backbones: float32, bfloat16 or int8, and the layers that compute with them.

A family's folded program is a tree of plain dicts that `Storage` makes of canonical modules, one block at a
time, and the functions below compute with: `linear`, `convolution`, `norm`. `fold_blocks` stacks runs of
equal blocks and `run_blocks` scans them, so that they compile once and one block of a sharded stack is
gathered at a time.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.devices import sharding
from frozen_vision.layers import norms
from frozen_vision.ops import convolution as conv_ops
from frozen_vision.ops.arrays import Array

Tree = Any
KINDS = ("float32", "bfloat16", "int8")


class Folded(nnx.Variable):
  """A leaf of a folded backbone. It is no `nnx.Param`: whatever a policy says, it never trains."""


@dataclasses.dataclass(frozen=True)
class Storage:
  """How the matrices of a folded backbone are stored.

  Attributes:
    kind: one of `KINDS`; int8 has a float32 scale per output channel.
    dtype: of the inputs of matrix products. Vectors and tables are small: they stay float32, or are `dtype`
      where a product takes them in.
  """

  kind: str
  dtype: Any

  def matrix(self, kernel: Float[Array, "*inputs outputs"]) -> Array | dict[str, Array]:
    """A kernel of a linear layer or a convolution, whose last axis is the output channels."""
    if self.kind == "int8":
      return _quantize(kernel)
    kernel = kernel.astype(self.kind)
    # XLA on CPU makes a float32 copy of a whole stack of bfloat16 matrices before the scan, but not of bits.
    bits = self.kind == "bfloat16" and jax.default_backend() == "cpu"
    return jax.lax.bitcast_convert_type(kernel, jnp.uint16) if bits else kernel

  def layer(
    self, kernel: Float[Array, "*inputs outputs"], bias: Float[Array, "outputs"] | None
  ) -> dict[str, Any]:
    """The stored form of a kernel and bias, as `linear` and `convolution` take it."""
    return dict(kernel=self.matrix(kernel), bias=None if bias is None else bias.astype(self.dtype))

  def module(self, module: nnx.Module) -> dict[str, Any]:
    """The same of an `nnx.Linear` or `nnx.Conv`."""
    return self.layer(module.kernel[...], None if module.bias is None else module.bias[...])

  def normed(self, module: nnx.Module, norm: nnx.BatchNorm) -> dict[str, Any]:
    """A convolution or linear layer with the BatchNorm behind it, as one layer (`merge_batch_norm`)."""
    return self.layer(
      *merge_batch_norm(module.kernel[...], None if module.bias is None else module.bias[...], norm)
    )


def choose(kind: str | None, dtype: Any, backbone_dtype: Any) -> Storage:
  """The storage that `Backbone.fold` is asked for: by default that of `dtype`, by default the backbone's.

  Raises:
    ValueError: an unknown kind.
  """
  dtype = jnp.dtype(backbone_dtype if dtype is None else dtype)
  kind = kind or dtype.name
  check(kind, "storage")
  return Storage(kind, dtype)


def check(kind: str, option: str) -> None:
  """Raises a ValueError, which names the option, unless the kind of storage is known."""
  if kind not in KINDS:
    raise ValueError(f"{option} is {kind!r}; known kinds of storage: {', '.join(KINDS)}.")


def merge_batch_norm(
  kernel: Float[Array, "*inputs outputs"], bias: Float[Array, "outputs"] | None, norm: nnx.BatchNorm
) -> tuple[Float[Array, "*inputs outputs"], Float[Array, "outputs"]]:
  """Kernel and bias that give what the BatchNorm makes of the layer's output, by its running statistics."""
  factor = 1 / jnp.sqrt(norm.var[...].astype(jnp.float32) + norm.epsilon)
  if norm.scale is not None:
    factor = factor * norm.scale[...]
  shift = -norm.mean[...].astype(jnp.float32) if bias is None else bias - norm.mean[...]
  shift = shift * factor
  return kernel * factor, shift if norm.bias is None else shift + norm.bias[...]


def norm_leaves(module: nnx.LayerNorm) -> dict[str, Array]:
  """The arrays that `norm` computes with, float32."""
  return dict(scale=module.scale[...].astype(jnp.float32), bias=module.bias[...].astype(jnp.float32))


def linear(x: Float[Array, "... i"], weights: Tree) -> Float[Array, "... o"]:
  """A linear layer on stored weights, in the dtype of `x`."""
  kernel, bias = weights["kernel"], weights["bias"]
  if isinstance(kernel, dict):
    y = jnp.matmul(x, kernel["values"].astype(x.dtype), preferred_element_type=jnp.float32)
    x = (y * kernel["scale"]).astype(x.dtype)
  else:
    x = x @ _values(kernel).astype(x.dtype)
  return x if bias is None else x + bias


def convolution(
  x: Float[Array, "b h w i"],
  weights: Tree,
  *,
  strides: int | tuple[int, int] = 1,
  padding: conv_ops.Padding = "SAME",
  groups: int = 1,
) -> Float[Array, "b h2 w2 o"]:
  """A convolution on stored weights [height, width, inputs / groups, outputs], in the dtype of `x`."""
  kernel, bias = weights["kernel"], weights["bias"]
  quantized = isinstance(kernel, dict)
  y = conv_ops.convolve(
    x,
    (kernel["values"] if quantized else _values(kernel)).astype(x.dtype),
    strides=strides,
    padding=padding,
    groups=groups,
    dtype=jnp.float32 if quantized else None,
  )
  if quantized:
    y = (y * kernel["scale"]).astype(x.dtype)
  return y if bias is None else y + bias


def norm(
  x: Float[Array, "... c"], weights: Tree, epsilon: float = norms.NORM_EPSILON
) -> Float[Array, "... c"]:
  """LayerNorm in float32, returned in the input's dtype."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
  return (y * weights["scale"] + weights["bias"]).astype(x.dtype)


def fold_blocks(
  count: int,
  fold_block: Callable[[int], Tree],
  *,
  period: int = 1,
  scan: bool = True,
  shardings: Tree = None,
) -> dict[str, Any]:
  """Folds the blocks of a stage one after the other, and stacks those that repeat.

  Args:
    count: number of blocks.
    fold_block: number of a block -> its folded leaves; reads the block from disk, if need be.
    period: blocks after which the structure repeats, such as 2 for a plain and a shifted one.
    scan: stack whole periods where there are at least two.
    shardings: of the result; each block goes to its place before the next one is made.

  Returns:
    `repeated`, one tree per block of a period whose leaves have a leading axis, or None; and `blocks`, those
    that follow, one by one. `run_blocks` runs them.
  """
  periods = count // period if scan else 0
  stacked = periods * period if periods > 1 else 0
  repeated: list[Tree] = [None] * period
  blocks = []
  for number in range(count):
    folded = fold_block(number)
    if number >= stacked:
      blocks.append(put(folded, shardings and shardings["blocks"][number - stacked]))
      continue
    row, position = divmod(number, period)
    stack_sharding = shardings and shardings["repeated"][position]
    if row == 0:
      repeated[position] = _empty_stack(folded, periods, stack_sharding)
    row_sharding = stack_sharding and jax.tree.map(sharding.of_row, stack_sharding)
    repeated[position] = _set_row(repeated[position], row, put(folded, row_sharding))
  return dict(repeated=tuple(repeated) if stacked else None, blocks=tuple(blocks))


def run_blocks(
  x: Tree, stage: Tree, block: Callable[[Tree, Tree, int], Tree], *, remat: bool = False
) -> Tree:
  """Runs what `fold_blocks` made: stacked periods in a scan, then the blocks that follow.

  Args:
    x: what the blocks pass on.
    stage: `repeated` and `blocks`, as arrays (`arrays`).
    block: (x, leaves of one block, its number within the period or among those that follow) -> x. The leaves
      are gathered from all devices.
    remat: compute each block again on the way back, for a stack that trains.
  """

  def step(x: Tree, leaves: Tree, position: int) -> Tree:
    return block(x, sharding.gathered(leaves), position)

  if remat:
    step = jax.checkpoint(step, static_argnums=2)
  if stage["repeated"] is not None:

    def period(x, leaves):
      for position, one in enumerate(leaves):
        x = step(x, one, position)
      return x, None

    x, _ = jax.lax.scan(period, x, stage["repeated"])
  for position, one in enumerate(stage["blocks"]):
    x = step(x, one, position)
  return x


def put(tree: Tree, shardings: Tree) -> Tree:
  """The tree where its shardings say; as it is where they are None."""
  return tree if shardings is None else sharding.put(tree, shardings)


def reader(read: Callable[[str, nnx.Module], nnx.Module] | None) -> Callable[[str, nnx.Module], nnx.Module]:
  """`read`, or what gives back the part of a backbone that holds its weights already."""
  return read or (lambda path, module: module)


def variables(tree: Tree) -> Tree:
  """Every array as a `Folded` variable."""
  return jax.tree.map(Folded, tree)


def parameters(tree: Tree) -> Tree:
  """Every `Folded` variable as an `nnx.Param`, which trains (`Backbone.stacked`)."""
  return jax.tree.map(lambda leaf: nnx.Param(leaf.get_value()), tree, is_leaf=is_variable)


def arrays(tree: Tree) -> Tree:
  """The array of every variable."""
  return jax.tree.map(lambda leaf: leaf[...], tree, is_leaf=is_variable)


def values(shardings: Tree) -> Tree:
  """The shardings that the variables of a folded program hold; None for None."""
  return jax.tree.map(lambda leaf: leaf.get_value(), shardings, is_leaf=is_variable)


def is_variable(leaf: Any) -> bool:
  return isinstance(leaf, nnx.Variable)


def shapes(module: nnx.Module, method: str = "fold", **options: Any) -> Tree:
  """Shapes of the result of a method, such as `fold` or `stacked`; the module may have shapes only."""
  graphdef, state = nnx.split(module)
  return jax.eval_shape(lambda state: getattr(nnx.merge(graphdef, state), method)(**options), state)


def _values(kernel: Array) -> Array:
  return jax.lax.bitcast_convert_type(kernel, jnp.bfloat16) if kernel.dtype == jnp.uint16 else kernel


def _quantize(kernel: Float[Array, "*inputs outputs"]) -> dict[str, Array]:
  """8-bit integers -127..127 and a float32 scale per output channel."""
  kernel = kernel.astype(jnp.float32)
  scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=tuple(range(kernel.ndim - 1))), 1e-12) / 127
  return dict(values=jnp.round(kernel / scale).astype(jnp.int8), scale=scale)


def _empty_stack(block: Tree, repeats: int, shardings: Tree) -> Tree:
  """Zeros for so many blocks, made where they stay."""
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((repeats, *leaf.shape), leaf.dtype), block)

  def make():
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  return make() if shardings is None else jax.jit(make, out_shardings=shardings)()


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(stack: Tree, row: Array, leaves: Tree) -> Tree:
  """Puts one block into its stack, in place, as the stack is sharded."""
  return jax.tree.map(lambda stack, leaf: stack.at[row].set(leaf), stack, leaves)
