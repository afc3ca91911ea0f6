"""What a checkpoint remembers of its features, and which config a workdir belongs to."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.files import lock
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import workdir as workdir_lib
from frozen_vision.training import loop
from tests import tiny


def test_feature_keys():
  key = dict(weights="f00d", windows=[8, 8], image=dict(mean=[0.1], dtype="bfloat16"))
  workdir_lib.check_feature_key(key, dict(key, windows=(8, 8)))
  workdir_lib.check_feature_key("a", "a")
  workdir_lib.check_feature_key(None, None)
  other = dict(key, image=dict(mean=[0.1], dtype="int8"), levels=4)
  with pytest.raises(ValueError) as error:
    workdir_lib.check_feature_key(key, other)
  text = str(error.value)
  assert json.dumps(key) in text and json.dumps(other) in text
  assert 'image.dtype: "bfloat16" in the checkpoint, "int8" in the backbone' in text
  assert "levels: absent in the checkpoint, 4 in the backbone" in text
  for found, wanted in (("a", "b"), ("a", key), (None, "a")):
    with pytest.raises(ValueError, match="other frozen features"):
      workdir_lib.check_feature_key(found, wanted)


def test_meta_holds_what_a_head_needs(tmp_path):
  meta = workdir_lib.make_meta(config=dict(a=(1, 2)), feature_key="k", examples=np.int64(8), more=1)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, dict(w=jnp.ones(1)), meta)
    found = checkpoints.read_meta()
  assert found.pop("library_version")
  assert found == dict(config=dict(a=[1, 2]), feature_key="k", examples=8, more=1, step=2)


def test_a_workdir_belongs_to_one_config(tmp_path):
  workdir = tmp_path / "a" / "run"
  config = dict(
    steps=100, log_every=10, data=dict(num_workers=2, sizes=(128, 192)), drop=0.1, nan=float("nan")
  )
  claim = functools.partial(workdir_lib.claim_workdir, workdir, ignore=("log_every", "*.num_workers"))
  workdir_lib.claim_workdir(workdir, config, is_writer=False)
  assert not workdir.exists()
  claim(config)
  assert [p.name for p in workdir.iterdir()] == ["config.json"]
  written = (workdir / "config.json").read_bytes()
  claim(config)
  assert (workdir / "config.json").read_bytes() == written
  with pytest.raises(ValueError) as error:
    claim(dict(config, steps=200, drop=True, new=None, log_every=1))
  text = str(error.value)
  for part in (
    str(workdir),
    "steps: 100 there, 200 now",
    "drop: 0.1 there, true now",
    "new: absent there, null now",
    "another --workdir",
  ):
    assert part in text
  assert "log_every" not in text and "sizes" not in text
  assert (workdir / "config.json").read_bytes() == written
  claim(dict(config, log_every=1, data=dict(config["data"], num_workers=0)))
  now = json.loads((workdir / "config.json").read_text())
  assert now["log_every"] == 1 and now["data"]["num_workers"] == 0
  workdir_lib.claim_workdir(workdir, dict(config, data=3, log_every=1), ignore=("data",))
  (workdir / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json is not valid JSON"):
    claim(config)


_CONFIG = {"batch_size": 4, "optimizer": {"learning_rate": 0.1}, "log_every": 10}
_META = {
  "config": _CONFIG,
  "feature_key": None,
  "examples": 80,
  "step": 20,
  "classes": ["cat", "dog"],
}


def _check(meta=None, config=_CONFIG, classes=("cat", "dog"), batch_size=4):
  workdir_lib.check_resumed(
    meta or _META, config, classes, batch_size, where="runs/a", ignore=("log_every", "loader.*")
  )


def test_the_record_of_a_checkpoint_decides():
  _check()
  _check(config=_CONFIG | {"log_every": 50})
  with pytest.raises(ValueError, match=r"a was saved with another config.*\n  batch_size: 4 there, 8 now"):
    _check(config=_CONFIG | {"batch_size": 8}, batch_size=8)
  with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.1 there, 0.2 now"):
    _check(config=_CONFIG | {"optimizer": {"learning_rate": 0.2}})
  with pytest.raises(ValueError, match="of step 20 and of 40 examples, expected 80 with batches of 4"):
    _check(meta=_META | {"examples": 40})
  for name in ("config", "feature_key", "examples", "step"):
    with pytest.raises(ValueError, match=f"does not say its {name}"):
      _check(meta={key: value for key, value in _META.items() if key != name})
  _check(meta={key: value for key, value in _META.items() if key != "classes"})  # from before they were saved


@pytest.mark.parametrize(
  ("classes", "message"),
  [
    (
      ["dog", "cat"],
      "same ones in another order. The first to differ is class 0, 'cat' there and 'dog' in",
    ),
    (["cat", "dog", "owl"], "3: 1 are new: owl. The first to differ is class 2, nothing there and 'owl' in"),
    (["cat"], "1: 1 are gone: dog. The first to differ is class 1, 'dog' there and nothing in"),
    (["cat", "owl"], "1 are gone: dog; 1 are new: owl"),
  ],
)
def test_other_classes_are_named(classes, message):
  with pytest.raises(ValueError, match=message):
    _check(classes=classes)
  as_categories = [{"id": 7 + i, "name": name} for i, name in enumerate(classes)]
  with pytest.raises(ValueError, match=message):
    workdir_lib.check_classes([{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}], as_categories, where="a")


def test_one_process_writes_a_workdir(tmp_path):
  folder = tmp_path / "run"
  with workdir_lib.hold(folder):
    with pytest.raises(lock.LockedError, match="is writing the run in .*run. Wait"):
      with workdir_lib.hold(folder):
        pass
    with workdir_lib.hold(folder, is_writer=False):
      pass
  assert not folder.exists()
  (folder / "pictures").mkdir(parents=True)
  leftovers = [folder / ".metrics.0123.partial", folder / "pictures" / ".8_val.4567.partial"]
  for path in leftovers:
    path.touch()
  with workdir_lib.hold(folder, is_writer=False):
    assert all(path.exists() for path in leftovers)
  with workdir_lib.hold(folder):
    assert not any(path.exists() for path in leftovers)


def test_an_address_is_no_workdir():
  with pytest.raises(ValueError, match="gs://bucket/run is an address, expected a folder. Mount it"):
    workdir_lib.local_folder("gs://bucket/run")
  with pytest.raises(ValueError, match="gs://bucket/run is an address"):
    loop.train(tiny.segmentation(), "gs://bucket/run")
