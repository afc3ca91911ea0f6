"""Weights are found in what people save around them, or the keys that were found are named."""

import json
import re
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from frozen_vision.files import checkpoint_file, formats, state_dicts, tensors
from tests.files import pth_file

_W = np.arange(6, dtype=np.float32).reshape(2, 3)


def _open(path):
  file = checkpoint_file.open_checkpoint(path)
  return {key: tensor.read() for key, tensor in file.tensors.items()}


@pytest.mark.parametrize("key", state_dicts.WRAPPERS)
def test_each_wrapper_alone(tmp_path, key):
  found = _open(pth_file.write(tmp_path / "a.pth", {key: {"w": _W}, "epoch": 3, "args": {"lr": 1}}))
  assert list(found) == ["w"]
  np.testing.assert_array_equal(found["w"], _W)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_training_frameworks(tmp_path, prefix):
  content = {f"{prefix}w": _W, f"{prefix}b": _W[0]}
  assert list(_open(pth_file.write(tmp_path / "a.pth", {"model": content}))) == ["w", "b"]
  safetensors.numpy.save_file(content, tmp_path / "a.safetensors")
  assert set(_open(tmp_path / "a.safetensors")) == {"w", "b"}
  # A prefix of some keys is a part of their names.
  half = pth_file.write(tmp_path / "b.pth", {f"{prefix}w": _W, "b": _W[0]})
  assert list(_open(half)) == [f"{prefix}w", "b"]


def test_several_state_dicts_are_named_and_chosen_by_name(tmp_path):
  content = {"teacher": {"w": _W}, "student": {"w": -_W}, "epoch": 1}
  path = pth_file.write(tmp_path / "dino.pth", content)
  message = r"dino.pth holds several state dicts, teacher, student; say which one .* such as dino.pth:teacher"
  with pytest.raises(formats.FileFormatError, match=message):
    _open(path)
  np.testing.assert_array_equal(_open(f"{path}:teacher")["w"], _W)
  np.testing.assert_array_equal(_open(f"{path}:student")["w"], -_W)
  with pytest.raises(
    formats.FileFormatError, match="no state dict 'teachers'; its keys are teacher, student, e"
  ):
    _open(f"{path}:teachers")
  # A key that is no usual wrapper, and one below a wrapper.
  path = pth_file.write(tmp_path / "own.pth", {"state_dict": {"ema_weights": {"w": _W}, "x": {"w": -_W}}})
  np.testing.assert_array_equal(_open(f"{path}:ema_weights")["w"], _W)
  both = pth_file.write(tmp_path / "timm.pth", {"state_dict": {"w": _W}, "state_dict_ema": {"w": -_W}})
  with pytest.raises(formats.FileFormatError, match="state_dict, state_dict_ema"):
    _open(both)


def test_the_keys_are_listed_where_none_fits(tmp_path):
  content = {"optimizer": {"lr": 1}, "weights": {"w": {"deep": _W}}, "epoch": 1}
  with pytest.raises(formats.FileFormatError, match=r"its keys are optimizer, weights, epoch\."):
    _open(pth_file.write(tmp_path / "a.pth", content))
  many = {f"key{i}": i for i in range(40)}
  with pytest.raises(formats.FileFormatError, match=r"key0, key1, .*, key11 and 28 more"):
    _open(pth_file.write(tmp_path / "a.pth", many))


def _module(parameters, buffers, children, hidden=()):
  """A pickled nn.Module."""
  state = {
    "training": False,
    "_parameters": parameters,
    "_buffers": buffers,
    "_non_persistent_buffers_set": pth_file.Call("__builtin__", "set", pth_file.Items(*hidden)),
    "_modules": children,
  }
  return pth_file.Call("my.models", "Net", state=state)


