"""What a run does not lose, and what it refuses to continue."""

import errno
import itertools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from frozen_vision.data import images as images_lib
from frozen_vision.data import pipeline
from frozen_vision.data.classification import folders
from frozen_vision.files import lock
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import curves, digests, workdir
from frozen_vision.tasks import classification
from frozen_vision.training import evaluation
from frozen_vision.training import loop as train
from frozen_vision.training import run as run_lib
from tests import comparing, tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  return tiny.image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
  """(config, folder, metrics) of a run that nothing interrupted; nobody writes there."""
  config = tiny.classification(images, images)
  config.update(dict(trainable=("head/.*",), steps=4, log_every=2, eval_every=2, checkpoint_every=2))
  folder = tmp_path_factory.mktemp("whole")
  return config, folder, train.train(config, folder)


def _fails_once(monkeypatch, at):
  """Makes the evaluation of a step fail, as a truncated image does."""
  original = evaluation.evaluate_all

  def evaluate_all(task, predictions, folder, log, step, **options):
    if step == at:
      raise images_lib.ImageError("7.png", "is truncated", "damaged")
    return original(task, predictions, folder, log, step, **options)

  monkeypatch.setattr(evaluation, "evaluate_all", evaluate_all)


def _stop_at(monkeypatch, step):
  """Sends the process SIGTERM while it works on the step after which `step` are done."""
  original = classification.ClassificationTask.phase_at

  def phase_at(self, at):
    if at == step - 1:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(self, at)

  monkeypatch.setattr(classification.ClassificationTask, "phase_at", phase_at)


@pytest.mark.parametrize("end", ["error", "signal"])
@pytest.mark.parametrize("at", [2, 4])
def test_an_evaluation_that_failed_or_did_not_begin_is_made_up_for(
  whole, tmp_path, monkeypatch, caplog, at, end
):
  config, folder, metrics = whole
  with monkeypatch.context() as patch:
    if end == "error":
      _fails_once(patch, at)
      with pytest.raises(images_lib.ImageError) as error:
        train.train(config, tmp_path)
      assert str(error.value).startswith(
        f"7.png: is truncated. Step {at} is saved and not evaluated. Mend the file"
      )
    else:
      _stop_at(patch, at)
      train.train(config, tmp_path)
  assert at not in [step for step, _ in tiny.metrics(tmp_path).get("eval/top1", [])]
  assert checkpoint.Checkpoints(tmp_path).latest_step() == at
  with caplog.at_level("INFO"):
    found = train.train(config, tmp_path)
  assert f"Step {at} was saved and not evaluated; it is evaluated now." in caplog.text
  assert {**found, "examples_per_second": 0} == {**metrics, "examples_per_second": 0}
  assert comparing.checkpoint(tmp_path) == comparing.checkpoint(folder)
  assert comparing.log_lines(tmp_path) == comparing.log_lines(folder)
  for kept in (folder, tmp_path):
    assert curves.are_whole(kept / "curves.png")
  assert checkpoint.Checkpoints(tmp_path, best_metric="top1").best_step() == (
    checkpoint.Checkpoints(folder, best_metric="top1").best_step()
  )


def test_what_is_evaluated_is_saved_first_whatever_the_steps_between_checkpoints(
  images, tmp_path, monkeypatch
):
  config = tiny.classification(images, images)
  config.update(dict(trainable=("head/.*",), steps=4, log_every=4, eval_every=2, checkpoint_every=100))
  with monkeypatch.context() as patch:
    _fails_once(patch, 2)
    with pytest.raises(ValueError, match="truncated"):
      train.train(config, tmp_path)
  assert checkpoint.Checkpoints(tmp_path).latest_step() == 2
  assert not (tmp_path / "metrics.jsonl").exists()
  train.train(config, tmp_path)
  assert [step for step, _ in tiny.metrics(tmp_path)["eval/top1"]] == [2, 4]


