"""Reads a pickle as data: a machine of its own for the opcodes, in which nothing is imported or called.

A pickle is a program. Python's interpreter of it can be kept from importing names, but not from hashing a
tuple of 2^60 paths or from filling a memo of 200 million places because four bytes say so. This one knows
numbers, texts, lists, dictionaries and the names that its caller explains; every other object is an `Unknown`
that remembers its name and its attributes. Work and memory are bounded by the length of the pickle.
"""

import codecs
from collections.abc import Callable
import dataclasses
import mmap
import pickle
import struct
from typing import Any

# A checkpoint of 20,000 tensors with the optimizer's two moments has about 3 million opcodes.
_MAX_STEPS = 4_000_000
_MAX_LONG_BYTES = 64
_MAX_KEY_PARTS = 8


class Unknown:
  """An object of a pickle whose class is not known here; holds what the pickle says and does nothing.

  Attributes:
    name: `module.name` of what made it.
    state: its attributes, if they came as a dictionary; of a set, its `items`.
    parts: what it is made of, if that came as a tuple, as of NumPy's arrays.
  """

  __slots__ = ("name", "state", "parts")

  def __init__(self, name: str):
    self.name = name
    self.state: dict[Any, Any] = {}
    self.parts: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Global:
  """A name of a pickle that its reader knows.

  Attributes:
    name: `module.name`.
    call: makes the object from the pickle's arguments; None for a name that is only passed on.
    value: what the name stands for where it is passed on.
  """

  name: str
  call: Callable[..., Any] | None = None
  value: Any = None


class PickleError(Exception):
  """A pickle that is damaged, or that no program writes."""


_MARK = object()


def _set(items: Any = ()) -> Unknown:
  """A set as data: its members are listed and never hashed."""
  found = Unknown("set")
  found.state["items"] = list(items) if type(items) in (list, tuple) else []
  return found


