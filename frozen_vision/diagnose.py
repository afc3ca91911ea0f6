"""Measures and draws how backbones look at images.

  python -m frozen_vision.diagnose --backbones=swinv2_nano,dino_vits16:dino.pth --out=DIR

Writes DIR/diagnostics.json, .md and pictures: how far each attention head looks and how alike the heads of a
block are, of SwinV2 and plain ViTs; and how alike the feature maps of every two backbones are (CKA), of any.
`--measures=diffusion,reconstruction` takes longer: over how much of an image attention spreads, and what
image comes back from the last feature map, with its error in red, green and blue. Backbones are given as to
`--mode=report`. The images are those of a folder, or the photographs that come with the package.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import itertools
import logging
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

from frozen_vision import output
from frozen_vision.backbones.base import Backbone
from frozen_vision.data import images as image_io
from frozen_vision.data.detection import photos
from frozen_vision.diagnostics import attention, diffusion, inversion, similarity
from frozen_vision.files import atomic
from frozen_vision.report import entries
from frozen_vision.tasks import common

_logger = logging.getLogger(__name__)
_BATCH = 8
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MEASURES = ("attention", "cka", "diffusion", "reconstruction")


@dataclasses.dataclass(frozen=True)
class SlowOptions:
  """Of diffusion and reconstruction.

  Attributes:
    images: how many they look at.
    occluder, stride: side of the square that covers the image, and the steps in which it moves, in pixels.
    steps: of training the network that draws an image, each a pass through the backbone and back.
    seed: of that network.
  """

  images: int = 4
  occluder: int = diffusion.SIZE
  stride: int = 1
  steps: int = inversion.STEPS
  seed: int = 0


def diagnose(
  backbones: dict[str, Backbone],
  images: UInt8[np.ndarray, "n h w 3"],
  out: str | os.PathLike[str],
  *,
  measures: Sequence[str] = ("attention", "cka"),
  slow: SlowOptions = SlowOptions(),
) -> dict[str, Any]:
  """Measures backbones on images, and writes the files of the module's docstring to the folder `out`.

  Args:
    backbones: by what tables and pictures call them.
    images: RGB, at least four; attention and CKA use whole batches of eight of them, or all of fewer.
    measures: of `MEASURES`.
    slow: of diffusion and reconstruction.

  Returns:
    What `diagnostics.json` holds.

  Raises:
    ValueError: an unknown measure, or a square that does not fit the images.
  """
  if unknown := [name for name in measures if name not in MEASURES]:
    raise ValueError(f"{unknown[0]!r} is no measure; known: {', '.join(MEASURES)}.")
  size = min(_BATCH, len(images))
  batches = [images[i : i + size] for i in range(0, len(images) - size + 1, size)]
  report: dict[str, Any] = {"images": size * len(batches), "side": images.shape[1:3]}
  pictures = {}
  if "attention" in measures:
    report["attention"] = {name: _attention(backbone, batches) for name, backbone in backbones.items()}
    pictures["attention"] = _attention_figure(report)
  if "cka" in measures:
    report["cka"] = _cka(backbones, batches)
    pictures["cka"] = _cka_figure(report)
  few = images[: slow.images]
  if {"diffusion", "reconstruction"} & set(measures):
    report["slow"] = dataclasses.asdict(slow) | {"images": len(few)}
  if "diffusion" in measures:
    report["diffusion"], maps = _diffusion(backbones, few, slow)
    pictures["diffusion"] = _pictures_figure(few, maps)
  if "reconstruction" in measures:
    report["reconstruction"], drawn = _reconstruction(backbones, few, slow)
    pictures["reconstruction"] = _pictures_figure(few, drawn)
  folder = pathlib.Path(out)
  folder.mkdir(parents=True, exist_ok=True)
  atomic.write_json(folder / "diagnostics.json", report, indent=1)
  atomic.write_text(folder / "diagnostics.md", _markdown(report))
  for name, figure in pictures.items():
    if figure is not None:
      _save(figure, folder / f"{name}.png")
  return report


def _attention(backbone: Backbone, batches: Sequence[UInt8[np.ndarray, "b h w 3"]]) -> list[Any] | str:
  """Distances and similarity of the heads of every block; a sentence for a backbone without attention."""
  try:
    heads = attention.measure(backbone, (backbone.preprocessing.normalise(batch) for batch in batches))
  except ValueError as error:
    return str(error)
  return [dict(distances=block.distances.tolist(), similarity=block.similarity) for block in heads]


def _cka(
  backbones: dict[str, Backbone], batches: Sequence[UInt8[np.ndarray, "b h w 3"]]
) -> list[dict[str, Any]]:
  vectors = {name: _vectors(backbone, batches) for name, backbone in backbones.items()}
  pairs = []
  for first, second in itertools.combinations_with_replacement(backbones, 2):
    found = similarity.cka(zip(vectors[first], vectors[second]))
    pairs.append(dict(first=first, second=second, values=found.tolist()))
  return pairs


def _diffusion(
  backbones: dict[str, Backbone], images: UInt8[np.ndarray, "n h w 3"], options: SlowOptions
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
  """(diffusion of every image, attention maps) by backbone."""
  report, maps = {}, {}
  for name, backbone in backbones.items():
    _logger.info("Attentive diffusion of %s on %d images.", name, len(images))
    normalised = backbone.preprocessing.normalise(images)
    found = diffusion.measure(backbone, normalised, size=options.occluder, stride=options.stride)
    report[name] = [each.diffusion for each in found]
    maps[name] = [each.attention for each in found]
  return report, maps


def _reconstruction(
  backbones: dict[str, Backbone], images: UInt8[np.ndarray, "n h w 3"], options: SlowOptions
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
  """(errors of every image, images from features) by backbone."""
  report, drawn = {}, {}
  for name, backbone in backbones.items():
    _logger.info("Reconstruction of %d images from the features of %s.", len(images), name)
    found = inversion.reconstruct(backbone, images, steps=options.steps, seed=options.seed)
    report[name] = [
      {
        "distance": float(each.distances[-1]),
        "colour_errors": inversion.colour_errors(each.image, image).tolist(),
      }
      for each, image in zip(found, images)
    ]
    drawn[name] = [np.clip(np.round(each.image), 0, 255).astype(np.uint8) for each in found]
  return report, drawn


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
  if "attention" in report:
    lines += [
      "| backbone | block | mean distance in px, by head | similarity of heads |",
      "|---|---|---|---|",
    ]
  for name, blocks in report.get("attention", {}).items():
    if isinstance(blocks, str):
      lines.append(f"| {name} | | {blocks} | |")
      continue
    for index, block in enumerate(blocks):
      heads = ", ".join(f"{distance:.1f}" for distance in sorted(block["distances"]))
      lines.append(f"| {name} | {index} | {heads} | {block['similarity']:.3f} |")
  if "cka" in report:
    lines += ["", "CKA of the maps of two backbones, averaged over positions:", ""]
    lines += ["| maps of | with those of | rows: levels of the first |", "|---|---|---|"]
  for pair in report.get("cka", []):
    values = "; ".join(" ".join(f"{value:.2f}" for value in row) for row in pair["values"])
    lines.append(f"| {pair['first']} | {pair['second']} | {values} |")
  if "diffusion" in report:
    slow = report["slow"]
    lines += [
      "",
      f"Attentive diffusion on {slow['images']} images, by a square of {slow['occluder']} px that",
    ]
    lines += [f"moves in steps of {slow['stride']} px:", ""]
    lines += ["| backbone | % of the image above its mean attention | of each image |", "|---|---|---|"]
  for name, values in report.get("diffusion", {}).items():
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    lines.append(f"| {name} | {100 * np.mean(values):.2f} | {each} |")
  if "reconstruction" in report:
    slow = report["slow"]
    lines += [
      "",
      f"Reconstruction of {slow['images']} images from the last feature map in {slow['steps']:,} steps:",
    ]
    lines += [
      "",
      "| backbone | distance of features | squared error of red | of green | of blue |",
      "|---" * 5 + "|",
    ]
  for name, found in report.get("reconstruction", {}).items():
    red, green, blue = np.mean([each["colour_errors"] for each in found], axis=0)
    distance = np.mean([each["distance"] for each in found])
    lines.append(f"| {name} | {distance:.4f} | {red:.0f} | {green:.0f} | {blue:.0f} |")
  return "\n".join([*lines, ""])


def _attention_figure(report: dict[str, Any]) -> mpl_figure.Figure | None:
  """Distance of every head and similarity of heads, by depth; a column for each backbone with attention."""
  known = {name: blocks for name, blocks in report["attention"].items() if not isinstance(blocks, str)}
  if not known:
    return None
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
  return figure


def _cka_figure(report: dict[str, Any]) -> mpl_figure.Figure:
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
  return figure


def _pictures_figure(
  images: UInt8[np.ndarray, "n h w 3"], of_backbones: dict[str, list[np.ndarray]]
) -> mpl_figure.Figure:
  """Images in a row, and below them a row for each backbone: pictures, or maps of numbers."""
  rows = {"image": list(images), **of_backbones}
  figure = _figure(0.4 + 2.1 * len(images), 2.2 * len(rows))
  for panels, (name, pictures) in zip(figure.subplots(len(rows), len(images), squeeze=False), rows.items()):
    for panel, picture in zip(panels, pictures):
      panel.imshow(picture, cmap="magma")
      panel.set_xticks([])
      panel.set_yticks([])
    panels[0].set_ylabel(name, fontsize=9)
  return figure


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


def _positive(text: str) -> int:
  if not text.isdigit() or not int(text):
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
  return int(text)


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
    "--side", type=_positive, default=224, help="of the squares that the backbones see, in pixels"
  )
  parser.add_argument("--count", type=_positive, default=32, help="how many images, at the most")
  parser.add_argument("--measures", default="attention,cka", help=f"of {', '.join(MEASURES)}")
  slow = SlowOptions()
  parser.add_argument("--slow-images", type=_positive, default=slow.images, help="of the slow measures")
  parser.add_argument(
    "--occluder", type=_positive, default=slow.occluder, help="side of diffusion's square, in pixels"
  )
  parser.add_argument(
    "--stride", type=_positive, default=slow.stride, help="of that square, which divides sides and occluder"
  )
  parser.add_argument("--steps", type=_positive, default=slow.steps, help="of drawing a reconstruction")
  parser.add_argument("--seed", type=int, default=slow.seed, help="of reconstructions")
  options = parser.parse_args(arguments)
  try:
    named = entries.read(options.backbones.split(","))
    images = read_images(options.images or photos.sample_photos().images, options.side, options.count)
    backbones = {entry.label: common.load_backbone(entry.options, 0) for entry in named}
    slow = SlowOptions(options.slow_images, options.occluder, options.stride, options.steps, options.seed)
    measures = [name for name in options.measures.split(",") if name]
    diagnose(backbones, images, options.out, measures=measures, slow=slow)
  except (OSError, ValueError) as error:
    print(f"Error: {error}", file=sys.stderr)
    return 1
  print((pathlib.Path(options.out) / "diagnostics.md").read_text(encoding="utf-8"))
  return 0


if __name__ == "__main__":
  output.log_progress(_logger)
  sys.exit(main())
