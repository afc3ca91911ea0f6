""".pth files are data: tensors come out, nothing in them is run, damage is named."""

import pathlib
import zipfile

import ml_dtypes
import numpy as np
import pytest

from frozen_vision.backbones import families
from frozen_vision.files import torch_file
from tests.files import pth_file


def _attack(path: pathlib.Path) -> pth_file.Call:
  """What would create a file if a loader called it."""
  return pth_file.Call("os", "system", f"touch {path}")


def test_tensors_of_every_layout(tmp_path):
  base = np.arange(24, dtype=np.float32)
  content = {
    "model": {
      "plain": base.reshape(2, 3, 4),
      "transposed": pth_file.View(base, 4, (3, 2), (1, 3)),
      "half": base.astype(np.float16),
      "bfloat": base.astype(ml_dtypes.bfloat16),
      "index": np.arange(5),
      "scalar": pth_file.View(base, 7, (), ()),
      "empty": pth_file.View(base, 0, (0, 3), (3, 1)),
    },
    "epoch": 3,
    "optimizer": {"lr": 1},
  }
  tensors, others = torch_file.open_torch(pth_file.write(tmp_path / "a.pth", content))
  assert others == ["epoch", "optimizer"]
  np.testing.assert_array_equal(tensors["plain"].read(), base.reshape(2, 3, 4))
  np.testing.assert_array_equal(tensors["transposed"].read(), base[4:10].reshape(2, 3).T)
  for key in ("half", "bfloat"):
    assert tensors[key].read().dtype == tensors[key].dtype
    np.testing.assert_array_equal(tensors[key].read().astype(np.float32), base)
  np.testing.assert_array_equal(tensors["index"].read(), np.arange(5))
  assert tensors["scalar"].shape == () and tensors["scalar"].read() == 7
  assert tensors["empty"].read().shape == (0, 3)


@pytest.mark.parametrize("name", ["os.system", "posix.system", "builtins.eval", "builtins.getattr"])
def test_a_pickle_that_runs_code_is_not_run(tmp_path, name):
  target = tmp_path / "executed"
  module, function = name.split(".")
  argument = f"open({str(target)!r}, 'w')" if function == "eval" else f"touch {target}"
  attack = pth_file.Call(module, function, argument)
  path = pth_file.write(tmp_path / "a.pth", attack)
  with pytest.raises(
    ValueError, match=rf"holds no dictionary of tensors.*neither imported nor called: \['{name}'\]"
  ):
    families.load_backbone(path)
  # Beside real weights it is ignored, by name.
  path = pth_file.write(tmp_path / "b.pth", {"model": {"x": np.ones(2, np.float32)}, "config": attack})
  tensors, others = torch_file.open_torch(path)
  assert list(tensors) == ["x"]
  assert others == ["config", f"{name} (a name in the pickle, not imported)"]
  # A plain pickle is not even opened, whatever it is called.
  for suffix in (".pth", ".pkl", ".safetensors"):
    path = tmp_path / f"plain{suffix}"
    path.write_bytes(pth_file.pickle_of(attack))
    with pytest.raises(ValueError, match="not a complete"):
      families.load_backbone(path)
  assert not target.exists()


_OS = b"cos\nsystem\n"


# Every way in which a pickle can call: REDUCE of a name found on the stack, INST, OBJ, NEWOBJ, NEWOBJ_EX.
@pytest.mark.parametrize(
  "program",
  [
    lambda name, text: name(b"os") + name(b"system") + b"\x93(" + text + b"tR",
    lambda name, text: b"(" + text + b"ios\nsystem\n",
    lambda name, text: b"(" + _OS + text + b"o",
    lambda name, text: _OS + b"(" + text + b"t\x81",
    lambda name, text: _OS + b"(" + text + b"t}\x92",
  ],
  ids=["STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"],
)
def test_no_opcode_calls_anything(tmp_path, program):
  target = tmp_path / "executed"

  def string(text):
    return b"X" + len(text).to_bytes(4, "little") + text

  path = tmp_path / "a.pth"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr(
      "archive/data.pkl", b"\x80\x04" + program(string, string(f"touch {target}".encode())) + b"."
    )
  with pytest.raises(ValueError, match=r"holds no dictionary of tensors.*\['os.system'\]"):
    families.load_backbone(path)
  assert not target.exists()


