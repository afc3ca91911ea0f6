"""How far features move when frozen weights are stored as bfloat16 or int8: per feature map, against float32.

  PYTHONPATH=. python experiments/benchmarks/drift.py --out=experiments/results/drift.md

Random weights (--weights=random), those of a config's weights=random, whose blocks are not the identity; or
--weights=FILE or a name that load_backbone knows, then of one backbone. The image is noise, or --image=FILE.
"""

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments import tables
from frozen_vision.backbones import base
from frozen_vision.config import BackboneOptions
from frozen_vision.planning import machines
from frozen_vision.tasks import common

_DEFAULT = [
  "swinv2_b",
  "swinv2_l",
  "dinov3_vitb16",
  "dinov3_vitl16",
  "clip_vitb16",
  "resnet50",
  "convnext_tiny",
]
_BACKBONES = flags.DEFINE_list("backbones", _DEFAULT, "Rows of the families' tables.")
_WEIGHTS = flags.DEFINE_string("weights", "random", "random, or what load_backbone takes.")
_SIZE = flags.DEFINE_integer("image_size", 192, "Side of the image.")
_WINDOW = flags.DEFINE_integer("window", 12, "Window of a random SwinV2, where its maps are as large.")
_IMAGE = flags.DEFINE_string("image", None, "A picture; noise, if absent.")
_SEED = flags.DEFINE_integer("seed", 0, "Of weights and noise.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")

# name: arguments of fold
FORMS = {
  "weights bfloat16, computed in float32": dict(storage="bfloat16"),
  "weights and computation bfloat16": dict(dtype=jnp.bfloat16),
  "weights int8, computed in float32": dict(storage="int8"),
  "weights int8, computed in bfloat16": dict(storage="int8", dtype=jnp.bfloat16),
}


def distance(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float, float]:
  """(mean cosine over positions, smallest of them, relative error) of features [b, h, w, c]."""
  found, wanted = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (found, wanted))
  lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
  cosine = np.sum(found * wanted, axis=-1) / lengths
  return cosine.mean(), cosine.min(), np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def open_backbone(name: str) -> base.Backbone:
  """The backbone of --weights; the windows of a random SwinV2 are --window, where its maps are as large."""
  overrides = {}
  if _WEIGHTS.value == "random" and name.startswith("swinv2"):
    windows = tuple(min(_WINDOW.value, _SIZE.value // (4 * 2**stage)) for stage in range(4))
    overrides = dict(window_sizes=windows, pretrained_window_sizes=windows)
  options = BackboneOptions(name=name, weights=_WEIGHTS.value, overrides=overrides)
  return common.load_backbone(options, _SEED.value)


def measure(name: str) -> list[tuple[str, int, float, float, float]]:
  """(form, number of the map, mean cosine, smallest cosine, relative error) of one backbone."""
  backbone, side = open_backbone(name), _SIZE.value
  if _IMAGE.value:
    picture = Image.open(_IMAGE.value).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    images = backbone.preprocessing.normalise(jnp.asarray(picture)[None])
  else:
    images = jax.random.normal(jax.random.key(_SEED.value), (1, side, side, 3))
  run = jax.jit(lambda folded, images: folded(images))
  wanted = jax.device_get(run(backbone.fold(), images))
  rows = []
  for form, options in FORMS.items():
    found = jax.device_get(run(backbone.fold(**options), images))
    rows += [(form, number + 1, *distance(*pair)) for number, pair in enumerate(zip(found, wanted))]
  return rows


def _main(argv: list[str]) -> None:
  del argv
  lines = [
    "| backbone | frozen part | map | cosine similarity, mean over positions | smallest | relative error |",
    "|---|---|---|---|---|---|",
  ]
  for name in _BACKBONES.value:
    for form, number, mean, least, error in measure(name):
      lines.append(f"| {name} | {form} | {number} | {mean:.6f} | {least:.6f} | {error:.5f} |")
  text = "\n".join(lines) + "\n"
  print(text)
  what = "random weights" if _WEIGHTS.value == "random" else _WEIGHTS.value
  tables.write(
    f"Made by `experiments/benchmarks/drift.py`: {what}, {_SIZE.value} px, window {_WINDOW.value}, "
    f"{_IMAGE.value or 'noise'}, seed {_SEED.value}, "
    f"{jax.devices()[0].device_kind} ({machines.processor()}). "
    f"Against the same weights folded in float32.\n\n{text}",
    _OUT.value,
  )


if __name__ == "__main__":
  app.run(_main)
