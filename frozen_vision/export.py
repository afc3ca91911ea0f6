"""A backbone and its heads as one program that runs without this package, on CPU, CUDA and TPU.

    python -m frozen_vision.export --workdir=RUN --out=detector.jaxexport

writes the program (StableHLO, `jax.export`) and, beside it, `detector.jaxexport.safetensors`, its weights: a
program that held gigabytes of constants would be compiled with them each time. Several heads that share a
backbone pass, `--workdir=RUN1 --workdir=RUN2`, are one program. `experiments/run_exported.py` runs it with
jax, numpy and safetensors alone.

The program is a function (weights, images, image_size) -> {head: {name: array}}:

    weights      {name: array} of the `.safetensors` file
    images       uint8 [b, h, w, 3]: RGB, the content at the top left, zeros elsewhere; of action recognition
                 uint8 [b, views, t, h, w, 3]. The shape is fixed at the export.
    image_size   int32 [b, 2]: (height, width) of the content of each image in pixels

and gives for each head

    detection                boxes [b, k, 4] xyxy in input pixels, scores, labels, valid [b, k]; with masks
                             also masks [b, k, m, m], probabilities inside each box
    segmentation             label_map uint8 [b, h, w], class index of every input pixel; 0 in the padding
    dense_regression         normals float32 [b, h, w, 3], unit vectors, and depth float32 [b, h, w] in metres
    action, classification   probabilities [b, classes]

The metadata of the `.safetensors` file says, as JSON under `frozen_vision`, which classes each head has, how
its images are resized, and the shape of the images. bfloat16 weights of a backbone that was folded on a CPU
are stored as their bits, uint16; the program takes them so on every platform.
"""

import argparse
from collections.abc import Mapping, Sequence
import json
import logging
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import safetensors.flax

from frozen_vision import command_line, failures, output
from frozen_vision.files import atomic, lock
from frozen_vision.prediction import predictor as predict
from frozen_vision.prediction import trained_head
from frozen_vision.runs import state_leaves

PLATFORMS = ("cpu", "cuda", "tpu")

_logger = logging.getLogger(__name__)


def export(
  predictor: predict.Predictor,
  path: str | pathlib.Path,
  *,
  batch_size: int = 1,
  platforms: Sequence[str] = PLATFORMS,
) -> dict[str, Any]:
  """Writes `path`, the program, and `path.safetensors`, its weights; see the module.

  Args:
    predictor: all of its heads share one pass; only the whole input is looked at, which is what
      `Predictor(..., image_size=...)` makes sure of.
    batch_size: images of one call.
    platforms: that the program is lowered for.

  Returns:
    What the weights file remembers.

  Raises:
    ValueError: heads with several passes or views, or an unknown platform.
  """
  unknown = sorted(set(platforms) - set(PLATFORMS))
  if unknown or not platforms:
    raise ValueError(f"platforms are {list(platforms)}; known: {', '.join(PLATFORMS)}.")
  function, weights, meta = program(predictor)
  shape = (batch_size, *meta["image_shape"])
  abstract = (
    {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()},
    jax.ShapeDtypeStruct(shape, np.uint8),
    jax.ShapeDtypeStruct((batch_size, 2), np.int32),
  )
  exported = jax.export.export(jax.jit(function, keep_unused=True), platforms=tuple(platforms))(*abstract)
  path = pathlib.Path(path)
  meta |= {"images": list(shape), "platforms": list(platforms)}
  with lock.hold(f"{path}.lock", f"the program {path}"):
    with atomic.path_aside(f"{path}.safetensors") as aside:
      safetensors.flax.save_file(weights, aside, metadata={"frozen_vision": json.dumps(meta)})
    atomic.write_bytes(path, exported.serialize())
  return meta


