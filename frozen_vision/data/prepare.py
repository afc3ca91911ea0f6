"""Checks image and video data once, names every file that cannot be used, and writes ArrayRecord shards.

    python -m frozen_vision.data.prepare images --images DIR
    python -m frozen_vision.data.prepare coco --images DIR --annotations FILE --out DIR --split NAME
    python -m frozen_vision.data.prepare coco --root COCO --out DIR --split train val
    python -m frozen_vision.data.prepare voc --root VOCdevkit --out DIR
    python -m frozen_vision.data.prepare ade20k --root ADE20K --out DIR
    python -m frozen_vision.data.prepare segmentation --images DIR --labels DIR --classes FILE --out DIR \
      --split training
    python -m frozen_vision.data.prepare nyuv2 --root NYUV2 --out DIR
    python -m frozen_vision.data.prepare dense --images DIR --normals DIR --depth DIR --out DIR \
      --split training
    python -m frozen_vision.data.prepare videos --videos FOLDER_OR_LIST --out DIR --split train

The first only checks. With `--check` the others do too, and need no TensorFlow; writing does. Bad
files are named and left out, and the exit code is 0, unless nothing usable is left or `--strict`
is given: then anything bad is an error and nothing is written.

With `--beam_options` the files are decoded and the shards written on Apache Beam (pip install apache-beam),
in processes or on a cluster whose workers see the data and `--out` by the same paths; records are the same.

Images keep their files' bytes. Videos are decoded once (twice with `--strict`) and become JPEG frames
of a limited size; while they are written, about twice their final space is needed.
"""

import argparse
from collections.abc import Iterator, Sequence
import functools
import importlib.util
import os
import pathlib
import sys
from typing import Any

from frozen_vision import output
from frozen_vision.data import beam, prepared
from frozen_vision.data import classes as class_names
from frozen_vision.data import images as image_io
from frozen_vision.data import prepare_checks as checks
from frozen_vision.data.dense import folders, prepared_dense
from frozen_vision.data.dense.sources import TARGETS
from frozen_vision.data.detection import coco, prepared_coco, voc
from frozen_vision.data.segmentation import ade20k, class_lists, prepared_segmentation
from frozen_vision.data.segmentation import sources as labelled
from frozen_vision.data.video import jpegs, lists, prepared_videos
from frozen_vision.data.video import sources as videos


def prepare_images(options: argparse.Namespace) -> int:
  """Checks every image below a folder; returns the exit code."""
  root = pathlib.Path(options.images)
  if not root.is_dir():
    raise FileNotFoundError(f"{root}: no such folder.")
  tasks, others = [], []
  for path in sorted(root.rglob("*")):
    if path.is_dir() or path.name.startswith("."):
      continue
    name = str(path.relative_to(root))
    if path.suffix.lower() in image_io.SUFFIXES:
      tasks.append(checks.Task(path, name))
    else:
      others.append(name)
  tally = checks.Tally(len(tasks))
  tally.run(checks.check_images(tasks, options.workers, beam=options.beam))
  print(f"Summary of {root}")
  tally.print_summary()
  if others:
    more = f", and {len(others) - 5} more" if len(others) > 5 else ""
    print(f"  not looked at, since not named as images: {', '.join(others[:5])}{more}")
  return _exit_code(usable=bool(tally.good), defects=tally.bad.total(), strict=options.strict)


def prepare_coco(options: argparse.Namespace) -> int:
  """Checks, and unless `--check` is given writes, each split; returns the exit code."""
  if options.root is None and (options.images is None or options.annotations is None):
    raise ValueError("give --root, or --images and --annotations.")
  if options.root is not None and (options.images or options.annotations):
    raise ValueError("give either --root or --images and --annotations, not both.")
  splits = options.split or (["train", "val"] if options.root else ["train"])
  if options.root is None and len(splits) != 1:
    raise ValueError("--images and --annotations make one split; give one name to --split.")
  if not options.check:
    _require_writing(options, splits, prepared_coco.KIND)
  return max(_prepare_instances(options, _open_coco(options, split), split) for split in splits)


