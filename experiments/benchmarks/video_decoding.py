"""Decoded frames per second and core: what a loader process gives for the videos of a folder.

  PYTHONPATH=. python experiments/benchmarks/video_decoding.py FOLDER \
    --out=experiments/results/video_decoding.md

Per file, in one thread: up to 300 frames in order; and a clip of 16 frames at stride 4 from the middle,
resized to a short side of 256 (frames given per second, those decoded in vain not counted). With --prepared,
which needs TensorFlow, the same clip also from the file as `frozen_vision.data.prepare videos` writes it by
default, and what both take on disk.
"""

import argparse
from collections.abc import Callable
import csv
import pathlib
import tempfile
import time
from typing import Any

import numpy as np

from experiments import tables
from frozen_vision.data import prepare
from frozen_vision.data.video import clips, decoding, prepared_videos
from frozen_vision.planning import machines


def _clips_per_second(opened: Callable[[], decoding.Frames]) -> float:
  """Frames per second of clips, in processor time; each opens the video anew."""
  started, count = time.process_time(), 0
  while time.process_time() - started < 0.5:
    with opened() as frames:
      count += len(frames.read(clips.Sampler(16, 4).test(len(frames), 1)[0], short_side=256))
  return count / (time.process_time() - started)


def _measure(path: pathlib.Path) -> tuple[int, str, float, float]:
  """(frames, size, frames/s of the whole file, clip frames/s), in processor time."""
  started = time.process_time()
  with decoding.Video(path) as opened:
    frames = opened.read(range(min(len(opened), 300)))
    whole = len(frames) / (time.process_time() - started)
    length = len(opened)
  return (
    length,
    f"{frames.shape[2]} x {frames.shape[1]}",
    whole,
    _clips_per_second(lambda: decoding.Video(path)),
  )


def _prepare(files: list[pathlib.Path], folder: str) -> dict[str, Any]:
  """{path: record} of the files that can be used, prepared in a folder."""
  listing = pathlib.Path(folder) / "list.csv"
  with open(listing, "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([["path", "label"], *[[path.absolute(), 0] for path in files]])
  if prepare.main(["videos", "--videos", str(listing), "--out", folder, "--split", "train"]):
    raise SystemExit("none of the videos can be prepared")
  source = prepared_videos.PreparedVideos(folder, "train")
  return {source.paths[i]: source[i] for i in range(len(source))}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path, help="read with everything below it")
  parser.add_argument("--limit", type=int, default=20, help="most files that are measured")
  parser.add_argument("--prepared", action="store_true", help="measure prepared videos too")
  parser.add_argument("--out", type=pathlib.Path, help="Markdown file to write")
  options = parser.parse_args()
  columns = ["file", "frames", "size", "frames/s, whole file", "frames/s, clips"]
  columns += ["frames/s, prepared clips"] * options.prepared
  files = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in decoding.SUFFIXES)
  files = files[: options.limit]
  head = (
    "Made by `experiments/benchmarks/video_decoding.py`, per core, in processor time, on "
    f"{machines.processor()}."
  )
  rows, rates = [], []
  with tempfile.TemporaryDirectory() as folder:
    records = _prepare(files, folder) if options.prepared else {}
    if records:
      shards = pathlib.Path(folder, prepared_videos.KIND.builder).rglob("*")
      stored = sum(path.stat().st_size for path in shards if path.is_file())
      original = sum(pathlib.Path(path).stat().st_size for path in records)
      count = sum(len(record["video"]) for record in records.values())
      head += (
        f" On disk the files take {original / 1e6:.1f} MB, prepared {stored / 1e6:.1f} MB, which is "
        f"{stored / count / 1e3:.1f} kB for a frame."
      )
    for path in files:
      try:
        frames, size, *speeds = _measure(path)
      except decoding.VideoError as error:
        rows.append([path.name, error.kind, *[""] * (len(columns) - 2)])
        continue
      if records:
        if str(path.absolute()) not in records:  # damaged behind the frames that were measured
          rows.append([path.name, "damaged", *[""] * (len(columns) - 2)])
          continue
        speeds.append(_clips_per_second(lambda: records[str(path.absolute())]["video"]))
      rates.append(speeds)
      rows.append([path.name, str(frames), size, *[f"{speed:.0f}" for speed in speeds]])
  if rates:
    rows.append(["**median**", "", "", *[f"{rate:.0f}" for rate in np.median(rates, axis=0)]])
  table = [columns, ["---"] * len(columns), *rows]
  text = "\n".join([head, "", *[f"| {' | '.join(row)} |" for row in table], ""])
  tables.publish(text, options.out)


if __name__ == "__main__":
  main()
