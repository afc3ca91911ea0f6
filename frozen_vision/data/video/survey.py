"""Opens videos before a run begins, so that those that cannot be read are counted and left out at once."""

import concurrent.futures

import numpy as np

from frozen_vision.data import findings
from frozen_vision.data.video import decoding, sources

# Opening a video reads its whole file: where there are more, evenly spaced ones are opened.
_ENOUGH = 400
_THREADS = 16
KINDS = {"video_unreadable": findings.Kind("videos that cannot be read: dropped", "videos")}


def survey(source: sources.VideoList | sources.Selection) -> sources.Selection:
  """The videos of a source without those that cannot be read; its findings say which."""
  found = findings.Findings(KINDS)
  positions = np.arange(len(source))
  if len(source) > _ENOUGH:
    positions = np.unique(np.linspace(0, len(source) - 1, _ENOUGH).round().astype(int))
    found.notes.append(f"{len(positions):,} of {len(source):,} videos were opened")
  found.saw("videos", len(positions))
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    good = found.add_errors("video_unreadable", pool.map(_error, (source.paths[i] for i in positions)))
  kept = sources.Selection([source], np.setdiff1d(np.arange(len(source)), np.delete(positions, good)))
  kept.findings.merge(found)
  return kept


def _error(path: str) -> decoding.VideoError | None:
  """The fault of a video, as far as its first frame shows one."""
  try:
    with decoding.Video(path) as video:
      video.read([0])
  except decoding.VideoError as error:
    return error
  return None
