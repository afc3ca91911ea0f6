"""What cached features are worth: images a second in the first pass and from the cache; writing to the disk.

  PYTHONPATH=. python experiments/benchmarks/feature_cache.py --folder=/tmp/cache --out=TABLE.md
  PYTHONPATH=. python experiments/benchmarks/feature_cache.py --folder=/tmp/cache --write_gigabytes=10

The first form trains two heads on a frozen backbone for two passes over generated images: a linear
classifier of embeddings on an image folder of scenes, and an attentive probe on clips. The first pass
computes and stores, the second reads. Speeds are of the steps of each pass without its first two, in one
process; evaluation, which ends a run, is not in them. The second form writes records of one megabyte through
the cache's writer, each shard synced to the disk, and says how many megabytes a second arrive in each
gigabyte: the later ones are past the memory that the system fills first.
"""

import pathlib
import shutil
import time

from absl import app, flags, logging
import jax
import ml_collections
import numpy as np
from PIL import Image

from experiments import tables
from frozen_vision import config as config_lib
from frozen_vision.data.generated import scenes
from frozen_vision.freezing import cache as feature_cache
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import feeds, loop, optimizer, programs

_FOLDER = flags.DEFINE_string(
  "folder", None, "Where data and caches go; below it `feature_cache` is replaced."
)
_BACKBONE = flags.DEFINE_string("backbone", "swinv2_nano", "Variant; others have random weights.")
_IMAGES = flags.DEFINE_integer("images", 512, "Images of a pass.")
_CLIPS = flags.DEFINE_integer("clips", 64, "Clips of a pass.")
_SIDE = flags.DEFINE_integer("side", 128, "Of images and frames, in pixels.")
_BATCH = flags.DEFINE_integer("batch", 16, "Examples of a step.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "That features are stored in.")
_GIGABYTES = flags.DEFINE_float("write_gigabytes", 0.0, "Only write so much, and time it.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")


def make_folder(folder: pathlib.Path) -> pathlib.Path:
  """JPEGs of scenes in two classes."""
  source = scenes.SceneSource(_IMAGES.value, image_size=_SIDE.value, seed=0)
  for index in range(_IMAGES.value):
    path = folder / f"class{index % 2}" / f"{index}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(source[index]["image"]).save(path, quality=90)
  return folder


def base_config(task: str, folder: pathlib.Path) -> ml_collections.ConfigDict:
  """A frozen backbone, and one view of every example."""
  config = tasks_build.default_config(task)
  config.backbone.name = _BACKBONE.value
  if _BACKBONE.value != "swinv2_nano":
    config.backbone.weights = "random"
  config.trainable = ("head/.*",)
  config.batch_size = _BATCH.value
  config.cache.update(dict(path=str(folder / "cache"), views=1, dtype=_DTYPE.value))
  return config


def linear(folder: pathlib.Path) -> ml_collections.ConfigDict:
  config = base_config("classification", folder)
  images = str(make_folder(folder / "images"))
  config.classification.update(
    dict(train=images, validation=images, image_size=_SIDE.value, mixup=0.0, cutmix=0.0)
  )
  return config


def attentive(folder: pathlib.Path) -> ml_collections.ConfigDict:
  config = base_config("action", folder)
  config.action.update(dict(data="clips", image_size=_SIDE.value, frames=8, stride=1, crop_scale=()))
  config.action.clips.update(dict(train_clips=_CLIPS.value, validation_clips=_BATCH.value, frames=8))
  config.action.head.name = "attentive"
  config_lib.set_for(config.action.head, "attentive", levels=(-1,), channels=64, num_heads=4)
  return config


def passes(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Examples a second of the first and of the second pass, and the bytes of an example."""
  config = tasks_build.read_config(config)
  task, config, _, mesh = loop._open(config, "train")  # pylint: disable=protected-access
  model = loop.build_model(task, config, mesh)
  tx = optimizer.build(config.optimizer, steps=1000, trainable=model.trainable, layer_of=model.layer_of)
  state, layout = loop._initial_state(task, model, tx, config, mesh)  # pylint: disable=protected-access
  found = {}
  with jax.set_mesh(mesh), feeds.Cached(task, model, config, mesh) as feed:
    steps = feed.order.length // config.batch_size
    batch = next(feed)
    step = programs.compile_steps(task, model, tx, config, state, layout, feed, batch, mesh)[task.phases[0]]
    for name in ("first", "second"):
      for number in range(steps):
        if number == 2:
          jax.block_until_ready(state)
          started = time.perf_counter()
        state, _ = step(state, model.frozen, *feed.place(batch))
        batch = next(feed)
      jax.block_until_ready(state)
      found[name] = (steps - 2) * config.batch_size / (time.perf_counter() - started)
    found["bytes"] = feed.store.record_bytes
  return found


def write(folder: pathlib.Path, gigabytes: float) -> list[float]:
  """MB/s of each gigabyte, or part of one, that is written."""
  record = np.random.default_rng(0).integers(0, 256, (1, 10**6), np.uint8)
  speeds, per_part = [], min(1000, round(gigabytes * 1000))
  cache = feature_cache.FeatureCache(folder / "written", {"benchmark": "written"})
  cache.announce(round(gigabytes * 1000), record.nbytes)
  with cache.writing() as writer:
    for start in range(0, round(gigabytes * 1000), per_part):
      started = time.perf_counter()
      for index in range(start, start + per_part):
        writer.add([index], {"features.0": record})
      writer.flush()
      speeds.append(per_part / (time.perf_counter() - started))
  return speeds


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
  if not _FOLDER.value:
    raise app.UsageError("--folder=FOLDER says where data and caches go.")
  logging.set_verbosity(logging.ERROR)
  folder = pathlib.Path(_FOLDER.value) / "feature_cache"
  shutil.rmtree(folder, ignore_errors=True)
  try:
    if _GIGABYTES.value:
      speeds = write(folder, _GIGABYTES.value)
      print("MB/s of each gigabyte, synced:", " ".join(f"{speed:.0f}" for speed in speeds))
      return
    rows = []
    for name, make in (("linear, embeddings", linear), ("attentive, maps of 8 frames", attentive)):
      found = passes(make(folder / make.__name__))
      ratio = found["second"] / found["first"]
      rows.append(
        [name, f"{found['first']:.1f}", f"{found['second']:.1f}", f"{ratio:.1f}", f"{found['bytes']:,.0f}"]
      )
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  lines = [
    f"Heads on a frozen {_BACKBONE.value} at {_SIDE.value} px, {_BATCH.value} examples a step, features "
    f"stored in {_DTYPE.value}, on {jax.devices()[0].device_kind} with {tables.versions()}.",
    "",
    "| head | first pass, examples/s | from the cache, examples/s | ratio | bytes per example |",
    "|---|---|---|---|---|",
    *(f"| {' | '.join(row)} |" for row in rows),
    "",
  ]
  tables.publish("\n".join(lines), _OUT.value)


if __name__ == "__main__":
  app.run(main)
