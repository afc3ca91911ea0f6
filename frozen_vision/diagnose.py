"""Measures and draws how backbones look at images.

  python -m frozen_vision.diagnose --backbones=swinv2_nano,dino_vits16:dino.pth --out=DIR

Writes DIR/diagnostics.json, .md and pictures: how far each attention head looks and how alike the heads of a
block are, of SwinV2 and plain ViTs; and how alike the feature maps of every two backbones are (CKA), of any.
Backbones are given as to `--mode=report`. The images are those of a folder, or the photographs that come with
the package.
"""

import argparse
from collections.abc import Sequence
import itertools
import os
import pathlib
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float, UInt8
from matplotlib import figure as mpl_figure
from matplotlib.backends import backend_agg
import numpy as np
from PIL import Image

from frozen_vision.backbones.base import Backbone
from frozen_vision.data import images as image_io
from frozen_vision.data.detection import photos
from frozen_vision.diagnostics import attention, similarity
from frozen_vision.files import atomic
from frozen_vision.report import entries
from frozen_vision.tasks import common

_BATCH = 8
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def diagnose(
  backbones: dict[str, Backbone], images: UInt8[np.ndarray, "n h w 3"], out: str | os.PathLike[str]
) -> dict[str, Any]:
  """Measures backbones on images, and writes the files of the module's docstring to the folder `out`.

  Args:
    backbones: by what tables and pictures call them.
    images: RGB, at least four; of them whole batches of eight are used, or all of fewer.

  Returns:
    What `diagnostics.json` holds.
  """
  size = min(_BATCH, len(images))
  batches = [images[i : i + size] for i in range(0, len(images) - size + 1, size)]
  report: dict[str, Any] = {
    "images": size * len(batches),
    "side": images.shape[1:3],
    "attention": {},
    "cka": [],
  }
  for name, backbone in backbones.items():
    try:
      heads = attention.measure(backbone, (backbone.preprocessing.normalise(batch) for batch in batches))
    except ValueError as error:
      report["attention"][name] = str(error)
      continue
    report["attention"][name] = [
      dict(distances=block.distances.tolist(), similarity=block.similarity) for block in heads
    ]
  vectors = {name: _vectors(backbone, batches) for name, backbone in backbones.items()}
  for first, second in itertools.combinations_with_replacement(backbones, 2):
    found = similarity.cka(zip(vectors[first], vectors[second]))
    report["cka"].append(dict(first=first, second=second, values=found.tolist()))
  folder = pathlib.Path(out)
  folder.mkdir(parents=True, exist_ok=True)
  atomic.write_json(folder / "diagnostics.json", report, indent=1)
  atomic.write_text(folder / "diagnostics.md", _markdown(report))
  _draw_attention(report, folder / "attention.png")
  _draw_cka(report, folder / "cka.png")
  return report


def _vectors(
  backbone: Backbone, batches: Sequence[UInt8[np.ndarray, "b h w 3"]]
) -> list[list[Float[np.ndarray, "b _c"]]]:
  """Feature maps of all levels, averaged over positions, for every batch."""
  graphdef, state = nnx.split(backbone)

  @jax.jit
  def maps(state, images):
    module = nnx.merge(graphdef, state)
    found = module(module.preprocessing.normalise(images))
    return [jnp.mean(x.astype(jnp.float32), axis=(1, 2)) for x in found]

  return [jax.device_get(maps(state, batch)) for batch in batches]


def _markdown(report: dict[str, Any]) -> str:
  lines = [
    "# Diagnostics",
    "",
    f"{report['images']} images of {report['side'][0]} x {report['side'][1]} px.",
    "",
  ]
  lines += ["| backbone | block | mean distance in px, by head | similarity of heads |", "|---|---|---|---|"]
  for name, blocks in report["attention"].items():
    if isinstance(blocks, str):
      lines.append(f"| {name} | | {blocks} | |")
      continue
    for index, block in enumerate(blocks):
      heads = ", ".join(f"{distance:.1f}" for distance in sorted(block["distances"]))
      lines.append(f"| {name} | {index} | {heads} | {block['similarity']:.3f} |")
  lines += ["", "CKA of the maps of two backbones, averaged over positions:", ""]
  lines += ["| maps of | with those of | rows: levels of the first |", "|---|---|---|"]
  for pair in report["cka"]:
    values = "; ".join(" ".join(f"{value:.2f}" for value in row) for row in pair["values"])
    lines.append(f"| {pair['first']} | {pair['second']} | {values} |")
  return "\n".join([*lines, ""])


