"""Heads of finished runs, ready to predict: model, classes, and how the input is prepared."""

from collections.abc import Mapping, Sequence
import json
import logging
import os
import pathlib
from typing import Any

from flax import nnx
import jax
import numpy as np

from frozen_vision.backbones import families
from frozen_vision.config import Config
from frozen_vision.files import trees
from frozen_vision.freezing import adapters, feature_key, prepare
from frozen_vision.freezing import partition as freeze
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import workdir as workdir_lib
from frozen_vision.tasks import base, common, results
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import step as train_step

Example = dict[str, np.ndarray]
_logger = logging.getLogger(__name__)


class TrainedHead:
  """The neck and head of a finished run on their backbone.

  Attributes:
    name: what the caller calls it.
    workdir: of the run.
    step: of the checkpoint that was read.
    task: of the run, without data.
    config: of the run.
    graphdef, trainable, mutable, frozen: the model in parts, for `nnx.merge`.
    feature_key: of the frozen backbone; None where something in it was trained with the head, be it adapters.
    differs: {field: (of the given backbone, of its own)} where it did not fit the given backbone.
  """

  def __init__(
    self,
    name: str,
    workdir: str | os.PathLike[str],
    step: int,
    task: base.Task,
    config: Config,
    model: tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State],
    feature_key: dict[str, Any] | None,
    differs: dict[str, tuple[Any, Any]],
  ):
    self.name = name
    self.workdir = workdir
    self.step = step
    self.task = task
    self.config = config
    self.graphdef, self.trainable, self.mutable, self.frozen = model
    self.feature_key = feature_key
    self.differs = differs
    self._features = jax.jit(self.compute_features)
    self._outputs = jax.jit(self.compute_outputs)
    self._to_source = jax.jit(task.to_source, static_argnums=2)

  @property
  def media(self) -> str:
    """ "image" or "video", what it looks at."""
    return self.task.media

  @property
  def classes(self) -> base.Classes:
    """{"id", "name"} by index."""
    return self.task.classes

  @property
  def parts(self) -> tuple[nnx.State, nnx.State, nnx.State]:
    """(trainable, mutable, frozen), the first argument of `compute_features` and `compute_outputs`."""
    return self.trainable, self.mutable, self.frozen

  def compute_features(self, parts: tuple[nnx.State, ...], batch: base.Batch) -> base.Features:
    """The backbone's features of a batch, to be jitted."""
    model, batch = self._prepared(parts, batch)
    return self.task.features(model, batch, None)

  def compute_outputs(
    self, parts: tuple[nnx.State, ...], batch: base.Batch, features: base.Features | None
  ) -> base.Outputs:
    """The head's outputs, to be jitted; it runs the backbone itself where `features` is None."""
    model, batch = self._prepared(parts, batch)
    features = self.task.features(model, batch, None) if features is None else features
    return self.task.predict(model, batch, features)

  def _prepared(self, parts: tuple[nnx.State, ...], batch: base.Batch) -> tuple[Any, base.Batch]:
    model = nnx.merge(self.graphdef, *parts)
    model.eval()
    return model, self.task.prepare(batch, None, self.task.phases[-1])

  def features(self, batch: base.Batch) -> base.Features:
    """`compute_features` of a batch on the host, compiled."""
    return self._features(self.parts, train_step.device_batch(batch))

  def outputs(self, batch: base.Batch, features: base.Features | None) -> base.Outputs:
    """`compute_outputs` of a batch on the host, compiled, at the sizes of the sources."""
    batch = train_step.device_batch(batch)
    outputs = self._outputs(self.parts, batch, features)
    largest = None
    if "original_size" in batch:
      # The sizes of photographs are many; a few canvases keep the number of programs small.
      largest = (canvas_side(int(np.max(batch["original_size"]))),) * 2
    return self._to_source(outputs, batch, largest)

  def results(self, outputs: base.Outputs, batch: base.Batch, count: int) -> list[results.Result]:
    """The first `count` examples' results, from outputs on the host."""
    return self.task.result_type.from_outputs(outputs, batch, count, self.classes)


def read_meta(workdir: str | os.PathLike, *, best: bool = False) -> dict[str, Any]:
  """The record of the newest (or best) checkpoint of a run.

  Raises:
    FileNotFoundError: no checkpoint there.
  """
  if not pathlib.Path(workdir).is_dir():
    raise FileNotFoundError(
      f"{pathlib.Path(workdir).absolute()} does not exist; expected the workdir of a run."
    )
  with checkpoint.Checkpoints(workdir) as checkpoints:
    return checkpoints.read_meta(best=best)


def named(heads: Sequence[str]) -> dict[str, str]:
  """{name: workdir} of texts `NAME=WORKDIR`, or `WORKDIR` alone, which is called by its task.

  Raises:
    FileNotFoundError: no checkpoint there.
    ValueError: two heads of one name.
  """
  found: dict[str, str] = {}
  for text in heads:
    name, _, workdir = text.rpartition("=")
    name = name or tasks_build.task_class(read_meta(workdir)["config"]["task"]).head_name
    if name in found:
      raise ValueError(f"Two heads are called {name}; name them: NAME1={found[name]} and NAME2={workdir}.")
    found[name] = workdir
  return found


