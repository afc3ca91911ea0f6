"""Files of trained necks and heads: what a new run may start from.

A file is `.safetensors` with our parameter paths (`neck/...`, `head/...`) as keys. `frozen_vision.convert`
writes them from published checkpoints, `experiments/export_head.py` from a finished run.
"""

from collections.abc import Mapping, Sequence
import logging
import os
import pathlib
import re

from flax import nnx
import jax.numpy as jnp
import numpy as np

from frozen_vision.files import keys, tensors, trees

FORMAT = "frozen_vision head 1"
PARTS = ("neck/", "head/")

_logger = logging.getLogger(__name__)


def save(path: str | os.PathLike, leaves: Mapping[str, np.ndarray], *, source: str) -> str:
  """Writes parameters in float32 and returns their fingerprint.

  Args:
    path: the `.safetensors` file.
    leaves: {path of the parameter: array}, paths below `neck/` and `head/`.
    source: where they come from, in words; a reader of the file finds it in the header.

  Raises:
    ValueError: other paths, or numbers that are not finite.
  """
  foreign = sorted(name for name in leaves if not name.startswith(PARTS))
  if foreign or not leaves:
    raise ValueError(f"A head file holds parameters below {PARTS}, at least one; found others: {foreign}.")
  lazy = {
    name: tensors.LazyTensor(np.shape(leaf), np.dtype(np.float32), lambda leaf=leaf: np.asarray(leaf))
    for name, leaf in leaves.items()
  }
  return tensors.write(path, lazy, metadata={"format": FORMAT, "source": source})


def load(state: nnx.State, path: str | os.PathLike, *, keep: Sequence[str] = ()) -> nnx.State:
  """The state with its neck and head filled from a file, and a log of every key that is not used.

  Args:
    state: of a module with parts `neck` and `head`; other parts stay as they are.
    path: a file of `save`.
    keep: regular expressions of whole paths that keep the values of `state`; what the file has for them is
      not used. For another set of classes: `head/.*/(classes|logits)/.*`, and `head/box_heads/.*/boxes/.*`
      where each class has its own box.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not such a file; a pattern that matches nothing; or keys that are missing, unexpected or of
      another shape: all are listed.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"Head weights {path}: no such file.")
  tensors.check_file(path)
  how = (
    "Make one with python -m frozen_vision.convert --head-of=mmdet SOURCE FILE, or with "
    "experiments/export_head.py."
  )
  if path.suffix != ".safetensors":
    raise ValueError(f"Head weights {path}: expected a .safetensors file. {how}")
  stored, header = tensors.open_safetensors(path)
  if header.get("format") != FORMAT:
    raise ValueError(
      f"{path} is no file of a neck and a head (its format is {header.get('format')!r}). {how}"
    )
  flat = [(trees.path_string(key), key, leaf) for key, leaf in nnx.to_flat_state(state)]
  ours = {name: tuple(leaf.shape) for name, _, leaf in flat if name.startswith(PARTS)}
  for pattern in keep:
    if not any(re.fullmatch(pattern, name) for name in (*ours, *stored)):
      raise ValueError(f"init.keep: {pattern!r} matches no parameter of the neck and head, nor of {path}.")

  def kept(name):
    return any(re.fullmatch(pattern, name) for pattern in keep)

  wanted = {name: shape for name, shape in ours.items() if not kept(name)}
  unused = [f"{name} {tensor.shape}" for name, tensor in stored.items() if kept(name)]
  found = {name: tensor.shape for name, tensor in stored.items() if not kept(name)}
  keys.compare(found, wanted).check(
    f"{path} does not fit the neck and head. Configure them as those of the file "
    f"({header.get('source', 'of unknown source')}), or name in init.keep what should start at random"
  )
  _logger.info("%d parameters of the neck and head start as in %s.", len(wanted), path)
  for what, names in (
    ("Start as initialised", [name for name in ours if name not in wanted]),
    ("In the file and not used", unused),
  ):
    if names:
      _logger.info("%s (%d):\n  %s", what, len(names), "\n  ".join(names))
  filled = []
  for name, key, leaf in flat:
    if name in wanted:
      leaf = leaf.replace(jnp.asarray(tensors.check_finite(name, stored[name].read(), path), leaf.dtype))
    filled.append((key, leaf))
  return nnx.from_flat_state(filled)