def _damage_middle(path):
  """Leaves both ends of an image, which is all that the start of a run looks at."""
  data = bytearray(path.read_bytes())
  middle = len(data) // 2
  data[middle - 20 : middle + 20] = bytes(40)
  path.write_bytes(data)


def _position(position, rng):
  return {"position": np.int64(position)}


def test_an_image_damaged_in_its_middle_ends_the_run_after_a_save(whole, images, tmp_path, caplog):
  config = whole[0].copy_and_resolve_references()
  shutil.copytree(images, tmp_path / "data")
  config.classification.train = str(tmp_path / "data")
  config.loader.workers = 1  # the error comes from another process
  # The order of examples is a function of the seed: the third step is the first to see this image.
  order = pipeline.train_batches(range(12), _position, batch_size=4, seed=config.seed)
  with order as batches:
    position = [batch["position"][0] for batch in itertools.islice(batches, 3)][2]
  name = folders.ImageFolder(images).names[position]
  _damage_middle(tmp_path / "data" / name)
  with pytest.raises(ValueError) as error:
    train.train(config, tmp_path / "run")
  assert f"{name}: cannot be decoded" in str(error.value) and "Step 2 is saved." in str(error.value)
  assert "--config.data.allow_changes=True" in str(error.value)
  assert checkpoint.Checkpoints(tmp_path / "run").latest_step() == 2
  assert "The next batch cannot be read; step 2 is saved." in caplog.text
  shutil.copy(images / name, tmp_path / "data" / name)
  assert train.train(config, tmp_path / "run")
  assert comparing.log_lines(tmp_path / "run") == comparing.log_lines(whole[1])


def test_the_first_line_after_a_restart_averages_the_same_steps(whole, tmp_path, monkeypatch):
  config, folder, _ = whole
  with monkeypatch.context() as patch:
    _stop_at(patch, 3)
    train.train(config, tmp_path)
  assert checkpoint.Checkpoints(tmp_path).latest_step() == 3  # between two lines of the log
  train.train(config, tmp_path)
  assert comparing.checkpoint(tmp_path) == comparing.checkpoint(folder)
  assert comparing.log_lines(tmp_path) == comparing.log_lines(folder)


def _copy(whole, folder):
  config, source, _ = whole
  shutil.copytree(source, folder, dirs_exist_ok=True)
  return config.copy_and_resolve_references()


