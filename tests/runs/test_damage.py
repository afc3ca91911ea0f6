"""Damaged, changed, renamed and misplaced checkpoints: named, and the one before is taken."""

import json
import random
import shutil
import warnings

import pytest

from frozen_vision.runs import checkpoints as checkpoint
from tests import comparing
from tests.runs import states


def _flip(path, place, bit=0):
  data = bytearray(path.read_bytes())
  data[place % len(data)] ^= 1 << bit
  path.write_bytes(data)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's loop
def test_a_flipped_bit_anywhere_is_seen_or_changes_nothing(tmp_path):
  """Forty damages, of every file of a checkpoint: named and passed over, or what is restored is equal."""
  states.save(tmp_path, 1, 2)
  wanted = {step: states.make(step) for step in (1, 2)}
  abstract = states.abstract(wanted[2])
  folder, rng = tmp_path / "checkpoints" / "2", random.Random(0)
  kept = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
  files = [path for path, data in kept.items() if data]
  fell_back = 0
  for number in range(40):
    path = files[number % len(files)]
    _flip(path, rng.randrange(1 << 30), rng.randrange(8))
    with checkpoint.Checkpoints(tmp_path) as checkpoints, warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      restored, meta = checkpoints.restore(abstract)
      comparing.assert_equal(restored, wanted[meta["step"]])
      if meta["step"] == 1:
        fell_back += 1
        assert any("checkpoints/2 cannot be read" in str(one.message) for one in caught)
    path.write_bytes(kept[path])
  assert fell_back >= 8, fell_back


def _set_array(checkpoint_folder, key, change):
  """Changes an array of a checkpoint without a trace, as a bit that flips below other checksums would."""
  with checkpoint.Checkpoints(checkpoint_folder) as checkpoints:
    state, meta = checkpoints.restore(states.abstract(states.make()))
  record = json.loads((checkpoint_folder / "checkpoints" / "2" / "meta" / "metadata").read_text())
  del meta["step"]
  state[key] = change(state[key])
  shutil.rmtree(checkpoint_folder / "checkpoints" / "2")
  with checkpoint.Checkpoints(checkpoint_folder) as checkpoints:
    checkpoints.save(2, state, meta)
  (checkpoint_folder / "checkpoints" / "2" / "meta" / "metadata").write_text(json.dumps(record))


@pytest.mark.parametrize("partial", [False, True])
def test_a_number_that_is_another_is_named(tmp_path, partial):
  states.save(tmp_path, 1, 2)
  _set_array(tmp_path, "half", lambda x: x.at[3].add(0.5))
  state = states.abstract(states.make())
  wanted = {"half": state["half"]} if partial else state
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match="checkpoints/2: arrays: half do not add up to the checksums"):
      checkpoints.restore(wanted, step=2, partial=partial)
    with pytest.warns(RuntimeWarning, match="checkpoints/2 cannot be read .*: arrays: half"):
      restored, meta = checkpoints.restore(wanted, partial=partial)
    assert meta["step"] == 1
    comparing.assert_equal(restored, {key: states.make(1)[key] for key in wanted})


@pytest.mark.parametrize("name", ["half", "ids", "step"])
def test_an_array_that_goes_by_another_name_is_named(tmp_path, name):
  states.save(tmp_path, 1, 2)
  path = tmp_path / "checkpoints" / "2" / "state" / "_METADATA"
  text = path.read_text()
  assert text.count(f'"key": "{name}"') == 1
  path.write_text(text.replace(f'"key": "{name}"', f'"key": "{name}x"'))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.warns(RuntimeWarning, match=f"checkpoints/2 cannot be read .*: arrays: {name} are absent"):
      restored, meta = checkpoints.restore(states.abstract(states.make()))
  assert meta["step"] == 1
  comparing.assert_equal(restored, states.make(1))


def _change_record(**changes):
  def damage(step_dir):
    path = step_dir / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return damage


@pytest.mark.parametrize(
  "damage",
  [
    _change_record(leaves=None),
    _change_record(scalars={}),
    _change_record(meta={"step": 2}),
    _change_record(extra=1),
    _change_record(quality=0.5),
    _change_record(digests={}),
    lambda step_dir: (step_dir / "meta" / "metadata").write_text("[" * 100_000),
    lambda step_dir: (step_dir / "meta" / "metadata").write_text("null"),
    lambda step_dir: (step_dir / "meta" / "metadata").write_bytes(b"\xff\xfe"),
  ],
  ids=["leaves", "scalars", "meta", "extra", "quality", "digests", "deep", "null", "bytes"],
)
def test_a_changed_record_is_named_and_passed_over(tmp_path, damage):
  states.save(tmp_path, 1, 2)
  damage(tmp_path / "checkpoints" / "2")
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.warns(RuntimeWarning, match="checkpoints/2 cannot be read and is passed over: meta: "):
      assert checkpoints.latest_step() == 1


def test_a_renamed_checkpoint_is_refused(tmp_path):
  states.save(tmp_path, 28)
  (tmp_path / "checkpoints" / "28").rename(tmp_path / "checkpoints" / "40")
  with checkpoint.Checkpoints(tmp_path) as checkpoints, pytest.warns(RuntimeWarning):
    with pytest.raises(ValueError, match="checkpoints/40: meta: it was saved as step 28; it was renamed"):
      checkpoints.latest_step()
  states.save(tmp_path / "two", 28)
  shutil.copytree(tmp_path / "two" / "checkpoints" / "28", tmp_path / "two" / "checkpoints" / "40")
  with checkpoint.Checkpoints(tmp_path / "two") as checkpoints:
    with pytest.warns(RuntimeWarning, match="checkpoints/40 cannot be read"):
      assert checkpoints.latest_step() == 28


def test_checkpoints_in_the_wrong_folder(tmp_path):
  with checkpoint.Checkpoints(tmp_path, best_metric="ap") as checkpoints:
    checkpoints.save(1, states.make(1), states.META)
    checkpoints.save(2, states.make(2), states.META)
    checkpoints.save_best(1, states.make(1), states.META, {"ap": 0.5})
  shutil.copytree(tmp_path / "checkpoints" / "2", tmp_path / "best" / "2")
  shutil.rmtree(tmp_path / "checkpoints" / "2")
  shutil.copytree(tmp_path / "best" / "1", tmp_path / "checkpoints" / "5")
  with checkpoint.Checkpoints(tmp_path, best_metric="ap") as checkpoints:
    with pytest.warns(RuntimeWarning, match="best/2 cannot be read.*one of the latest checkpoints"):
      assert checkpoints.best_step() == 1
    with pytest.warns(RuntimeWarning, match="checkpoints/5 cannot be read"):
      assert checkpoints.latest_step() == 1


def test_records_of_the_first_edition_are_read(tmp_path):
  states.save(tmp_path, 1)
  path = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
  record = json.loads(path.read_text())
  del record["digest"], record["digests"]
  path.write_text(json.dumps(record))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    comparing.assert_equal(checkpoints.restore(states.abstract(states.make()))[0], states.make(1))
