"""Frames of clips through an image backbone, a few at a time."""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float, UInt8

from frozen_vision.devices import sharding
from frozen_vision.ops.arrays import Array


class _Layout(NamedTuple):
  """How frames are divided: every pass takes `size` frames of each device, so that no frame moves.

  Attributes:
    devices: that frames are divided over.
    count: frames of each device.
    passes: how often the backbone runs.
    size: frames of a pass on each device; the last pass is filled up.
  """

  devices: int
  count: int
  passes: int
  size: int


def frame_features(
  backbone: Any,
  frames: UInt8[Array, "n h w 3"],
  levels: tuple[int, ...],
  *,
  frames_per_pass: int,
  rng: jax.Array | None = None,
) -> tuple[Float[jax.Array, "n _h _w _c"], ...]:
  """Features of some levels of every frame.

  Memory is that of one pass, and of the maps that are kept. Where a gradient crosses the backbone, each pass
  is computed again on the way back.

  Args:
    frames: RGB.
    frames_per_pass: most frames of a pass on each device; passes are of equal size.
    rng: key of stochastic depth while the backbone trains.

  Raises:
    ValueError: several passes of a backbone whose BatchNorm trains: statistics are of one batch.
  """
  layout = _layout(frames.shape[0], frames_per_pass)

  def run(indexed: tuple[Array, Array]) -> tuple[jax.Array, ...]:
    index, part = indexed
    key = None if rng is None else jax.random.fold_in(rng, index)
    features = backbone(backbone.preprocessing.normalise(part), rng=key)
    return tuple(features[level] for level in levels)

  if layout.passes == 1:
    return run((jnp.zeros((), jnp.int32), frames))
  if rng is not None and _updates_statistics(backbone):
    raise ValueError(
      f"config.action.frames_per_pass is {frames_per_pass}, and {layout.count} frames of each device go "
      "through a backbone whose BatchNorm trains, which takes all of them in one pass. Set "
      f"--config.action.frames_per_pass={layout.count} or more, or train the head alone."
    )
  run = run if rng is None else jax.checkpoint(run)
  maps = jax.lax.map(run, (jnp.arange(layout.passes), _split(frames, layout)))
  return tuple(_join(x, layout) for x in maps)


def _updates_statistics(backbone: Any) -> bool:
  """Whether a forward pass in training changes running statistics of some BatchNorm."""
  return isinstance(backbone, nnx.Module) and any(
    isinstance(module, nnx.BatchNorm) and not module.use_running_average
    for _, module in nnx.iter_modules(backbone)
  )


def _layout(num_frames: int, frames_per_pass: int) -> _Layout:
  devices = sharding.num_devices()
  devices = 1 if num_frames % devices else devices
  count = num_frames // devices
  passes = -(-count // frames_per_pass)
  return _Layout(devices, count, passes, size=-(-count // passes))


def _split(frames: Array, layout: _Layout) -> Array:
  """[n, ...] -> [passes, devices * size, ...], zeros where the last pass is filled up."""
  x = frames.reshape(layout.devices, layout.count, *frames.shape[1:])
  missing = layout.passes * layout.size - layout.count
  x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))
  x = jnp.moveaxis(x.reshape(layout.devices, layout.passes, layout.size, *frames.shape[1:]), 1, 0)
  return x.reshape(layout.passes, -1, *frames.shape[1:])


def _join(maps: Array, layout: _Layout) -> Array:
  """[passes, devices * size, ...] -> [n, ...]; the opposite of `_split`."""
  x = jnp.moveaxis(maps.reshape(layout.passes, layout.devices, layout.size, *maps.shape[2:]), 0, 1)
  x = x.reshape(layout.devices, layout.passes * layout.size, *maps.shape[2:])[:, : layout.count]
  return x.reshape(-1, *maps.shape[2:])
