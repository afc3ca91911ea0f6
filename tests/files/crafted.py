"""Checkpoints of PyTorch's format that lie, bite or never end, drawn from a seed."""

import io
import pathlib
import pickle
import random
import struct
import zipfile

import numpy as np

from tests.files import pth_file

_LARGE = (1 << 31, 1 << 40, (1 << 63) - 1, 1 << 62, 10**11)
_TYPES = (b"FloatStorage", b"DoubleStorage", b"LongStorage", b"BoolStorage", b"NoStorage")
# Names that run something where a pickle is loaded by Python.
_CALLS = (
  ("os", "system"),
  ("posix", "system"),
  ("builtins", "exec"),
  ("builtins", "eval"),
  ("__builtin__", "eval"),
  ("subprocess", "call"),
  ("runpy", "_run_code"),
  ("torch", "load"),
  ("torch._utils", "os.system"),
  ("collections", "OrderedDict.__init__.__globals__"),
)


def number(value: int) -> bytes:
  """The opcode of a whole number of at least 0."""
  if value < 1 << 31:
    return b"J" + struct.pack("<i", value)
  data = value.to_bytes((value.bit_length() + 8) // 8, "little")
  return b"\x8a" + bytes([len(data)]) + data


def text(value: str) -> bytes:
  return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def numbers(values: tuple[int, ...]) -> bytes:
  return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str, size: bytes, kind: bytes = b"FloatStorage") -> bytes:
  """A storage by its persistent id."""
  return b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + text(key) + text("cpu") + size + b"tQ"


def view(stored: bytes, offset: bytes, shape: bytes, strides: bytes) -> bytes:
  """A tensor, as a view of a storage."""
  rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
  return rebuild + stored + offset + shape + strides + b"\x89ccollections\nOrderedDict\n)RtR"


def tensor(stored: bytes, offset: bytes, shape: bytes, strides: bytes) -> bytes:
  """A pickle of {"w": a view of a storage}."""
  return b"\x80\x02}(" + text("w") + view(stored, offset, shape, strides) + b"u."


