"""Writes random weights of a backbone, one tensor at a time: to try what one not at hand needs.

  PYTHONPATH=. python experiments/random_backbone.py --name=swinv2_g --out=/tmp/swinv2_g_random.safetensors
  PYTHONPATH=. python experiments/random_backbone.py --name=dinov3_vit7b16 --out=/tmp/dinov3_7b_random

A file has our format; a folder, of a DINOv3, gets shards and their index as transformers saves them. Both
hold bfloat16. Norms and LayerScales that end residual branches are one, so that no block is the identity.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import functools
import json
import pathlib
import sys
import zlib

from flax import nnx
import jax.numpy as jnp
import numpy as np

from frozen_vision.backbones import families
from frozen_vision.backbones.vit import checkpoint_keys
from frozen_vision.backbones.vit.config import ViTConfig
from frozen_vision.files import checkpoint_file, tensors, trees

_SHARD_BYTES = 2 << 30
_DRAWN = 15_485_863  # a prime, so that rows of no matrix repeat one another
# A name that only transformers' DINOv3 has.
_MARKER = "layer.0.layer_scale1.lambda1"


@functools.cache
def _normal() -> np.ndarray:
  return np.random.default_rng(0).standard_normal(_DRAWN, np.float32)


def _lazy(name: str, path: str, shape: tuple[int, ...], fan_in: int) -> tensors.LazyTensor:
  """Reproducible numbers of the size that weights have.

  They repeat after `_DRAWN` numbers, from a place on that the name decides: to draw billions takes minutes.

  Args:
    name: of the tensor in the file.
    path: of our variable that it is or belongs to.
    fan_in: rows of that variable.
  """

  def draw() -> np.ndarray:
    if path.endswith("logit_scale"):
      return np.full(shape, np.log(10.0), np.float32)
    if len(shape) == 1:
      return np.full(shape, float(path.endswith("scale")), np.float32)
    start, size = zlib.crc32(name.encode()) % _DRAWN, int(np.prod(shape))
    drawn = _normal()
    repeats = -(-max(size - (_DRAWN - start), 0) // _DRAWN)
    parts = [drawn[start : start + size], *[drawn] * repeats]
    return np.concatenate(parts)[:size].reshape(shape) * np.float32(fan_in**-0.5)

  return tensors.LazyTensor(shape, np.dtype(np.float32), draw)


def write_shards(
  shapes: Mapping[str, tuple[int, ...]],
  config: ViTConfig,
  folder: pathlib.Path,
  shard_bytes: int = _SHARD_BYTES,
) -> int:
  """Writes a DINOv3 under the names of transformers, in shards of at most `shard_bytes` beside an index.

  Args:
    shapes: of our variables by path.

  Returns:
    How many numbers were written.
  """
  layout = checkpoint_keys.detect({_MARKER: None})
  found = {}
  for path, shape in shapes.items():
    alternatives = layout.alternatives(path)
    if not alternatives:  # rotary periods, which transformers computes
      continue
    names, transform = alternatives[-1]  # the names of published files are last
    found |= {
      name: _lazy(name, path, theirs, shape[0])
      for name, theirs in zip(names, transform.shapes(shape, config))
    }
  shards = list(_shards(found, shard_bytes))
  places = {}
  folder.mkdir(parents=True, exist_ok=True)
  for number, shard in enumerate(shards, start=1):
    name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    tensors.write(folder / name, shard, metadata={"format": "pt"}, dtype=jnp.bfloat16)
    places |= dict.fromkeys(shard, name)
    print(folder / name, flush=True)
  (folder / checkpoint_file.WEIGHTS_IN_FOLDERS[0]).write_text(json.dumps({"weight_map": places}))
  return _numbers(found)


def _shards(
  leaves: Mapping[str, tensors.LazyTensor], shard_bytes: int
) -> Iterator[dict[str, tensors.LazyTensor]]:
  shard, size = {}, 0
  for name, leaf in leaves.items():
    more = 2 * int(np.prod(leaf.shape))
    if shard and size + more > shard_bytes:
      yield shard
      shard, size = {}, 0
    shard[name] = leaf
    size += more
  yield shard


def _numbers(leaves: Mapping[str, tensors.LazyTensor]) -> int:
  return sum(int(np.prod(leaf.shape)) for leaf in leaves.values())


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
  parser.add_argument("--name", default="swinv2_g", help="row of a family's table of variants")
  parser.add_argument("--window", type=int, default=16, help="window of all stages of a SwinV2")
  parser.add_argument(
    "--out", type=pathlib.Path, required=True, help="file of ours (.safetensors) or folder to write"
  )
  asked = parser.parse_args(arguments)
  options = dict(window_size=asked.window) if asked.name.startswith("swinv2") else {}
  module = families.abstract_backbone(asked.name, **options)
  shapes = {path: leaf.shape for path, leaf in trees.flatten(nnx.state(module, nnx.Param)).items()}
  if asked.out.suffix == ".safetensors":
    leaves = {path: _lazy(path, path, shape, shape[0]) for path, shape in shapes.items()}
    # bfloat16 has the range of float32 and half its size on disk.
    families.write_leaves(leaves, asked.out, name=asked.name, config=module.config, dtype=jnp.bfloat16)
    count = _numbers(leaves)
  elif asked.name.startswith("dinov3_vit"):
    count = write_shards(shapes, module.config, asked.out)
  else:
    parser.error(
      f"--out={asked.out}: only a dinov3_vit* is written as a folder of shards; {asked.name} needs a file "
      "that ends in .safetensors."
    )
  print(f"{asked.out}: {count:,} numbers")
  return 0


if __name__ == "__main__":
  sys.exit(main())
