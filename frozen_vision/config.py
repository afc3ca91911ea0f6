"""The options that every config has. A task adds a section: its config is a subclass with one more field."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from typing import Any, Literal, Self

import ml_collections

from frozen_vision import options
from frozen_vision.options import Count, DType, Fraction, Natural, NonNegative, Positive


@dataclasses.dataclass(frozen=True)
class BackboneOptions:
  """The backbone and its weights."""

  name: str = "swinv2_nano"
  # shipped: the weights inside the package; init: as initialised for training; random: drawn alike on every
  # machine, with the norms that end residual branches at one, since a SwinV2 as initialised is the identity
  # in every block; a name of published weights, fetched once; or a file, ours or a public checkpoint, with
  # `:PART` for one of several state dicts in it, such as dino.pth:teacher.
  weights: options.Path = "shipped"
  dtype: DType = "float32"
  # If nothing of it trains: position biases, logit scales and biases are computed once, blocks scanned.
  fold: bool = True
  # Fields of the backbone's own config, such as window_sizes or drop_path_rate.
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
  """Residual adapters in a frozen, folded backbone: they train, and nothing else of it does."""

  kind: Literal["none", "linear", "bottleneck"] = "none"  # a 1 x 1 layer, or two with a ReLU between them
  placement: Literal["parallel", "series"] = "parallel"  # on what enters a block, or on what leaves it
  width: Count = 64  # channels of a bottleneck
  stages: tuple[Natural, ...] = ()  # whose blocks have adapters, from 0; all if empty
  # Blocks are computed again on the way back: one more forward pass, and activations of one block in memory.
  remat: bool = True


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
  """The update rule and its learning rate."""

  name: Literal["adamw", "muon", "sgd"] = "adamw"  # muon: of matrices; the rest as adamw
  learning_rate: Positive = 1e-3
  weight_decay: NonNegative = 0.05
  final_weight_decay: NonNegative | None = None  # reached along half a cosine over all steps; None: constant
  schedule: Literal["cosine", "linear", "steps", "constant"] = "cosine"
  warmup_steps: Natural = 0
  decay_at: tuple[Natural, ...] = ()  # steps at which "steps" multiplies by 0.1
  final_fraction: Fraction = 0.0  # learning rate at the end over the peak, for cosine and linear
  clip_norm: NonNegative = 0.0  # 0 for none
  clip_each: bool = False  # clip the gradient of every parameter by its own norm, not by that of all
  b1: Fraction = 0.9
  b2: Fraction = 0.999
  momentum: Fraction = 0.9
  nesterov: bool = False  # of sgd
  # Of sgd: decay is part of the gradient, before momentum, and of every parameter, as in PyTorch's SGD.
  l2: bool = False
  layer_decay: Positive = 1.0
  delayed: tuple[str, ...] = ()  # regular expressions of parameters that stay as they are at first,
  delay_steps: Natural = 0  # for so many steps

  def __post_init__(self):
    if bool(self.delayed) != bool(self.delay_steps):
      raise ValueError(
        f"OptimizerOptions.delayed is {self.delayed} and delay_steps {self.delay_steps}; give both or none."
      )
    for option in ("nesterov", "l2"):
      if getattr(self, option) and self.name != "sgd":
        raise ValueError(f"OptimizerOptions.{option} is of sgd alone; optimizer.name is {self.name!r}.")


@dataclasses.dataclass(frozen=True)
class MeshOptions:
  """Devices of all processes as a grid, each with its own part of every batch.

  Frozen weights are sharded over all devices, or over `model` with a copy in every group of `data`. The
  optimizer's state and the averages of heads are replicated, or sharded over all devices, which large heads
  need.
  """

  data: int = -1  # -1: the devices that are left
  model: int = 1
  frozen: Literal["all", "model"] = "all"
  optimizer: Literal["replicated", "sharded"] = "replicated"

  def __post_init__(self):
    for name in ("data", "model"):
      size = getattr(self, name)
      if size < 1 and size != -1:
        raise ValueError(
          f"MeshOptions.{name} is {size}; expected 1 or more, or -1 for the devices that are left."
        )


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
  """Processes that load examples, and threads in each."""

  workers: Natural = 0
  threads: Count = 1


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """Checks of data in files before a run begins, and which faults are accepted."""

  check: bool = True  # look at all images, and at label maps and videos; leave out what cannot be read
  allow_drops: bool = False  # go on where more than a tenth of anything is left out
  allow_changes: bool = False  # continue a run although the data are not those of its checkpoint
  allow_outside: bool = False  # take file names in annotations and lists that lead out of their folder


@dataclasses.dataclass(frozen=True)
class CacheOptions:
  """Features of a frozen backbone on disk, so that they are computed once."""

  path: options.Path = ""  # folder of feature caches; empty: none. Evaluation uses it wherever it can
  # Augmented views of every training example, which passes over the data take in turn; 0: augmentation is
  # endless, and features of training examples are not cached. 1 is all that fixed examples need.
  views: Natural = 0
  dtype: Literal["float32", "bfloat16"] = "float32"  # that features are stored in


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that the loops read; a task's subclass has one more section, called by the task's name."""

  headline: str = ""  # printed first
  task: str = ""
  seed: Natural = 0
  backbone: BackboneOptions = BackboneOptions()
  trainable: tuple[str, ...] = (
    "neck/.*",
    "head/.*",
  )  # regular expressions of parameter paths; the rest is frozen
  adapters: AdapterOptions = AdapterOptions()  # they train beside what `trainable` names
  # Storage of the frozen weights: bfloat16 on TPU and GPU; int8 for folded backbones.
  frozen_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
  steps: Count = 1000
  batch_size: Count = 16
  eval_batch_size: Count = 16
  accumulate: Count = 1  # micro-batches per update
  mesh: MeshOptions = MeshOptions()
  ema_decay: Fraction = 0.0  # average of what training changes in the model, used for evaluation; 0 for none
  optimizer: OptimizerOptions = OptimizerOptions()
  data: DataOptions = DataOptions()
  loader: LoaderOptions = LoaderOptions()
  cache: CacheOptions = CacheOptions()
  log_every: Count = 20
  eval_every: Natural = 0  # steps; 0: at the end only
  checkpoint_every: Count = 500  # steps; every evaluation is preceded by a checkpoint too
  keep_checkpoints: Count = 2
  pictures: Natural = 8  # examples shown after each evaluation
  tensorboard: bool = True  # also write TensorBoard events, if TensorFlow is installed

  @property
  def section(self) -> Any:
    """The options of the task's own."""
    return getattr(self, self.task)

  def to_dict(self) -> dict[str, Any]:
    """All options as nested dicts."""
    return options.to_dict(self)

  def replace(self, changes: Mapping[str, Any]) -> Self:
    """The config with options changed, by dotted path; raises OptionError.

    `config.replace({"optimizer.learning_rate": 5e-4})`
    """
    return options.replace(self, changes)


