"""Writes random weights of a backbone in our format, one tensor at a time: to try what one not at hand needs.

  PYTHONPATH=. python experiments/random_backbone.py --name=swinv2_g --out=/tmp/swinv2_g_random.safetensors

Norms that end residual branches are one, so that no block is the identity.
"""

import zlib

from absl import app, flags
from flax import nnx
import jax.numpy as jnp
import numpy as np

from frozen_vision.backbones import families
from frozen_vision.backbones.swinv2 import model as swinv2
from frozen_vision.files import tensors, trees

_NAME = flags.DEFINE_string("name", "swinv2_g", "Row of the table of variants.")
_WINDOW = flags.DEFINE_integer("window", 16, "Window of all stages.")
_OUT = flags.DEFINE_string("out", None, "File to write.", required=True)


def _draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
  """Reproducible numbers of the size that weights have."""
  if path.endswith("logit_scale"):
    return np.full(shape, np.log(10.0), np.float32)
  if len(shape) == 1:
    return np.full(shape, float(path.endswith("scale")), np.float32)
  rng = np.random.default_rng(zlib.crc32(path.encode()))
  return rng.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
  config = families.backbone_config(_NAME.value, window_size=_WINDOW.value)
  module = nnx.eval_shape(lambda: swinv2.SwinV2(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
  leaves = {
    path: tensors.LazyTensor(
      leaf.shape, np.dtype(np.float32), lambda path=path, leaf=leaf: _draw(path, leaf.shape)
    )
    for path, leaf in trees.flatten(nnx.state(module, nnx.Param)).items()
  }
  # bfloat16 has the range of float32 and half its size on disk.
  fingerprint = families.write_leaves(leaves, _OUT.value, name=_NAME.value, config=config, dtype=jnp.bfloat16)
  count = sum(np.prod(leaf.shape) for leaf in leaves.values())
  print(f"{_OUT.value}: {count:,} numbers, fingerprint {fingerprint}")


if __name__ == "__main__":
  app.run(main)
