"""Options of a config: frozen dataclasses whose fields have a type, a range, choices and a default.

A section of a config is a frozen dataclass, and each field of it is an option. Values come from a config
file, from JSON or, as text, from the command line; `read` checks them and makes the dataclass. An error has a
line for each option that is wrong: its name, what was found and what was expected.

Some sections depend on a name: a detection head is a `HTCConfig` if its name is `htc`. Such a section is a
field `choice(table, default)`; its dataclass has a field `name`. In a config file the section may also hold
values for names that are not chosen, so that choosing another one on the command line gives what the file
wants for it, and that dataclass's defaults for everything else:

  head = dict(name="mask2former", mask2former=dict(hidden_dim=64), upernet=dict(channels=64))
"""

import ast
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import math
import numbers
import os
import pathlib
import types
import typing
from typing import Annotated, Any, Literal

from frozen_vision import annotations, messages


class OptionError(ValueError):
  """An option that does not exist or whose value does not fit; the message names it."""


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `low` to `high`, both included unless `above` leaves out `low`."""

  low: float = -math.inf
  high: float = math.inf
  above: bool = False

  def __contains__(self, value: float) -> bool:
    return (value > self.low if self.above else value >= self.low) and value <= self.high

  def __str__(self) -> str:
    if self.high < math.inf:
      return f"from {self.low} to {self.high}"
    return f"above {self.low}" if self.above else f"of at least {self.low}"


class _Path:
  """Marks a text that is a path, in which `~` stands for the home folder."""


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Path = Annotated[str, _Path]
Size = tuple[Count, Count]  # (height, width)
DType = Literal["float32", "bfloat16"]


def choice(table: Mapping[str, Callable[[], Any]], default: str) -> Any:
  """A field whose dataclass depends on its option `name`: `table[name]()` makes it with its defaults."""
  return dataclasses.field(default_factory=lambda: table[default](), metadata={"choice": table})


def from_data(default: Any) -> Any:
  """A field that the data decide, such as the number of classes: no option."""
  return dataclasses.field(default=default, metadata={"option": False})


def read(cls: type, values: Mapping[str, Any], path: str = "config") -> Any:
  """Makes the dataclass `cls` of nested values; options that are not given have their defaults.

  Args:
    values: nested mappings, as a config file or JSON holds them; lists may stand for tuples.
    path: what messages call this section.

  Raises:
    OptionError: one line for each option that is unknown or does not fit.
  """
  problems: list[str] = []
  section = _read(cls, values, path, problems)
  if problems:
    raise OptionError("\n".join(problems))
  return section


def check_values(cls: type, values: Mapping[str, Any], path: str) -> dict[str, Any]:
  """Values of some fields of a dataclass, of their types; fields that it does not have are left as they are.

  Raises:
    OptionError: one line for each value that is not of its field's type.
  """
  problems: list[str] = []
  types_, checked = annotations.types_of(cls), dict(values)
  for key in set(values) & set(annotations.names(cls)):
    checked[key] = _check(values[key], types_[key], f"{path}.{key}", problems)
  if problems:
    raise OptionError("\n".join(problems))
  return checked


def to_dict(section: Any) -> dict[str, Any]:
  """All options of a section with their values, as nested dicts."""
  values = {field.name: getattr(section, field.name) for field in annotations.fields(section)}
  return {key: to_dict(value) if dataclasses.is_dataclass(value) else value for key, value in values.items()}


def replace(section: Any, changes: Mapping[str, Any], path: str = "config") -> Any:
  """The section with options changed, by dotted path; see `apply`. Raises OptionError."""
  return read(type(section), apply(type(section), to_dict(section), changes, path), path)


@dataclasses.dataclass(frozen=True)
class Text:
  """A value as it was typed: how it is read depends on the type of its option."""

  text: str


def apply(
  cls: type, values: Mapping[str, Any], changes: Mapping[str, Any], path: str = "config"
) -> dict[str, Any]:
  """Nested values with options changed by dotted path, later ones over earlier ones.

  Names are changed first. A section whose name changes loses the values that were set for the old name.

  Args:
    changes: {"optimizer.learning_rate": 5e-4}; a dict changes options of a section; a `Text` is parsed.

  Raises:
    OptionError: an option that does not exist, or a text that is no value of its type.
  """
  values = _copy(values)
  flat = dict(_flattened(changes, path))
  for option, value in sorted(flat.items(), key=lambda item: not item[0].endswith(".name")):
    _set(cls, values, option.split("."), value, path)
  return values


def _flattened(changes: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
  """Yields changes of single options: a dict for a section, or the text of one, is taken apart."""
  for option, value in changes.items():
    if isinstance(value, Text) and value.text.lstrip().startswith("{"):
      value = _literal(value.text, f"{path}.{option}", "a dict of options, such as \"{'name': 'x'}\"")
    if isinstance(value, Mapping):
      yield from _flattened({f"{option}.{key}": part for key, part in value.items()}, path)
    else:
      yield option, value


def _set(
  cls: type,
  values: dict[str, Any],
  parts: list[str],
  value: Any,
  path: str,
  table: Mapping[str, Any] | None = None,
  name: str = "",
) -> None:
  """Sets an option of the section `path` in nested values; see `apply`.

  Args:
    parts: the option's path below the section.
    table, name: of a section that depends on a name.
  """
  key, rest, option = parts[0], parts[1:], ".".join([path, *parts])
  field = {field.name: field for field in annotations.fields(cls)}.get(key)
  if field is None:
    raise OptionError(_unknown(option, path, key, cls, table, name))
  annotation, section = annotations.types_of(cls)[key], f"{path}.{key}"
  is_named = "choice" in field.metadata
  if not (is_named or dataclasses.is_dataclass(annotation) or annotations.is_mapping(annotation)):
    if rest:
      raise OptionError(f"{option}: there is no such option; {section} is {_expected(annotation)}.")
    values[key] = parse(value.text, annotation, option) if isinstance(value, Text) else value
  elif not rest:
    example = "name=NAME" if is_named else "OPTION=VALUE"
    raise OptionError(f"{option} is a section of options; set one of them, such as --{option}.{example}.")
  elif is_named:
    _set_named(field, values.setdefault(key, {}), rest, value, section)
  elif annotations.is_mapping(annotation):
    values.setdefault(key, {})[".".join(rest)] = _guess(value.text) if isinstance(value, Text) else value
  else:
    _set(annotation, values.setdefault(key, {}), rest, value, section)


def _set_named(
  field: dataclasses.Field, values: dict[str, Any], parts: list[str], value: Any, path: str
) -> None:
  """Sets an option of a field `choice`: its name, an option of what it is, or one for when it is another."""
  table, name = field.metadata["choice"], values.get("name") or field.default_factory().name
  if parts == ["name"]:
    chosen = value.text if isinstance(value, Text) else value
    if chosen != name:
      for key in [key for key in values if key not in table]:
        del values[key]
    values["name"] = chosen
    return
  if parts[0] in table and len(parts) > 1:
    name, path = parts[0], f"{path}.{parts[0]}"
    values, parts = values.setdefault(name, {}), parts[1:]
  if name not in table:
    raise OptionError(_unknown_choice(f"{path}.name", name, table))
  _set(type(table[name]()), values, parts, value, path, table, name)


def parse(text: str, annotation: Any, option: str) -> Any:
  """The value that a text of the command line means for an option of a type. Raises OptionError."""
  kind = annotations.base(annotation)
  if kind is str:
    return text
  if annotations.is_optional(kind) and text.lower() in ("none", "null"):
    return None
  if kind is bool:
    if text.lower() in ("true", "t", "1", "false", "f", "0"):
      return text.lower() in ("true", "t", "1")
    raise OptionError(f"{option} is {text!r}; expected True or False.")
  if typing.get_origin(kind) is tuple:
    if str in annotations.element_types(kind) and not text.lstrip().startswith(("(", "[", "'", '"')):
      if "," in text and text.strip():
        raise OptionError(
          f"{option} is {text!r}; put each text of several in quotes: --{option}=\"('a', 'b')\"."
        )
      return (text,) if text else ()
    value = _literal(text, option, _expected(annotation))
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
  if typing.get_origin(kind) is Literal and all(isinstance(known, str) for known in typing.get_args(kind)):
    return text
  return _guess(text)


def _guess(text: str) -> Any:
  """A Python literal, or else the text itself."""
  try:
    return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
  except (SyntaxError, ValueError):
    return text


def _literal(text: str, option: str, expected: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError) as error:
    raise OptionError(f"{option} is {text!r}; expected {expected}.") from error


def _read(cls: type, values: Any, path: str, problems: list[str]) -> Any:
  """Does what `read` does, but appends to `problems` what is wrong and then returns None."""
  if dataclasses.is_dataclass(values) and isinstance(values, cls):
    return values
  if not isinstance(values, Mapping) and not hasattr(values, "items"):
    problems.append(
      f"{path} is {values!r}; expected a section with options, such as {annotations.names(cls)[:3]}."
    )
    return None
  fields, found, count = {field.name: field for field in annotations.fields(cls)}, {}, len(problems)
  for key, value in values.items():
    name = f"{path}.{key}"
    if key not in fields:
      problems.append(_unknown(name, path, key, cls))
    elif fields[key].metadata.get("choice"):
      found[key] = _read_choice(fields[key], value, name, problems)
    else:
      found[key] = _check(value, annotations.types_of(cls)[key], name, problems)
  if len(problems) > count:
    return None
  return _make(functools.partial(cls, **found), cls, path, problems)


def _read_choice(field: dataclasses.Field, values: Any, path: str, problems: list[str]) -> Any:
  """The section of a field `choice`: the defaults of its name, what is set for that name, what is set."""
  if dataclasses.is_dataclass(values):
    return values
  table = field.metadata["choice"]
  if not hasattr(values, "items"):
    problems.append(
      f"{path} is {_shown(values)}; expected a section whose name is one of {', '.join(table)}."
    )
    return None
  values = dict(values)
  name = values.pop("name", None) or field.default_factory().name
  for other in [key for key in values if key in table and key != name]:
    _read_onto(table[other](), values.pop(other), f"{path}.{other}", table, problems)
  if name not in table:
    problems.append(_unknown_choice(f"{path}.name", name, table))
    return None
  section, own = table[name](), values.pop(name, {})
  return _read_onto(section, {**own, **values}, path, table, problems)


def _read_onto(
  defaults: Any, values: Mapping[str, Any], path: str, table: Mapping[str, Any], problems: list[str]
) -> Any:
  """The section `defaults` with some of its values replaced."""
  cls, found, count = type(defaults), {}, len(problems)
  for key, value in values.items():
    if key not in annotations.names(cls):
      problems.append(_unknown(f"{path}.{key}", path, key, cls, table, defaults.name))
    else:
      found[key] = _check(value, annotations.types_of(cls)[key], f"{path}.{key}", problems)
  if len(problems) > count:
    return None
  return _make(lambda: dataclasses.replace(defaults, **found), cls, path, problems)


def _make(make: Callable[[], Any], cls: type, path: str, problems: list[str]) -> Any:
  """Calls `make`; a dataclass that refuses values which do not go together is a problem, and None."""
  try:
    return make()
  except ValueError as error:
    text = str(error)
    problems.append(
      path + text.removeprefix(cls.__name__) if text.startswith(cls.__name__) else f"{path}: {text}"
    )
    return None


def _check(value: Any, annotation: Any, path: str, problems: list[str]) -> Any:
  """The value as its type has it: lists as tuples, whole numbers as floats where those are expected."""
  if dataclasses.is_dataclass(annotation):
    return _read(annotation, value, path, problems)
  if annotations.is_mapping(annotation):
    if hasattr(value, "items"):
      return {key: _tuples(part) for key, part in value.items()}
  else:
    try:
      return _converted(value, annotation)
    except (TypeError, ValueError):
      pass
  problems.append(f"{path} is {_shown(value)}; expected {_expected(annotation)}.")
  return None


def _converted(value: Any, annotation: Any) -> Any:
  """The value of the type; raises TypeError or ValueError."""
  if typing.get_origin(annotation) is Annotated:
    kind, *marks = typing.get_args(annotation)
    value = _converted(value, kind)
    for mark in marks:
      if isinstance(mark, Range) and value not in mark:
        raise ValueError
      if mark is _Path:
        value = os.path.expanduser(value)
    return value
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is Literal:
    if value not in arguments or isinstance(value, bool) != (bool in map(type, arguments)):
      raise ValueError
    return value
  if origin in (typing.Union, types.UnionType):
    for kind in arguments:
      try:
        return _converted(value, kind)
      except (TypeError, ValueError):
        pass
    raise ValueError
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise TypeError
    if arguments[-1:] == (...,):
      arguments = (arguments[0],) * len(value)
    return tuple(_converted(item, kind) for item, kind in zip(value, arguments, strict=True))
  if annotation is type(None) and value is None:
    return None
  if annotation is bool and isinstance(value, bool):
    return value
  if annotation is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
    return int(value)
  if annotation is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
    if not math.isfinite(value):
      raise ValueError
    return float(value)
  if annotation is str and isinstance(value, (str, pathlib.PurePath)):
    return str(value)
  raise TypeError


def _expected(annotation: Any) -> str:
  """The values that an annotation admits, in words."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if dataclasses.is_dataclass(annotation):
    return f"a section with options, such as {', '.join(annotations.names(annotation)[:3])}"
  if annotations.is_mapping(annotation):
    return "a section of options"
  if origin is Annotated:
    ranges = [str(mark) for mark in arguments[1:] if isinstance(mark, Range)]
    path = "a path" if _Path in arguments else _expected(arguments[0])
    return " ".join([path, *ranges])
  if origin is Literal:
    known = [str(value) for value in arguments]
    return known[0] if len(known) == 1 else f"{', '.join(known[:-1])} or {known[-1]}"
  if origin in (typing.Union, types.UnionType):
    return " or ".join(_expected(kind) for kind in arguments)
  if origin is tuple:
    if not arguments or arguments == ((),):
      return "()"
    if arguments[-1] is ...:
      return f"a tuple of values, each {_expected(arguments[0])}"
    return f"{len(arguments)} values, each {_expected(arguments[0])}"
  if annotation is type(None):
    return "None"
  return {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}[annotation]


def _unknown(option: str, section: str, key: str, cls: type, table: Any = None, name: str = "") -> str:
  """The sentence about an option that does not exist; `table` and `name` are of a section that has a name."""
  known = annotations.names(cls)
  having = [other for other in table or () if key in annotations.names(type(table[other]()))]
  if having:
    return f"{option}: {name} has no such option; --{section}.name={having[0]} has it."
  close = messages.closest(key, known)
  what = f"{name} has no such option" if table else "there is no such option"
  if close:
    return f"{option}: {what}; did you mean {section}.{close}?"
  return f"{option}: {what}; {section} has {messages.listed(known, most=12)}."


def _unknown_choice(option: str, name: Any, table: Mapping[str, Any]) -> str:
  return f"{option} is {name!r}; known: {', '.join(table)}."


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) < 200 else text[:200] + "..."


def _copy(values: Any) -> Any:
  """Nested mappings as dicts of their own."""
  if dataclasses.is_dataclass(values):
    return to_dict(values)
  return {key: _copy(value) for key, value in values.items()} if hasattr(values, "items") else values


def _tuples(value: Any) -> Any:
  if hasattr(value, "items"):
    return {key: _tuples(part) for key, part in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
