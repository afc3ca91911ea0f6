"""The one place where a model on a frozen backbone is built, split, folded, cast and sharded.

Training and planning call `prepare`, prediction and export `Backbones.of` and `on_backbone`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import os
import re
import shlex
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from frozen_vision.backbones import base, families, random_weights
from frozen_vision.config import AdapterOptions, BackboneOptions, Config
from frozen_vision.devices import sharding
from frozen_vision.files import paths, trees
from frozen_vision.freezing import adapters as adapters_lib
from frozen_vision.freezing import casting, feature_key, partition
from frozen_vision.layers import storage as stored
from frozen_vision.options import to_dict

Source = base.Backbone | families.BackboneFile


@dataclasses.dataclass(frozen=True)
class Model:
  """A task's model in parts.

  Attributes:
    graphdef: its structure; `nnx.merge(graphdef, trainable, mutable, frozen)` gives the module.
    trainable: what the optimizer sees.
    mutable: what the forward pass of trained modules changes, such as BatchNorm's statistics.
    frozen: what nothing changes.
    frozen_pass: whether nothing in the backbone trains, so that its features are computed outside of the
      gradient.
    feature_key: identifies the frozen features, or the frozen backbone that adapters train in; None where
      some of the backbone itself trains.
    frozen_parameters: how many numbers are frozen in the canonical model, before folding.
    storage: how the frozen ones are stored, in words.
    layer_of: path of a parameter -> its depth for layer-wise decay; adapters have that of the head.
    no_weight_decay: patterns of whole paths that weight decay leaves out, beside vectors.
    sharding_rules: {attribute of the module: how the leaves of the network there are sharded}.
    teacher: identifies the features of the second frozen network, if the task has one.
  """

  graphdef: nnx.GraphDef
  trainable: nnx.State
  mutable: nnx.State
  frozen: nnx.State
  frozen_pass: bool
  feature_key: dict[str, Any] | None
  frozen_parameters: int
  storage: str
  layer_of: Callable[[str], int]
  no_weight_decay: tuple[str, ...]
  sharding_rules: Mapping[str, base.ShardingRules]
  teacher: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class FrozenBackbone:
  """A backbone whose weights nothing changes.

  Attributes:
    module: the canonical one; shapes only where its weights were read block by block, or are planned.
    program: what computes features: `module` folded, or as it is in the dtype of its storage.
    key: identifies its features.
    storage: how it is stored, in words.
  """

  module: base.Backbone
  program: Any
  key: dict[str, Any]
  storage: str


def prepare(
  build: Callable[[base.Backbone], nnx.Module],
  source: Source,
  *,
  trainable: Sequence[str],
  adapters: AdapterOptions = AdapterOptions(),
  seed: int = 0,
  storage: str = "float32",
  fold: bool = True,
  mesh: jax.sharding.Mesh | None = None,
  over: sharding.Over = "all",
  trained_as: Callable[[base.Backbone], Any] | None = None,
  teacher: nnx.Module | None = None,
  fold_teacher: bool = True,
  teacher_settings: Mapping[str, Any] | None = None,
) -> Model:
  """Builds a model on a backbone and splits it into what trains and what is frozen.

  A wholly frozen backbone is folded, unless `fold` is off. Patterns and fingerprint are those of the backbone
  as it was before. One that lies in a file is read, folded and sharded block by block: it is never
  whole in one place.

  The module that `build` makes is changed, and a backbone that is given: what is frozen of them is put into
  inference mode (`partition.inference_mode`), and the module's attribute `backbone` becomes the program that
  stands for the backbone. No weight of them changes.

  Args:
    build: backbone -> the task's model; it may look at everything of the backbone but its weights.
    source: the backbone, its file, or its shapes; of shapes the parts are shapes, without a fingerprint.
    trainable: patterns of the parameters that train (`partition.partition`).
    adapters: those in the frozen backbone, which train too.
    seed: of the adapters' random numbers.
    storage: of the frozen weights, one of `layers.storage.KINDS`.
    mesh: where the weights go; None leaves them on the default device.
    over: the devices that share frozen weights.
    trained_as: the program in the place of a backbone of which something trains; by default itself.
    teacher: a second frozen network, which becomes the attribute `teacher` of the model; a backbone is folded
      and stored as one that nothing trains of, even where `source` trains.
    fold_teacher: fold it, if it is a backbone.
    teacher_settings: what decides its features beside itself, as JSON, such as the size of its images.

  Raises:
    ValueError: a pattern that matches nothing; a storage that is unknown, or that asks for folding where it
      is off, or where something of the backbone trains, unless all that is frozen is a teacher; adapters in
      such a backbone, or that it does not take.
  """
  stored.check(storage, "config.frozen_dtype")
  module = build(source.module if isinstance(source, families.BackboneFile) else source)
  _, trained, frozen = partition.partition(module, trainable)
  networks = (frozen,) if teacher is None else (frozen, trees.weights(teacher))
  parameters = sum(leaf.size for leaf in jax.tree.leaves(networks))
  is_open = not backbone_is_frozen(trained)
  if storage == "int8" and is_open and (teacher is None or casting.holds_floats(trained, frozen)):
    raise ValueError(_INT8)
  if adapters.kind != "none" and (is_open or not fold):
    raise ValueError(_ADAPTERS.format(adapters.kind))
  identity = None
  if isinstance(teacher, base.Backbone):
    second = freeze(teacher, storage=storage, fold=fold_teacher, mesh=mesh, over=over)
    program, identity = second.program, second.key
    module.teacher = program if isinstance(program, nnx.Module) else nnx.data(program)
  elif teacher is not None:
    module.teacher = teacher
    if not casting.has_shapes_only(teacher):
      identity = {"weights": trees.fingerprint(trees.weights(teacher))}
  if is_open:
    model = _open_model(module, source, trainable, storage, trained_as)
  else:
    backbone = freeze(source, storage=storage, fold=fold, mesh=mesh, over=over)
    model = on_backbone(module, backbone, trainable, adapters=adapters, seed=seed)
  if identity is not None:
    identity = {**identity, **(teacher_settings or {})}
  model = dataclasses.replace(model, frozen_parameters=parameters, teacher=identity)
  return model if mesh is None else place(model, mesh, over)


def freeze(
  source: Source,
  *,
  storage: str = "float32",
  fold: bool = True,
  mesh: jax.sharding.Mesh | None = None,
  over: sharding.Over = "all",
) -> FrozenBackbone:
  """Puts a backbone into inference mode, identifies its features, and folds it or casts its weights.

  Arguments and errors are those of `prepare`; for a backbone that is not folded all weights are loaded first.
  """
  if storage == "int8" and not fold:
    raise ValueError(_INT8)
  if isinstance(source, families.BackboneFile) and not fold:
    source = source.load()
  on_disk = isinstance(source, families.BackboneFile)
  module = nnx.merge(*nnx.split(source.module if on_disk else source))
  partition.inference_mode(module, set())
  if on_disk:
    program = _fold_from_disk(source, module, storage, mesh, over)
    fingerprint = source.read_fingerprint()
  elif casting.has_shapes_only(module):
    fingerprint = ""
    program = stored.shapes(module, storage=storage) if fold else casting.cast_module(module, storage)
  else:
    fingerprint = trees.fingerprint(trees.weights(module))
    program = module.fold(storage=storage) if fold else casting.cast_module(module, storage)
  key = feature_key.feature_key(module, fingerprint, storage=storage, folded=fold)
  return FrozenBackbone(module, program, key, _in_words(storage, fold))


def on_backbone(
  module: nnx.Module,
  backbone: FrozenBackbone,
  trainable: Sequence[str],
  *,
  adapters: AdapterOptions = AdapterOptions(),
  seed: int = 0,
) -> Model:
  """Puts a frozen backbone into a model that was built on its canonical module, and splits the model.

  Args:
    adapters, seed: of `prepare`; the backbone is folded where there are some.

  Raises:
    ValueError: a pattern that matches nothing, or a parameter of the backbone; adapters that it does not
      take.
  """
  program, key, has_adapters = backbone.program, backbone.key, adapters.kind != "none"
  if has_adapters:
    program = adapters_lib.attach(program, adapters, seed)
    key = {**key, "adapters": adapters_lib.identity(adapters)}
  set_backbone(module, program)
  graphdef, trained, mutable, frozen = partition.split(module, adapters_lib.patterns(trainable, adapters))
  return Model(
    graphdef,
    trained,
    mutable,
    frozen,
    frozen_pass=not has_adapters,
    feature_key=key,
    frozen_parameters=sum(leaf.size for leaf in jax.tree.leaves(frozen)),
    storage=backbone.storage,
    **_rules(module, backbone.module),
  )


def set_backbone(module: nnx.Module, backbone: Any) -> None:
  """Puts a backbone, or a program that stands for it, into a model."""
  module.backbone = backbone if isinstance(backbone, nnx.Module) else nnx.data(backbone)


def backbone_is_frozen(trainable: nnx.State) -> bool:
  """Whether nothing of the backbone is among the parameters that train."""
  return not any(path.startswith("backbone/") for path in trees.flatten(trainable))


def place(model: Model, mesh: jax.sharding.Mesh, over: sharding.Over) -> Model:
  """The model with its weights on the devices of a mesh."""
  rules = model.sharding_rules
  trainable = sharding.state_shardings({"trainable": model.trainable}, mesh, over, rules)["trainable"]
  return dataclasses.replace(
    model,
    trainable=sharding.put(model.trainable, trainable),
    mutable=sharding.put(model.mutable, jax.tree.map(lambda _: sharding.replicated(mesh), model.mutable)),
    frozen=sharding.put(model.frozen, sharding.frozen_shardings(model.frozen, mesh, over, rules)),
  )


class Backbones:
  """Backbones that finished heads stand on: each opened once and folded once, however many heads there are.

  Args:
    given: weights that heads shall take in the place of those that their configs name: whatever
      `load_backbone` reads, or a backbone itself. None: as the configs say.

  Raises:
    ValueError: a module that is no backbone as `load_backbone` gives it.
  """

  def __init__(self, given: str | os.PathLike | base.Backbone | None = None):
    if not (given is None or isinstance(given, (str, os.PathLike, base.Backbone))):
      raise ValueError(
        f"The backbone is a {type(given).__name__}; give the canonical one, as frozen_vision.load_backbone "
        "returns it. It is folded here."
      )
    self._given = given
    self._sources: dict[str, Source] = {}
    self._frozen: dict[tuple[str, str, bool], FrozenBackbone] = {}

  @property
  def has_given(self) -> bool:
    return self._given is not None

  def of(self, config: Config, *, given: bool = False) -> FrozenBackbone:
    """The backbone of a run's config; with `given`, its options on the given weights.

    A given module keeps its own sizes and dtype.
    """
    options = config.backbone
    name = self._name(config, given)
    if name not in self._sources:
      self._sources[name] = self._open(config, given)
    key = name, config.frozen_dtype, options.fold
    if key not in self._frozen:
      self._frozen[key] = freeze(self._sources[name], storage=config.frozen_dtype, fold=options.fold)
    return self._frozen[key]

  def _name(self, config: Config, given: bool) -> str:
    """Equal for configs whose backbones are the same before they are stored."""
    if given and isinstance(self._given, nnx.Module):
      return "given"
    options = config.backbone
    parts = [os.fspath(self._given) if given else None, to_dict(options)]
    # Random weights depend on the seed too.
    return json.dumps(parts + [config.seed] * (options.weights in ("init", "random")))

  def _open(self, config: Config, given: bool) -> Source:
    if not given:
      return open_source(config.backbone, config.seed)
    if isinstance(self._given, nnx.Module):
      return self._given
    options = config.backbone
    dtype = jnp.dtype(options.dtype)
    return families.open_backbone(self._given, prefer=options.name, dtype=dtype, **options.overrides)


_HOW_TO_GET_WEIGHTS = (
  "Download a public checkpoint (SwinV2-G was never published) and write it in our format with "
  "python -m frozen_vision.convert SOURCE FILE, or give it as it is with --config.backbone.weights=SOURCE; "
  "or give the name of published weights, such as --config.backbone.weights=swinv2_base_window12_192_22k, to "
  "have them fetched; --config.backbone.weights=random trains on a random backbone."
)
_INT8 = (
  "config.frozen_dtype=int8 is for a folded backbone: nothing of it may match config.trainable, and "
  "config.backbone.fold must be on. Take bfloat16 otherwise."
)
_ADAPTERS = (
  "config.adapters.kind={} is for a folded backbone of which nothing else trains: nothing of it may match "
  "config.trainable, and config.backbone.fold must be on. To train the backbone itself, set "
  "--config.adapters.kind=none."
)


def open_source(options: BackboneOptions, seed: int) -> Source:
  """The backbone that the section `config.backbone` names: with random weights, or the file that has them.

  Args:
    options: the section.
    seed: of random weights.

  Raises:
    FileNotFoundError: no such weights.
    ValueError: an unknown name or option; weights of another network than the one that is named.
  """
  dtype, overrides = jnp.dtype(options.dtype), base.tuples(options.overrides)
  if options.weights in ("random", "init"):
    fields = _initial_fields(options)
    backbone = families.build_backbone(options.name, dtype=dtype, rngs=nnx.Rngs(seed), **fields)
    return random_weights.redraw(backbone, seed) if options.weights == "random" else backbone
  source = options.name if options.weights == "shipped" else options.weights
  named = (*families.shipped_weights(), *families.published_weights())
  if options.weights != "shipped" and source not in named:
    source = paths.existing_path(source, "backbone.weights", _HOW_TO_GET_WEIGHTS)
  backbone = families.open_backbone(source, prefer=options.name, dtype=dtype, **overrides)
  row = families.backbone_config(options.name, **overrides)
  names = [field.name for field in dataclasses.fields(row) if field.name not in row.weightless]
  found = {name: getattr(backbone.module.config, name, None) for name in names}
  differing = {name: value for name, value in found.items() if value != getattr(row, name)}
  if differing:
    fields = ", ".join(f"{name} = {value}" for name, value in differing.items())
    expected = ", ".join(f"{name} = {getattr(row, name)}" for name in differing)
    flags = (shlex.quote(f"--config.backbone.overrides.{name}={value}") for name, value in differing.items())
    raise ValueError(
      f"config.backbone.weights: {source} holds a network with {fields}, but config.backbone.name = "
      f"{options.name} has {expected}. Give the weights of that backbone, or the name of the backbone of "
      f"these weights; where they were trained with such overrides, repeat them: {' '.join(flags)}"
    )
  return backbone


def abstract_source(options: BackboneOptions) -> base.Backbone:
  """`open_source` of random weights, with shapes in the place of weights."""
  fields = _initial_fields(options)
  return families.abstract_backbone(options.name, dtype=jnp.dtype(options.dtype), **fields)


def _initial_fields(options: BackboneOptions) -> dict[str, Any]:
  """Overridden fields of a backbone whose weights are not read from a file."""
  random = families.family_of(options.name).random if options.weights == "random" else {}
  return {**random, **options.overrides}


def _open_model(
  module: nnx.Module,
  source: Source,
  trainable: Sequence[str],
  storage: str,
  trained_as: Callable[[base.Backbone], Any] | None,
) -> Model:
  """A model of whose backbone something trains: as it is, and what is frozen of it cast."""
  if isinstance(source, families.BackboneFile):
    module.backbone = source.load()
  canonical = module.backbone
  if trained_as is not None:
    set_backbone(module, trained_as(canonical))
  graphdef, trained, mutable, frozen = partition.split(module, trainable)
  return Model(
    graphdef,
    trained,
    mutable,
    casting.cast_all_but_teacher(frozen, storage),
    frozen_pass=False,
    feature_key=None,
    frozen_parameters=0,
    storage=_in_words(storage, False),
    **_rules(module, canonical),
  )


class _Holder(nnx.Module):
  """A folded backbone where its paths begin with `backbone/`, as in a model."""

  def __init__(self, backbone: Any):
    self.backbone = nnx.data(backbone)


def _fold_from_disk(
  source: families.BackboneFile,
  module: base.Backbone,
  storage: str,
  mesh: jax.sharding.Mesh | None,
  over: sharding.Over,
) -> base.FoldedBackbone:
  """Folds a backbone that is read block by block, each block put where it stays before the next is read."""
  graphdef, state = nnx.split(_Holder(stored.shapes(module, storage=storage)))
  mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
  shardings = sharding.frozen_shardings(state, mesh, over, {"backbone": module.sharding_rules})
  shardings = nnx.merge(graphdef, shardings).backbone
  return module.fold(storage=storage, read=source.read, shardings=shardings)


def _rules(module: nnx.Module, backbone: base.Backbone) -> dict[str, Any]:
  """Rules by path that a model takes from its canonical backbone, without keeping its weights alive."""
  graphdef, state = nnx.split(backbone)
  shapes = nnx.merge(graphdef, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state))

  def layer_of(path: str) -> int:
    network, _, rest = path.partition("/")
    if re.fullmatch(adapters_lib.PATTERN, path):
      return shapes.num_depths
    return shapes.depth_of(rest) if network == "backbone" else shapes.num_depths

  rules = {name: getattr(value, "sharding_rules", None) for name, value in vars(module).items()}
  return dict(
    layer_of=layer_of,
    no_weight_decay=tuple(f"backbone/{pattern}" for pattern in backbone.no_weight_decay),
    sharding_rules={name: value for name, value in rules.items() if value is not None},
  )


def _in_words(storage: str, folded: bool) -> str:
  return f"{storage}, {'folded' if folded else 'as they train'}"