def _draw_attention(report: dict[str, Any], path: pathlib.Path) -> None:
  """Distance of every head and similarity of heads, by depth; a column for each backbone."""
  known = {name: blocks for name, blocks in report["attention"].items() if not isinstance(blocks, str)}
  if not known:
    return
  figure = _figure(4.2 * len(known), 6.0)
  axes = figure.subplots(2, len(known), squeeze=False, sharey="row")
  for column, (name, blocks) in zip(axes.T, known.items()):
    for index, block in enumerate(blocks):
      column[0].plot(
        [index] * len(block["distances"]), block["distances"], "o", color="tab:blue", markersize=4
      )
    column[0].set_title(name, loc="left", fontsize=11)
    column[1].plot([block["similarity"] for block in blocks], "o-", color="tab:orange", markersize=4)
    column[1].set_ylim(0, 1.02)
    column[1].set_xlabel("block")
    for panel in column:
      panel.grid(alpha=0.25)
      panel.xaxis.get_major_locator().set_params(integer=True)
  axes[0, 0].set_ylabel("mean attention distance of a head, px")
  axes[1, 0].set_ylabel("cosine similarity of heads")
  _save(figure, path)


def _draw_cka(report: dict[str, Any], path: pathlib.Path) -> None:
  pairs = report["cka"]
  figure = _figure(3.2 * len(pairs), 3.4)
  for panel, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs):
    values = np.array(pair["values"])
    panel.imshow(values, vmin=0, vmax=1, cmap="viridis")
    for (row, column), value in np.ndenumerate(values):
      panel.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.7 else "k")
    panel.set_xlabel(f"level of {pair['second']}")
    panel.set_ylabel(f"level of {pair['first']}")
    panel.set_xticks(range(values.shape[1]))
    panel.set_yticks(range(values.shape[0]))
    panel.set_title("CKA", loc="left", fontsize=11)
  _save(figure, path)


def _figure(width: float, height: float) -> mpl_figure.Figure:
  figure = mpl_figure.Figure((width, height), dpi=120, layout="constrained")
  backend_agg.FigureCanvasAgg(figure)
  return figure


def _save(figure: mpl_figure.Figure, path: pathlib.Path) -> None:
  with atomic.open_aside(path) as file:
    figure.savefig(file, format="png")


def read_images(folder: str | os.PathLike[str], side: int, count: int) -> UInt8[np.ndarray, "n side side 3"]:
  """The first images of a folder in the order of their names, their middle squares resized bicubically.

  Raises:
    ValueError: fewer than four images.
    ImageError: one that cannot be read.
  """
  paths = sorted(
    path for path in pathlib.Path(folder).expanduser().rglob("*") if path.suffix.lower() in _SUFFIXES
  )
  if len(paths) < 4:
    raise ValueError(f"{folder}: {len(paths)} images; expected at least 4 of {', '.join(_SUFFIXES)}.")
  found = []
  for path in paths[:count]:
    picture = Image.fromarray(image_io.decode_image(path))
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    square = picture.crop((left, top, left + edge, top + edge))
    found.append(np.asarray(square.resize((side, side), Image.Resampling.BICUBIC)))
  return np.stack(found)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m frozen_vision.diagnose",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--backbones", required=True, help="comma-separated, as to --mode=report")
  parser.add_argument("--out", required=True, help="the folder to write to")
  parser.add_argument("--images", help="a folder of images; by default the built-in photographs")
  parser.add_argument(
    "--side", type=int, default=224, help="of the squares that the backbones see, in pixels"
  )
  parser.add_argument("--count", type=int, default=32, help="how many images, at the most")
  options = parser.parse_args(arguments)
  try:
    named = entries.read(options.backbones.split(","))
    images = read_images(options.images or photos.sample_photos().images, options.side, options.count)
    backbones = {entry.label: common.load_backbone(entry.options, 0) for entry in named}
    diagnose(backbones, images, options.out)
  except (OSError, ValueError) as error:
    print(f"Error: {error}", file=sys.stderr)
    return 1
  print((pathlib.Path(options.out) / "diagnostics.md").read_text(encoding="utf-8"))
  return 0


if __name__ == "__main__":
  sys.exit(main())
