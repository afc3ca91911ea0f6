"""Files whose sizes, offsets, strides and counts lie: refused by name, without memory, time or a crash."""

import contextlib
import io
import json
import pathlib
import pickle
import random
import struct
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from frozen_vision.files import checkpoint_file, formats
from tests.files import crafted, hostile, pth_file

# A few hundred bytes each, from public reports.
_FAULTS = sorted((pathlib.Path(__file__).parent / "faults").glob("*.pth"))


def _zip(path: pathlib.Path, pickled: bytes, **options) -> pathlib.Path:
  with zipfile.ZipFile(path, "w", **options) as archive:
    archive.writestr("archive/data.pkl", pickled)
  return path


def _short(path: pathlib.Path, claimed: int = 1 << 24, there: int = 16) -> pathlib.Path:
  """A member whose central entry claims more bytes than it has."""
  count = claimed // 4
  stored = crafted.storage("0", crafted.number(count))
  pickled = crafted.tensor(stored, crafted.number(0), crafted.numbers((count,)), crafted.numbers((1,)))
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickled)
    archive.writestr("archive/data/0", bytes(there))
  data = bytearray(path.read_bytes())
  entry = data.rindex(b"PK\x01\x02")
  data[entry + 24 : entry + 28] = struct.pack("<I", claimed)
  path.write_bytes(data)
  return path


def _npy(shape: tuple[int, ...]) -> bytes:
  """The header of an array of float32."""
  file = io.BytesIO()
  np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
  return file.getvalue()