def load(
  name: str,
  workdir: str | os.PathLike,
  backbones: prepare.Backbones,
  *,
  best: bool = False,
  image_size: tuple[int, int] | None = None,
) -> TrainedHead:
  """The head of a run's newest (or best) checkpoint, with averaged parameters where the run has them.

  Needs no training data where the checkpoint knows its classes.

  Args:
    backbones: where its backbone comes from. The given one is taken where its features are those that the
      head was trained on; else that of the run's config.
    image_size: (height, width) of the frame that images are fitted into, in place of the config's test
      settings; heads with squares of their own keep them.

  Raises:
    FileNotFoundError: no checkpoint, or weights or data of the config that are not there any more.
    ValueError: a backbone with other features than the head was trained on.
  """
  meta = read_meta(workdir, best=best)
  config = tasks_build.read_config(meta["config"], quiet=True)
  task_name = config.task
  init = getattr(config.section, "init", None)
  if init is not None:  # what has trained since is in the checkpoint
    config = config.replace({f"{task_name}.init.path": ""})
  if image_size is not None:
    config = tasks_build.task_class(task_name).with_image_size(config, image_size)
  classes = meta.get("classes")
  if classes is None:  # written before checkpoints knew them
    try:
      classes = tasks_build.build_task(config).classes
    except FileNotFoundError as error:
      raise FileNotFoundError(
        f"The checkpoint in {workdir} does not say which classes it has, and the data that do are not "
        f"there. {error}"
      ) from error
  task = tasks_build.build_task(config, classes)
  patterns, differs = tuple(config.trainable), {}
  if meta["feature_key"] is None:
    model = _trained_with_backbone(task, config)
  else:
    backbone, differs = _fitting_backbone(backbones, config, meta["feature_key"], workdir)
    module = task.build_model(backbone.module)
    model = prepare.on_backbone(module, backbone, patterns, adapters=config.adapters, seed=config.seed)
  graphdef, trainable, mutable, frozen = model.graphdef, model.trainable, model.mutable, model.frozen
  if init is not None and init.path and _has_frozen_head(frozen):
    own = tasks_build.read_config(meta["config"], quiet=True)
    common.check_frozen_head(meta.get("frozen_head"), own, frozen, os.fspath(workdir))
    module = nnx.merge(graphdef, trainable, mutable, frozen)
    common.start_head(module, init, f"{task_name}.init")
    graphdef, trainable, mutable, frozen = freeze.split(module, adapters.patterns(patterns, config.adapters))
  with checkpoint.Checkpoints(workdir) as checkpoints:
    trainable, mutable, meta = checkpoints.restore_evaluated(
      trainable, mutable, averaged=config.ema_decay > 0, step=meta["step"], best=best
    )
  parts, key = (graphdef, trainable, mutable, frozen), model.feature_key if model.frozen_pass else None
  return TrainedHead(name, os.fspath(workdir), meta["step"], task, config, parts, key, differs)


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """{field: (value in a, value in b)} of the fields that are not equal."""
  return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def canvas_side(side: int) -> int:
  """The next of 512, 768, 1024, 1536, 2048, ...: shapes of results that images of any size share."""
  canvas = 512
  while canvas < side:
    canvas = canvas * 3 // 2 if canvas & (canvas - 1) == 0 else canvas * 4 // 3
  return canvas


def _fitting_backbone(
  backbones: prepare.Backbones,
  config: Config,
  stored_key: Mapping[str, Any],
  workdir: str | os.PathLike,
) -> tuple[prepare.FrozenBackbone, dict[str, tuple[Any, Any]]]:
  """(the given backbone where its features are those of the head, else the head's own; what differs).

  Raises:
    FileNotFoundError: the given backbone does not fit, and the head's own is not there.
    ValueError: the head's own backbone has other features today.
  """
  wanted = feature_key.current(json.loads(json.dumps(stored_key)))
  wanted.pop("adapters", None)  # they are in the checkpoint, and stand on features without them
  differs: dict[str, tuple[Any, Any]] = {}
  backbone = backbones.of(config, given=True) if backbones.has_given else None
  if backbone is not None and backbone.key != wanted:
    differs, backbone = differing(backbone.key, wanted), None
  if backbone is None:
    try:
      backbone = backbones.of(config)
    except FileNotFoundError as error:
      if not differs:
        raise
      raise FileNotFoundError(
        f"{workdir} was trained on other features than the given backbone gives "
        f"({', '.join(differs)} differ), and its own backbone is not there. {error}"
      ) from error
  workdir_lib.check_feature_key(wanted, backbone.key)
  return backbone, differs


def _trained_with_backbone(task: base.Task, config: Config) -> prepare.Model:
  """A model some of whose backbone is in the checkpoint; pretrained weights are read if it is not all.

  Their file says the sizes too: windows or normalisation of weights can be others than those of their row.
  """

  def model(source: prepare.Source) -> prepare.Model:
    return prepare.prepare(task.build_model, source, trainable=config.trainable, storage=config.frozen_dtype)

  def needs_weights(found: prepare.Model) -> bool:
    return any(path.startswith("backbone/") for path in trees.flatten(found.frozen))

  try:
    source = prepare.open_source(config.backbone, config.seed)
  except (FileNotFoundError, ConnectionError) as error:
    row = config.replace({"backbone.weights": "init"}).backbone
    found = model(prepare.open_source(row, config.seed))
    if needs_weights(found):
      raise
    _logger.warning(
      "The weights that the backbone began with are not there; its options are taken from %s. %s",
      row.name,
      error,
    )
    return found
  if isinstance(source, families.BackboneFile):
    found = model(source.module)
    if not needs_weights(found):
      return found
  return model(source)


def _has_frozen_head(frozen: nnx.State) -> bool:
  return any(not path.startswith("backbone/") for path in trees.flatten(frozen))
