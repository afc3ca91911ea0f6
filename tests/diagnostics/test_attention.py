"""Attention of known shapes has known distances; what blocks report is what they weigh values by."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones import families
from frozen_vision.backbones.base import AttentionWeights
from frozen_vision.diagnostics import attention
from tests import tiny_family

_GRID = np.stack(np.meshgrid(np.arange(2), np.arange(3), indexing="ij"), axis=-1).reshape(1, -1, 2) * 16.0
_SWIN = dict(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), window_size=4)
_VITS = {
  "dinov3_vits16": dict(embed_dim=32, depth=2, num_heads=2, mlp_dim=32, registers=1),
  "deit_vits16": dict(embed_dim=32, depth=2, num_heads=2, mlp_dim=32, positions="relative", position_grid=2),
}


def _known(*maps, positions=_GRID):
  """Two images whose heads have these maps."""
  weights = np.stack([np.broadcast_to(one, (6, 6)) for one in maps])[None, None].repeat(2, axis=0)
  return AttentionWeights(jnp.asarray(weights, jnp.float32), np.asarray(positions, np.float32))


def test_distances_and_similarities_of_known_maps():
  uniform, own = np.full((6, 6), 1 / 6), np.eye(6)
  next_column = np.zeros((6, 6))
  next_column[np.arange(6), [1, 2, 1, 4, 5, 4]] = 1  # one column on; the last looks back
  found = attention.distances(_known(uniform, own, next_column))
  apart = np.linalg.norm(_GRID[0][:, None] - _GRID[0][None], axis=-1)
  np.testing.assert_allclose(found, np.tile([apart.mean(), 0.0, 16.0], (2, 1)), rtol=1e-6)
  similar = attention.similarities(_known(uniform, own, next_column))
  # The cosine of a uniform map and a permutation-like one of 6 ones is 1 / sqrt(6).
  root = 6**-0.5
  wanted = [[1, root, root], [root, 1, 0], [root, 0, 1]]
  np.testing.assert_allclose(similar, np.tile(wanted, (2, 1, 1)), atol=1e-6)
  np.testing.assert_allclose(attention.mean_maps(_known(own))[0, 0], own)
  alone = attention.Heads(np.zeros(1), np.ones((1, 1)))
  pair = attention.Heads(np.zeros(2), np.array([[1.0, 0.25], [0.25, 1.0]]))
  assert (alone.similarity, pair.similarity) == (1.0, 0.25)


def test_tokens_without_a_place_do_not_count():
  positions = _GRID.copy()
  positions[0, 0] = np.nan  # a class token, to which most of the attention goes
  weights = np.zeros((6, 6))
  weights[:, 0], weights[np.arange(6), np.arange(6)] = 0.9, 0.1
  weights[1] = [0.9, 0, 0.1, 0, 0, 0]  # 16 pixels on
  np.testing.assert_allclose(
    attention.distances(_known(weights, positions=positions)), [[16 / 5]] * 2, rtol=1e-6
  )


def _images(height, width):
  return jax.random.normal(jax.random.key(0), (2, height, width, 3))


@pytest.mark.parametrize("name", _VITS)
def test_a_vit_weighs_its_values_by_what_it_reports(name):
  backbone = families.build_backbone(name, rngs=nnx.Rngs(0), **_VITS[name])
  if backbone.relative_positions is not None:
    table = backbone.relative_positions
    table[...] = jax.random.normal(jax.random.key(1), table.shape)
  reports = backbone.attention_weights(_images(32, 48))
  x, rotary, bias, size = backbone._enter(_images(32, 48))
  assert size == (2, 3) and len(reports) == 2
  for block, report in zip(backbone.blocks, reports):
    np.testing.assert_allclose(report.weights.sum(-1), 1, rtol=1e-5)
    assert np.isnan(report.positions[0, : backbone.config.prefix_tokens]).all()
    np.testing.assert_array_equal(report.positions[0, backbone.config.prefix_tokens :], _GRID[0] + 8)
    normed = block.norm1(x)
    _, _, value = block.attn._heads(normed, rotary)
    wanted = block.attn.proj(jnp.einsum("bhqk,bkhd->bqhd", report.weights[:, 0], value).reshape(x.shape))
    np.testing.assert_allclose(block.attn(normed, rotary, bias), wanted, atol=1e-5)
    x = block(x, rotary, bias)


def test_a_swin_weighs_its_values_by_what_it_reports():
  """On maps that are padded (9 x 6 cells in windows of 4) and shifted."""
  backbone = families.build_backbone("swinv2_t", rngs=nnx.Rngs(0), **_SWIN)
  images = _images(36, 24)
  reports = backbone.attention_weights(images)
  assert len(reports) == 8
  x = backbone.patch_embed(images)
  for index, block in enumerate(backbone.stages[0].blocks):
    report = reports[index]
    np.testing.assert_allclose(report.weights.sum(-1), 1, rtol=1e-5)
    cells = report.positions / 4 - 0.5
    placed = np.isfinite(cells).all(-1)
    assert placed.sum() == 9 * 6 and len(np.unique(cells[placed], axis=0)) == 9 * 6
    rows, columns = (
      np.where(placed, cells[..., 0], 0).astype(int),
      np.where(placed, cells[..., 1], 0).astype(int),
    )
    inside = jnp.where(placed[..., None], x[:, rows, columns], 0.0)  # [b, windows, n, c]
    value = block.attn.biased_qkv(inside)[..., -x.shape[-1] :]
    value = value.reshape(*value.shape[:3], block.attn.num_heads, -1)
    out = jnp.einsum("bghqk,bgkhd->bgqhd", report.weights, value).reshape(inside.shape)
    found = block._attend(x)[:, rows, columns]
    np.testing.assert_allclose(
      jnp.where(placed[..., None], found, 0), jnp.where(placed[..., None], block.attn.proj(out), 0), atol=1e-5
    )
    x = block(x)


def test_heads_of_all_blocks_over_batches():
  backbone = families.build_backbone("swinv2_t", rngs=nnx.Rngs(0), **_SWIN)
  images = _images(32, 32)
  together = attention.measure(backbone, [images])
  apart = attention.measure(backbone, [images[:1], images[1:]])
  assert [len(block.distances) for block in together] == [2, 2, 2, 2, 4, 4, 4, 4]
  for one, other in zip(together, apart):
    np.testing.assert_allclose(one.distances, other.distances, rtol=1e-5)
    np.testing.assert_allclose(one.similarities, other.similarities, atol=1e-5)
  with pytest.raises(ValueError, match="no images"):
    attention.measure(backbone, [])
  tiny = tiny_family.Tiny(tiny_family.TinyConfig(), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="Tiny has no self-attention"):
    attention.measure(tiny, [images])
