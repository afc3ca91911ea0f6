"""Convolutions of heads, and those with BatchNorm, described once for the canonical and the folded form."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.layers import storage as storage_lib
from frozen_vision.ops import convolution
from frozen_vision.ops.arrays import Array


@dataclasses.dataclass(frozen=True)
class ConvSpec:
  """One convolution of a network.

  Attributes:
    inputs, outputs: channels.
    size: side of the kernel.
    strides: cells from one position to the next.
    groups: `inputs` for a depthwise convolution.
    norm: a BatchNorm follows; without one the convolution has a bias.
  """

  inputs: int
  outputs: int
  size: int = 1
  strides: int = 1
  groups: int = 1
  norm: bool = True

  def pads(self, same: bool) -> convolution.Padding:
    """TensorFlow's padding, which depends on the map's size, or half the kernel on every side."""
    return "SAME" if same else self.size // 2


class MapConv(nnx.Conv):
  """`nnx.Conv` over maps, by `ops.convolution.convolve`, which is fast on each platform."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    size: tuple[int, int],
    *,
    strides: int | tuple[int, int] = 1,
    padding: convolution.Padding = "SAME",
    feature_group_count: int = 1,
    use_bias: bool = True,
    kernel_init: Any = nnx.initializers.lecun_normal(),
    bias_init: Any = nnx.initializers.zeros_init(),
    dtype: Any = None,
    rngs: nnx.Rngs,
  ):
    """Initialises as `nnx.Conv` does, whose other options this one does not have.

    Args:
      size: of the kernel: rows and columns.
      dtype: of the computation; by default that which the map's and the parameters' promote to.
    """
    super().__init__(
      inputs,
      outputs,
      size,
      strides=strides,
      padding=padding,
      feature_group_count=feature_group_count,
      use_bias=use_bias,
      kernel_init=kernel_init,
      bias_init=bias_init,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
    kernel = self.kernel[...]
    dtype = self.dtype or jnp.result_type(x, kernel)
    y = convolution.convolve(
      x.astype(dtype),
      kernel.astype(dtype),
      strides=self.strides,
      padding=self.padding,
      groups=self.feature_group_count,
    )
    return y if self.bias is None else y + self.bias[...].astype(dtype)


class BatchNorm(nnx.BatchNorm):
  """BatchNorm in float32 whatever comes in, returned in the input's dtype.

  Args:
    momentum: weight of the new batch in the running statistics, as PyTorch counts it.
  """

  def __init__(self, channels: int, *, epsilon: float, momentum: float, rngs: nnx.Rngs):
    super().__init__(
      channels,
      epsilon=epsilon,
      momentum=1 - momentum,
      dtype=jnp.float32,
      use_fast_variance=False,
      rngs=rngs,
    )

  def __call__(self, x: Float[Array, "... c"], *, inference: bool = False) -> Float[Array, "... c"]:
    """Normalises by the running statistics in inference and where the module is frozen."""
    running = inference or self.use_running_average
    return super().__call__(x, use_running_average=running).astype(x.dtype)


class Conv(nnx.Module):
  """A convolution and, where its spec has one, the BatchNorm behind it.

  Args:
    same: pad as TensorFlow's "SAME" does; else by half the kernel on every side.
    epsilon, momentum: of the BatchNorm.
  """

  def __init__(
    self,
    spec: ConvSpec,
    *,
    same: bool,
    epsilon: float = 1e-5,
    momentum: float = 0.1,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.spec = spec
    self.same = same
    self.dtype = dtype
    shape = (spec.size, spec.size, spec.inputs // spec.groups, spec.outputs)
    # He et al. 2015, by the number of outputs that each input reaches, as torchvision and timm initialise.
    fan_out = spec.size * spec.size * spec.outputs // spec.groups
    initialise = nnx.initializers.normal((2 / fan_out) ** 0.5)
    self.kernel = nnx.Param(initialise(rngs.params(), shape, jnp.float32))
    self.bias = None if spec.norm else nnx.Param(jnp.zeros(spec.outputs))
    self.norm = BatchNorm(spec.outputs, epsilon=epsilon, momentum=momentum, rngs=rngs) if spec.norm else None

  def __call__(self, x: Float[Array, "b h w i"], *, inference: bool = False) -> Float[Array, "b h2 w2 o"]:
    spec, dtype = self.spec, self.dtype
    y = convolution.convolve(
      x.astype(dtype),
      self.kernel[...].astype(dtype),
      strides=spec.strides,
      padding=spec.pads(self.same),
      groups=spec.groups,
    )
    return y + self.bias[...].astype(dtype) if self.norm is None else self.norm(y, inference=inference)


class Convolutions(nnx.Module):
  """Convolutions by name: a stem or a block, whose structure is a function of them.

  Args:
    specs: by name.
    same, epsilon, momentum: of `Conv`.
    drop_path: rate of stochastic depth of the residual branch.
  """

  def __init__(
    self,
    specs: Mapping[str, ConvSpec],
    *,
    same: bool,
    epsilon: float = 1e-5,
    momentum: float = 0.1,
    drop_path: float = 0.0,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.names = tuple(specs)
    self.drop_path = drop_path
    for name, spec in specs.items():
      conv = Conv(spec, same=same, epsilon=epsilon, momentum=momentum, dtype=dtype, rngs=rngs)
      setattr(self, name, conv)

  def layers(self, inference: bool) -> Callable[[str, Array], Array]:
    """The convolution of a name on a map; `inference`: by the running statistics of BatchNorm."""
    return lambda name, x: getattr(self, name)(x, inference=inference)

  def fold(self, storage: storage_lib.Storage) -> dict[str, Any]:
    """The arrays that `folded` computes with."""
    return {name: fold(getattr(self, name), storage) for name in self.names}


class Stage(nnx.Module):
  """Blocks at one stride; `fold_stages` folds a sequence of stages."""

  def __init__(self, blocks: Sequence[nnx.Module]):
    self.blocks = nnx.List(list(blocks))


def folded(
  leaves: Mapping[str, Any], specs: Mapping[str, ConvSpec], *, same: bool
) -> Callable[[str, Array], Array]:
  """`Convolutions.layers` on folded leaves."""

  def layers(name: str, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
    return run(x, leaves[name], specs[name], same=same)

  return layers


def fold_stages(
  stages: Sequence[nnx.Module],
  store: storage_lib.Storage,
  *,
  scan: bool,
  read: Callable[[str, nnx.Module], nnx.Module],
  shardings: Sequence[Any] | None,
) -> tuple[dict[str, Any], ...]:
  """Folds stages whose first block differs from the others.

  Args:
    stages: modules whose `blocks` are `Convolutions`.
    store, scan, read, shardings: of `Backbone.fold`; `shardings` is a tree like the result.

  Returns:
    For each stage `first` and what `storage.fold_blocks` makes of the blocks after it.
  """
  folded_stages = []
  for index, stage in enumerate(stages):
    sharded = shardings and shardings[index]

    def fold_block(number, index=index, blocks=stage.blocks):
      return read(f"stages/{index}/blocks/{number}", blocks[number]).fold(store)

    first = storage_lib.put(fold_block(0), sharded and sharded["first"])
    rest = storage_lib.fold_blocks(
      len(stage.blocks) - 1,
      lambda number, fold_block=fold_block: fold_block(number + 1),
      scan=scan,
      shardings=sharded,
    )
    folded_stages.append(dict(first=first, **rest))
  return tuple(folded_stages)


def fold(module: Conv, storage: storage_lib.Storage) -> dict[str, Any]:
  """The arrays that `run` computes with: the kernel with its BatchNorm multiplied in, and a bias."""
  return storage.module(module) if module.norm is None else storage.normed(module, module.norm)


def run(
  x: Float[Array, "b h w i"], leaves: Mapping[str, Any], spec: ConvSpec, *, same: bool
) -> Float[Array, "b h2 w2 o"]:
  """A folded convolution."""
  return storage_lib.convolution(x, leaves, strides=spec.strides, padding=spec.pads(same), groups=spec.groups)


def squeeze_excite(
  x: Float[Array, "b h w c"], reduce: Any, expand: Any, activation: Any
) -> Float[Array, "b h w c"]:
  """Weighs channels by what all positions together say (Hu et al. 2018).

  Args:
    reduce, expand: the two 1 x 1 convolutions as functions of a map.
    activation: between them.
  """
  pooled = jnp.mean(x.astype(jnp.float32), axis=(1, 2), keepdims=True).astype(x.dtype)
  return x * nnx.sigmoid(expand(activation(reduce(pooled))))
