"""Images a second of the detection loader at large-scale jitter, against PyTorch's with torchvision.

  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONPATH=. python experiments/benchmarks/loader.py \
    --annotations=instances_train2017.json --images=train2017 --array_record \
    --reference=PYTHON_WITH_TORCHVISION --rounds=7 --out=experiments/results/loader.md
  PYTHONPATH=. python experiments/benchmarks/loader.py --side=96 --batches=2 --rounds=1   # seconds

Training examples as the full-scale recipes make them: decoded, jittered by 0.1 to 2.0, cropped, mirrored,
boxes and masks moved, in batches. Ours reads JPEG files and, with TensorFlow to write them, ArrayRecord
shards, in one thread and in two; without --annotations, the 50 photographs of the package. The peer
(`loader_torchvision.py`) runs in the Python that --reference names, with its images decoded by Pillow too: in
its main process, and with two workers. Each round opens each loader, takes a batch, and times the next. The
setting of malloc is the one that `frozen_vision.main` makes; it holds for the peer too.
"""

import argparse
from collections.abc import Callable, Sequence
import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
import time

from experiments import rounds, tables
from frozen_vision.data import pipeline, prepare
from frozen_vision.data.detection import coco, photos, prepared_coco, transforms
from frozen_vision.planning import machines

_TORCHVISION = pathlib.Path(__file__).with_name("loader_torchvision.py")


def ours(source: pipeline.Source, options: argparse.Namespace, threads: int) -> Callable[[], float]:
  """A function that opens our loader and returns the seconds of its batches."""
  transform = transforms.DetectionTrain((options.side, options.side), max_objects=100)

  def run() -> float:
    with pipeline.train_batches(
      source, transform, batch_size=options.batch, seed=0, num_threads=threads, prefetch_batches=1
    ) as batches:
      next(batches)
      started = time.perf_counter()
      for _ in range(options.batches):
        next(batches)
      return time.perf_counter() - started

  return run


def peer(options: argparse.Namespace, workers: int, stack: contextlib.ExitStack) -> Callable[[], float]:
  """The same of PyTorch's, in a process that lives as long as `stack`."""
  arguments = [options.annotations, options.images, options.side, options.batch, workers]
  process = stack.enter_context(
    subprocess.Popen(
      [options.reference, _TORCHVISION, *map(str, arguments)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
  )
  stack.callback(process.terminate)
  options.versions |= json.loads(process.stdout.readline())

  def run() -> float:
    process.stdin.write(f"{options.batches}\n")
    process.stdin.flush()
    return float(process.stdout.readline())

  return run


def main(arguments: Sequence[str] | None = None) -> str:
  """Runs the comparison and returns the table."""
  parser = argparse.ArgumentParser(prog="experiments/benchmarks/loader.py")
  parser.add_argument("--annotations", help="COCO instances JSON")
  parser.add_argument("--images", help="folder of its images")
  parser.add_argument("--reference", help="a Python that has torchvision; without it, no peer is measured")
  parser.add_argument("--array_record", action="store_true", help="also from shards, which TensorFlow writes")
  parser.add_argument("--side", type=int, default=1024, help="of the frame in pixels")
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--batches", type=int, default=16, help="timed in each round")
  parser.add_argument("--rounds", type=int, default=7, help="from 6 on, intervals are known")
  parser.add_argument("--out", help="Markdown file to write")
  options = parser.parse_args(arguments)
  options.versions = {}
  if not options.annotations:
    options.annotations, options.images = photos.sample_photos()
  with contextlib.ExitStack() as stack:
    files = coco.load_coco(options.annotations, options.images)
    runs = {f"ours, files, {threads}": ours(files, options, threads) for threads in (1, 2)}
    if options.array_record:
      folder = stack.enter_context(tempfile.TemporaryDirectory())
      paths = ["--annotations", str(options.annotations), "--images", str(options.images)]
      prepare.main(["coco", *paths, "--out", folder, "--split", "train"])
      shards = prepared_coco.PreparedCoco(folder, "train")
      runs |= {f"ours, ArrayRecord, {threads}": ours(shards, options, threads) for threads in (1, 2)}
    if options.reference:
      runs["torchvision, in the main process, 1"] = peer(options, 0, stack)
      runs["torchvision, workers, 2"] = peer(options, 2, stack)
    seconds = rounds.reported(runs, options.rounds)
  text = _table(seconds, options, len(files))
  tables.publish(text, options.out)
  return text


def _table(seconds: dict[str, list[float]], options: argparse.Namespace, images: int) -> str:
  examples = options.batch * options.batches
  versions = "".join(f", {name} {version}" for name, version in options.versions.items())
  lines = [
    f"Made by `experiments/benchmarks/loader.py`: {images} photographs in frames of {options.side} px, "
    f"{options.batches} batches of {options.batch}, {options.rounds} interleaved rounds on {os.cpu_count()} "
    f"cores of {machines.processor()}{versions}.",
    "",
    "| loader, threads or workers | images/s, median (95% interval) | times torchvision in as many |",
    "|---|---|---|",
  ]
  peers = {name.rpartition(", ")[2]: values for name, values in seconds.items() if name.startswith("torch")}
  for name, values in seconds.items():
    other = peers.get(name.rpartition(", ")[2])
    cells = [name, rounds.median([examples / value for value in values], "{:.1f}")]
    lines.append(f"| {' | '.join([*cells, rounds.ratio(other, values) if other else '-'])} |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  main()
