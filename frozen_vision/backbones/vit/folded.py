"""A frozen ViT as an inference program: done once at load is what a trained one repeats at every call.

LayerScale and the scale of the scores go into the weights beside them; biases of keys, which shift all scores
of a query alike, are left out where positions are not rotary; class token and registers are one table with
their positions added; blocks are stacked for a scan.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.backbones import base
from frozen_vision.backbones.vit import positions, tokens
from frozen_vision.devices import sharding
from frozen_vision.layers import adapters
from frozen_vision.layers import storage as stored
from frozen_vision.layers.activations import ACTIVATIONS, gated
from frozen_vision.layers.attention import attention
from frozen_vision.layers.patches import patches
from frozen_vision.layers.storage import Storage
from frozen_vision.ops.arrays import Array

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FoldedViT(base.FoldedBackbone):
  """The inference program that `fold` makes.

  Attributes:
    stem: patch embedding, tokens before the patches, and the norm before the blocks.
    positions: the stored table of patches, the rotary periods, or the biases of offsets; resized, turned
      into angles or looked up for the size of the image at hand.
    stages: the blocks up to the last tap, and those that follow, which only `embed` needs.
    norm: the final norm.
    pool: SigLIP's attention pooling, or None.
  """

  stem: Tree
  positions: Any
  stages: tuple[Tree, Tree]
  norm: Tree
  pool: Tree

  def __call__(
    self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None
  ) -> tuple[Float[Array, "b _h _w c"], ...]:
    """Maps of the tapped blocks; see `model.ViT.__call__`."""
    del rng
    config = self.config
    _, taps, size = self._run(images, self.stages[:1])
    norm = sharding.gathered(stored.arrays(self.norm))
    maps = [tokens.to_map(tap, size, config.prefix_tokens) for tap in taps]
    return tuple(stored.norm(map_, norm, config.norm_epsilon) if config.norm_taps else map_ for map_ in maps)

  def token_sequence(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n c"]:
    """See `model.ViT.token_sequence`."""
    x, _, _ = self._run(images, self.stages)
    return stored.norm(x, sharding.gathered(stored.arrays(self.norm)), self.config.norm_epsilon)

  def final_features(self, images: Float[Array, "b h w 3"]) -> base.FinalFeatures:
    """See `model.ViT.final_features`."""
    x, _, size = self._run(images, self.stages)
    norm = sharding.gathered(stored.arrays(self.norm))
    return tokens.final_features(stored.norm(x, norm, self.config.norm_epsilon), size, self.config)

  def embed(self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None) -> Float[Array, "b c"]:
    """See `model.ViT.embed`."""
    del rng
    x = self.token_sequence(images)
    if self.pool is None:
      return x[:, 0]
    pool, config = sharding.gathered(stored.arrays(self.pool)), self.config
    query = jnp.broadcast_to(pool["query"].astype(x.dtype), (x.shape[0], 1, config.embed_dim))
    key, value = jnp.split(stored.linear(x, pool["key_value"]), 2, axis=-1)
    parts = (tokens.split_heads(part, config.num_heads) for part in (query, key, value))
    x = stored.linear(attention(*parts, scale=1.0).reshape(x.shape[0], -1), pool["proj"])
    return x + self._mlp(stored.norm(x, pool["norm"], config.norm_epsilon), pool["mlp"])

  def _run(
    self, images: Float[Array, "b h w 3"], stages: Sequence[Tree]
  ) -> tuple[Array, list[Array], tuple[int, int]]:
    """(tokens after the last of `stages`, outputs of the tapped blocks, rows and columns of the patches)."""
    config = self.config
    stem, table = sharding.gathered(stored.arrays((self.stem, self.positions)))
    images = tokens.align_to_stride(images, config).astype(self.dtype)
    x = stored.linear(patches(images, config.patch_size), stem["proj"])
    size = x.shape[1:3]
    x = x.reshape(x.shape[0], -1, config.embed_dim)
    rotary = bias = None
    if config.positions == "rotary":
      angles = positions.rotary_angles(table, size)
      rotary = jnp.cos(angles), jnp.sin(angles)
    elif config.positions == "relative":
      bias = tokens.relative_bias(table, size, config)
    else:
      resized = positions.resize_table(table, config.position_grid, size, config.position_resize)
      x = x + resized.astype(x.dtype)
    if stem["prefix"] is not None:
      x = tokens.with_prefix(x, stem["prefix"])
    if stem["pre_norm"] is not None:
      x = stored.norm(x, stem["pre_norm"], config.norm_epsilon)
    # Every block writes into the place of the next tap, which the tapped block writes last.
    places = jnp.asarray([sum(tap < block for tap in config.tapped_blocks) for block in range(config.depth)])
    taps = jnp.zeros((len(config.tapped_blocks), *x.shape), x.dtype)

    def tapping(state, leaves, _):
      x, taps, number = state
      x = self._block(x, leaves, rotary, bias)
      return x, jax.lax.dynamic_update_index_in_dim(taps, x, places[number], 0), number + 1

    def plain(x, leaves, _):
      return self._block(x, leaves, rotary, bias)

    before, after = stored.arrays(self.stages)
    x, taps, _ = stored.run_blocks((x, taps, jnp.int32(0)), before, tapping, remat=self.remat)
    if len(stages) > 1:
      x = stored.run_blocks(x, after, plain, remat=self.remat)
    return x, list(taps), size

  def _block(
    self,
    x: Float[Array, "b n c"],
    block: Tree,
    rotary: tuple[Array, Array] | None,
    bias: Float[Array, "heads n n"] | None,
  ) -> Float[Array, "b n c"]:
    config = self.config
    qkv = stored.linear(stored.norm(x, block["norm1"], config.norm_epsilon), block["qkv"])
    query, key, value = (tokens.split_heads(part, config.num_heads) for part in jnp.split(qkv, 3, axis=-1))
    if rotary is not None:
      query, key = positions.rotate(query, *rotary), positions.rotate(key, *rotary)
    y = x + stored.linear(attention(query, key, value, scale=1.0, bias=bias).reshape(x.shape), block["proj"])
    y = y + self._mlp(stored.norm(y, block["norm2"], config.norm_epsilon), block["mlp"])
    return adapters.adapted(x, y, block)

  def block_shape(self, stage: int, index: int) -> base.BlockShape:
    """Stage 0 leads to the last tapped block, stage 1 on to `embed`."""
    del stage, index
    return base.BlockShape(self.config.embed_dim, self.config.embed_dim)

  def _mlp(self, x: Float[Array, "... c"], mlp: Tree) -> Float[Array, "... c"]:
    if "gate" in mlp:
      return stored.linear(gated(stored.linear(x, mlp["gate"]), stored.linear(x, mlp["up"])), mlp["down"])
    return stored.linear(ACTIVATIONS[self.config.activation](stored.linear(x, mlp["fc1"])), mlp["fc2"])


def fold(
  backbone: base.Backbone,
  *,
  storage: str | None = None,
  dtype: Any = None,
  scan: bool = True,
  read: Callable[[str, nnx.Module], nnx.Module] | None = None,
  shardings: FoldedViT | None = None,
) -> FoldedViT:
  """Arguments and errors are those of `Backbone.fold`; `backbone` is a `model.ViT`.

  Args:
    read: is called with the path of each child of the backbone that holds weights (`patch_embed`, `norm`,
      `blocks/3`, ...), and with an empty path for tokens and positions, which lie in the backbone itself.
  """
  kind = stored.choose(storage, dtype, backbone.dtype)
  config, read = backbone.config, stored.reader(read)
  leaf_shardings = stored.values(shardings)

  def put(name, tree):
    return stored.put(tree, leaf_shardings and getattr(leaf_shardings, name))

  def part(name):
    module = getattr(backbone, name)
    return None if module is None else read(name, module)

  own = read("", _Tables(backbone))
  embedding, pre_norm, pool = part("patch_embed"), part("pre_norm"), part("attention_pool")
  stem = dict(
    proj=kind.module(embedding.proj),
    prefix=_prefix(own),
    pre_norm=None if pre_norm is None else stored.norm_leaves(pre_norm),
  )
  if own.periods is not None:
    table = own.periods[...]
  elif own.relative_positions is not None:
    table = own.relative_positions[...]
  else:
    table = own.positions[...][int(config.class_token) :]

  def blocks(index, start, count):
    def fold_block(number):
      module = read(f"blocks/{start + number}", backbone.blocks[start + number])
      return _block(module, config.positions == "rotary", kind)

    return stored.fold_blocks(
      count, fold_block, scan=scan, shardings=leaf_shardings and leaf_shardings.stages[index]
    )

  last = config.tapped_blocks[-1] + 1
  stages = (blocks(0, 0, last), blocks(1, last, config.depth - last))
  return FoldedViT(
    stem=stored.variables(put("stem", stem)),
    positions=stored.variables(put("positions", jnp.asarray(table, jnp.float32))),
    stages=stored.variables(stages),
    norm=stored.variables(put("norm", stored.norm_leaves(part("norm")))),
    pool=None if pool is None else stored.variables(put("pool", _pool(pool, kind))),
    **base.static_fields(backbone, dtype=kind.dtype, storage=kind.kind),
  )


def stacked(backbone: base.Backbone, *, remat: bool) -> FoldedViT:
  """See `Backbone.stacked`.

  LayerScale is in the weights and stochastic depth is left out: neither changes memory or FLOPs by anything
  that shows.
  """
  folded = fold(backbone, storage="float32")
  trees = ("stem", "positions", "stages", "norm", "pool")
  trained = {name: stored.parameters(getattr(folded, name)) for name in trees}
  return dataclasses.replace(folded, remat=remat, **trained)


class _Tables(nnx.Module):
  """The variables of a ViT that lie in no child module, so that they can be read apart from the rest."""

  def __init__(self, backbone: base.Backbone):
    for name in ("cls_token", "registers", "positions", "periods", "relative_positions"):
      setattr(self, name, nnx.data(getattr(backbone, name)))


def _prefix(own: nnx.Module) -> Float[Array, "p c"] | None:
  """Class token, with its position, and registers; float32."""
  parts = []
  if own.cls_token is not None:
    token = jnp.asarray(own.cls_token[...], jnp.float32)
    parts.append((token if own.positions is None else token + own.positions[...][0])[None])
  if own.registers is not None:
    parts.append(jnp.asarray(own.registers[...], jnp.float32))
  return jnp.concatenate(parts) if parts else None


def _block(block: nnx.Module, rotary: bool, kind: Storage) -> dict[str, Tree]:
  attn = block.attn
  return dict(
    norm1=stored.norm_leaves(block.norm1),
    qkv=kind.layer(*_qkv(attn, rotary)),
    proj=_scaled(attn.proj, block.scale1, kind),
    norm2=stored.norm_leaves(block.norm2),
    mlp=_mlp(block.mlp, block.scale2, kind),
  )


def _qkv(attn: nnx.Module, rotary: bool) -> tuple[Array, Array | None]:
  """Kernel and bias, with the scale of the scores in the queries'; only turned keys need a bias."""
  kernel = attn.qkv.kernel[...]
  channels = kernel.shape[0]
  scale = (channels // attn.num_heads) ** -0.5
  factors = jnp.concatenate([jnp.full(channels, scale), jnp.ones(2 * channels)]).astype(jnp.float32)
  biases = [attn.q_bias, attn.k_bias if rotary else None, attn.v_bias]
  if all(bias is None for bias in biases):
    return kernel * factors, None
  parts = [jnp.zeros(channels) if bias is None else bias[...] for bias in biases]
  return kernel * factors, jnp.concatenate(parts) * factors


def _scaled(module: nnx.Linear, scale: nnx.Module | None, kind: Storage) -> dict[str, Tree]:
  """A linear layer with the LayerScale behind it."""
  if scale is None:
    return kind.module(module)
  factors = scale.scale[...]
  return kind.layer(module.kernel[...] * factors, module.bias[...] * factors)


def _mlp(mlp: nnx.Module, scale: nnx.Module | None, kind: Storage) -> dict[str, Tree]:
  if hasattr(mlp, "gate"):
    return dict(gate=kind.module(mlp.gate), up=kind.module(mlp.up), down=_scaled(mlp.down, scale, kind))
  return dict(fc1=kind.module(mlp.fc1), fc2=_scaled(mlp.fc2, scale, kind))


def _pool(pool: nnx.Module, kind: Storage) -> dict[str, Tree]:
  """Attention pooling; its one query is the same for all images, so it is computed here."""
  query = pool.probe[...] @ pool.query.kernel[...] + pool.query.bias[...]
  return dict(
    query=jnp.asarray(query, jnp.float32) * (query.shape[0] // pool.num_heads) ** -0.5,
    key_value=kind.module(pool.key_value),
    proj=kind.module(pool.proj),
    norm=stored.norm_leaves(pool.norm),
    mlp=_mlp(pool.mlp, None, kind),
  )
