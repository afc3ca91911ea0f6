"""CRC-32C (Castagnoli), the checksum of TensorFlow's files, computed with NumPy.

A checksum of many bytes is computed for many parts of them side by side, and joined: behind a part, the
checksum of the bytes before it goes on as through as many zeros.
"""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78
_MASK = 0xA282EAD8
_SMALL = 4096


def masked(data: bytes) -> int:
  """The checksum as TensorFlow and LevelDB store it."""
  found = checksum(data)
  return ((found >> 15 | found << 17) + _MASK) & 0xFFFFFFFF


def checksum(data: bytes) -> int:
  """CRC-32C of bytes, as RFC 3720 has it."""
  if len(data) < _SMALL:
    return _continue(0xFFFFFFFF, data) ^ 0xFFFFFFFF
  # As many parts as each has bytes, so that neither of the two loops is long.
  parts = int(len(data) ** 0.5)
  length = len(data) // parts
  columns = np.frombuffer(data, np.uint8, parts * length).reshape(parts, length).T.astype(np.uint32)
  states = np.zeros(parts, np.uint32)
  states[0] = 0xFFFFFFFF
  table = _table()
  for column in columns:
    states = table[(states ^ column) & 255] ^ (states >> 8)
  through = _through_zeros(length)
  total = 0
  for state in states.tolist():
    total = state ^ functools.reduce(
      lambda found, byte: found ^ through[byte][total >> (8 * byte) & 255], range(4), 0
    )
  return _continue(total, data[parts * length :]) ^ 0xFFFFFFFF


@functools.cache
def _table() -> np.ndarray:
  """[256] uint32: what one byte does to a state."""
  table = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
  return table


@functools.cache
def _small_table() -> list[int]:
  return _table().tolist()


def _continue(state: int, data: bytes) -> int:
  table = _small_table()
  for byte in data:
    state = table[(state ^ byte) & 255] ^ state >> 8
  return state


@functools.lru_cache(maxsize=64)
def _through_zeros(count: int) -> list[list[int]]:
  """What `count` bytes of zero do to each of a state's four bytes: [4][256]."""
  powers = 1 << np.arange(32, dtype=np.uint32)
  step = _table()[powers & 255] ^ powers >> 8  # what one byte of zero does to each bit of a state
  found = powers
  while count:
    if count & 1:
      found = _apply(step, found)
    step = _apply(step, step)
    count >>= 1
  values = np.arange(256, dtype=np.uint32)
  return [_apply(found, values << np.uint32(8 * byte)).tolist() for byte in range(4)]


def _apply(operator: np.ndarray, states: np.ndarray) -> np.ndarray:
  """States, each bit of which becomes `operator`'s entry for it."""
  bits = states[:, None] >> np.arange(32, dtype=np.uint32) & 1
  return np.bitwise_xor.reduce(np.where(bits == 1, operator, np.uint32(0)), axis=1)
