"""Convolutions of channels-last maps, in the form that each platform is fast at.

On a CPU, XLA's grouped convolutions run 15 to 40 times slower than the same sum written as one product per
cell of the kernel, which fuses into a single loop; those by a kernel of one cell 1.2 to 2.3 times slower than
the matrix product; and gradients of dense convolutions 1.3 to 3.3 times slower than with a product per cell
for the kernel (experiments/results/cpu_operations.md). Elsewhere the convolution is left to the compiler.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float
import numpy as np

from frozen_vision.ops.arrays import Array

# "SAME" pads as TensorFlow does, the odd cell at the bottom and right; an int pads every side alike.
Padding = str | int | Sequence[tuple[int, int]]
_Pads = tuple[tuple[int, int], tuple[int, int]]
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolve(
  x: Float[Array, "b h w i"],
  kernel: Float[Array, "kh kw _i o"],
  *,
  strides: int | tuple[int, int] = 1,
  padding: Padding = "SAME",
  groups: int = 1,
  dtype: DTypeLike | None = None,
) -> Float[Array, "b h2 w2 o"]:
  """A convolution, without bias; to be differentiated in reverse mode only.

  Args:
    kernel: [height, width, inputs / groups, outputs].
    strides: along both axes, or for rows and columns.
    padding: "SAME", "VALID", a number of cells on every side, or ((top, bottom), (left, right)).
    groups: parts that the channels are split into, each with filters of its own; as many as there are
      channels for a depthwise convolution.
    dtype: of the result; that of `x` by default.

  Raises:
    ValueError: channels that do not fit the kernel and the groups.
  """
  inputs, outputs = x.shape[-1], kernel.shape[-1]
  if inputs != groups * kernel.shape[2] or outputs % groups:
    raise ValueError(
      f"A kernel {kernel.shape} in {groups} groups takes {groups * kernel.shape[2]} channels and gives a "
      f"multiple of {groups}; the map has {inputs}."
    )
  steps = (strides, strides) if isinstance(strides, int) else tuple(strides)
  pads = _pads(x.shape[1:3], kernel.shape[:2], steps, padding)
  options = dict(steps=steps, dtype=jnp.dtype(dtype or x.dtype))
  one_cell = kernel.shape[:2] == (1, 1) and not any(map(any, pads))
  if groups == 1 and not one_cell:
    like = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    return _dense(_Setting(pads=pads, like=like, **options), x, kernel)
  if groups == 1:
    on_cpu = functools.partial(_by_product, **options)
  else:
    on_cpu = functools.partial(_by_cells, pads=pads, groups=groups, **options)
  by_compiler = functools.partial(_by_compiler, pads=pads, groups=groups, **options)
  return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=by_compiler)


def max_pool(
  x: Float[Array, "b h w c"], *, size: int, strides: int, padding: Padding
) -> Float[Array, "b h2 w2 c"]:
  """The largest value of every window; padding never wins."""
  pads = _pads(x.shape[1:3], (size, size), (strides, strides), padding)
  lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
  return jax.lax.reduce_window(
    x, lowest, jax.lax.max, (1, size, size, 1), (1, strides, strides, 1), ((0, 0), *pads, (0, 0))
  )


def average_pool(x: Float[Array, "b h w c"], *, size: int, strides: int) -> Float[Array, "b h2 w2 c"]:
  """Means of size x size windows; windows over the edge average what lies within the map."""
  pads = _pads(x.shape[1:3], (size, size), (strides, strides), "SAME")
  window, steps, pads = (1, size, size, 1), (1, strides, strides, 1), ((0, 0), *pads, (0, 0))
  total = jax.lax.reduce_window(x.astype(jnp.float32), 0.0, jax.lax.add, window, steps, pads)
  ones = jnp.ones((1, *x.shape[1:3], 1), jnp.float32)
  return (total / jax.lax.reduce_window(ones, 0.0, jax.lax.add, window, steps, pads)).astype(x.dtype)


def _by_compiler(
  x: Float[Array, "b h w i"],
  kernel: Float[Array, "kh kw _i o"],
  *,
  steps: tuple[int, int],
  pads: _Pads,
  groups: int = 1,
  dtype: np.dtype,
) -> Float[Array, "b h2 w2 o"]:
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=steps,
    padding=pads,
    dimension_numbers=_DIMENSIONS,
    feature_group_count=groups,
    preferred_element_type=dtype,
  )


@dataclasses.dataclass(frozen=True)
class _Setting:
  """Options of a dense convolution, and shapes and types of its map and its kernel (`like`)."""

  steps: tuple[int, int]
  pads: _Pads
  dtype: np.dtype
  like: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]

  def run(self, x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"]) -> Float[Array, "b h2 w2 o"]:
    return _by_compiler(x, kernel, steps=self.steps, pads=self.pads, dtype=self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(
  setting: _Setting, x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"]
) -> Float[Array, "b h2 w2 o"]:
  """The compiler's convolution, whose kernel has its gradient in the form that each platform is fast at."""
  return setting.run(x, kernel)


