"""A frozen SwinV2 as an inference program: done once at load is what a trained one repeats at every call.

The module with one entry per block stays the canonical one: paths, policies, adapters and checkpoints speak
of it. A folded backbone is made from it, is never saved, and gives the same features.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.backbones.swinv2 import model as swinv2
from frozen_vision.backbones.swinv2 import windows
from frozen_vision.devices import sharding

Tree = Any
HELD_AS = ("float32", "bfloat16", "int8")
# Of what a block does at once on CPU: cells at least, and cells times channels. Measured with float32.
_STRIP_CELLS = 512
_STRIP_NUMBERS = 192 * 1024


class Folded(nnx.Variable):
  """A leaf of a folded backbone. It is no `nnx.Param`: whatever a policy says, it never trains."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FoldedSwinV2:
  """What `fold` makes: a pytree that is called like the backbone; it may be an argument of jit.

  In the place of the backbone in a module (`module.backbone = nnx.data(folded)`), its leaves are part of the
  module's state.

  Attributes:
    stem, norm: patch embedding, and the final norm that `embed` uses.
    stages: per stage `repeated` (a period of blocks whose leaves have a leading axis, for a scan; or None),
      `blocks` (those that follow, one by one) and `downsample`.
    config, dtype, feature_specs: of the backbone; `dtype` is that of the matrix products.
    held_as: how matrices are kept, one of `HELD_AS`; int8 has a scale per output channel.
  """

  stem: Tree
  stages: tuple[Tree, ...]
  norm: Tree
  config: swinv2.SwinV2Config = dataclasses.field(metadata=dict(static=True))
  dtype: Any = dataclasses.field(metadata=dict(static=True))
  feature_specs: tuple[FeatureSpec, ...] = dataclasses.field(metadata=dict(static=True))
  held_as: str = dataclasses.field(metadata=dict(static=True))

  def __call__(self, images: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b hs ws cs"], ...]:
    """Features of every stage; see `swinv2.SwinV2.__call__`."""
    if self.config.whole_windows:
      swinv2.check_patches(images.shape[1:3])
    stem, stages = _arrays((self.stem, self.stages))
    stem = sharding.gathered(stem)
    x = _norm(_linear(swinv2.patches(images.astype(self.dtype)), stem["proj"]), stem["norm"])
    features = []
    for index, stage in enumerate(stages):
      if stage["repeated"] is not None:

        def period(x, blocks, index=index):
          for position, block in enumerate(blocks):
            x = self._block(x, block, index, shifted=position % 2 == 1)
          return x, None

        x, _ = jax.lax.scan(period, x, stage["repeated"])
      # A period has an even number of blocks, so the parity of what follows is its own.
      for position, block in enumerate(stage["blocks"]):
        x = self._block(x, block, index, shifted=position % 2 == 1)
      features.append(x)
      if stage["downsample"] is not None:
        down = sharding.gathered(stage["downsample"])
        x = _norm(_linear(swinv2.join_neighbours(x), down["reduction"]), down["norm"])
    return tuple(features)

  def embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b c"]:
    """The final norm's output, averaged over positions."""
    return jnp.mean(_norm(self(images)[-1], _arrays(self.norm)), axis=(1, 2))

  def _block(self, x: Float[Array, "b h w c"], block: Tree, stage: int, *, shifted: bool):
    block = sharding.gathered(block)
    size = self.config.window_sizes[stage]
    if self.config.whole_windows:
      swinv2.check_map(x.shape[1:3], size)
    bias = self._bias(block, tuple(min(size, length) for length in x.shape[1:3]), stage)

    def attention(x, window, regions):
      x = windows.cosine_attention(_linear(x, block["qkv"]), window, block["scale"], bias, regions)
      return _linear(x, block["proj"])

    def after(x, update):
      x = x + _norm(update, block["norm1"])
      hidden = _gelu(_linear(x, block["fc1"]))
      x = x + _norm(_linear(hidden, block["fc2"]), block["norm2"])
      return x if block["extra_norm"] is None else _norm(x, block["extra_norm"])

    def at_once(x):
      heads = self.config.num_heads[stage]
      return after(x, windows.attend_in_windows(x, size, shifted, attention, heads))

    def in_strips(x):
      def part(x, window, regions):
        return after(x, attention(x, window, regions))

      return windows.map_in_strips(x, size, shifted, part, max(_STRIP_CELLS, _STRIP_NUMBERS // x.shape[-1]))

    # XLA on CPU writes and reads whole layers; strips stay in the cache, and their memory is used again.
    # Of a sharded batch, a strip would be on one device.
    if sharding.num_devices() == 1 and windows.whole_windows(x.shape[1:3], size):
      return jax.lax.platform_dependent(x, cpu=in_strips, default=at_once)
    return at_once(x)

  def _bias(self, block: Tree, window: tuple[int, int], stage: int) -> Float[Array, "heads _ _"]:
    """`windows.pair_bias` of the table, or of its middle where a map is smaller.

    Without a pretrained window, positions in a smaller map are relative to the map: its table is computed.
    """
    side = self.config.window_sizes[stage]
    if window == (side, side) or block["position_bias"] is None:
      table = block["table"].reshape(2 * side, 2 * side, -1)
      rows, columns = (slice(side - length, side + length - 1) for length in window)
      table = table[rows, columns].reshape(-1, table.shape[-1])
    else:
      table = swinv2.position_table(**block["position_bias"], window=window, pretrained=0)
    return windows.pair_bias(table, window)


def fold(
  backbone: swinv2.SwinV2,
  *,
  dtype: Any = None,
  held_as: str | None = None,
  scan: bool = True,
  read: Callable[[str, nnx.Module], nnx.Module] | None = None,
  shardings: FoldedSwinV2 | None = None,
) -> FoldedSwinV2:
  """Computes once what does not change: tables of position bias, logit scales, biases; casts; stacks blocks.

  Args:
    backbone: the canonical module, float32 weights.
    dtype: of the inputs of matrix products; the backbone's by default. Norms, tables, softmax and cosine
      similarity stay float32.
    held_as: one of `HELD_AS`, how matrices are kept; as `dtype` by default. int8 has a float32 scale per
      output channel. Vectors and tables are small: they stay float32, or are `dtype` where a product takes
      them in.
    scan: stack runs of equal periods (a plain and a shifted block; six where every sixth has an extra norm),
      so that they compile as one.
    read: (path, part of `backbone`) -> that part with its weights, where `backbone` has only shapes
      (`build.BackboneFile.read`). One block is read, folded and put in its place before the next.
    shardings: of every leaf of the result. Only a block is ever whole, on the host.

  Raises:
    ValueError: an unknown `held_as`.
  """
  config = backbone.config
  read = read or (lambda path, module: module)
  dtype = jnp.dtype(backbone.dtype if dtype is None else dtype)
  held_as = held_as or dtype.name
  if held_as not in HELD_AS:
    raise ValueError(f"Frozen weights are held as {held_as!r}; known: {', '.join(HELD_AS)}.")

  def matrix(kernel):
    if held_as == "int8":
      return _quantize(kernel)
    kernel = kernel.astype(held_as)
    # XLA on CPU makes a float32 copy of a whole stack of bfloat16 matrices before the scan, but not of bits.
    bits = held_as == "bfloat16" and jax.default_backend() == "cpu"
    return jax.lax.bitcast_convert_type(kernel, jnp.uint16) if bits else kernel

  def linear(module, bias=None):
    bias = module.bias[...] if bias is None and module.bias is not None else bias
    return dict(kernel=matrix(module.kernel[...]), bias=None if bias is None else bias.astype(dtype))

  def feed_forward(module):
    # With y = x sqrt(1/2), gelu(x) = sqrt(1/2) (y + y erf(y)): its constants go into the weights.
    root = math.sqrt(0.5)
    fc1, fc2 = module.fc1, module.fc2
    return dict(
      fc1=dict(kernel=matrix(root * fc1.kernel[...]), bias=(root * fc1.bias[...]).astype(dtype)),
      fc2=dict(kernel=matrix(root * fc2.kernel[...]), bias=fc2.bias[...].astype(dtype)),
    )

  def padded(table, side):
    # One more row and column than distances: an odd number of rows cannot be spread over devices.
    table = table.reshape(2 * side - 1, 2 * side - 1, -1)
    return jnp.pad(table, ((0, 1), (0, 1), (0, 0))).reshape(4 * side * side, -1)

  def block(module, stage):
    attn = module.attn
    v_bias = attn.v_bias[...]
    side, pretrained = config.window_sizes[stage], config.pretrained_window_sizes[stage]
    mlp = attn.position_bias
    return dict(
      table=padded(mlp.table((side, side), pretrained), side),
      position_bias=None if pretrained else mlp.weights(),
      scale=jnp.exp(jnp.minimum(attn.logit_scale[...].astype(jnp.float32), swinv2.MAX_LOGIT_SCALE)),
      qkv=linear(attn.qkv, jnp.concatenate([attn.q_bias[...], jnp.zeros_like(v_bias), v_bias])),
      proj=linear(attn.proj),
      **feed_forward(module.mlp),
      norm1=_norm_leaves(module.norm1),
      norm2=_norm_leaves(module.norm2),
      extra_norm=None if module.extra_norm is None else _norm_leaves(module.extra_norm),
    )

  place = sharding.put if shardings is not None else lambda tree, where: tree
  where_all = jax.tree.map(lambda leaf: leaf.get_value(), shardings, is_leaf=_is_variable)
  period = math.lcm(2, config.extra_norm_interval or 1)
  stages = []
  for index, stage in enumerate(backbone.stages):
    where = where_all and where_all.stages[index]
    repeats = len(stage.blocks) // period if scan else 0
    stacked = repeats * period if repeats > 1 else 0
    repeated, blocks = [None] * period, []
    for number, module in enumerate(stage.blocks):
      folded = block(read(f"stages/{index}/blocks/{number}", module), index)
      if number >= stacked:
        blocks.append(place(folded, where and where["blocks"][number - stacked]))
        continue
      row, position = divmod(number, period)
      stack_where = where and where["repeated"][position]
      if row == 0:
        repeated[position] = _zeros(folded, repeats, stack_where)
      repeated[position] = _set_row(
        repeated[position], row, place(folded, jax.tree.map(sharding.of_row, stack_where))
      )
    down = stage.downsample
    if down is not None:
      down = read(f"stages/{index}/downsample", down)
      down = place(
        dict(reduction=linear(down.reduction), norm=_norm_leaves(down.norm)), where and where["downsample"]
      )
    stages.append(dict(repeated=tuple(repeated) if stacked else None, blocks=tuple(blocks), downsample=down))
  stem, norm = read("patch_embed", backbone.patch_embed), read("norm", backbone.norm)
  folded = FoldedSwinV2(
    stem=place(dict(proj=linear(stem.proj), norm=_norm_leaves(stem.norm)), where_all and where_all.stem),
    stages=tuple(stages),
    norm=place(_norm_leaves(norm), where_all and where_all.norm),
    config=config,
    dtype=dtype,
    feature_specs=backbone.feature_specs,
    held_as=held_as,
  )
  return jax.tree.map(Folded, folded)


def shapes(backbone: swinv2.SwinV2, **options: Any) -> FoldedSwinV2:
  """What `fold` would make, as shapes; of a backbone that has only shapes too."""
  graphdef, state = nnx.split(backbone)
  return jax.eval_shape(lambda state: fold(nnx.merge(graphdef, state), **options), state)


def describe_held(held_as: str, *, folded: bool) -> str:
  """How frozen weights are held, as a feature key has it (`build.feature_key`): heads fit no other features.

  Rounded, norms and position biases of a module are others than those that folding keeps in float32.
  """
  return held_as if folded or held_as == "float32" else f"{held_as}, unfolded"


def _is_variable(leaf: Any) -> bool:
  return isinstance(leaf, nnx.Variable)


def _zeros(block: Tree, repeats: int, where: Tree) -> Tree:
  """An empty stack of so many blocks, made where it stays."""
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((repeats, *leaf.shape), leaf.dtype), block)

  def make():
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  return make() if where is None else jax.jit(make, out_shardings=where)()


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(stack: Tree, row: Array, leaves: Tree) -> Tree:
  """Puts one block into its stack, in place, as the stack is spread."""
  return jax.tree.map(lambda stack, leaf: stack.at[row].set(leaf), stack, leaves)


def _arrays(tree: Tree) -> Tree:
  return jax.tree.map(lambda leaf: leaf[...], tree, is_leaf=_is_variable)


def _norm_leaves(module: swinv2.LayerNorm) -> dict[str, Array]:
  return dict(scale=module.scale[...].astype(jnp.float32), bias=module.bias[...].astype(jnp.float32))


def _quantize(kernel: Float[Array, "i o"]) -> dict[str, Array]:
  """8-bit integers -127..127 and a float32 scale per output channel."""
  kernel = kernel.astype(jnp.float32)
  scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=0), 1e-12) / 127
  return dict(values=jnp.round(kernel / scale).astype(jnp.int8), scale=scale)


def _linear(x: Float[Array, "... i"], weights: Tree) -> Float[Array, "... o"]:
  kernel, bias = weights["kernel"], weights["bias"]
  if isinstance(kernel, dict):
    y = jnp.matmul(x, kernel["values"].astype(x.dtype), preferred_element_type=jnp.float32)
    x = (y * kernel["scale"]).astype(x.dtype)
  else:
    if kernel.dtype == jnp.uint16:
      kernel = jax.lax.bitcast_convert_type(kernel, jnp.bfloat16)
    x = x @ kernel.astype(x.dtype)
  return x if bias is None else x + bias


def _gelu(y: Float[Array, "..."]) -> Float[Array, "..."]:
  """Of what folded weights make, see `fold`; in float32."""
  z = y.astype(jnp.float32)
  return (z + z * jax.lax.erf(z)).astype(y.dtype)


def _norm(x: Float[Array, "... c"], weights: Tree) -> Float[Array, "... c"]:
  """LayerNorm in float32, returned in the input's dtype."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + swinv2.NORM_EPSILON)
  return (y * weights["scale"] + weights["bias"]).astype(x.dtype)
