"""Placement of arrays: a mesh of devices, sharding rules for frozen weights, batches split over all devices.

Every device works on its own examples. Frozen weights are sharded over the devices and gathered one block at
a time while they are used (`gathered`), heads and their optimizer state are small and replicated (that of a
large head can be sharded), and sums over the batch are sums over all devices, because the compiled program is
that of the global batch.

  mesh axis   what it is
  data        groups of devices that each hold all frozen weights, where `over="model"`
  model       the devices of a group, over which frozen weights are sharded; `over="all"` shards them over
              both axes
"""

from collections.abc import Callable, Mapping, Sequence
import math
import re
from typing import Any, Literal

from flax import nnx
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ("data", "model")
Over = Literal["all", "model"]
Optimizer = Literal["replicated", "sharded"]
Meshes = Mesh | AbstractMesh  # of devices, or of their number alone

# For each pattern of a leaf's path within its network: the axes along which the leaf may be sharded, the
# preferred one first, counted from the end. Of stacked blocks (below `repeated`) the scan's axis in front is
# never sharded, since XLA would gather the whole stack before the loop.
Rules = tuple[tuple[str, tuple[int, ...]], ...]
_LARGE_BYTES = 2**20
# The smallest leaves are replicated while they are together below this fraction of a device's part: gathering
# them costs time and saves nothing.
_REPLICATED_PART = 0.02


