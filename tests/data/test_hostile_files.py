"""Small files that nobody vouches for: mutated by a seeded generator, each is read or refused by name."""

import collections
import random

import pytest

from tests.data import hostile

_CASES = 60


@pytest.mark.parametrize("reader", hostile.READERS)
def test_mutated_files_are_read_or_refused_by_name(tmp_path, reader):
  hostile.make_files(tmp_path)
  rng, kinds = random.Random(f"{reader} 0"), collections.Counter()
  assert hostile.read_good(reader, tmp_path).kind == "read"
  for case in range(_CASES):
    outcome = hostile.try_one(reader, case, tmp_path, rng)
    assert outcome.kind != "fault", (outcome.said, outcome.data)
    kinds[outcome.kind] += 1
  assert kinds["refused"]  # mutations are not harmless
