"""Reasons for which a test may be skipped; any other skip fails the run (`tests/conftest.py`)."""

import re

# Pattern of pytest's message: what is missing.
ALLOWED = {
  r"FROZEN_VISION_DATA": "No real data: neither $FROZEN_VISION_DATA nor ../shared/data.",
  r"FROZEN_VISION_FAULTS": "No faulty inputs: neither $FROZEN_VISION_FAULTS nor ../shared/faults.",
  r"FROZEN_VISION_REFERENCE_PYTHON": "No Python with PyTorch for a reference implementation to run in.",
  r"writing shards needs TensorFlow": "No TensorFlow, which writes prepared data.",
  r"needs Apache Beam": "No Apache Beam, which prepares data on many machines.",
  r"'libtpu'": "No libtpu, which compiles plans for TPU slices.",
  r"(tensorflow|tensorboard|clu) is not installed": "No TensorBoard, which reads the event files of a run.",
  r"needs /proc": "No /proc: the operating system is not Linux.",
  r"Chromium is not installed": "No Chromium, which shows the page of a report.",
  r"needs a small disk": "This system lets no user mount a small disk (unshare, tmpfs).",
  r"this kernel gives huge pages always or never": "The kernel decides about huge pages by itself.",
  r"frozen_vision is installed": "The package is installed, so no script can show that it runs without it.",
}


def explanation(message: str) -> str | None:
  """What is missing when a test is skipped with `message`; None if that is no allowed reason."""
  for pattern, sentence in ALLOWED.items():
    if re.search(pattern, message):
      return sentence
  return None
