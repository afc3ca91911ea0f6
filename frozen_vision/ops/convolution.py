"""Convolutions of channels-last maps, in the form that each platform is fast at.

On a CPU, XLA's grouped convolutions run 15 to 30 times slower than the same sum written as one product per
cell of the kernel, which fuses into a single loop; those by a kernel of one cell up to twice as slow as the
matrix product; and the gradient of a dense kernel 1.5 to 5 times slower than a product per cell. Elsewhere
the convolution is left to the compiler.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from frozen_vision.ops.arrays import Array

# "SAME" pads as TensorFlow does, the odd cell at the bottom and right; an int pads every side alike.
Padding = str | int | Sequence[tuple[int, int]]
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
  """A convolution, without bias.

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
  options = dict(steps=steps, dtype=dtype or x.dtype)
  whole = functools.partial(_whole, pads=pads, groups=groups, **options)
  if groups > 1:
    on_cpu = functools.partial(_by_cells, pads=pads, groups=groups, **options)
  elif kernel.shape[:2] == (1, 1) and not any(map(any, pads)):
    on_cpu = functools.partial(_by_product, **options)
  else:
    on_cpu = functools.partial(_dense, steps, pads, options["dtype"])
  return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=whole)


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


def _whole(
  x: Float[Array, "b h w i"],
  kernel: Float[Array, "kh kw _i o"],
  *,
  steps: tuple[int, int],
  pads: Sequence[tuple[int, int]],
  groups: int,
  dtype: DTypeLike,
) -> Float[Array, "b h2 w2 o"]:
  """The compiler's convolution."""
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=steps,
    padding=pads,
    dimension_numbers=_DIMENSIONS,
    feature_group_count=groups,
    preferred_element_type=dtype,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dense(
  steps: tuple[int, int],
  pads: tuple[tuple[int, int], tuple[int, int]],
  dtype: DTypeLike,
  x: Float[Array, "b h w i"],
  kernel: Float[Array, "kh kw i o"],
) -> Float[Array, "b h2 w2 o"]:
  """The compiler's convolution; the kernel's gradient, which it is slow at, is a matrix product per cell."""
  return _whole(x, kernel, steps=steps, pads=pads, groups=1, dtype=dtype)


def _dense_forward(steps: Any, pads: Any, dtype: DTypeLike, x: Array, kernel: Array) -> tuple[Array, Any]:
  return _dense(steps, pads, dtype, x, kernel), (x, kernel)


def _dense_backward(
  steps: Any, pads: Any, dtype: DTypeLike, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
  x, kernel = saved
  convolution = functools.partial(_whole, kernel=kernel, steps=steps, pads=pads, groups=1, dtype=dtype)
  (of_map,) = jax.linear_transpose(convolution, x)(gradient)
  flat = gradient.reshape(-1, gradient.shape[-1])
  cells = [
    jnp.matmul(shifted.reshape(-1, x.shape[-1]).T, flat, preferred_element_type=jnp.float32)
    for shifted in _shifts(x, kernel.shape[:2], steps, pads)
  ]
  return of_map, jnp.stack(cells).reshape(kernel.shape).astype(kernel.dtype)


_dense.defvjp(_dense_forward, _dense_backward)


def _shifts(
  x: Float[Array, "b h w i"], window: tuple[int, int], steps: tuple[int, int], pads: Any
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
  x: Float[Array, "b h w i"], kernel: Float[Array, "1 1 i o"], *, steps: tuple[int, int], dtype: DTypeLike
) -> Float[Array, "b h2 w2 o"]:
  """A convolution by a kernel of one cell as the matrix product that it is."""
  x = x[:, :: steps[0], :: steps[1]]
  return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0], preferred_element_type=jnp.float32).astype(dtype)


def _by_cells(
  x: Float[Array, "b h w i"],
  kernel: Float[Array, "kh kw _i o"],
  *,
  steps: tuple[int, int],
  pads: Sequence[tuple[int, int]],
  groups: int,
  dtype: DTypeLike,
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


def _pads(
  size: Sequence[int], window: Sequence[int], strides: Sequence[int], padding: Padding
) -> tuple[tuple[int, int], tuple[int, int]]:
  if isinstance(padding, str):
    return tuple(jax.lax.padtype_to_pads(size, window, strides, padding))
  return ((padding, padding),) * 2 if isinstance(padding, int) else tuple(map(tuple, padding))
