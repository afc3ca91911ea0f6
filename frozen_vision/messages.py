"""Phrases of error messages that several modules use."""

from collections.abc import Iterable
import difflib


def closest(name: str, known: Iterable[str]) -> str | None:
  """The known name that is most like a wrong one; None if none is near."""
  found = difflib.get_close_matches(name, list(known), n=1)
  return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """` Did you mean 'swinv2_base'?`, to end an error with; empty if no known name is near."""
  found = closest(name, known)
  return f" Did you mean {found!r}?" if found else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
  """`Unknown variant 'swinv2_bas'; known: [...]. Did you mean 'swinv2_b'?`"""
  known = sorted(known)
  return f"Unknown {kind} {name!r}; known: {known}.{did_you_mean(name, known)}"