def program(predictor: predict.Predictor) -> tuple[Any, dict[str, jax.Array], dict[str, Any]]:
  """(function of (weights, images, image_size), its weights, what to remember about it).

  Raises:
    ValueError: heads with several passes or views.
  """
  if len(predictor.passes) != 1:
    raise ValueError(
      "An exported program has one backbone pass, and these heads have several; export them one by one, or "
      "give image_size if only their frames differ:\n" + predictor.describe()
    )
  heads = predictor.passes[0].heads
  for head in heads:
    if head.task.extra_views or not head.task.takes_features:
      raise ValueError(
        f"{head.name} looks at several views or windows of an image, an exported program at the whole of "
        "it once; give image_size."
      )
  flat, trees = {}, {}
  for head in heads:
    leaves, structure = state_leaves.flatten(head.parts)
    names = [_weight_name(path, head.name) for path in leaves]
    flat |= dict(zip(names, leaves.values()))  # of a shared backbone once
    trees[head.name] = names, structure
  first = heads[0]
  _, example = first.task.read_input(np.zeros((*(1,) * (first.media == "video"), 8, 8, 3), np.uint8))
  shape = example[first.task.input_name].shape

  def function(weights: Mapping[str, jax.Array], images: jax.Array, image_size: jax.Array) -> dict[str, Any]:
    parts = {
      name: jax.tree.unflatten(structure, [weights[key] for key in names])
      for name, (names, structure) in trees.items()
    }
    batch = {first.task.input_name: images, "image_size": image_size, "original_size": image_size}
    features = first.compute_features(parts[first.name], batch)
    outputs = {}
    for head in heads:
      found = head.compute_outputs(parts[head.name], batch, features)
      found = head.task.to_source(found, batch, None if first.media == "video" else shape[:2])
      found = {name: found[name] for name in head.task.result_type.exported if name in found}
      outputs[head.name] = found
    return outputs

  meta = {
    "heads": {
      head.name: {"task": head.config.task, "classes": list(head.classes), "step": head.step}
      for head in heads
    },
    "view": dict(first.task.view),
    "image_shape": list(shape),
  }
  return function, flat, meta


def _weight_name(path: str, head: str) -> str:
  """`backbone/...`, which heads share, or `HEAD/neck/...`, `HEAD/head/...`."""
  name = path.split("/", 1)[1]
  return name if name.startswith("backbone/") else f"{head}/{name}"


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m frozen_vision.export",
    description="Writes a backbone with its heads as a program that runs without this package.",
  )
  parser.add_argument(
    "--workdir",
    type=command_line.path,
    action="append",
    required=True,
    metavar="[NAME=]RUN",
    help="workdir of a run; several heads may share a backbone",
  )
  parser.add_argument(
    "--out", type=os.path.expanduser, required=True, help="the program; its weights go to OUT.safetensors"
  )
  parser.add_argument("--platforms", default=",".join(PLATFORMS), help="default: %(default)s")
  parser.add_argument("--batch_size", type=int, default=1, help="images of one call; default: %(default)s")
  parser.add_argument("--image_size", default="", metavar="HEIGHT,WIDTH", help="default: as evaluated")
  parser.add_argument(
    "--backbone", type=os.path.expanduser, default=None, help="weights in place of those of the configs"
  )
  parser.add_argument("--best", action="store_true", help="read the best checkpoints instead of the newest")
  options = parser.parse_args(arguments)
  logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
  try:
    size = tuple(int(side) for side in options.image_size.split(",") if side)
    predictor = predict.Predictor(
      options.backbone,
      trained_head.named(options.workdir),
      image_size=size[0] if len(size) == 1 else size or None,
      best=options.best,
    )
    meta = export(
      predictor, options.out, batch_size=options.batch_size, platforms=options.platforms.split(",")
    )
  except Exception as error:
    parser.exit(1, failures.report(error) + "\n")
  _logger.info("%s", predictor.describe())
  size = pathlib.Path(options.out).stat().st_size
  _logger.info(
    "%s: %.2f MB of program for %s, images %s; %s.safetensors: weights.",
    options.out,
    size / 1e6,
    ", ".join(meta["platforms"]),
    meta["images"],
    options.out,
  )


if __name__ == "__main__":
  output.protect()
  main()
