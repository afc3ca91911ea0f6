"""Decoded frames per second and core: what a loader process gives for the videos of a folder.

  PYTHONPATH=. python experiments/benchmarks/video_decoding.py FOLDER \
    --out=experiments/results/video_decoding.md

Per file, in one thread: up to 300 frames in order; and a clip of 16 frames at stride 4 from the middle,
resized to a short side of 256 (frames given per second, those decoded in vain not counted).
"""

import argparse
import pathlib
import time

import numpy as np

from frozen_vision.data import clips, video


def _measure(path: pathlib.Path) -> tuple[int, str, float, float]:
  """(frames, size, frames/s of the whole file, clip frames/s), in processor time."""
  started = time.process_time()
  with video.Video(path) as opened:
    frames = opened.read(range(min(len(opened), 300)))
    whole = len(frames) / (time.process_time() - started)
    length = len(opened)
  started, count = time.process_time(), 0
  while time.process_time() - started < 0.5:
    with video.Video(path) as opened:
      count += len(opened.read(clips.Sampler(16, 4).test(length, 1)[0], short_side=256))
  return length, f"{frames.shape[2]} x {frames.shape[1]}", whole, count / (time.process_time() - started)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path, help="read with everything below it")
  parser.add_argument("--limit", type=int, default=20, help="most files that are measured")
  parser.add_argument("--out", type=pathlib.Path, help="Markdown file to write")
  options = parser.parse_args()
  rows = ["| file | frames | size | frames/s, whole file | frames/s, clips |", "|---|---|---|---|---|"]
  rates = []
  files = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in video.SUFFIXES)
  for path in files[:options.limit]:
    try:
      frames, size, whole, clip = _measure(path)
    except video.VideoError as error:
      rows.append(f"| {path.name} | {error.kind} | | | |")
      continue
    rates.append((whole, clip))
    rows.append(f"| {path.name} | {frames} | {size} | {whole:.0f} | {clip:.0f} |")
  if rates:
    rows.append("| **median** | | | " + " | ".join(f"{rate:.0f}" for rate in np.median(rates, axis=0)) + " |")
  head = "Made by `experiments/benchmarks/video_decoding.py`, per core, in processor time."
  text = "\n".join([head, "", *rows, ""])
  print(text)
  if options.out:
    options.out.write_text(text)


if __name__ == "__main__":
  main()