def prepare_voc(options: argparse.Namespace) -> int:
  """Checks, and unless `--check` is given writes, splits of VOC's layout; returns the exit code."""
  lists = {"train": options.train, "val": options.val}
  if not options.check:
    _require_writing(options, list(lists), prepared_coco.KIND)
  names = class_names.read_classes(options.classes) if options.classes else class_names.VOC
  difficult = {"train": "crowd" if options.leave_difficult else "object", "val": "crowd"}
  opened = {
    split: voc.load_voc(options.root, splits, class_names=names, difficult=difficult[split])
    for split, splits in lists.items()
  }
  return max(_prepare_instances(options, source, split) for split, source in opened.items())


def prepare_ade20k(options: argparse.Namespace) -> int:
  """Checks, and unless `--check` is given writes, each split of ADE20K; returns the exit code."""
  splits = options.split or list(ade20k.SPLITS)
  if not options.check:
    _require_writing(options, splits, prepared_segmentation.KIND)
  opened = {split: ade20k.ade20k_root(options.root, split, unlabelled="keep") for split in splits}
  return max(_prepare_labelled(options, source, split) for split, source in opened.items())


def prepare_segmentation(options: argparse.Namespace) -> int:
  """Checks, and unless `--check` is given writes, images and their labels; returns the exit code."""
  if not options.check:
    _require_writing(options, [options.split], prepared_segmentation.KIND)
  label_format = class_lists.read_format(options.classes, ignored=options.ignore, unknown=options.unknown)
  source = labelled.LabelledImages(
    options.images,
    options.labels,
    label_format,
    segments=options.segments,
    unlabelled="keep",
    image_suffix=options.image_suffix,
    label_suffix=options.label_suffix,
  )
  return _prepare_labelled(options, source, options.split)


def prepare_nyuv2(options: argparse.Namespace) -> int:
  """Checks, and unless `--check` is given writes, both splits of NYUv2; returns the exit code."""
  names = {"training": "train", "validation": "test"}
  if not options.check:
    _require_writing(options, list(names), prepared_dense.KIND)
  opened = {split: folders.nyuv2(options.root, name, options.targets) for split, name in names.items()}
  return max(_prepare_dense(options, source, split) for split, source in opened.items())


def prepare_dense(options: argparse.Namespace) -> int:
  """Checks, and unless `--check` is given writes, images with normals and depth; returns the exit code."""
  if not options.check:
    _require_writing(options, [options.split], prepared_dense.KIND)
  given = {"normals": options.normals, "depth": options.depth}
  source = folders.DenseFolders(options.images, {name: path for name, path in given.items() if path})
  return _prepare_dense(options, source, options.split)


def _prepare_dense(options: argparse.Namespace, source: folders.DenseFolders, split: str) -> int:
  tally = checks.Tally(len(source))
  check = functools.partial(checks.check_dense, source)
  tally.run(checks.check_images(range(len(source)), options.workers, check, options.beam))
  usable = source.take(tally.good)
  print(f"Summary of {source!r}, split {split}")
  tally.print_summary()
  for line in source.findings.lines():
    print(f"  {line}")
  defects = tally.bad.total() + sum(source.findings.counts.values())
  code = _exit_code(usable=len(usable) > 0, defects=defects, strict=options.strict)
  if code == 0 and not options.check:
    from frozen_vision.data.dense import builder  # needs TensorFlow, checked before

    print(f"  written: {builder.write(usable, split, pathlib.Path(options.out), options.beam)}")
  return code


