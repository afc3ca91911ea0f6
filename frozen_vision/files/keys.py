"""Comparison of the keys of a file with those that are wanted: total, or one error that lists every fault."""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass
class KeyReport:
  """Keys at fault, one line each.

  Attributes:
    missing: wanted, and not in the file.
    unexpected: in the file, and wanted by nothing.
    misshaped: in both, with another shape or type.
  """

  missing: list[str] = dataclasses.field(default_factory=list)
  unexpected: list[str] = dataclasses.field(default_factory=list)
  misshaped: list[str] = dataclasses.field(default_factory=list)

  def add_missing(self, key: str, wanted: Any) -> None:
    """Counts a key that the file lacks; `wanted` is its shape, or text that describes it."""
    self.missing.append(f"missing {key} {wanted}")

  def add_unexpected(self, key: str, found: Any) -> None:
    """Counts a key that nothing wants; `found` is its shape, or text that describes it."""
    self.unexpected.append(f"unexpected {key} {found}")

  def add_misshaped(self, key: str, found: Any, wanted: Any) -> None:
    """Counts a key of another shape (tuples), or of another type and shape (texts)."""
    kind = "has shape" if isinstance(wanted, tuple) else "is"
    self.misshaped.append(f"{key} {kind} {found}, expected {wanted}")

  @property
  def lines(self) -> list[str]:
    """Every fault once: missing, unexpected, misshaped."""
    return list(dict.fromkeys([*self.missing, *self.unexpected, *self.misshaped]))

  def check(self, problem: str, hints: Iterable[str] = ()) -> None:
    """Raises a ValueError with every fault, if there is one.

    Args:
      problem: the file and what it does not fit, and perhaps what to do; ends without a full stop.
      hints: sentences to add below the list.
    """
    lines = self.lines
    if lines:
      keys = "1 key at fault" if len(lines) == 1 else f"{len(lines)} keys at fault"
      raise ValueError("\n".join([f"{problem}; {keys}:", *(f"  {line}" for line in lines), *hints]))


def compare(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> KeyReport:
  """Compares two tables of shapes (tuples), or of descriptions such as `float32[3,4]` (texts)."""
  report = KeyReport()
  for key, value in wanted.items():
    if key not in found:
      report.add_missing(key, value)
    elif found[key] != value:
      report.add_misshaped(key, found[key], value)
  for key, value in found.items():
    if key not in wanted:
      report.add_unexpected(key, value)
  return report
