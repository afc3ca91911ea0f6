"""Writes a public checkpoint in our own format: a backbone, or the neck and head of a detector.

  python -m frozen_vision.convert swinv2_tiny_patch4_window8_256.pth swinv2_t.safetensors
  python -m frozen_vision.convert --name=dinov2_vits14 dinov2_vits14_pretrain.pth dinov2_vits14.safetensors
  python -m frozen_vision.convert model.safetensors out.safetensors --window 16 --image-size 256 \
      --pretrained-window 12 --pretrained-image-size 192
  python -m frozen_vision.convert --head-of=mmdet htc_r50_fpn_1x_coco.pth htc_r50.safetensors

The last one is for --config.detection.init.path=htc_r50.safetensors; for a backbone of other channels, with
--config.detection.init.keep="('neck/laterals/.*/kernel','neck/norms/.*')".
"""

import argparse
from collections.abc import Sequence
import os
import pathlib
import sys
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from frozen_vision import output
from frozen_vision.backbones import families
from frozen_vision.backbones.swinv2 import checkpoint_windows as windows
from frozen_vision.backbones.swinv2 import checkpoints as swinv2
from frozen_vision.files import atomic
from frozen_vision.heads import files as head_weights
from frozen_vision.heads.htc import checkpoints as mmdet

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def main(arguments: Sequence[str] | None = None) -> None:
  """Converts, and prints what became of every key and the fingerprint."""
  parser = argparse.ArgumentParser(
    prog="python -m frozen_vision.convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "source",
    type=os.path.expanduser,
    help="a public checkpoint that backbone.weights takes, or one of mmdet",
  )
  parser.add_argument("destination", type=os.path.expanduser, help="the .safetensors file to write")
  parser.add_argument(
    "--head-of",
    choices=["mmdet"],
    help=(
      "write the FPN, RPN and RoI heads of mmdet's HTC, Cascade Mask R-CNN or Mask R-CNN instead of a "
      "backbone; no other option applies"
    ),
  )
  parser.add_argument("--name", help="variant it must be, such as swinv2_b; inferred by default")
  parser.add_argument(
    "--window", help="window, or one per stage (16,16,16,8); by default what the source tells"
  )
  parser.add_argument(
    "--image-size", type=int, help="image side it was trained at with --window: caps the window to the maps"
  )
  parser.add_argument("--pretrained-window", help="window of the pretraining, if it was another")
  parser.add_argument("--pretrained-image-size", type=int, help="image side of the pretraining")
  parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights in the file")
  parser.add_argument(
    "--head", type=os.path.expanduser, help="also write the classifier, to this .safetensors file"
  )
  parser.add_argument(
    "--head-classes",
    help=(
      "text file of class indices, one per line: only these rows of the classifier (such as the released "
      "map22kto1k.txt)"
    ),
  )
  options = parser.parse_args(arguments)
  if options.head_classes and not options.head:
    parser.error("--head-classes needs --head")
  if options.head_of:
    others = (
      "name",
      "window",
      "image_size",
      "pretrained_window",
      "pretrained_image_size",
      "head",
      "head_classes",
    )
    given = [name for name in others if getattr(options, name)] + ["dtype"] * (options.dtype != "float32")
    if given:
      parser.error(f"--head-of takes no --{given[0].replace('_', '-')}")
  destination = pathlib.Path(options.destination)
  if destination.suffix != ".safetensors":
    parser.error(f"DESTINATION must end in .safetensors, found {destination}")
  if destination.resolve() == pathlib.Path(options.source).resolve():
    parser.error("SOURCE and DESTINATION are the same file")
  overrides = {}
  for key, window, image_size in (
    ("window_sizes", options.window, options.image_size),
    ("pretrained_window_sizes", options.pretrained_window, options.pretrained_image_size),
  ):
    if window:
      overrides[key] = _windows(parser, window, image_size)
  if options.window and options.image_size and not options.pretrained_window:
    overrides["pretrained_window_sizes"] = overrides["window_sizes"]  # it was trained there.
  try:
    if options.head_of:
      _convert_head(options, destination)
    else:
      _convert(options, destination, overrides)
  except (OSError, ValueError) as error:
    sys.exit(f"error: {error}")


def _convert(options: argparse.Namespace, destination: pathlib.Path, overrides: dict[str, Any]) -> None:
  checkpoint = families.open_public(options.source, options.name, **overrides)
  print(checkpoint.summary())
  head = None
  if options.head:
    if not isinstance(checkpoint, swinv2.Checkpoint):
      raise ValueError(f"--head reads classifiers of SwinV2 only; {options.source} is {checkpoint.name}.")
    head = checkpoint.head()
    if head is None:
      raise ValueError(f"{options.source} has no classifier for --head.")
    if options.head_classes:
      head = head.select([int(line) for line in pathlib.Path(options.head_classes).read_text().split()])
  fingerprint = families.write_leaves(
    checkpoint.leaves,
    destination,
    name=checkpoint.name or "swinv2",
    config=checkpoint.config,
    dtype=_DTYPES[options.dtype],
  )
  print(f"wrote {destination} ({destination.stat().st_size:,} bytes, {options.dtype})")
  if head is not None:
    arrays = {"kernel": np.ascontiguousarray(head.kernel), "bias": head.bias}
    atomic.write_bytes(options.head, safetensors.numpy.save(arrays, {"backbone": fingerprint}))
    print(f"wrote {options.head}: a classifier of {head.bias.size} classes")
  print(f"fingerprint {fingerprint}")


def _convert_head(options: argparse.Namespace, destination: pathlib.Path) -> None:
  source = pathlib.Path(options.source)
  arrays, ignored = mmdet.head_arrays(mmdet.read_state_dict(source))
  fingerprint = head_weights.save(destination, arrays, source=f"mmdet {source.name}")
  print(f"{len(arrays)} tensors of the neck and head; {len(ignored)} keys are not for them:")
  print("".join(f"  {name}\n" for name in ignored), end="")
  print(f"wrote {destination} ({destination.stat().st_size:,} bytes, float32)")
  print(f"fingerprint {fingerprint}")


def _windows(parser: argparse.ArgumentParser, text: str, image_size: int | None) -> tuple[int, ...]:
  try:
    sides = tuple(int(side) for side in text.split(","))
  except ValueError:
    parser.error(f"a window is a number or one number per stage, found {text!r}")
  if len(sides) == 1:
    sides *= 4
    return windows.effective(sides[0], image_size, 4) if image_size else sides
  return sides


if __name__ == "__main__":
  output.protect()
  main()
