"""Random weights in shards, as transformers saves them, are a checkpoint that is read block by block."""

import jax
import numpy as np

from experiments import random_backbone
from frozen_vision.backbones import families
from frozen_vision.backbones.vit import checkpoints
from frozen_vision.freezing import prepare


def test_shards_of_a_7b_made_small(tmp_path):
  sizes = dict(embed_dim=16, depth=2, num_heads=2, mlp_dim=24, registers=2)
  config = checkpoints.VARIANTS["dinov3_vit7b16"].replace(**sizes)
  shapes = {path: shape for path, shape in checkpoints.variable_shapes(config).items() if path != "periods"}
  count = random_backbone.write_shards(shapes, config, tmp_path, shard_bytes=4000)
  assert count == sum(np.prod(shape) for shape in shapes.values())
  assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
  file = families.open_backbone(tmp_path, prefer="dinov3_vit7b16", **sizes)
  assert file.module.config == config and file.fingerprint is None
  block = file.load().blocks[1]
  assert np.all(block.scale2.scale[...] == 1) and not np.any(block.attn.proj.bias[...])
  assert 0.2 < np.std(block.mlp.down.kernel[...]) * 24**0.5 < 1.2
  program = prepare.freeze(file, storage="int8").program
  images = jax.random.normal(jax.random.key(0), (1, 32, 48, 3))
  maps = jax.jit(lambda program, images: program(images))(program, images)
  assert all(np.isfinite(map_).all() and np.ptp(map_) > 0.1 for map_ in maps)