def make_mesh(data: int = -1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of the axes `data` and `model` over all devices of all processes.

  Args:
    data: groups; -1 for as many as there are devices.
    model: devices in a group.
    devices: those to use, in the order of processes; all by default.

  Raises:
    ValueError: sizes that do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  if model < 1 or (data != -1 and data < 1):
    raise ValueError(f"config.mesh is data={data}, model={model}; expected positive numbers, or data=-1.")
  if data == -1:
    data = max(len(devices) // model, 1)
  if data * model != len(devices):
    raise ValueError(
      f"config.mesh is data={data}, model={model}: {data * model} devices, but there are {len(devices)}. "
      "Give sizes whose product that is; data=-1 takes what is left."
    )
  return Mesh(np.array(devices).reshape(data, model), AXES, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Meshes) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Meshes) -> NamedSharding:
  """The first axis of every array of a batch, split over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def check_batch(size: int, mesh: Meshes, option: str, parts: int = 1) -> None:
  """Raises a ValueError unless a batch can be split into `parts` micro-batches and over all devices."""
  pieces = mesh.size * parts
  if size % pieces or not size:
    raise ValueError(
      f"config.{option} is {size}; expected a multiple of {pieces} ({mesh.size} devices, config.accumulate "
      f"{parts}), such as {max(round(size / pieces), 1) * pieces}."
    )


def frozen_shardings(
  state: nnx.State, mesh: Meshes, over: Over = "all", rules: Mapping[str, Rules] | None = None
) -> nnx.State:
  """How frozen leaves are sharded: for each a NamedSharding, in a tree like `state`.

  Args:
    state: arrays or their shapes, by canonical or folded paths.
    over: the devices of a group, or all.
    rules: {first part of the paths of a network, such as "backbone": how its leaves are sharded}. All other
      leaves, those of heads, are replicated.

  Raises:
    ValueError: a large leaf of a network without a rule, or an unknown `over`.
  """
  if over not in ("all", "model"):
    raise ValueError(f"config.mesh.frozen is {over!r}; known: all, model.")
  choices = _choices(mesh) if over == "all" else [("model",)]
  flat = nnx.to_flat_state(state)
  rules = rules or {}
  sizes = {path: _num_bytes(leaf) for path, leaf in flat if str(path[0]) in rules}
  small = _small_leaves(sizes, _size(mesh, choices[0]))
  shardings = []
  for path, leaf in flat:
    if path in sizes and path not in small:
      spec = _spec(path, leaf.shape, sizes[path], mesh, choices, rules[str(path[0])])
    else:
      spec = PartitionSpec()
    shardings.append((path, leaf.replace(NamedSharding(mesh, spec))))
  return nnx.from_flat_state(shardings)


def _choices(mesh: Meshes) -> list[tuple[str, ...]]:
  """Which axes together split a dimension, most pieces first."""
  return sorted([AXES, ("data",), ("model",)], key=lambda axes: -_size(mesh, axes))


def _small_leaves(sizes: Mapping[Any, int], pieces: int) -> set[Any]:
  """The smallest leaves, which together are next to nothing beside a device's part of all."""
  small, kept = set(), 0
  for name in sorted(sizes, key=lambda name: sizes[name]):
    kept += sizes[name]
    if kept > _REPLICATED_PART * sum(sizes.values()) / pieces:
      break
    small.add(name)
  return small


def state_shardings(
  state: Mapping[str, Any],
  mesh: Meshes,
  over: Over = "all",
  rules: Mapping[str, Rules] | None = None,
  optimizer: Optimizer = "replicated",
) -> dict[str, Any]:
  """How what changes in training is sharded: heads are replicated, networks that train as if frozen.

  Args:
    state: of `training.step.init_state`, arrays or shapes. Leaves of `opt_state` and `ema` are laid out as
      the parameters they belong to.
    rules: as for `frozen_shardings`.
    optimizer: "sharded": optimizer state and averages of heads are sharded over all devices, as ZeRO's
      first stage does (arXiv:1910.02054). Each device updates its part, and the new parameters are gathered.

  Raises:
    ValueError: as `frozen_shardings`, or an unknown `optimizer`.
  """
  if optimizer not in ("replicated", "sharded"):
    raise ValueError(f"config.mesh.optimizer is {optimizer!r}; known: replicated, sharded.")
  trainable = state["trainable"]
  specs = {
    _names(path): leaf
    for path, leaf in jax.tree.flatten_with_path(
      frozen_shardings(trainable, mesh, over, rules), is_leaf=lambda x: isinstance(x, NamedSharding)
    )[0]
  }
  shapes = {_names(path): leaf.shape for path, leaf in jax.tree.flatten_with_path(trainable)[0]}
  whole = replicated(mesh)

  def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    names = _names(path)
    for start in range(len(names)):
      if names[start:] in specs and shapes[names[start:]] == leaf.shape:
        return specs[names[start:]]
    return whole

  shardings = jax.tree.map_with_path(sharding_of, dict(state))
  if optimizer == "sharded":
    names = {"opt_state", "ema"} & set(state)
    shardings |= {name: _sharded_where_replicated(state[name], shardings[name], mesh) for name in names}
  return shardings


def _sharded_where_replicated(tree: Any, shardings: Any, mesh: Meshes) -> Any:
  """Shardings of a tree's leaves over all devices, but for those that are sharded already, small, or keys."""
  leaves, structure = jax.tree.flatten(tree)
  found = structure.flatten_up_to(shardings)
  choices = _choices(mesh)
  sizes = {
    index: _num_bytes(leaf)
    for index, leaf in enumerate(leaves)
    if not any(found[index].spec) and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  }
  for index in sizes.keys() - _small_leaves(sizes, _size(mesh, choices[0])):
    shape = leaves[index].shape
    longest_first = sorted(range(-len(shape), 0), key=lambda axis: -shape[axis])
    found[index] = NamedSharding(mesh, _split(shape, longest_first, mesh, choices))
  return structure.unflatten(found)


def put(tree: Any, shardings: Any) -> Any:
  """Host or device arrays on their shardings; of several processes each has the same whole arrays.

  Arrays that are sharded over several processes already, as weights folded from a file are, stay where they
  are or move between the devices.
  """

  def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      data = put(jax.random.key_data(leaf), sharding)
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
      return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

  return jax.tree.map(place, tree, shardings)


def of_row(sharding: NamedSharding) -> NamedSharding:
  """The sharding of one row of a stack, given that of the stack."""
  return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's part of a batch, as part of the global batch on all devices."""
  sharding = batch_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def local_rows(tree: Any) -> Any:
  """This process's part of arrays that are sharded along their first axis, as numpy arrays."""

  def rows(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
      return np.asarray(array)
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

  return jax.tree.map(rows, tree)


def local_bytes(tree: Any) -> int:
  """Bytes that one device holds of arrays, or of shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )


def gathered(tree: Any) -> Any:
  """Leaves of one block, replicated on every device: inside a scan, only while that block is at work.

  Without a mesh (`jax.set_mesh`) nothing is done.
  """
  if num_devices() == 1:
    return tree
  return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), tree)


def per_device(function: Callable[..., Any], *, replicated: int = 0) -> Callable[..., Any]:
  """A function of examples that runs on each device's own, in a loop or kernel of its own.

  For loops over the examples of a batch: in a program of the whole batch, every device would run all steps.
  For kernels, which the compiler cannot split: every device would run the whole batch's.

  Args:
    function: arrays [b, ...] in, arrays [b, ...] out; nothing in it may depend on other examples.
    replicated: how many of its arguments, the last ones, are no arrays of examples: every device has them
      whole.
  """
  if num_devices() == 1:
    return function
  spec = PartitionSpec(AXES)

  def run(*arguments: Any) -> Any:
    specs = (spec,) * (len(arguments) - replicated) + (PartitionSpec(),) * replicated
    return jax.shard_map(function, in_specs=specs, out_specs=spec, check_vma=False)(*arguments)

  return run


def num_devices() -> int:
  """Devices of the mesh that a program is traced for; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.size


def _spec(
  path: tuple[Any, ...],
  shape: tuple[int, ...],
  num_bytes: int,
  mesh: Meshes,
  choices: Sequence[tuple[str, ...]],
  rules: Rules,
) -> PartitionSpec:
  """Splits a leaf into as many pieces as its dimensions allow.

  Raises:
    ValueError: no rule for its path.
  """
  network, *names = map(str, path)
  name = "/".join(names)
  dimensions = next((dims for pattern, dims in rules if re.fullmatch(pattern, name)), None)
  if dimensions is None:
    if num_bytes < _LARGE_BYTES:
      return PartitionSpec()
    raise ValueError(
      f"No rule says how {network}/{name} {shape} is sharded over the mesh; add one to the sharding_rules of "
      f"the class of the {network}."
    )
  stacked = "repeated" in names
  return _split(shape, [axis for axis in dimensions if -axis <= len(shape) - stacked], mesh, choices)


def _split(
  shape: tuple[int, ...], dimensions: Sequence[int], mesh: Meshes, choices: Sequence[tuple[str, ...]]
) -> PartitionSpec:
  """One dimension in as many pieces as can be, the first that allows them."""
  for axes in choices:
    pieces = _size(mesh, axes)
    for dimension in dimensions:
      if pieces > 1 and shape[dimension] % pieces == 0:
        entries: list[Any] = [None] * len(shape)
        entries[dimension] = axes
        return PartitionSpec(*entries)
  return PartitionSpec()


def _size(mesh: Meshes, axes: Sequence[str]) -> int:
  return math.prod(mesh.shape[axis] for axis in axes)


def _num_bytes(leaf: Any) -> int:
  return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
  """A tree path as names, without the attribute that holds a Variable's value."""
  names = (str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
  return tuple(name for name in names if name != "value")