def _crafted(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """{situation: file}, each as small as it can be."""
  one = (crafted.storage("0", crafted.number(1)), np.ones(1, np.float32).tobytes())

  def view(name, offset=0, shape=(1,), strides=(1,), storage=one):
    pickled = crafted.tensor(
      storage[0], crafted.number(offset), crafted.numbers(shape), crafted.numbers(strides)
    )
    path = folder / f"{name}.pth"
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("archive/data.pkl", pickled)
      archive.writestr("archive/data/0", storage[1])
    return path

  files = {
    "short": _short(folder / "short.pth"),
    "short in both": _short(folder / "short2.pth", claimed=1 << 31, there=0),
    "stride 0": view("stride0", shape=(10**11,), strides=(0,)),
    "product overflows": view("overflow", shape=(1 << 40, 1 << 40), strides=(0, 0)),
    "offset overflows": view("offset", offset=1 << 61),
    "stride overflows": view("stride", shape=(3,), strides=(1 << 61,)),
    "many dimensions": view("dims", shape=(1,) * 60, strides=(1,) * 60),
    "wrong count": view("count", storage=(crafted.storage("0", crafted.number(1 << 40)), one[1])),
    "another type": view("type", storage=(crafted.storage("0", crafted.number(1), b"DoubleStorage"), one[1])),
    "missing member": view("missing", storage=(crafted.storage("7", crafted.number(1)), one[1])),
    "cycle": _zip(folder / "cycle.pth", b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."),
    "memo": _zip(folder / "memo.pth", b"\x80\x02}r\x00\xc2\xeb\x0b."),
    "tuple hash": _zip(folder / "tuplehash.pth", b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s."),
    "frozenset": _zip(folder / "frozenset.pth", b"\x80\x04})" + b"2\x86" * 60 + b"(h\x00\x91s."),
    "long integer": _zip(folder / "long.pth", b"\x80\x02\x8b\xff\xff\xff\x7f."),
    "long text": _zip(folder / "text.pth", b"\x80\x02X\xff\xff\xff\xff."),
    "bytearray": _zip(folder / "bytearray.pth", b"\x80\x05\x96" + b"\xff" * 7 + b"\x00."),
    "deep": _zip(folder / "deep.pth", b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b"."),
    "opcodes": _zip(folder / "opcodes.pth", b"\x80\x02" + b"N0" * 5_000_000 + b"N."),
    "dictionaries": _zip(folder / "dicts.pth", b"\x80\x02(" + b"}" * 7_000_000 + b"l."),
    "copies": _zip(
      folder / "copies.pth",
      b"\x80\x02(" + b"N" * 100_000 + b"lq\x00(" + b"ccollections\nOrderedDict\n(h\x00tR" * 20_000 + b"l.",
    ),
    "extension": _zip(folder / "extension.pth", b"\x80\x02\x82\x01."),
    "no stack": _zip(folder / "stack.pth", b"\x80\x02s."),
    "no mark": _zip(folder / "mark.pth", b"\x80\x02u."),
    "compressed bomb": _zip(
      folder / "bomb.pth", b"\x80\x02" + b"N0" * 20_000_000 + b"N.", compression=zipfile.ZIP_DEFLATED
    ),
    "legacy count": folder / "legacy.pth",
    "safetensors header": folder / "header.safetensors",
    "safetensors offsets": folder / "offsets.safetensors",
    "safetensors overflow": folder / "overflow.safetensors",
    "npz shape": folder / "shape.npz",
    "npz bomb": folder / "bomb.npz",
    "npz objects": folder / "objects.npz",
    "index outside": folder / "outside.safetensors.index.json",
    "index too deep": folder / "deep.safetensors.index.json",
    "shard count": folder / "model-00001-of-99999.safetensors",
  }
  pth_file.write_legacy(files["legacy count"], {"w": np.ones(4, np.float32)})
  data = files["legacy count"].read_bytes()
  files["legacy count"].write_bytes(data[:-24] + struct.pack("<q", 1 << 40) + data[-16:])
  files["safetensors header"].write_bytes(struct.pack("<Q", 1 << 40) + b"{}" + b" " * 20)
  with zipfile.ZipFile(files["npz shape"], "w") as archive:
    archive.writestr("w.npy", _npy((1 << 40, 1 << 20)))
  with zipfile.ZipFile(files["npz bomb"], "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("w.npy", _npy((1 << 24,)) + bytes(4 << 24))
  np.savez(files["npz objects"], w=np.array([{}], dtype=object))
  for name, entry in (
    ("safetensors offsets", {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 4 << 20]}),
    ("safetensors overflow", {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}),
  ):
    header = json.dumps({"w": entry}).encode()
    files[name].write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
  files["index outside"].write_text(json.dumps({"weight_map": {"w": "../../etc/passwd"}}))
  files["index too deep"].write_text('{"weight_map":' + "[" * 100_000)
  files["shard count"].write_bytes(b"x" * 20)
  return files


def test_sizes_that_lie_are_refused_by_name(tmp_path):
  files = _crafted(tmp_path)
  assert len(_FAULTS) == 5
  files |= {f"kept {path.name}": path for path in _FAULTS}
  found = hostile.read_all(list(files.values()))
  for situation, path in files.items():
    said, seconds, peak = found[str(path)]
    assert said.startswith("refused ") and path.name in said, (situation, said)
    assert seconds < 10 and peak < 2048, (situation, seconds, peak)


def test_crafted_checkpoints_are_refused_or_read_and_nothing_is_executed(tmp_path):
  rng, marker = random.Random(1), tmp_path / "executed"
  kinds = {}
  for index in range(40):
    path = tmp_path / f"crafted{index}.pth"
    kinds[str(path)], data = crafted.craft(rng, marker)
    path.write_bytes(data)
  found = hostile.read_all(list(map(pathlib.Path, kinds)))
  for path, (said, seconds, peak) in found.items():
    assert said.startswith("read ") or (said.startswith("refused ") and pathlib.Path(path).name in said), said
    assert seconds < 10 and peak < 2048, (kinds[path], seconds, peak)
  assert {kinds[path] for path, (said, *_) in found.items() if said.startswith("read ")} >= {"code", "view"}
  assert not marker.exists()
  for seed in range(20):  # which Python would have done: these touch a file
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
      pickle.loads(b"\x80\x04" + crafted.code(random.Random(seed), marker) + b".")
  assert marker.exists()


def good_files(folder: pathlib.Path) -> list[tuple[str, bytes]]:
  """(ending, content) of a file of each format."""
  rng = np.random.default_rng(0)
  arrays = {f"layers.{i}.weight": rng.standard_normal((4, 3)).astype(np.float32) for i in range(3)}
  base = np.arange(24, dtype=np.float32)
  content = {
    "model": arrays | {"view": pth_file.View(base, 4, (3, 2), (1, 3)), "half": base.astype(np.float16)},
    "config": pth_file.Call("argparse", "Namespace", state={"lr": 1}),
    "epoch": 3,
  }
  safetensors.numpy.save_file(arrays, folder / "a.safetensors", metadata={"format": "pt"})
  np.savez(folder / "a.npz", **arrays)
  made = [
    pth_file.write(folder / "a.pth", content),
    pth_file.write_legacy(folder / "b.pth", content),
    folder / "a.safetensors",
    folder / "a.npz",
  ]
  return [(path.suffix, path.read_bytes()) for path in made]


def mutate(data: bytes, rng: random.Random) -> bytes:
  """A few bytes changed, removed, repeated or replaced by numbers that programs are wrong about."""
  found = bytearray(data)
  for _ in range(rng.randint(1, 4)):
    at = rng.randrange(max(1, len(found)))
    match rng.randrange(6):
      case 0:
        found[at : at + 1] = bytes([rng.randrange(256)])
      case 1:
        del found[at : at + rng.randint(1, 16)]
      case 2:
        found[at:at] = found[at : at + rng.randint(1, 64)]
      case 3:
        found[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000)))
      case 4:
        found[at : at + 8] = struct.pack(
          "<Q", rng.choice((0, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
        )
      case 5:
        del found[at:]
  return bytes(found)


@pytest.mark.parametrize("seed", [0])
def test_mutated_files_are_read_or_refused(tmp_path, seed, count=300):
  rng = random.Random(seed)
  good = good_files(tmp_path)
  files = []
  for index in range(count):
    suffix, data = good[index % len(good)]
    path = tmp_path / f"mutant{index}{suffix}"
    path.write_bytes(mutate(data, rng))
    files.append(path)
  found = hostile.read_all(files)
  outcomes = [found[str(path)][0].split()[0] for path in files]
  assert set(outcomes) <= {"read", "refused", "other"}
  for path in files:
    said, seconds, peak = found[str(path)]
    assert path.name in said or said.startswith("read "), said
    assert not said.startswith("other") or "is empty" in said, said
    assert seconds < 10 and peak < 2048, said
  assert outcomes.count("refused") > count // 2


def test_all_tensors_together_are_no_larger_than_the_file(tmp_path):
  base = np.ones(1 << 20, np.float32)
  path = pth_file.write(tmp_path / "a.pth", {"w": base})
  assert checkpoint_file.open_checkpoint(path).read_all()["w"].sum() == base.size
  # One storage of 4 MiB, 26 tensors that view it.
  stored = crafted.storage("0", crafted.number(base.size))
  shape, strides = crafted.numbers((base.size,)), crafted.numbers((1,))
  body = crafted.view(stored, crafted.number(0), shape, strides)
  pickled = b"\x80\x02}(" + b"".join(crafted.text(chr(65 + i)) + body for i in range(26)) + b"u."
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickled)
    archive.writestr("archive/data/0", base.tobytes())
  with pytest.raises(
    formats.FileFormatError, match="a.pth has .* bytes and describes tensors of 109,051,904"
  ):
    checkpoint_file.open_checkpoint(path).read_all()