def test_whole_models_are_read_as_data(tmp_path):
  half = _W.astype(np.float16)
  block = _module(
    {"weight": pth_file.Call("torch._utils", "_rebuild_parameter", half, True, {}), "bias": None},
    {"mean": half[0], "index": half[1]},
    {},
    hidden=["index"],
  )
  model = _module({}, {}, {"blocks": _module({}, {}, {"0": block, "1": block}), "head": None})
  for content in (model, {"model": model, "epoch": 3}):
    found = _open(pth_file.write(tmp_path / "a.pth", content))
    assert sorted(found) == ["blocks.0.mean", "blocks.0.weight", "blocks.1.mean", "blocks.1.weight"]
    assert all(array.dtype == np.float16 for array in found.values())
    np.testing.assert_array_equal(found["blocks.1.weight"], half)


def test_a_module_that_contains_itself(tmp_path):
  # }(… "_modules": {"a": memo 0}): the state of object 0 holds object 0.
  def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()

  inside = b"}(" + text("a") + b"h\x00u"
  state = b"}(" + text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules") + inside + b"u"
  path = tmp_path / "loop.pth"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02cmy\nNet\n)Rq\x00" + state + b"b.")
  with pytest.raises(formats.FileFormatError, match="loop.pth holds a module that contains itself"):
    _open(path)


def _shards(folder, suffix=".safetensors", index=True):
  parts = [{"a": _W}, {"b": -_W, "c": _W[0]}, {"d": _W[1]}]
  names = [f"model-{i + 1:05d}-of-00003{suffix}" for i in range(3)]
  for name, part in zip(names, parts):
    if suffix == ".bin":
      pth_file.write(folder / name, part)
    else:
      safetensors.numpy.save_file(part, folder / name)
  places = {key: name for name, part in zip(names, parts) for key in part}
  if index:
    (folder / f"model{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
  return [folder / name for name in names]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("index", [True, False])
def test_shards_by_any_of_them(tmp_path, suffix, index):
  names = _shards(tmp_path, suffix, index)
  sources = names + [tmp_path / f"model{suffix}.index.json"] * index
  for source in sources:
    found = _open(source)
    assert sorted(found) == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(found["b"], -_W)


def test_shards_that_do_not_fit(tmp_path):
  names = _shards(tmp_path)
  index = tmp_path / "model.safetensors.index.json"
  kept = names[1].read_bytes()
  names[1].unlink()
  for source in (index, names[0]):
    with pytest.raises(
      FileNotFoundError, match="one of 3 shards, of which 1 .*: model-00002-of-00003.safetensors"
    ):
      _open(source)
  safetensors.numpy.save_file({"b": _W}, names[1])
  with pytest.raises(formats.FileFormatError, match=r"model-00002-of-00003.safetensors lacks \['c'\]"):
    _open(index)
  safetensors.numpy.save_file({"b": _W, "c": _W, "a": _W}, names[1])
  with pytest.raises(formats.FileFormatError, match=r"00002.* holds \['a'\], which another shard holds too"):
    _open(names[2])
  names[1].write_bytes(kept)
  index.write_text('{"weight_map": {"a": "/etc/passwd"}}')
  with pytest.raises(formats.FileFormatError, match="a shard is a file beside the index"):
    _open(index)
  index.write_text("[]")
  with pytest.raises(formats.FileFormatError, match="no weight_map"):
    _open(index)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite_are_refused(value, dtype):
  array = np.ones((4, 5), dtype)
  assert tensors.check_finite("w", array, "a.pth") is array
  array[2, 3] = value
  with pytest.raises(ValueError, match=re.escape("a.pth: 1 of the 20 numbers of w are not finite")):
    tensors.check_finite("w", array, "a.pth")


def test_large_finite_numbers_are_read():
  largest = np.full(8, np.finfo(np.float64).max)
  assert tensors.check_finite("w", np.full(1 << 20, np.finfo(np.float32).max, np.float32), "x").size
  assert tensors.check_finite("i", np.arange(3), "x").size == 3
  with pytest.raises(ValueError, match="8 of the 8"):  # float32 cannot hold them
    tensors.check_finite("w", largest, "x")
