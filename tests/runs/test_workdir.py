"""What a checkpoint remembers of its features, and which config a workdir belongs to."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.runs import checkpoints as checkpoint


def test_feature_keys():
  key = dict(weights="f00d", windows=[8, 8], image=dict(mean=[0.1], dtype="bfloat16"))
  checkpoint.check_feature_key(key, dict(key, windows=(8, 8)))
  checkpoint.check_feature_key("a", "a")
  checkpoint.check_feature_key(None, None)
  other = dict(key, image=dict(mean=[0.1], dtype="int8"), levels=4)
  with pytest.raises(ValueError) as error:
    checkpoint.check_feature_key(key, other)
  text = str(error.value)
  assert json.dumps(key) in text and json.dumps(other) in text
  assert 'image.dtype: "bfloat16" in the checkpoint, "int8" in the backbone' in text
  assert "levels: absent in the checkpoint, 4 in the backbone" in text
  for found, wanted in (("a", "b"), ("a", key), (None, "a")):
    with pytest.raises(ValueError, match="other frozen features"):
      checkpoint.check_feature_key(found, wanted)


def test_meta_holds_what_a_head_needs(tmp_path):
  meta = checkpoint.make_meta(config=dict(a=(1, 2)), feature_key="k", examples=np.int64(8), more=1)
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
  claim = functools.partial(checkpoint.claim_workdir, workdir, ignore=("log_every", "*.num_workers"))
  checkpoint.claim_workdir(workdir, config, is_writer=False)
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
  checkpoint.claim_workdir(workdir, dict(config, data=3, log_every=1), ignore=("data",))
  (workdir / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json is not valid JSON"):
    claim(config)
