"""Random weights that are the same bits on every machine, processor and version of jax.

A compiled program draws other last bits where instructions are fused otherwise, so a head that was trained on
random weights would not fit the same random weights elsewhere. Here integers of a generator whose stream
never changes are added up and scaled, which rounds alike everywhere.
"""

import hashlib
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from frozen_vision.files import trees

# Mean and standard deviation of the sum of four integers that are uniform in 0..65535.
_MEAN = 2 * 65535
_STD = math.sqrt(4 * (65536**2 - 1) / 12)
# Standard deviations are rounded to this many steps per factor of two: two machines agree on them, though the
# last bits of the draws that they are measured on differ.
_STEPS = 8


def redraw(module: nnx.Module, seed: int) -> nnx.Module:
  """The module with every parameter that its initialiser drew drawn anew, by the parameter's path.

  Parameters that are constant, such as zeros of biases and ones of norms, stay; the others have about the
  standard deviation that their initialiser gave them.
  """
  graphdef, params, rest = nnx.split(module, nnx.Param, ...)
  flat = []
  for path, variable in nnx.to_flat_state(params):
    leaf = variable.get_value()
    if isinstance(leaf, jax.core.Tracer):  # only its shape is asked for
      return module
    value = np.asarray(leaf, np.float32)
    if np.ptp(value) > 0:
      std = 2.0 ** (np.round(np.log2(np.std(value, dtype=np.float64)) * _STEPS) / _STEPS)
      std = float(np.float32(std))  # powers differ in their last bits
      variable = variable.replace(
        jnp.asarray(draw(trees.path_string(path), value.shape, std, seed), leaf.dtype)
      )
    flat.append((path, variable))
  return nnx.merge(graphdef, nnx.from_flat_state(flat), rest)


def draw(path: str, shape: tuple[int, ...], std: float, seed: int) -> np.ndarray:
  """float32 numbers of a nearly normal distribution (four uniforms added up), within 3.5 `std` of zero."""
  digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
  bits = np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(
    int(np.prod(shape, dtype=np.int64))
  )
  sums = bits.astype("<u8").view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int64)
  return ((sums - _MEAN) * (std / _STD)).astype(np.float32).reshape(shape)