@pytest.mark.parametrize(
  "name",
  [
    "torch._utils\n_rebuild_parameter",
    "torch._utils\n_rebuild_tensor_v2",
    "torch\nFloatStorage",
    "collections\nOrderedDict",
    "os\nsystem",
  ],
)
def test_nothing_of_ours_can_be_changed_by_a_file(tmp_path, name):
  good = pth_file.write(tmp_path / "good.pth", {"x": np.arange(4, dtype=np.float32)})
  state = pth_file.pickle_of((None, {"__defaults__": (1,), "call": 2, "dtype": 3, "__setstate__": 4}))[2:-1]
  path = tmp_path / "bad.pth"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02c" + name.encode() + b"\n" + state + b"b.")
  with pytest.raises(ValueError, match="bad.pth"):
    torch_file.open_torch(path)
  tensors, others = torch_file.open_torch(good)
  np.testing.assert_array_equal(tensors["x"].read(), np.arange(4))
  assert not others and torch_file._parameter.__defaults__ is None


def test_placeholders_stay_inert(tmp_path):
  # The state of an unknown object, set on it by the pickle, and a tensor rebuilt by an unknown function.
  unknown = pth_file.Call("yacs.config", "CfgNode", {"a": 1})
  rebuilt = pth_file.Call("torch._utils", "_rebuild_from_type_v2", unknown, np.ones(1, np.float32))
  path = pth_file.write(tmp_path / "a.pth", {"x": np.ones(2, np.float32), "config": unknown, "y": rebuilt})
  tensors, others = torch_file.open_torch(path)
  assert list(tensors) == ["x"]
  assert others[:2] == ["config", "y"]


def test_damaged_files(tmp_path):
  good = pth_file.write(tmp_path / "good.pth", {"x": np.ones((8, 8), np.float32)})
  data = good.read_bytes()
  bad = tmp_path / "bad.pth"
  for size in (len(data) - 30, len(data) // 2, 10):
    bad.write_bytes(data[:size])
    with pytest.raises(ValueError, match="bad.pth"):
      families.load_backbone(bad)
  bad.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
  with pytest.raises(ValueError, match="pointer of Git LFS.*git lfs pull"):
    families.load_backbone(bad)
  bad.write_bytes(b"")
  with pytest.raises(ValueError, match="is empty"):
    families.load_backbone(bad)
  with pytest.raises(FileNotFoundError, match="is a directory"):
    families.load_backbone(tmp_path)
  with pytest.raises(FileNotFoundError, match="absent.pth does not exist"):
    families.load_backbone(tmp_path / "absent.pth")
  # Numbers flipped inside of a storage: the zip's checksum.
  start = data.index(np.ones(8, np.float32).tobytes())
  bad.write_bytes(data[:start] + b"\x01" + data[start + 1 :])
  tensors, _ = torch_file.open_torch(bad)
  with pytest.raises(ValueError, match="bad.pth is damaged: Bad CRC"):
    tensors["x"].read()


@pytest.mark.parametrize(
  "view",
  [
    ((0, (5,), (1,))),
    ((1, (4,), (1,))),
    ((-1, (2,), (1,))),
    ((0, (2,), (-1,))),
    ((0, (2, 2), (1,))),
    ((0, (1 << 30,), (0,))[:1] + ((2, 3), (2, 1))),
  ],
)
def test_tensors_stay_inside_their_storage(tmp_path, view):
  path = pth_file.write(tmp_path / "a.pth", {"x": pth_file.View(np.ones(4, np.float32), *view)})
  with pytest.raises(ValueError, match="a.pth cannot be read as a .pth file"):
    torch_file.open_torch(path)