@pytest.mark.parametrize("damage", ["half", "absent", "empty"])
def test_damaged_curves_are_drawn_again(whole, tmp_path, damage):
  config = _copy(whole, tmp_path)
  path = tmp_path / "curves_train.png"
  data = path.read_bytes()
  match damage:
    case "half":
      path.write_bytes(data[: len(data) // 2])
    case "absent":
      path.unlink()
    case "empty":
      path.write_bytes(b"")
  assert train.train(config, tmp_path) == {}
  assert curves.are_whole(tmp_path / "curves.png")


def test_curves_that_cannot_be_written_end_no_run(whole, tmp_path, monkeypatch, caplog):
  shutil.copy(whole[1] / "metrics.jsonl", tmp_path)

  def full(path, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))

  with monkeypatch.context() as patch:
    patch.setattr(curves.atomic, "open_aside", full)
    train._draw_curves(tmp_path, True, again=False)
  assert "The curves could not be written: " in caplog.text and "No space left on device" in caplog.text
  train._draw_curves(tmp_path, True, again=False)
  assert curves.are_whole(tmp_path / "curves.png")


def test_the_second_run_in_a_workdir_touches_nothing(whole, tmp_path):
  config = _copy(whole, tmp_path)
  with workdir.hold(tmp_path):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for call in (train.train, train.evaluate):
      with pytest.raises(lock.LockedError, match=f"process {os.getpid()} on .* is writing the run in "):
        call(config, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
  assert not (tmp_path / ".lock").exists()


def test_the_checkpoint_decides_what_continues(whole, tmp_path):
  config = _copy(whole, tmp_path)
  (tmp_path / "config.json").unlink()
  config.steps, config.batch_size, config.optimizer.learning_rate = 8, 2, 0.5
  with pytest.raises(ValueError) as error:
    train.train(config, tmp_path)
  for part in ("was saved with another config", "batch_size: 4 there, 2 now", "optimizer.learning_rate: "):
    assert part in str(error.value)
  assert not (tmp_path / "config.json").exists()


def test_a_renamed_checkpoint_is_no_place_to_continue(whole, tmp_path):
  config = _copy(whole, tmp_path)
  folder = tmp_path / "checkpoints"
  shutil.rmtree(folder / "2")
  (folder / "4").rename(folder / "3")
  with (
    pytest.raises(ValueError, match="checkpoints/3: meta: it was saved as step 4"),
    pytest.warns(RuntimeWarning),
  ):
    train.train(config, tmp_path)


def test_other_data_are_not_continued_unless_that_is_asked_for(whole, images, tmp_path, caplog):
  config = _copy(whole, tmp_path / "run")
  data = tmp_path / "data"
  shutil.copytree(images, data)
  (data / "class0" / "0.png").unlink()
  config.classification.train = config.classification.validation = str(data)
  _replace_in_records(tmp_path / "run", str(images), str(data))
  with pytest.raises(ValueError, match="there are 11 training examples, 12 then.*allow_changes=True"):
    train.train(config, tmp_path / "run")
  config.data.allow_changes = True
  assert train.train(config, tmp_path / "run") == {}  # all steps are done
  assert "there are 11 training examples, 12 then" in caplog.text


def _replace_in_records(folder, old, new):
  """Writes another path into the config of a run and of its checkpoints."""
  for file in (folder / "config.json", *folder.rglob("meta/metadata")):
    content = json.loads(file.read_text().replace(old, new))
    if "digest" in content:
      del content["digest"]
      content["digest"] = digests.of_record(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("change", ["exchanged", "one more", "renamed"])
def test_other_classes_are_not_evaluated_or_continued(whole, images, tmp_path, change):
  config = _copy(whole, tmp_path / "run")
  data = tmp_path / "data"
  shutil.copytree(images, data)
  for split in {path.parent for path in data.rglob("class0")}:
    match change:
      case "exchanged":  # names in the file are in another order, which sorting names again would hide
        (split / "class0").rename(split / "zebra")
      case "one more":
        shutil.copytree(split / "class0", split / "another")
      case "renamed":
        (split / "class1").rename(split / "class1b")
  config.classification.train = config.classification.validation = str(data)
  _replace_in_records(tmp_path / "run", str(images), str(data))
  for call in (train.train, train.evaluate):
    with pytest.raises(ValueError, match="on 3 classes, the data have [34]: .*The first to differ is"):
      call(config, tmp_path / "run")


def test_at_most_two_steps_are_in_flight(whole, tmp_path, monkeypatch):
  config = whole[0].copy_and_resolve_references()
  config.steps, config.eval_every, config.log_every, config.checkpoint_every = 8, 0, 100, 100
  events, original = [], jax.block_until_ready

  def block_until_ready(x):
    if isinstance(x, dict) and "loss" in x:
      events.append(("done", id(x["loss"])))
    return original(x)

  class Recorded(dict):
    def __getitem__(self, phase):
      step = super().__getitem__(phase)

      def run(*arguments):
        state, scalars = step(*arguments)
        kept.append(scalars)
        events.append(("sent", id(scalars["loss"])))
        return state, scalars

      return run

  kept = []
  original_train = run_lib.Run.train

  def recorded(self, *arguments):
    self.steps = Recorded(self.steps)
    return original_train(self, *arguments)

  monkeypatch.setattr(run_lib.Run, "train", recorded)
  monkeypatch.setattr(run_lib.jax, "block_until_ready", block_until_ready)
  train.train(config, tmp_path)
  in_flight, most, sent = set(), 0, 0
  for what, name in events:
    if what == "sent":
      in_flight.add(name)
      sent += 1
    else:
      in_flight.discard(name)
    most = max(most, len(in_flight))
  assert sent == 8 and most == 2