# The argument of public functions: a config, or values that `tasks.build.read_config` reads.
ConfigLike = Config | Mapping[str, Any] | ml_collections.ConfigDict


def base_config() -> ml_collections.ConfigDict:
  """The options that every config has, for a config file to change; a task adds a section of its own."""
  return config_dict(Config())


def config_dict(section: Any) -> ml_collections.ConfigDict:
  """A section as a config file changes it.

  A section that depends on a name holds the name alone: its other options are those of the name that is
  chosen in the end.
  """
  found = ml_collections.ConfigDict(type_safe=False)  # `options.read` checks types, and names the option
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if field.metadata.get("choice"):
      found[field.name] = ml_collections.ConfigDict(dict(name=value.name), type_safe=False)
    elif dataclasses.is_dataclass(value):
      found[field.name] = config_dict(value)
    elif isinstance(value, Mapping):
      found[field.name] = ml_collections.ConfigDict(dict(value), type_safe=False)
    elif field.metadata.get("option", True):
      found[field.name] = value
  return found


def set_for(section: ml_collections.ConfigDict, names: str | Iterable[str], **values: Any) -> None:
  """Sets options of a config file's section for when its `name` is one of `names`.

  `set_for(options.head, "upernet", channels=64)` stays without effect while `options.head.name` is another.
  """
  for name in [names] if isinstance(names, str) else names:
    section[name] = ml_collections.ConfigDict({**section.get(name, {}), **values}, type_safe=False)


def parse_arguments(
  text: str, arguments: Mapping[str, Sequence[str]], file: str, names: Mapping[str, str]
) -> dict[str, str]:
  """The arguments of a config file, what stands after the colon: `backbone=swinv2_b,stage=objects365`.

  Args:
    arguments: the values that each argument can have.
    file: what messages call the config.
    names: short names of combinations, such as {"swinv2_b": "backbone=swinv2_b"}.

  Raises:
    ValueError: an unknown argument or value; the message lists the known ones.
  """
  text = names.get(text, text)
  found: dict[str, str] = {}
  for part in filter(None, text.split(",")):
    name, equals, value = part.partition("=")
    if not equals:
      raise ValueError(
        f"{file} has no variant {part!r}; known: {', '.join(f':{name}' for name in names if name)}; or "
        + ",".join(f"{name}={'|'.join(values)}" for name, values in arguments.items())
      )
    if name not in arguments:
      raise ValueError(f"{file} has no argument {name!r}; known: {', '.join(arguments) or 'none'}.")
    if value not in arguments[name]:
      raise ValueError(f"{file}: {name} is {value!r}; known: {', '.join(arguments[name])}.")
    found[name] = value
  if {"recipe", "backbone"} <= set(found):
    raise ValueError(
      f"{file}: recipe={found['recipe']} has its own backbone; give recipe= or backbone=, not both."
    )
  return found
