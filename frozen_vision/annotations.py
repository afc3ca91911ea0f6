"""Reads the annotations of a dataclass of options: its fields, their types, whether None is allowed."""

from collections.abc import Mapping
import dataclasses
import functools
import typing
from typing import Annotated, Any


def fields(cls: Any) -> list[dataclasses.Field]:
  """The fields that are options."""
  return [field for field in dataclasses.fields(cls) if field.metadata.get("option", True)]


def names(cls: type) -> list[str]:
  """Names of the fields that are options."""
  return [field.name for field in fields(cls)]


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
  """The annotation of every field, marks included."""
  return typing.get_type_hints(cls, include_extras=True)


def base(annotation: Any) -> Any:
  """The type without its marks."""
  return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def is_mapping(annotation: Any) -> bool:
  """Whether any keys are allowed."""
  return typing.get_origin(annotation) is Mapping or annotation is Mapping


def is_optional(annotation: Any) -> bool:
  """Whether None is allowed."""
  return type(None) in typing.get_args(annotation)


def element_types(annotation: Any) -> list[Any]:
  """The types of a tuple's elements, or the members of a union, without their marks."""
  return [base(kind) for kind in typing.get_args(annotation)]
