"""Phrases of error messages that several modules use."""

from collections.abc import Iterable, Sequence
import difflib
import signal
from typing import Any


def listed(names: Sequence[str], most: int = 5) -> str:
  """`a, b, c and 20 more`, or `none`."""
  more = f" and {len(names) - most:,} more" if len(names) > most else ""
  return (", ".join(names[:most]) or "none") + more


def short(value: Any) -> str:
  """A value as errors show it, in at most 60 characters."""
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."


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


def signal_name(number: int) -> str:
  """A signal's name, such as SIGKILL, or its number where Python knows no name, as of real-time signals."""
  try:
    return signal.Signals(number).name
  except ValueError:
    return f"signal {number}"
