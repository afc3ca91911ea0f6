"""A full disk is an error with a path, and what was saved before stays."""

import errno
import os
import subprocess
import sys

import pytest

from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import log as run_log
from tests import small_disk

_SAVES = """
import logging, sys
import numpy as np
from frozen_vision import failures
from frozen_vision.runs import checkpoints as checkpoint
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, force=True)
failures.quiet_libraries()
rng = np.random.default_rng(0)
try:
  with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
    for step, size in ((1, 1_000), (2, 100_000)):
      checkpoints.save(step, {"trainable": {"a": rng.standard_normal(size).astype(np.float32)}}, {})
except Exception as error:
  print(failures.report(error))
"""


def test_a_checkpoint_that_has_no_room_is_one_sentence(tmp_path, request):
  disk = tmp_path / "disk"
  disk.mkdir()
  result = subprocess.run(
    small_disk.command(disk, "300k", [sys.executable, "-c", _SAVES, str(disk)], kept=tmp_path / "kept"),
    cwd=request.config.rootpath,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.stdout == (
    f"Error: {disk}/checkpoints: No space left on device. Checkpoints from before are whole; once this is "
    "mended, the same command continues from the last one.\n"
  ), result.stdout + result.stderr
  assert "Traceback" not in result.stderr
  assert checkpoint.Checkpoints(tmp_path / "kept").latest_step() == 1


def test_a_line_of_the_log_that_has_no_room_names_the_file(tmp_path):
  with run_log.RunLog(tmp_path, tensorboard=False) as log:
    log.scalars(1, {"a": 1.0})
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(OSError) as error:
      log.scalars(2, {"a": 1.0})
  assert error.value.errno == errno.ENOSPC and error.value.filename == os.fspath(tmp_path / "metrics.jsonl")