def archive(pickled: bytes, *, compressed: bool = False, **members: bytes) -> bytes:
  """The bytes of a file with a pickle, and storages by number (`s0`)."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as found:
    found.writestr("archive/data.pkl", pickled)
    for name, data in members.items():
      found.writestr(f"archive/data/{name[1:]}", data)
  return file.getvalue()


def craft(rng: random.Random, marker: pathlib.Path) -> tuple[str, bytes]:
  """(kind, content) of one file; some would create `marker` if anything in them were executed."""
  kind = rng.choice(("view", "view", "sizes", "program", "code", "depth", "legacy", "bomb"))
  match kind:
    case "view":
      return kind, _view(rng)
    case "sizes":
      return kind, _lying_sizes(rng)
    case "program":
      return kind, archive(_program(rng))
    case "code":
      sound = view(storage("0", number(4)), number(0), numbers((2, 2)), numbers((2, 1)))
      bites = text("x") + code(rng, marker)
      return kind, archive(b"\x80\x04}(" + text("w") + sound + bites + b"u.", s0=bytes(16))
    case "depth":
      depth = rng.choice((100, 10_000, 200_000))
      opened, closed = rng.choice(
        ((b"(", b"l"), (b"(", b"t"), (b"]", b"a"), (b"}K\x01", b"s"), (b")", b"\x85"))
      )
      return kind, archive(b"\x80\x02" + opened * depth + closed * depth + b".")
    case "legacy":
      data = _legacy(rng)
      return kind, data
    case "bomb":
      body = rng.choice((b"N0", b"}0", b"]0", b"q\x00", b"(1", b"K\x012")) * rng.choice(
        (10**5, 10**6, 5 * 10**6)
      )
      return kind, archive(b"\x80\x02N" + body + b".", compressed=rng.random() < 0.5)


def _any(rng: random.Random) -> int:
  return rng.choice((0, 1, 2, 3, 7, rng.randrange(64), rng.choice(_LARGE)))


def _view(rng: random.Random) -> bytes:
  if rng.random() < 0.2:  # a sound one
    return archive(tensor(storage("0", number(4)), number(1), numbers((3,)), numbers((1,))), s0=bytes(16))
  dims = rng.choice((0, 1, 2, 3, 40))
  there = rng.choice((0, 1, 16, 64))
  return archive(
    tensor(
      storage(rng.choice(("0", "0", "1", "../0", "")), number(_any(rng)), rng.choice(_TYPES)),
      number(_any(rng)),
      numbers(tuple(_any(rng) for _ in range(dims))),
      numbers(tuple(_any(rng) for _ in range(rng.choice((dims, dims, dims + 1))))),
    ),
    s0=bytes(there),
  )


def _lying_sizes(rng: random.Random) -> bytes:
  """A sound pickle in an archive whose directory has other sizes and places."""
  count = rng.choice((1, 4, 1 << 20))
  pickled = tensor(storage("0", number(count)), number(0), numbers((count,)), numbers((1,)))
  data = bytearray(archive(pickled, s0=bytes(16)))
  for _ in range(rng.randint(1, 3)):
    entry = rng.choice([at for at in range(len(data) - 4) if data[at : at + 2] == b"PK"])
    field = entry + rng.choice((8, 10, 16, 20, 24, 28, 30, 34, 42))
    data[field : field + 4] = struct.pack(
      "<I", rng.choice((0, 16, count * 4 % (1 << 32), 0x7FFFFFFF, 0xFFFFFFFF))
    )
  return bytes(data)


def _program(rng: random.Random) -> bytes:
  """Opcodes in an order that no program writes."""
  pieces = [
    *(bytes([opcode]) for opcode in b"(012N]})ltdusaeRbQ\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"),
    *(b"K\x05", b"q\x00", b"h\x00", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"j\x00\x00\x00\x00"),
    *(text("w"), text("__class__"), b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"),
    *(storage("0", number(1)), number(1 << 40), b"\x8b\xff\xff\xff\x7f", b"\x82\x01"),
    *(b"P0\n", b"ios\nsystem\n"),
  ]
  return b"\x80\x02" + b"".join(rng.choices(pieces, k=rng.choice((10, 100, 2000)))) + b"."


def code(rng: random.Random, marker: pathlib.Path) -> bytes:
  """Opcodes that run a command or a text of Python where names are imported and called."""
  module, name = rng.choice(_CALLS)
  said = rng.choice(
    (f"touch {marker}", f"open({str(marker)!r}, 'w')", f"__import__('os').mknod({str(marker)!r})")
  )
  argument, called = text(said), f"c{module}\n{name}\n".encode()
  return rng.choice(
    (
      called + b"(" + argument + b"tR",
      b"(" + called + argument + b"o",  # OBJ
      b"(" + argument + f"i{module}\n{name}\n".encode(),  # INST
      called + b")\x81}" + text("__setstate__") + called + b"sb",  # NEWOBJ, BUILD
      text(module) + text(name) + b"\x93" + argument + b"\x85R",  # STACK_GLOBAL
      b"ctorch._utils\n_rebuild_tensor_v2\n(" + called + argument + b"\x85R" + b"tR",
    )
  )


def _legacy(rng: random.Random) -> bytes:
  """The format before zip archives, with a count, a key or a pickle that lies."""
  path = io.BytesIO()

  class Sink:
    def write_bytes(self, data):
      path.write(data)

  pth_file.write_legacy(Sink(), {"w": np.ones(4, np.float32), "epoch": 1})
  data = bytearray(path.getvalue())
  match rng.randrange(3):
    case 0:
      data[-24:-16] = struct.pack("<q", rng.choice((*[n for n in _LARGE if n < 1 << 63], -1, 0, 5)))
    case 1:
      del data[rng.randrange(len(data)) :]
    case 2:
      at = rng.randrange(len(data))
      data[at:at] = pickle.dumps([1, {"a": 2}], 2)
  return bytes(data)