def prepare_videos(options: argparse.Namespace) -> int:
  """Checks, and unless `--check` is given writes, the videos of a folder or list; returns the exit code."""
  if not options.check:
    _require_writing(options, [options.split], prepared_videos.KIND)
  encoding = jpegs.Encoding(options.short_side, options.quality, options.rate)
  source = lists.open_videos(
    options.videos,
    root=options.root,
    group_column=options.group_column,
    keep_missing=True,
    allow_outside=options.allow_outside,
  )
  tally = checks.Tally(len(source), "videos")
  if options.check or options.strict:  # which writes nothing where anything is bad
    tally.run(checks.encode_videos(source, encoding, options.workers, beam=options.beam))
    code = _exit_code(usable=bool(tally.good), defects=tally.bad.total(), strict=options.strict)
    if options.check or code:
      _print_videos(options, source, tally)
      return code
    tally = checks.Tally(len(source), "videos")
  from frozen_vision.data.video import builder  # needs TensorFlow, checked before

  sizes = []

  def encode_all(spool: pathlib.Path) -> Iterator[tuple[int, jpegs.EncodedVideo]]:
    results = checks.encode_videos(source, encoding, options.workers, spool, options.beam)
    for index, encoded in tally.watch(results):
      sizes.append((len(encoded.sizes), int(encoded.sizes.sum())))
      yield index, encoded

  try:
    target = builder.write(
      source, encoding, encode_all, options.split, pathlib.Path(options.out), options.beam
    )
  finally:
    if tally.good or tally.bad:  # also where writing failed
      _print_videos(options, source, tally)
  frames, size = map(sum, zip(*sizes))
  print(f"  written: {target}: {frames} frames, {size / 1e6:.1f} MB, {size / frames / 1e3:.1f} kB per frame")
  return 0


def _print_videos(options: argparse.Namespace, source: videos.VideoList, tally: checks.Tally) -> None:
  print(f"Summary of {options.videos}, split {options.split}")
  tally.print_summary()
  print(f"  usable: {len(tally.good)} videos, {len(source.classes)} classes")
  unseen = set(range(len(source.classes))) - set(source.labels[tally.good].tolist())
  if unseen:
    names = [source.classes[label] for label in sorted(unseen)]
    print(f"  classes without a usable video: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")


def _prepare_labelled(options: argparse.Namespace, source: labelled.LabelledImages, split: str) -> int:
  tally = checks.Tally(len(source))
  check = functools.partial(checks.check_labelled, source)
  tally.run(checks.check_images(range(len(source)), options.workers, check, options.beam))
  usable = source.take(tally.good)
  print(f"Summary of {source.image_dir} with {source.label_dir}, split {split}")
  tally.print_summary()
  print(f"  usable: {len(usable)} images, {usable.num_classes} classes")
  code = _exit_code(usable=len(usable) > 0, defects=tally.bad.total(), strict=options.strict)
  if code == 0 and not options.check:
    from frozen_vision.data.segmentation import builder  # needs TensorFlow, checked before

    print(f"  written: {builder.write(usable, split, pathlib.Path(options.out), options.beam)}")
  return code


def _open_coco(options: argparse.Namespace, split: str) -> coco.CocoSource:
  load = {"require_masks": False if options.boxes_only else None, "allow_outside": options.allow_outside}
  if options.root is not None:
    return coco.coco_root(options.root, split, **load)
  return coco.load_coco(options.annotations, options.images, **load)


def _prepare_instances(options: argparse.Namespace, source: coco.CocoSource, split: str) -> int:
  tasks = []
  for index in range(len(source)):
    record = source.record(index)
    size = (record["height"], record["width"])
    tasks.append(checks.Task(source.image_path(index), record["file_name"], size))
  tally = checks.Tally(len(tasks))
  tally.run(checks.check_images(tasks, options.workers, beam=options.beam))
  usable = source.take(tally.good)
  print(f"Summary of {source.annotation_file}, split {split}")
  tally.print_summary()
  for line in str(source.findings).splitlines():
    print(f"  annotations: {line}")
  counts = ", ".join(f"{count} {key}" for key, count in usable.counts().items())
  print(f"  usable: {counts}, {usable.num_classes} classes{'' if usable.labelled else '; unlabelled'}")
  if usable.labelled and not usable.has_masks:
    print("  boxes only: no annotation has a mask")
  found = sum(count for kind, count in source.findings.counts.items() if kind != "image_renamed")
  defects = tally.bad.total() + found
  code = _exit_code(usable=len(usable) > 0, defects=defects, strict=options.strict)
  if code == 0 and not options.check:
    from frozen_vision.data.detection import builder  # needs TensorFlow, checked before

    print(f"  written: {builder.write(usable, split, pathlib.Path(options.out), options.beam)}")
  return code


