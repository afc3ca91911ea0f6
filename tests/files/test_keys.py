"""One report for all loaders: every fault once, and the nearest known name."""

import pytest

from frozen_vision import messages
from frozen_vision.files import keys


def test_every_fault_is_listed_once():
  found = {"a": (2, 3), "b": (4,), "c": ()}
  report = keys.compare(found, {"a": (2, 3), "b": (5,), "d": (1,)})
  with pytest.raises(ValueError) as error:
    report.check("FILE does not fit", ["Convert it."])
  assert str(error.value) == (
    "FILE does not fit; 3 keys at fault:\n"
    "  missing d (1,)\n"
    "  unexpected c ()\n"
    "  b has shape (4,), expected (5,)\n"
    "Convert it."
  )
  with pytest.raises(ValueError, match="1 key at fault:\n  x is int8, expected float32$"):
    keys.compare({"x": "int8"}, {"x": "float32"}).check("FILE")
  keys.compare(found, dict(found)).check("FILE", ["never said"])


def test_the_nearest_name():
  assert messages.did_you_mean("stpes", ["steps", "seed"]) == " Did you mean 'steps'?"
  assert messages.did_you_mean("zzz", ["steps", "seed"]) == ""
  assert messages.unknown("option", "stpes", ["steps", "seed"]) == (
    "Unknown option 'stpes'; known: ['seed', 'steps']. Did you mean 'steps'?"
  )
