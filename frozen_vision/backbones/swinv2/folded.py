"""A frozen SwinV2 as an inference program: done once at load is what a trained one repeats at every call.

The module with one entry per block stays the canonical one: paths, policies, adapters and checkpoints speak
of it. A folded backbone is made from it, is never saved, and gives the same features.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.backbones import base
from frozen_vision.backbones.swinv2 import config as swinv2
from frozen_vision.backbones.swinv2 import windows
from frozen_vision.devices import sharding
from frozen_vision.layers import adapters
from frozen_vision.layers import storage as stored
from frozen_vision.layers.patches import join_neighbours, patches
from frozen_vision.ops.arrays import Array

Tree = Any
# Size of a strip on CPU: its least cells, and its cells times channels. Measured with float32.
_STRIP_CELLS = 512
_STRIP_NUMBERS = 192 * 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FoldedSwinV2(base.FoldedBackbone):
  """The inference program that `fold` makes.

  Attributes:
    stem, norm: patch embedding, and the final norm that `embed` uses.
    stages: per stage `repeated` and `blocks` (`layers.storage.fold_blocks`), and `downsample`.
  """

  stem: Tree
  stages: tuple[Tree, ...]
  norm: Tree

  def __call__(
    self, images: Float[Array, "b h w 3"], *, rng: Array | None = None
  ) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Features of every stage; see `model.SwinV2.__call__`."""
    del rng
    if self.config.whole_windows:
      swinv2.check_patches(images.shape[1:3])
    stem, stages = stored.arrays((self.stem, self.stages))
    stem = sharding.gathered(stem)
    x = stored.linear(patches(images.astype(self.dtype), swinv2.PATCH_SIZE), stem["proj"])
    x = stored.norm(x, stem["norm"])
    features = []
    for index, stage in enumerate(stages):
      # A period has an even number of blocks, so the parity of what follows is its own.
      def block(x, leaves, position, index=index):
        return adapters.adapted(x, self._block(x, leaves, index, position % 2 == 1), leaves)

      x = stored.run_blocks(x, stage, block, remat=self.remat)
      features.append(x)
      if stage["downsample"] is not None:
        down = sharding.gathered(stage["downsample"])
        x = stored.norm(stored.linear(join_neighbours(x), down["reduction"]), down["norm"])
    return tuple(features)

  def embed(self, images: Float[Array, "b h w 3"], *, rng: Array | None = None) -> Float[Array, "b c"]:
    """The final norm's output, averaged over positions."""
    del rng
    return jnp.mean(self.final_features(images).map, axis=(1, 2))

  def final_features(self, images: Float[Array, "b h w 3"]) -> base.FinalFeatures:
    """The last stage's map after the final norm."""
    return base.FinalFeatures(stored.norm(self(images)[-1], stored.arrays(self.norm)))

  def _block(self, x: Float[Array, "b h w c"], block: Tree, stage: int, shifted: bool):
    size = self.config.window_sizes[stage]
    if self.config.whole_windows:
      swinv2.check_map(x.shape[1:3], size)
    window = tuple(min(size, length) for length in x.shape[1:3])
    table, scale = self._table(block, window, stage), block["scale"]

    def after(x, update):
      x = x + stored.norm(update, block["norm1"])
      hidden = _gelu(stored.linear(x, block["fc1"]))
      x = x + stored.norm(stored.linear(hidden, block["fc2"]), block["norm2"])
      return x if block["extra_norm"] is None else stored.norm(x, block["extra_norm"])

    if self.config.attention == "pallas":
      table = windows.table_by_head(table, window)

      def on_chip(x, window, shift):
        qkv = stored.linear(x, block["qkv"])
        return stored.linear(windows.attention_on_chip(qkv, window, scale, table, shift), block["proj"])

      return after(x, windows.attend_on_chip(x, size, shifted, on_chip))

    bias = windows.pair_bias(table, window)

    def attention(x, window, regions):
      qkv = stored.linear(x, block["qkv"])
      return stored.linear(windows.cosine_attention(qkv, window, scale, bias, regions), block["proj"])

    def at_once(x):
      heads = self.config.num_heads[stage]
      return after(x, windows.attend_in_windows(x, size, shifted, attention, heads))

    def in_strips(x):
      def part(x, window, regions):
        return after(x, attention(x, window, regions))

      return windows.map_in_strips(x, size, shifted, part, max(_STRIP_CELLS, _STRIP_NUMBERS // x.shape[-1]))

    # XLA on CPU writes and reads whole layers; strips stay in the cache, and their memory is used again.
    # A strip of a sharded batch would be on one device.
    if sharding.num_devices() == 1 and windows.whole_windows(x.shape[1:3], size):
      return jax.lax.platform_dependent(x, cpu=in_strips, default=at_once)
    return at_once(x)

  def block_shape(self, stage: int, index: int) -> base.BlockShape:
    del index
    return base.BlockShape(self.config.stage_channels(stage), self.config.stage_channels(stage))

  def _table(self, block: Tree, window: tuple[int, int], stage: int) -> Float[Array, "offsets heads"]:
    """The bias of every relative position: the table, or its middle where a map is smaller.

    Without a pretrained window, positions in a smaller map are relative to the map: its table is computed.
    """
    side = self.config.window_sizes[stage]
    if window == (side, side) or block["position_bias"] is None:
      table = block["table"].reshape(2 * side, 2 * side, -1)
      rows, columns = (slice(side - length, side + length - 1) for length in window)
      return table[rows, columns].reshape(-1, table.shape[-1])
    return windows.position_table(**block["position_bias"], window=window, pretrained=0)


def fold(
  backbone: base.Backbone,
  *,
  dtype: Any = None,
  storage: str | None = None,
  scan: bool = True,
  read: Callable[[str, nnx.Module], nnx.Module] | None = None,
  shardings: FoldedSwinV2 | None = None,
) -> FoldedSwinV2:
  """Computes once what does not change: tables of position bias, logit scales, biases; casts; stacks blocks.

  Arguments and errors are those of `Backbone.fold`, and `backbone` is a `model.SwinV2`. What is stacked are
  equal periods: a plain and a shifted block, or six blocks where every sixth has an extra norm.
  """
  config, store, read = backbone.config, stored.choose(storage, dtype, backbone.dtype), stored.reader(read)
  leaf_shardings = stored.values(shardings)
  period = math.lcm(2, config.extra_norm_interval or 1)
  stages = []
  for index, stage in enumerate(backbone.stages):
    sharded = leaf_shardings and leaf_shardings.stages[index]

    def fold_block(number, index=index, stage=stage):
      module = read(f"stages/{index}/blocks/{number}", stage.blocks[number])
      return _fold_block(module, config, index, store)

    folded = stored.fold_blocks(len(stage.blocks), fold_block, period=period, scan=scan, shardings=sharded)
    down = stage.downsample
    if down is not None:
      down = read(f"stages/{index}/downsample", down)
      down = dict(reduction=store.module(down.reduction), norm=stored.norm_leaves(down.norm))
      down = stored.put(down, sharded and sharded["downsample"])
    stages.append(dict(**folded, downsample=down))
  stem, norm = read("patch_embed", backbone.patch_embed), read("norm", backbone.norm)
  stem = dict(proj=store.module(stem.proj), norm=stored.norm_leaves(stem.norm))
  folded = FoldedSwinV2(
    stem=stored.put(stem, leaf_shardings and leaf_shardings.stem),
    stages=tuple(stages),
    norm=stored.put(stored.norm_leaves(norm), leaf_shardings and leaf_shardings.norm),
    **base.static_fields(backbone, dtype=store.dtype, storage=store.kind),
  )
  return stored.variables(folded)


def stacked(backbone: base.Backbone, *, remat: bool) -> FoldedSwinV2:
  """See `Backbone.stacked`.

  Position biases stand as tables, and stochastic depth is left out: neither changes memory or FLOPs by
  anything that shows.
  """
  return stored.parameters(dataclasses.replace(fold(backbone, storage="float32"), remat=remat))


def _fold_block(module: nnx.Module, config: swinv2.SwinV2Config, stage: int, store: stored.Storage) -> Tree:
  """The leaves of one block."""
  attn = module.attn
  v_bias = attn.v_bias[...]
  side, pretrained = config.window_sizes[stage], config.pretrained_window_sizes[stage]
  mlp = attn.position_bias
  return dict(
    table=_padded(mlp.table((side, side), pretrained), side),
    position_bias=None if pretrained else mlp.weights(),
    scale=jnp.exp(jnp.minimum(attn.logit_scale[...].astype(jnp.float32), windows.MAX_LOGIT_SCALE)),
    qkv=store.layer(
      attn.qkv.kernel[...], jnp.concatenate([attn.q_bias[...], jnp.zeros_like(v_bias), v_bias])
    ),
    proj=store.module(attn.proj),
    **_feed_forward(module.mlp, store),
    norm1=stored.norm_leaves(module.norm1),
    norm2=stored.norm_leaves(module.norm2),
    extra_norm=None if module.extra_norm is None else stored.norm_leaves(module.extra_norm),
  )


def _feed_forward(module: nnx.Module, store: stored.Storage) -> Tree:
  """Both layers: with y = x sqrt(1/2), gelu(x) = sqrt(1/2) (y + y erf(y)); weights take the constants."""
  root = math.sqrt(0.5)
  fc1, fc2 = module.fc1, module.fc2
  return dict(
    fc1=store.layer(root * fc1.kernel[...], root * fc1.bias[...]),
    fc2=store.layer(root * fc2.kernel[...], fc2.bias[...]),
  )


def _gelu(y: Float[Array, "..."]) -> Float[Array, "..."]:
  """GELU between the layers that `_feed_forward` makes; in float32."""
  z = y.astype(jnp.float32)
  return (z + z * jax.lax.erf(z)).astype(y.dtype)


def _padded(table: Float[Array, "offsets heads"], side: int) -> Float[Array, "padded heads"]:
  """One more row and column than distances: an odd number of rows cannot be split over devices."""
  table = table.reshape(2 * side - 1, 2 * side - 1, -1)
  return jnp.pad(table, ((0, 1), (0, 1), (0, 0))).reshape(4 * side * side, -1)