def _require_writing(options: argparse.Namespace, splits: Sequence[str], kind: prepared.Kind) -> None:
  if options.out is None:
    raise ValueError("give --out, the folder to write to, or --check to only check.")
  if importlib.util.find_spec("tensorflow") is None:
    raise ValueError(
      "writing the shards needs TensorFlow, which is not installed: pip install tensorflow-cpu."
      " Checking (--check) and reading them do not."
    )
  for split in splits:
    if kind.is_complete(options.out, split) and not options.overwrite:
      raise FileExistsError(f"{kind.folder(options.out, split)} is there already; --overwrite makes it anew.")


def _exit_code(*, usable: bool, defects: int, strict: bool) -> int:
  if not usable:
    print("error: nothing usable is left", file=sys.stderr)
    return 1
  if strict and defects:
    print(f"error: {defects} defects, and --strict allows none", file=sys.stderr)
    return 1
  return 0


def _voc_parser(commands: Any) -> argparse.ArgumentParser:
  boxes = commands.add_parser("voc", help="check PASCAL VOC's layout and write it as shards train and val")
  boxes.add_argument(
    "--root", type=os.path.expanduser, required=True, help="VOCdevkit, or the folder of one year"
  )
  boxes.add_argument("--train", nargs="+", default=["2007_trainval", "2012_trainval"], help="lists of images")
  boxes.add_argument("--val", nargs="+", default=["2007_test"], help="lists of images")
  boxes.add_argument("--classes", type=os.path.expanduser, help="JSON list of class names; default: VOC's")
  boxes.add_argument(
    "--leave-difficult", action="store_true", help="do not train on objects that are marked difficult"
  )
  return boxes


