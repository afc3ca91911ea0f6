"""Frozen models on weights of every source, on the devices of one or several processes.

Run by the launcher: python -m tests.weights_run FOLDER, where `write_files` wrote. Each process writes what
it found of each source to FOLDER/COUNT_INDEX.json.
"""

import json
import pathlib
import sys
from typing import Any

from flax import nnx
import jax
import numpy as np
import safetensors.numpy

from frozen_vision.backbones import base, families
from frozen_vision.config import BackboneOptions
from frozen_vision.devices import processes, sharding
from frozen_vision.files import trees
from frozen_vision.freezing import prepare
from frozen_vision.runs import digests
from tests import tiny
from tests.backbones.swinv2 import checkpoint_sources
from tests.files import pth_file

_SIDE = 32


def write_files(folder: pathlib.Path) -> None:
  """Writes the same small weights as two public checkpoints and in our own format."""
  small = tiny.SMALL_BACKBONE
  state = checkpoint_sources.timm(small["embed_dim"], small["depths"], small["num_heads"], classes=5)
  rng = np.random.default_rng(0)
  state = {key: 0.1 * rng.standard_normal(value.shape).astype(np.float32) for key, value in state.items()}
  pth_file.write(folder / "public.pth", {"model": checkpoint_sources.microsoft(state)})
  safetensors.numpy.save_file(checkpoint_sources.transformers(state), folder / "public.safetensors")
  own = families.load_backbone(folder / "public.pth", **small)
  families.save_backbone(own, folder / "own.safetensors", name="small")


def all_sources(folder: pathlib.Path) -> dict[str, BackboneOptions]:
  """The section `config.backbone` of every source of weights; files are those of `write_files`."""
  files = {name: str(folder / name) for name in ("own.safetensors", "public.pth", "public.safetensors")}
  sources = {
    name: BackboneOptions(weights=weights, overrides=tiny.SMALL_BACKBONE)
    for name, weights in (files | {"random": "random", "init": "init"}).items()
  }
  lite = BackboneOptions(name="efficientnet_lite0", weights="efficientnet_lite0")
  return sources | {"shipped": BackboneOptions(weights="shipped"), "package": lite}


class _Probe(nnx.Module):
  """A backbone and a head, as little as a task has."""

  def __init__(self, backbone: base.Backbone):
    self.backbone = backbone
    self.head = nnx.Linear(4, 3, rngs=nnx.Rngs(0))


def reports(folder: pathlib.Path, mesh: jax.sharding.Mesh) -> dict[str, dict[str, Any]]:
  """What all processes must agree on, for every source, folded and not folded.

  That is the fingerprint and checksums of all leaves; for the file of ours also features, and the same of a
  backbone that trains.
  """
  found = {}
  for name, options in all_sources(folder).items():
    for fold in (True, False):
      model = _model(options, mesh, "head/.*", fold)
      found[f"{name}, {'folded' if fold else 'not folded'}"] = dict(
        fingerprint=model.feature_key["weights"],
        digests=_digests(model),
        features=_features(model, mesh).tolist() if name == "own.safetensors" else [],
      )
  trained = _model(all_sources(folder)["own.safetensors"], mesh, ".*", True)
  return found | {"trained": dict(digests=_digests(trained), features=_features(trained, mesh).tolist())}


def _model(options: BackboneOptions, mesh: jax.sharding.Mesh, trainable: str, fold: bool) -> prepare.Model:
  source = prepare.open_source(options, seed=3)
  return prepare.prepare(_Probe, source, trainable=[trainable], fold=fold, mesh=mesh)


def _digests(model: prepare.Model) -> dict[str, str]:
  parts = {part: trees.flatten(getattr(model, part)) for part in ("trainable", "mutable", "frozen")}
  return digests.of_leaves(
    {f"{part}/{path}": leaf for part, leaves in parts.items() for path, leaf in leaves.items()}
  )


def _features(model: prepare.Model, mesh: jax.sharding.Mesh) -> np.ndarray:
  """Means over the last map of four images of noise."""
  images = np.random.default_rng(1).standard_normal((4, _SIDE, _SIDE, 3), np.float32)

  def features(parts, images):
    return nnx.merge(model.graphdef, *parts).backbone(images)[-1].mean(axis=(1, 2))

  with jax.set_mesh(mesh):
    compiled = jax.jit(features, out_shardings=sharding.replicated(mesh))
    return np.asarray(compiled((model.trainable, model.mutable, model.frozen), images))


def main(folder: str) -> None:
  processes.initialize()
  found = reports(pathlib.Path(folder), sharding.make_mesh())
  path = pathlib.Path(folder) / f"{jax.process_count()}_{jax.process_index()}.json"
  path.write_text(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
