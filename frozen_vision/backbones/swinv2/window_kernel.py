"""SwinV2's attention in windows as one kernel for TPUs (Pallas), which keeps all scores on the chip.

One step of the kernel attends from some rows of one window, to the whole window, for as many heads as fill
the 128 lanes of a register. It reads queries, keys and values where the linear layer wrote them, so nothing
is transposed in memory, and makes of the position bias and of the mask between regions only what it needs:

  scores    [keys, queries] of one head, float32, in registers and on-chip memory only
  bias      queries of R rows and keys whose row is u further down have the same bias wherever they stand in
            the window, so all of it is a slice of [(2h-R) w, R w] numbers a head instead of (h w)^2
  mask      which part of a window the shift brought from the other end of the map follows from two bits of
            a cell and from whether the window is in the last row or column of windows

`windows.attention_on_chip` calls it and has the gradient.
"""

import functools
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.ops.arrays import Array

_LANES = 128
_SUBLANES = 8  # rows of a register of float32
# Bytes of on-chip memory that one step may use. A v5p has 64 MiB a core, v5e and v6e have 128.
_MOST_BYTES = 48 * 2**20
# The most queries of one step; more read keys less often, and need more memory for scores and bias.
_MOST_QUERIES = 2 * _LANES
_FAR = -1e30  # the bias of a cell of padding; not -inf, whose differences are NaN
# Tests set it: the kernel is then interpreted, on any platform.
INTERPRET = False


def why_not(window: tuple[int, int], head_channels: int, dtype: Any) -> str | None:
  """Why the kernel cannot attend in such windows; None if it can."""
  if _LANES % head_channels or head_channels < 16:
    return f"its heads have {head_channels} channels; it takes 16, 32, 64 or 128"
  if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
    return f"it computes in bfloat16 or float32, not in {jnp.dtype(dtype).name}"
  needed = sum(_memory(window, head_channels, dtype).values())
  if needed > _MOST_BYTES:
    return (
      f"a window of {window[0]} x {window[1]} cells needs {needed / 2**20:.0f} MiB on the chip, and "
      f"{_MOST_BYTES // 2**20} are taken as what there is"
    )
  return None


def attend(
  qkv: Float[Array, "b height width qkv"],
  window: tuple[int, int],
  scale: Float[Array, "heads"],
  table: Float[Array, "heads y x"],
  shift: tuple[int, int],
  masked: float,
) -> Float[Array, "b height width c"]:
  """Attention inside every window of a map, as `windows.cosine_attention`.

  Args:
    qkv: queries, keys and values of a map of whole windows.
    window: (height, width).
    table: the bias of every relative position by head, y = 2 height - 1, x = 2 width - 1.
    shift: cells the map was rolled by, up and left.
    masked: what is added to the score of a pair of cells that were no neighbours before the shift.
  """

  def by_kernel(qkv, scale, table):
    return _attend(qkv, scale, table, window=window, shift=shift, masked=masked)

  if INTERPRET:
    return by_kernel(qkv, scale, table)
  return jax.lax.platform_dependent(qkv, scale, table, tpu=by_kernel, default=_refuse)


def _attend(qkv, scale, table, *, window, shift, masked):
  """Fills registers, and runs the kernel."""
  b, height, width = qkv.shape[:3]
  channels, heads = qkv.shape[-1] // 3, scale.shape[0]
  head_channels, columns = channels // heads, width // window[1]
  # Heads of zeros fill the lanes of registers, and columns of zeros their rows.
  more_heads = -heads % (_LANES // head_channels)
  side = _padded(window[1], _SUBLANES)
  x = qkv
  if more_heads or side != window[1]:
    x = x.reshape(b, height, columns, window[1], 3, channels)
    fill = (0, side - window[1]), (0, 0), (0, more_heads * head_channels)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), *fill)).reshape(b, height, columns * side, -1)
    scale, table = jnp.pad(scale, (0, more_heads)), jnp.pad(table, ((0, more_heads), (0, 0), (0, 0)))
  x = _call(
    x,
    jnp.repeat(scale, head_channels)[None],
    _expanded(table, window),
    window=window,
    head_channels=head_channels,
    shift=shift,
    masked=masked,
  )
  if x.shape != (b, height, width, channels):
    x = x.reshape(b, height, columns, side, -1)[:, :, :, : window[1], :channels]
  return x.reshape(b, height, width, channels)