class Reader:
  """Reads one pickle.

  Args:
    data: bytes, or a memory map, that hold a pickle.
    start: where it begins.
    known: {`module.name`: what it stands for}; `collections.OrderedDict` is known.
    persistent: from a persistent id, as data, to the object it stands for.

  Attributes:
    unknown: names that were neither known nor imported.
  """

  def __init__(
    self,
    data: bytes | mmap.mmap,
    known: dict[str, Global] | None = None,
    persistent: Callable[[Any], Any] | None = None,
    *,
    start: int = 0,
  ):
    self.unknown: set[str] = set()
    self._data, self._position = data, start
    own = [("collections.OrderedDict", self._dict), ("builtins.set", _set), ("__builtin__.set", _set)]
    self._known = {name: Global(name, call) for name, call in own} | (known or {})
    self._persistent = persistent
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}
    self._work = 0
    self._objects = 0

  def read(self) -> Any:
    """The object that the pickle describes.

    Raises:
      PickleError: the pickle is damaged or hostile.
    """
    while True:
      self._spend(1)
      code = self._take(1)
      if code == pickle.STOP:
        return self._pop()
      step = _STEPS.get(code)
      if step is None:
        raise PickleError(f"opcode {code!r} at byte {self._position - 1} is none that data needs")
      step(self)

  @property
  def end(self) -> int:
    """The position after the pickle, once it is read."""
    return self._position

  def _spend(self, work: int) -> None:
    self._work += work
    if self._work > _MAX_STEPS:
      raise PickleError(f"it needs more than {_MAX_STEPS:,} steps, which no checkpoint does")

  def _take(self, count: int) -> bytes:
    start, end = self._position, self._position + count
    if count < 0 or end > len(self._data):
      raise PickleError(f"{count:,} bytes are announced at byte {start:,} of {len(self._data):,}")
    self._position = end
    return self._data[start:end]

  def _line(self) -> bytes:
    end = self._data.find(b"\n", self._position)
    if end < 0:
      raise PickleError(f"a line without an end at byte {self._position:,}")
    start, self._position = self._position, end + 1
    return self._data[start:end]

  def _unpack(self, form: str) -> Any:
    return struct.unpack(form, self._take(struct.calcsize(form)))[0]

  def _push(self, value: Any) -> None:
    self._stack.append(value)

  def _pop(self) -> Any:
    if not self._stack or self._stack[-1] is _MARK:
      raise PickleError(f"nothing is on the stack at byte {self._position:,}")
    return self._stack.pop()

  def _top(self) -> Any:
    if not self._stack or self._stack[-1] is _MARK:
      raise PickleError(f"nothing is on the stack at byte {self._position:,}")
    return self._stack[-1]

  def _pop_mark(self) -> list[Any]:
    items = []
    while self._stack:
      item = self._stack.pop()
      if item is _MARK:
        items.reverse()
        return items
      items.append(item)
    raise PickleError(f"a mark is missing at byte {self._position:,}")

  def _key(self, key: Any) -> Any:
    """A key that can be hashed in constant time; objects get a text of their own."""
    if key is None or isinstance(key, (str, bytes, int, float)):
      return key
    plain = (str, bytes, int, float, type(None))
    if type(key) is tuple and len(key) <= _MAX_KEY_PARTS and all(isinstance(part, plain) for part in key):
      return key
    self._objects += 1
    return f"(object {self._objects})"

  def _pairs(self, items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
      raise PickleError("a dictionary has a key without a value")
    return {self._key(items[i]): items[i + 1] for i in range(0, len(items), 2)}

  def _dict(self, *arguments: Any) -> dict[Any, Any]:
    """An OrderedDict; Python 2 gives its items as a list of pairs."""
    items = arguments[0] if arguments and isinstance(arguments[0], list) else []
    self._spend(len(items))
    return {self._key(item[0]): item[1] for item in items if type(item) in (list, tuple) and len(item) == 2}

  def _global(self, module: str, name: str) -> Any:
    full = f"{module}.{name}"
    if full in self._known:
      return self._known[full]
    self.unknown.add(full)
    return Unknown(full)

  def _call(self, function: Any, arguments: Any) -> Any:
    if isinstance(function, Global):
      if function.call is None:
        raise PickleError(f"{function.name} is called like a function")
      if type(arguments) is not tuple:
        raise PickleError(f"{function.name} is called without a tuple of arguments")
      return function.call(*arguments)
    return Unknown(function.name if isinstance(function, Unknown) else type(function).__name__)

  def _set_items(self, target: Any, items: list[Any]) -> None:
    if type(target) is dict:
      target.update(self._pairs(items))
    elif not isinstance(target, Unknown):
      raise PickleError(f"items are set in a {type(target).__name__}")

  def _extend(self, target: Any, items: list[Any]) -> None:
    if type(target) is list:
      target.extend(items)
    elif not isinstance(target, Unknown):
      raise PickleError(f"items are appended to a {type(target).__name__}")

  def _build(self) -> None:
    state = self._pop()
    target = self._top()
    if type(state) is tuple and len(state) == 2:
      state = state[0]
    if isinstance(target, Unknown) and type(state) is dict:
      target.state = state
    elif isinstance(target, Unknown) and type(state) is tuple:
      target.parts = state

  def _remember(self, index: int) -> None:
    self._memo[index] = self._top()

  def _recall(self, index: int) -> None:
    if index not in self._memo:
      raise PickleError(f"place {index:,} of the memo is empty")
    self._push(self._memo[index])

  def _integer(self, text: bytes) -> int:
    try:
      return int(text.rstrip(b"L") or b"0")
    except ValueError as error:
      raise PickleError(f"{text[:20]!r} is no number") from error

  def _long(self, count: int) -> int:
    if count > _MAX_LONG_BYTES:
      raise PickleError(f"an integer of {count:,} bytes")
    return int.from_bytes(self._take(count), "little", signed=True)

  def _reduce(self) -> None:
    arguments = self._pop()
    self._push(self._call(self._pop(), arguments))

  def _new_with_keywords(self) -> None:
    self._pop()  # keywords, which nothing known takes
    self._reduce()

  def _append(self) -> None:
    item = self._pop()
    self._extend(self._top(), [item])

  def _append_all(self) -> None:
    items = self._pop_mark()
    self._extend(self._top(), items)

  def _set_item(self) -> None:
    value, key = self._pop(), self._pop()
    self._set_items(self._top(), [key, value])

  def _set_all_items(self) -> None:
    items = self._pop_mark()
    self._set_items(self._top(), items)

  def _frozenset(self) -> None:
    self._pop_mark()
    self._push(Unknown("frozenset"))

  def _add_items(self) -> None:
    items = self._pop_mark()
    target = self._top()
    if isinstance(target, Unknown) and type(target.state.get("items")) is list:
      target.state["items"] += items

  def _drop_to_mark(self) -> None:
    self._pop_mark()

  def _instance(self) -> None:
    module, name = self._text(self._line()), self._text(self._line())
    self._push(self._call(self._global(module, name), tuple(self._pop_mark())))

  def _object(self) -> None:
    function, *arguments = self._pop_mark() or [Unknown("object")]
    self._push(self._call(function, tuple(arguments)))

  def _stack_global(self) -> None:
    name, module = self._pop(), self._pop()
    if type(name) is not str or type(module) is not str:
      raise PickleError("a name that is no text")
    self._push(self._global(module, name))

  def _persist(self, identity: Any) -> None:
    if self._persistent is None:
      raise PickleError("a persistent id where there can be none")
    self._push(self._persistent(identity))

  def _tuple(self, count: int) -> None:
    items = [self._pop() for _ in range(count)]
    self._push(tuple(reversed(items)))

  @staticmethod
  def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")

  def _quoted(self) -> None:
    line = self._line()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"\"'":
      raise PickleError("a text without quotes")
    self._push(codecs.escape_decode(line[1:-1])[0].decode("latin-1"))

  def _number_line(self) -> None:
    line = self._line()
    self._push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else self._integer(line))

  def _float_line(self) -> None:
    line = self._line()
    try:
      self._push(float(line))
    except ValueError as error:
      raise PickleError(f"{line[:20]!r} is no number") from error

  def _drop(self) -> None:
    if not self._stack:
      raise PickleError("nothing is on the stack to drop")
    self._stack.pop()  # a mark too