def _dense_parsers(commands: Any) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
  rooms = commands.add_parser("nyuv2", help="check NYUv2 and write it as shards training and validation")
  rooms.add_argument("--root", type=os.path.expanduser, required=True, help="holds image/, normal/, depth/")
  rooms.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS, help="maps that are there")
  maps = commands.add_parser("dense", help="check images with normals and depth and write them as shards")
  maps.add_argument("--images", type=os.path.expanduser, required=True, help="folder of the images")
  maps.add_argument("--normals", type=os.path.expanduser, help="folder of their normals, .npy or 8-bit RGB")
  maps.add_argument("--depth", type=os.path.expanduser, help="folder of their depth, .npy or 16-bit gray")
  maps.add_argument("--split", required=True, help="name of what is written: training or validation")
  return rooms, maps


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m frozen_vision.data.prepare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  check = commands.add_parser("images", help="check every image below a folder")
  check.add_argument("--images", type=os.path.expanduser, required=True, help="folder, searched recursively")
  write = commands.add_parser("coco", help="check COCO-format data and write it as shards")
  write.add_argument("--images", type=os.path.expanduser, help="folder of the images")
  write.add_argument("--annotations", type=os.path.expanduser, help="annotation JSON")
  write.add_argument("--root", type=os.path.expanduser, help="instead: holds {split}2017/ and annotations/")
  write.add_argument("--split", nargs="+", help="default: train; with --root: train val")
  write.add_argument("--boxes-only", action="store_true", help="keep annotations that have no usable mask")
  boxes = _voc_parser(commands)
  scenes = commands.add_parser("ade20k", help="check ADE20K and write it as shards")
  scenes.add_argument("--root", type=os.path.expanduser, required=True, help="holds images/ and annotations/")
  scenes.add_argument("--split", nargs="+", help="default: training validation")
  pixels = commands.add_parser("segmentation", help="check images with label images and write them as shards")
  pixels.add_argument("--images", type=os.path.expanduser, required=True, help="folder of the images")
  pixels.add_argument("--labels", type=os.path.expanduser, required=True, help="folder of the label images")
  pixels.add_argument("--classes", type=os.path.expanduser, required=True, help="class list, .txt or .json")
  pixels.add_argument(
    "--segments", type=os.path.expanduser, help="COCO panoptic JSON, if the label images are of that format"
  )
  pixels.add_argument("--ignore", type=int, nargs="*", default=[], help="more pixel values without a class")
  pixels.add_argument("--unknown", default="error", help="what any other value is: error or ignore")
  pixels.add_argument("--image-suffix", default="", help="end of the image names before their ending")
  pixels.add_argument("--label-suffix", default="", help="the same of the label images")
  pixels.add_argument("--split", required=True, help="name of what is written: training or validation")
  rooms, maps = _dense_parsers(commands)
  clips = commands.add_parser("videos", help="check labelled videos and write their frames as shards")
  clips.add_argument(
    "--videos", type=os.path.expanduser, required=True, help="folder of class folders, or .csv or .txt list"
  )
  clips.add_argument(
    "--root", type=os.path.expanduser, default="", help="what paths in the list are relative to"
  )
  clips.add_argument("--group-column", default="", help="column of the list that says what belongs together")
  clips.add_argument("--split", required=True, help="name of what is written: train or validation")
  encoding = jpegs.Encoding()
  clips.add_argument(
    "--short-side",
    type=int,
    default=encoding.short_side,
    help="pixels that longer short sides are resized to (default: %(default)s)",
  )
  clips.add_argument(
    "--quality", type=int, default=encoding.quality, help="of the JPEGs (default: %(default)s)"
  )
  clips.add_argument(
    "--rate",
    type=float,
    default=encoding.rate,
    help="keep so many frames per second only, by time stamp; 0 keeps all (default)",
  )
  for command in (write, clips):
    command.add_argument(
      "--allow-outside",
      action="store_true",
      help="take file names that are absolute or lead out of the folder",
    )
  _add_common((write, boxes, scenes, pixels, rooms, maps, clips), check)
  return parser


def _add_common(writing: Sequence[argparse.ArgumentParser], check: argparse.ArgumentParser) -> None:
  """Adds the options of every command that writes, and of all."""
  for command in writing:
    command.add_argument("--out", type=os.path.expanduser, help="folder to write to")
    command.add_argument("--check", action="store_true", help="only check, write nothing")
    command.add_argument("--overwrite", action="store_true", help="replace shards that are there")
  for command in (check, *writing):
    command.add_argument("--strict", action="store_true", help="anything bad is an error")
    command.add_argument("--workers", type=int, default=1, help="processes that decode")
    command.add_argument(
      "--beam_options",
      default="",
      help="decode and write on Apache Beam instead: its options, name=value with commas between them, such "
      "as runner=DirectRunner,direct_num_workers=4,direct_running_mode=multi_processing",
    )


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  options = _parser().parse_args(arguments)
  run = {
    "images": prepare_images,
    "coco": prepare_coco,
    "voc": prepare_voc,
    "ade20k": prepare_ade20k,
    "segmentation": prepare_segmentation,
    "nyuv2": prepare_nyuv2,
    "dense": prepare_dense,
    "videos": prepare_videos,
  }[options.command]
  try:
    options.beam = beam.parse(options.beam_options, getattr(options, "out", None))
    return run(options)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
  output.protect()  # file names may be no valid text
  sys.exit(main())
