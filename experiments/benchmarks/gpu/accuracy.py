"""Part 1: features of SwinV2 on this device against the golden files of the reference implementation."""

from collections.abc import Callable, Mapping
import contextlib
import json
import os
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu import report, timing
from frozen_vision.backbones.swinv2 import checkpoints
from frozen_vision.backbones.swinv2 import model as swinv2
from frozen_vision.files import tensors
from tests import golden_values

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_PRETRAINED_WINDOWS = {
  "swinv2_w8": (0, 0, 0, 0),
  "swinv2_w12from8": (8, 8, 8, 4),
  "swinv2_w16": (0, 0, 0, 0),
}
# Largest error over the largest number of the reference. Float32 products in full precision are held to what
# the tests hold a CPU to, with room for another order of summation; rounded products are not what a golden
# file can judge closely.
_PRECISIONS = {
  "float32, highest": (jnp.float32, "highest", 1e-4),
  "float32, default": (jnp.float32, None, 2e-2),
  "bfloat16": (jnp.bfloat16, None, 1e-1),
}


def golden_folder() -> pathlib.Path | None:
  """The folder of golden files: in the tests, at $FROZEN_VISION_GOLDEN, or beside the checkout."""
  variable = os.environ.get("FROZEN_VISION_GOLDEN")
  folders = [_ROOT / "tests" / "golden", _ROOT.parent / "shared" / "golden"]
  for folder in ([pathlib.Path(variable)] if variable else []) + folders:
    if all(
      (folder / f"{name}.{ending}").exists() for name in _PRETRAINED_WINDOWS for ending in ("json", "npz")
    ):
      return folder
  return None


def errors(outputs: Any, golden: Mapping[str, np.ndarray], head: Any) -> dict[str, float]:
  """{output: largest error over the reference's largest number}."""
  features, pooled = outputs
  found = {
    f"stage{index}": np.asarray(x, np.float32).transpose(0, 3, 1, 2)[:, :: max(1, x.shape[-1] // 16)]
    for index, x in enumerate(features)
  }
  found["logits"] = np.asarray(pooled, np.float32) @ head.kernel + head.bias
  return {
    name: float(np.abs(values - golden[name]).max() / np.abs(golden[name]).max())
    for name, values in found.items()
  }


def _program(precision: str | None) -> Callable[[Any, jax.Array], Any]:
  """(backbone, images) -> (features, pooled vector), its products in a precision."""

  def apply(backbone: Any, images: jax.Array) -> Any:
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
      return backbone(images), backbone.embed(images)

  return apply


def run(table: report.Report) -> None:
  folder = golden_folder()
  if folder is None:
    raise FileNotFoundError(
      f"No golden files {sorted(_PRETRAINED_WINDOWS)} (.json, .npz) in tests/golden; "
      "set FROZEN_VISION_GOLDEN to the folder that has them."
    )
  failed = []
  for name in list(_PRETRAINED_WINDOWS)[: 1 if table.tiny else None]:
    golden = np.load(folder / f"{name}.npz")
    checkpoint, images = _open(folder, name)
    programs = {}
    for label, (dtype, precision, _) in _PRECISIONS.items():
      if table.tiny and label == "float32, default":
        continue
      graphdef, state = nnx.split(
        nnx.eval_shape(lambda dtype=dtype: swinv2.SwinV2(checkpoint.config, dtype=dtype, rngs=nnx.Rngs(0)))
      )
      backbone = nnx.merge(graphdef, tensors.fill(state, checkpoint.leaves, folder / name))
      programs["folded", label] = _program(precision), (backbone.fold(), images)
      if not table.tiny:
        programs["as it trains", label] = _program(precision), (backbone, images)
    for (form, label), program in timing.compile_all(programs, quick=table.tiny).items():
      found = errors(program.call(*programs[form, label][1]), golden, checkpoint.head())
      features, bound = max(value for key, value in found.items() if key != "logits"), _PRECISIONS[label][2]
      ok = max(features, found["logits"]) <= bound
      failed += [] if ok else [f"{name} {form} {label}"]
      table.add(
        golden=name,
        form=form,
        dtype=label,
        features=features,
        logits=found["logits"],
        bound=bound,
        ok="yes" if ok else "NO",
      )
  if failed:
    table.note(f"Beyond the bound: {', '.join(failed)}.")
    raise ArithmeticError(f"Features differ from the golden files: {', '.join(failed)}.")


def _open(folder: pathlib.Path, name: str) -> tuple[checkpoints.Checkpoint, jax.Array]:
  """The weights and the images of a golden file."""
  spec = json.loads((folder / f"{name}.json").read_text())
  leaves = {
    key: tensors.LazyTensor(value.shape, value.dtype, lambda value=value: value)
    for key, value in golden_values.state_dict(spec).items()
  }
  checkpoint = checkpoints.map_tensors(
    leaves,
    folder / name,
    depths=tuple(spec["depths"]),
    window_size=spec["window"],
    pretrained_window_sizes=_PRETRAINED_WINDOWS[name],
  )
  images = golden_values.values(spec["seed"], "images", (2, 3, spec["image"], spec["image"]))
  return checkpoint, jnp.asarray(images.transpose(0, 2, 3, 1))


PART = report.Part(
  "Features of SwinV2 against the golden files",
  dict(
    golden="golden file",
    form="form",
    dtype="dtype of the products",
    features="features, relative error",
    logits="logits, relative error",
    bound="bound",
    ok="within",
  ),
  run,
)