def _dense_forward(setting: _Setting, x: Any, kernel: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
  """Saves of the map and the kernel what the gradients that are asked for need."""
  saved = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
  return setting.run(x.value, kernel.value), saved


def _dense_backward(
  setting: _Setting, saved: tuple[Array | None, Array | None], gradient: Any
) -> tuple[Array | None, Array | None]:
  if isinstance(gradient, jax.custom_derivatives.SymbolicZero):
    return None, None
  (x, kernel), (like_x, like_kernel) = saved, setting.like
  of_x = of_kernel = None
  if kernel is not None:
    (of_x,) = jax.linear_transpose(lambda x: setting.run(x, kernel), like_x)(gradient)
  if x is not None:

    def by_compiler(x: Array, gradient: Array) -> Array:
      return jax.linear_transpose(lambda kernel: setting.run(x, kernel), like_kernel)(gradient)[0]

    def by_cells(x: Array, gradient: Array) -> Array:
      flat = gradient.reshape(-1, gradient.shape[-1])
      cells = [
        jnp.matmul(shifted.reshape(-1, x.shape[-1]).T, flat, preferred_element_type=jnp.float32)
        for shifted in _shifts(x, like_kernel.shape[:2], setting.steps, setting.pads)
      ]
      return jnp.stack(cells).reshape(like_kernel.shape).astype(like_kernel.dtype)

    of_kernel = jax.lax.platform_dependent(x, gradient, cpu=by_cells, default=by_compiler)
  return of_x, of_kernel


_dense.defvjp(_dense_forward, _dense_backward, symbolic_zeros=True)


def _shifts(
  x: Float[Array, "b h w i"], window: tuple[int, ...], steps: tuple[int, int], pads: _Pads
) -> Iterator[Float[Array, "b h2 w2 i"]]:
  """For each cell of a kernel, row by row, what it is multiplied with at every position."""
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  rows, columns = ((x.shape[axis] - window[axis - 1]) // steps[axis - 1] + 1 for axis in (1, 2))
  for top in range(window[0]):
    for left in range(window[1]):
      yield jax.lax.slice(
        x,
        (0, top, left, 0),
        (x.shape[0], top + (rows - 1) * steps[0] + 1, left + (columns - 1) * steps[1] + 1, x.shape[3]),
        (1, *steps, 1),
      )


def _by_product(
  x: Float[Array, "b h w i"], kernel: Float[Array, "1 1 i o"], *, steps: tuple[int, int], dtype: np.dtype
) -> Float[Array, "b h2 w2 o"]:
  """A convolution by a kernel of one cell as the matrix product that it is."""
  x = x[:, :: steps[0], :: steps[1]]
  return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0], preferred_element_type=jnp.float32).astype(dtype)


def _by_cells(
  x: Float[Array, "b h w i"],
  kernel: Float[Array, "kh kw _i o"],
  *,
  steps: tuple[int, int],
  pads: _Pads,
  groups: int,
  dtype: np.dtype,
) -> Float[Array, "b h2 w2 o"]:
  """The sum over the kernel's cells of the shifted map times that cell."""
  *window, inputs, outputs = kernel.shape
  product = _product(inputs, outputs, groups)
  shifts = _shifts(x, tuple(window), steps, pads)
  return functools.reduce(jnp.add, map(product, shifts, kernel.reshape(-1, inputs, outputs))).astype(dtype)


def _product(inputs: int, outputs: int, groups: int) -> Callable[[Array, Array], Array]:
  """A shifted map times one cell of the kernel [inputs / groups, outputs], in float32."""
  if inputs == 1 and outputs == groups:
    return lambda x, cell: x.astype(jnp.float32) * cell[0].astype(jnp.float32)

  def grouped(x, cell):
    x = x.reshape(*x.shape[:3], groups, inputs)
    cell = cell.reshape(inputs, groups, outputs // groups)
    y = jnp.einsum("bhwgi,igo->bhwgo", x, cell, preferred_element_type=jnp.float32)
    return y.reshape(*y.shape[:3], outputs)

  return grouped


def _pads(size: Sequence[int], window: Sequence[int], strides: Sequence[int], padding: Padding) -> _Pads:
  if isinstance(padding, str):
    return tuple(jax.lax.padtype_to_pads(size, window, strides, padding))
  return ((padding, padding),) * 2 if isinstance(padding, int) else tuple(map(tuple, padding))
