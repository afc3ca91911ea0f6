"""Surface normals and depth on a frozen backbone."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from frozen_vision import config as config_lib
from frozen_vision.data import batches, pipeline
from frozen_vision.data.dense import codewords, folders, prepared_dense, sources
from frozen_vision.data.dense import transforms as dense_transforms
from frozen_vision.data.generated import rooms
from frozen_vision.data.segmentation import transforms as segmentation_transforms
from frozen_vision.devices import sharding
from frozen_vision.heads.dense_regression import DenseRegressionHead, DepthBins
from frozen_vision.metrics import dense
from frozen_vision.ops import resize, vectors
from frozen_vision.tasks import base, common, dense_maps, pixel_data
from frozen_vision.tasks.dense_regression_options import DenseRegressionConfig, DenseRegressionOptions
from frozen_vision.visualization import dense_maps as visualize_dense


def default_config() -> ml_collections.ConfigDict:
  """The task's section, for a config file to change."""
  return config_lib.config_dict(DenseRegressionOptions())


class DenseRegressor(nnx.Module):
  """Backbone and head."""

  def __init__(self, backbone: nnx.Module, head: DenseRegressionHead):
    self.backbone = backbone
    self.head = head


class DenseRegressionTask(pixel_data.PixelData, base.Task):
  """A surface normal and a depth for every pixel. Its classes are the codewords of normals."""

  nominal_classes = 40
  built_in_data = ("rooms",)
  head_name = "measure"
  learns_classes = True
  result_type = dense_maps.DenseMaps

  def __init__(self, config: DenseRegressionConfig, classes: base.Classes | None = None):
    self._config = config
    self._options = config.dense_regression
    self._targets = tuple(name for name in sources.TARGETS if name in self._options.targets)
    self._train = self._validation = None
    self.headline = "Normals and depth" if len(self._targets) == 2 else self._targets[0].capitalize()
    if classes is None:
      self._train, self._validation = _open_sources(config)
      for source in (self._train, self._validation):
        _check_targets(source, self._targets)
      classes = ()
      if "normals" in self._targets:
        classes = _named(codewords.learn(self._train, self._options.codewords))
      self.headline += f": {len(self._train):,} training and {len(self._validation):,} validation images."
    self.classes = tuple(classes) if "normals" in self._targets else ()

  @property
  def best_metric(self) -> str:
    return "within_11.25" if "normals" in self._targets else "delta1"

  def keep_classes(self, trained: Sequence[Any] | None) -> None:
    """The codewords of a checkpoint stay those of its head, also where others would be learned now."""
    found = [one for one in trained or () if isinstance(one, Mapping) and "normal" in one]
    if len(found) == len(self.classes):  # else the config says another number, and is refused
      self.classes = tuple(found)

  def build_model(self, backbone: nnx.Module | None = None) -> DenseRegressor:
    options = self._options
    backbone = backbone or common.build_backbone(self._config)
    depth = DepthBins(options.depth_bins, *options.depth_range, weight=options.depth_weight)
    head = DenseRegressionHead(
      backbone.feature_specs,
      options.head,
      codewords=_directions(self.classes) if "normals" in self._targets else None,
      depth=depth if "depth" in self._targets else None,
      dtype=jnp.dtype(options.head_dtype),
      rngs=nnx.Rngs(self._config.seed),
    )
    regressor = DenseRegressor(backbone, head)
    common.start_head(regressor, options.init, "dense_regression.init")
    return regressor

  def train_batches(self, start_example: int) -> pipeline.BatchIterator:
    return common.train_batches(self._config, self._train, self._train_transform(), start_example)

  def blank_example(self) -> batches.DenseTrainBatch:
    size = tuple(self._options.frame)
    record = dict(
      image=np.zeros((*size, 3), np.uint8),
      normals=np.zeros((*size, 3), np.float32),
      depth=np.zeros(size, np.float32),
    )
    return self._train_transform()(record, np.random.default_rng(0))

  def _train_transform(self) -> dense_transforms.DenseTrain:
    options = self._options
    return dense_transforms.DenseTrain(
      tuple(options.frame),
      self._targets,
      segmentation_transforms.RandomShortSide(tuple(options.short_sides), options.long_side, 1.0),
      self.eval_transform(),
      jitter=segmentation_transforms.ColourJitter() if options.colour_jitter else None,
      flip_probability=options.flip,
    )

  @property
  def extra_views(self) -> int:
    return len(self._options.test.scales) - 1

  @classmethod
  def with_image_size(cls, config: DenseRegressionConfig, size: tuple[int, int]) -> DenseRegressionConfig:
    return config.replace(
      {
        "dense_regression": dict(
          eval_frame=size, eval_short_side=0, eval_long_side=0, test=dict(scales=(1.0,))
        )
      }
    )

  def loss(
    self,
    model: DenseRegressor,
    batch: batches.DenseTrainBatch,
    features: base.Features,
    rng: jax.Array,
    state: None,
  ) -> base.Losses:
    return base.Losses(*model.head.losses(features, batch, rng))

  def predict(
    self, model: DenseRegressor, batch: batches.SegmentationEvalBatch, features: base.Features
  ) -> list[dict[str, jax.Array]]:
    """Maps and `sizes` of every view of testing, each at the size of its own frame."""
    views = []
    for i in range(len(self._options.test.scales)):
      ending = f".{i}" if i else ""
      images, sizes = batch[f"image{ending}"], batch[f"image_size{ending}"]
      if i:
        features = self.features(model, {"image": images, "image_size": sizes}, None)
      maps = model.head.predict(features, images.shape[1:3])
      if i and "depth" in maps:
        # What is shown larger looks nearer; see `data.dense.transforms`.
        larger = sizes[:, 0] / batch["image_size"][:, 0]
        maps["depth"] = maps["depth"] * larger[:, None, None, None]
      views.append(maps | {"sizes": sizes})
    return views

  def to_source(
    self,
    outputs: list[dict[str, jax.Array]],
    batch: base.Batch,
    largest_size: tuple[int, int] | None,
  ) -> dict[str, jax.Array]:
    """`normals` [b, h, w, 3] of length 1 and `depth` [b, h, w] at the size of the source images."""
    largest = largest_size or tuple(self._options.eval_frame)

    def one(arguments: tuple[list[dict[str, jax.Array]], jax.Array]) -> dict[str, jax.Array]:
      views, original = arguments
      mean = {}
      for name in self._targets:
        resized = [resize.resize_content(view[name], view["sizes"], original, largest) for view in views]
        mean[name] = sum(resized) / len(resized)
      return mean

    each = sharding.per_device(lambda *arrays: jax.lax.map(one, arrays))
    maps = each(outputs, batch["original_size"])
    if "normals" in maps:
      maps["normals"] = vectors.unit(maps["normals"])
    if "depth" in maps:
      maps["depth"] = maps["depth"][..., 0]
    return maps

  def evaluator(self) -> dense.DenseEvaluator:
    source = self._validation
    return dense.DenseEvaluator(source.truth, source.name, len(source), self._targets)

  def pictures(
    self, predictions: dict[str, np.ndarray], batch: batches.SegmentationEvalBatch, count: int
  ) -> dict[str, np.ndarray]:
    rows = min(count, int(np.sum(batch["example_valid"])))
    examples = []
    for row, maps in enumerate(dense_maps.DenseMaps.from_outputs(predictions, batch, rows, self.classes)):
      record = self._validation[int(batch["index"][row])]
      true = {name: record[name] for name in self._targets}
      predicted = dataclasses.asdict(maps)
      examples.append(visualize_dense.DenseComparison(record["image"], predicted, true, record["name"]))
    return {"predictions": visualize_dense.draw_dense_comparisons(examples)}

  def write_results(self, evaluator: dense.DenseEvaluator, folder: pathlib.Path) -> None:
    """`per_image.json`: the metrics of every image."""
    evaluator.write(folder, main_process=jax.process_index() == 0)