def _call(x, scale, bias, *, window, head_channels, shift, masked):
  """Runs the kernel over maps of whole registers."""
  # Late, as importing them takes longer than importing this package, and few programs need them.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  b, height, _ = x.shape[:3]
  at_once, side, channels = _rows_at_once(window), _padded(window[1], _SUBLANES), x.shape[-1] // 3
  rows, columns, cells = height // window[0], x.shape[2] // side, window[0] * side
  groups, heads = channels // _LANES, _LANES // head_channels
  place = _from_other_end(window, shift)

  def part(number):
    return pl.BlockSpec(
      (1, window[0], side, _LANES), lambda g, i, row, column, _: (i, row, column, number * groups + g)
    )

  def fixed(shape, index):
    """What every step of a group of heads reads again; one copy of it is held."""
    return pl.BlockSpec(shape, index, pipeline_mode=pl.Buffered(1))

  return pl.pallas_call(
    functools.partial(
      _kernel,
      at_once=at_once,
      head_channels=head_channels,
      last=(rows - 1, columns - 1) if any(shift) else None,
      masked=masked,
    ),
    grid=(groups, b, rows, columns, window[0] // at_once),
    in_specs=[
      *map(part, range(3)),
      fixed((1, _LANES), lambda g, *_: (0, g)),
      fixed((heads, *bias.shape[1:]), lambda g, *_: (g, 0, 0)),
      fixed((cells, 1), lambda *_: (0, 0)),
      pl.BlockSpec((1, 1, at_once * side), lambda *step: (step[-1], 0, 0)),
    ],
    out_specs=part(0),
    out_shape=jax.ShapeDtypeStruct((*x.shape[:3], channels), x.dtype),
    scratch_shapes=[pltpu.VMEM((cells, _LANES), x.dtype), pltpu.VMEM((_LANES, cells), x.dtype)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",) * 4 + ("arbitrary",), vmem_limit_bytes=_MOST_BYTES
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * x.shape[1] * x.shape[2] * b * cells * channels,
      transcendentals=x.shape[1] * x.shape[2] * b * cells * channels // head_channels,
      bytes_accessed=x.nbytes * 4 // 3 + bias.nbytes,
    ),
    interpret=INTERPRET,
    name="attention_in_windows",
  )(x, x, x, scale, bias, place[:, None], place.reshape(-1, 1, at_once * side))


def _kernel(
  q_ref, k_ref, v_ref, scale_ref, bias_ref, key_ref, query_ref, out_ref, unit_ref, transposed_ref, *,
  at_once, head_channels, last, masked,
):  # fmt: skip
  """One step: `at_once` rows of queries of a window and of as many heads as fill the lanes.

  Args:
    q_ref, k_ref, v_ref, out_ref: [1, h, w, lanes] of a window.
    scale_ref: [1, lanes].
    bias_ref: [heads, (2h-R) w, R w], see `_expanded`.
    key_ref, query_ref: [h w, 1] and [1, 1, R w], see `_from_other_end`.
    unit_ref, transposed_ref: keys of length one [h w, lanes], and values [lanes, h w]; the first step of a
      window makes them for all.
    last: number of the last (row, column) of windows; None without a shift.
  """
  from jax.experimental import pallas as pl  # see `_call`

  height, side = q_ref.shape[1:3]
  cells, dtype, step = height * side, q_ref.dtype, pl.program_id(4)
  precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

  def product(a, b, axis):
    """[a, b] of a [a, n] and b [b, n] or [n, b], in float32."""
    return jax.lax.dot_general(
      a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )

  @pl.when(step == 0)
  def _():
    # Rows of bfloat16 are packed in pairs, and 40 or 56 columns are no whole register of them.
    keys, values = (ref[0].astype(jnp.float32).reshape(cells, _LANES) for ref in (k_ref, v_ref))
    unit_ref[...] = _unit(keys, head_channels).astype(dtype)
    transposed_ref[...] = values.T.astype(dtype)

  first = step * at_once
  queries = q_ref[0, pl.ds(first, at_once)].astype(jnp.float32).reshape(at_once * side, _LANES)
  queries = _unit(queries, head_channels) * scale_ref[...]
  head = jax.lax.broadcasted_iota(jnp.int32, queries.shape, 1) // head_channels
  offset = pl.multiple_of((height - at_once - first) * side, _SUBLANES)
  if last is not None:
    edge = (pl.program_id(2) == last[0]).astype(jnp.int32) + 2 * (pl.program_id(3) == last[1])
    apart = (key_ref[...] & edge) != (query_ref[0] & edge)
  parts = []
  for number in range(_LANES // head_channels):
    # The other heads' channels are zeros, as cutting out one's own would move all keys between lanes.
    query = jnp.where(head == number, queries, 0.0).astype(dtype)
    scores = product(unit_ref[...], query, 1) + bias_ref[number, pl.ds(offset, cells), :]
    if last is not None:
      scores = jnp.where(apart, scores + masked, scores)
    weights = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
    total = jnp.sum(weights, axis=0, keepdims=True)
    values = transposed_ref[number * head_channels : (number + 1) * head_channels]
    parts.append(product(values, weights.astype(dtype), 0) / total)
  out = jnp.concatenate(parts, axis=0).T
  out_ref[0, pl.ds(first, at_once)] = out.reshape(at_once, side, _LANES).astype(dtype)


def _unit(x: Float[Array, "n lanes"], head_channels: int) -> Float[Array, "n lanes"]:
  """`ops.vectors.unit` of each head's channels."""
  row, column = (jax.lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), axis) for axis in range(2))
  same = (row // head_channels == column // head_channels).astype(jnp.float32)
  squares = jnp.dot(x * x, same, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


def _expanded(
  table: Float[Array, "heads y x"], window: tuple[int, int]
) -> Float[Array, "heads keys queries"]:
  """Bias of R rows of queries and of all keys of a window, wherever in the window the queries are.

  Entry [u w + j, t w + i] is that of query (t, i) and of key (u - h + R, j), in rows from the first of the
  queries. Keys of padding are far below all others.
  """
  at_once, side = _rows_at_once(window), _padded(window[1], _SUBLANES)
  heads, long = table.shape[0], 2 * window[0] - at_once
  table = jnp.flip(table.astype(jnp.float32), 1)
  by_key = [table[:, :, window[1] - 1 - j :][:, :, : window[1]] for j in range(window[1])]
  pairs = jnp.stack(by_key, axis=2)  # heads, rows, key's and query's column
  more = side - window[1]
  pairs = jnp.pad(pairs, ((0, 0), (0, 0), (0, 0), (0, more)))
  pairs = jnp.pad(pairs, ((0, 0), (0, 0), (0, more), (0, 0)), constant_values=_FAR)
  rows = [pairs[:, at_once - 1 - t : at_once - 1 - t + long] for t in range(at_once)]
  return jnp.concatenate(rows, axis=-1).reshape(heads, long * side, at_once * side)


def _from_other_end(window: tuple[int, int], shift: tuple[int, int]) -> np.ndarray:
  """Flags of each cell of a window of whole registers, int32.

  Bit 0 is set where the shift brought the cell from the map's first row to the last row of windows, bit 1
  where it brought it from the first column to the last column of windows.
  """
  side = _padded(window[1], _SUBLANES)
  row, column = np.arange(window[0])[:, None], np.arange(side)[None]
  bits = (row >= window[0] - shift[0]) + 2 * ((column >= window[1] - shift[1]) & bool(shift[1]))
  return bits.reshape(-1).astype(np.int32)


def _rows_at_once(window: tuple[int, int]) -> int:
  """Rows of queries of one step: those that fill registers best, of these the fewest."""
  side = _padded(window[1], _SUBLANES)
  most = max(_MOST_QUERIES // side, 1)
  rows = [rows for rows in range(1, most + 1) if window[0] % rows == 0]
  return max(rows, key=lambda rows: (rows * side / _padded(rows * side, _LANES), -rows))


def _memory(window: tuple[int, int], head_channels: int, dtype: Any) -> dict[str, int]:
  """Bytes on the chip of one step, by what they are."""
  at_once, side, size = _rows_at_once(window), _padded(window[1], _SUBLANES), jnp.dtype(dtype).itemsize
  cells, queries = window[0] * side, _padded(at_once * side, _LANES)
  return {
    "queries, keys, values and output, each twice": 8 * cells * _LANES * size,
    "keys of length one, transposed values": 2 * _padded(cells, _LANES) * _LANES * size,
    "them in float32": 3 * cells * _LANES * 4,
    "bias": _LANES // head_channels * (2 * window[0] - at_once) * side * queries * 4,
    "place of keys": cells * _LANES * 4,
    "scores and weights": 3 * cells * queries * 4,
  }


def _padded(number: int, whole: int) -> int:
  return -(-number // whole) * whole


def _refuse(qkv: Array, scale: Array, table: Array) -> Array:
  """Lowers to an error: which platform a program is for is known only then."""
  del scale, table
  return _refused.bind(qkv)


def _raise(context: mlir.LoweringRuleContext, *args: Any) -> Any:
  del args
  raise NotImplementedError(
    f"SwinV2Config.attention is 'pallas', a kernel for TPUs, and this program is compiled for "
    f"{', '.join(context.module_context.platforms)}. Give --config.backbone.overrides.attention=xla, or "
    "attention='xla' where the backbone is built."
  )


_refused = Primitive("attention_on_chip_refused")
_refused.def_abstract_eval(lambda qkv: qkv.update(shape=(*qkv.shape[:3], qkv.shape[3] // 3)))
mlir.register_lowering(_refused, _raise)