def _constant(value: Any) -> Callable[[Reader], None]:
  """Pushes a value."""
  return lambda r: r._push(value)


def _skip(count: int) -> Callable[[Reader], None]:
  """The version of the protocol, or the length of a frame: neither matters here."""

  def step(reader: Reader) -> None:
    reader._take(count)

  return step


def _sized(form: str, decode: Callable[[Reader, bytes], Any]) -> Callable[[Reader], None]:
  """Pushes what `decode` makes of as many bytes as a number of the format `form` says."""
  return lambda r: r._push(decode(r, r._take(r._unpack(form))))


def _as_text(r: Reader, data: bytes) -> str:
  return data.decode("utf-8", "surrogatepass")


def _as_latin(r: Reader, data: bytes) -> str:
  return data.decode("latin-1")


def _as_bytes(r: Reader, data: bytes) -> bytes:
  return data


_STEPS: dict[bytes, Callable[[Reader], None]] = {
  pickle.PROTO: _skip(1),
  pickle.FRAME: _skip(8),
  pickle.NONE: _constant(None),
  pickle.NEWTRUE: _constant(True),
  pickle.NEWFALSE: _constant(False),
  pickle.EMPTY_TUPLE: _constant(()),
  pickle.EMPTY_LIST: lambda r: r._push([]),
  pickle.EMPTY_DICT: lambda r: r._push({}),
  pickle.EMPTY_SET: lambda r: r._push(_set()),
  pickle.INT: Reader._number_line,
  pickle.LONG: lambda r: r._push(r._integer(r._line())),
  pickle.FLOAT: Reader._float_line,
  pickle.BININT: lambda r: r._push(r._unpack("<i")),
  pickle.BININT1: lambda r: r._push(r._unpack("<B")),
  pickle.BININT2: lambda r: r._push(r._unpack("<H")),
  pickle.LONG1: lambda r: r._push(r._long(r._unpack("<B"))),
  pickle.LONG4: lambda r: r._push(r._long(r._unpack("<i"))),
  pickle.BINFLOAT: lambda r: r._push(r._unpack(">d")),
  pickle.STRING: Reader._quoted,
  pickle.UNICODE: lambda r: r._push(r._line().decode("raw-unicode-escape")),
  pickle.BINSTRING: _sized("<i", _as_latin),
  pickle.SHORT_BINSTRING: _sized("<B", _as_latin),
  pickle.BINUNICODE: _sized("<I", _as_text),
  pickle.SHORT_BINUNICODE: _sized("<B", _as_text),
  pickle.BINUNICODE8: _sized("<Q", _as_text),
  pickle.BINBYTES: _sized("<I", _as_bytes),
  pickle.SHORT_BINBYTES: _sized("<B", _as_bytes),
  pickle.BINBYTES8: _sized("<Q", _as_bytes),
  pickle.BYTEARRAY8: _sized("<Q", _as_bytes),
  pickle.TUPLE: lambda r: r._push(tuple(r._pop_mark())),
  pickle.TUPLE1: lambda r: r._tuple(1),
  pickle.TUPLE2: lambda r: r._tuple(2),
  pickle.TUPLE3: lambda r: r._tuple(3),
  pickle.LIST: lambda r: r._push(r._pop_mark()),
  pickle.DICT: lambda r: r._push(r._pairs(r._pop_mark())),
  pickle.FROZENSET: Reader._frozenset,
  pickle.MARK: _constant(_MARK),
  pickle.POP: Reader._drop,
  pickle.POP_MARK: Reader._drop_to_mark,
  pickle.DUP: lambda r: r._push(r._top()),
  pickle.APPEND: Reader._append,
  pickle.APPENDS: Reader._append_all,
  pickle.ADDITEMS: Reader._add_items,
  pickle.SETITEM: Reader._set_item,
  pickle.SETITEMS: Reader._set_all_items,
  pickle.BUILD: Reader._build,
  pickle.GLOBAL: lambda r: r._push(r._global(r._text(r._line()), r._text(r._line()))),
  pickle.STACK_GLOBAL: Reader._stack_global,
  pickle.REDUCE: Reader._reduce,
  pickle.NEWOBJ: Reader._reduce,
  pickle.NEWOBJ_EX: Reader._new_with_keywords,
  pickle.INST: Reader._instance,
  pickle.OBJ: Reader._object,
  pickle.PERSID: lambda r: r._persist(r._text(r._line())),
  pickle.BINPERSID: lambda r: r._persist(r._pop()),
  pickle.GET: lambda r: r._recall(r._integer(r._line())),
  pickle.BINGET: lambda r: r._recall(r._unpack("<B")),
  pickle.LONG_BINGET: lambda r: r._recall(r._unpack("<I")),
  pickle.PUT: lambda r: r._remember(r._integer(r._line())),
  pickle.BINPUT: lambda r: r._remember(r._unpack("<B")),
  pickle.LONG_BINPUT: lambda r: r._remember(r._unpack("<I")),
  pickle.MEMOIZE: lambda r: r._remember(len(r._memo)),
}