def _named(directions: np.ndarray) -> base.Classes:
  """Codewords as classes; a checkpoint keeps them, and its head means these directions for ever."""
  return tuple(
    {"id": index, "name": "({:.2f}, {:.2f}, {:.2f})".format(*direction), "normal": direction.tolist()}
    for index, direction in enumerate(directions)
  )


def _directions(classes: base.Classes) -> np.ndarray:
  """The codewords that classes stand for; of a plan, which has names only, evenly spread ones."""
  if all("normal" in one for one in classes):
    return np.array([one["normal"] for one in classes])
  return codewords.lattice(len(classes))


def _check_targets(source: sources.DenseSource, targets: tuple[str, ...]) -> None:
  """Raises ValueError where a source lacks a map that is to be learned."""
  lacking = [name for name in targets if name not in source.targets]
  if lacking:
    raise ValueError(
      f"{source!r} has {' and '.join(source.targets)}, no {' and '.join(lacking)}. Learn what it has: "
      f"--config.dense_regression.targets=\"('{source.targets[0]}',)\"."
    )


def _open_sources(config: DenseRegressionConfig) -> tuple[sources.DenseSource, sources.DenseSource]:
  """(training, validation) sources."""
  options = config.dense_regression
  form = folders.MapFormat(tuple(options.normal_signs), options.depth_unit)
  evaluated = dataclasses.replace(form, eigen_crop=options.eigen_crop)
  targets = tuple(options.targets)
  match options.data:
    case "rooms":
      sizes = dict(image_size=options.rooms.image_size, seed=config.seed)
      return (
        rooms.Rooms(options.rooms.train_images, split="train", **sizes),
        rooms.Rooms(options.rooms.validation_images, split="validation", **sizes),
      )
    case "nyuv2":
      root = common.existing_path(options.root, "dense_regression.root", folders.HOW_TO_GET)
      found = folders.nyuv2(root, "train", targets, form), folders.nyuv2(root, "test", targets, evaluated)
    case "files":
      found = _open_files(options, "train", form), _open_files(options, "validation", evaluated)
    case "prepared":
      root = common.existing_path(
        options.root,
        "dense_regression.root",
        "Make it with python -m frozen_vision.data.prepare nyuv2 --root NYUV2 --out FOLDER.",
      )
      return (
        prepared_dense.PreparedDense(root, "training", form),
        prepared_dense.PreparedDense(root, "validation", evaluated),
      )
    case other:
      raise ValueError(f"dense_regression.data is {other!r}; known: rooms, nyuv2, files, prepared.")
  return tuple(source.checked() for source in found) if config.data.check else found


def _open_files(options: DenseRegressionOptions, name: str, form: folders.MapFormat) -> folders.DenseFolders:
  """The source of the paths in the section `name`."""
  given, paths = getattr(options, name), {}
  for what in ("images", *options.targets):
    value = getattr(given, what)
    if not value:
      raise ValueError(f"dense_regression.data=files needs --config.dense_regression.{name}.{what}=FOLDER.")
    paths[what] = common.existing_path(
      pathlib.Path(options.root).expanduser() / value,
      f"dense_regression.{name}.{what}",
      "Give --config.dense_regression.root=FOLDER, or an absolute path.",
    )
  return folders.DenseFolders(paths.pop("images"), paths, form)
