"""Findings of checks of data: counted by kind, with examples, and compared with the totals.

Nothing is left out in silence: a source counts in its `Findings` what it repaired and what it dropped. A run
prints them first, writes them to `data.json`, and stops where more than a tenth of anything was dropped,
unless told to go on (`reports`).
"""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any

EXAMPLES = 3
# A larger dropped fraction is rather a mistake in the data than what every large data set has.
MAX_DROPPED = 0.1


class DroppedError(ValueError):
  """More of the data would be dropped than a run accepts by itself."""


@dataclasses.dataclass(frozen=True)
class Kind:
  """One kind of finding.

  Attributes:
    text: what was found, in the plural, and what was done about it.
    unit: what is counted, such as "annotations": a key of `Findings.totals`.
    dropped: whether it was left out, and not repaired.
    advice: what to do about it, a sentence; for findings that have a remedy other than mending the data.
  """

  text: str
  unit: str
  dropped: bool = True
  advice: str = ""


class Findings:
  """Counts of one source, by kind.

  Attributes:
    kinds: all kinds that there are.
    counts: {kind: how many}, without zeros.
    examples: {kind: the first few, in words}.
    totals: {unit: how many there were, what was dropped included}.
    notes: sentences about the data that are no defect.
  """

  def __init__(self, kinds: Mapping[str, Kind]):
    self.kinds = dict(kinds)
    self.counts: dict[str, int] = {}
    self.examples: dict[str, list[str]] = {}
    self.totals: dict[str, int] = {}
    self.notes: list[str] = []

  def add(self, kind: str, example: str, count: int = 1) -> None:
    """Counts a finding; raises KeyError for an unknown kind."""
    if kind not in self.kinds:
      raise KeyError(f"unknown kind of finding {kind!r}; known: {', '.join(self.kinds)}")
    self.counts[kind] = self.counts.get(kind, 0) + count
    examples = self.examples.setdefault(kind, [])
    if len(examples) < EXAMPLES:
      examples.append(example)

  def add_errors(self, kind: str, errors: Iterable[Exception | None]) -> list[int]:
    """Counts the errors among results of checks, and returns the positions of those that are None."""
    good = []
    for position, error in enumerate(errors):
      if error is None:
        good.append(position)
      else:
        self.add(kind, str(error))
    return good

  def saw(self, unit: str, count: int = 1) -> None:
    """Counts what was looked at."""
    self.totals[unit] = self.totals.get(unit, 0) + count

  def merge(self, other: "Findings") -> None:
    """Adds what another check of the same data found; totals of units that are known already stay."""
    self.kinds |= other.kinds
    for kind, count in other.counts.items():
      self.counts[kind] = self.counts.get(kind, 0) + count
      self.examples[kind] = (self.examples.get(kind, []) + other.examples[kind])[:EXAMPLES]
    self.totals = other.totals | self.totals
    self.notes += other.notes

  def dropped(self) -> dict[str, tuple[int, int]]:
    """{unit: (how many were dropped, how many there were)}, of units of which some were."""
    result: dict[str, tuple[int, int]] = {}
    for kind, count in self.counts.items():
      if self.kinds[kind].dropped:
        unit = self.kinds[kind].unit
        before, total = result.get(unit, (0, self.totals.get(unit, 0)))
        result[unit] = (before + count, total)
    return result

  def too_many_dropped(self) -> list[str]:
    """A sentence for each unit of which more than a tenth was dropped, with the kinds and what to do."""
    sentences = []
    for unit, (count, total) in self.dropped().items():
      if count <= MAX_DROPPED * max(total, count):
        continue
      kinds = [kind for kind in self.counts if self.kinds[kind].dropped and self.kinds[kind].unit == unit]
      advice = " ".join(self.kinds[kind].advice for kind in kinds if self.kinds[kind].advice)
      sentences.append(
        f"{count:,} of {max(total, count):,} {unit} would be left out: "
        + "; ".join(self._line(kind) for kind in kinds)
        + f". {advice}".rstrip()
      )
    return sentences

  def as_dict(self) -> dict[str, Any]:
    """The findings as JSON can hold them."""
    return {
      "totals": dict(self.totals),
      "dropped": {unit: count for unit, (count, _) in self.dropped().items()},
      "found": [
        {"kind": kind, "count": count, "what": self.kinds[kind].text, "examples": self.examples[kind]}
        for kind, count in self.counts.items()
      ],
      "notes": list(self.notes),
    }

  def lines(self) -> list[str]:
    """A line for each kind, then the notes."""
    return [self._line(kind) for kind in self.counts] + self.notes

  def _line(self, kind: str) -> str:
    count, examples = self.counts[kind], self.examples[kind]
    more = f"; and {count - len(examples)} more" if count > len(examples) else ""
    return f"{count} {self.kinds[kind].text} ({'; '.join(examples)}{more})"

  def __bool__(self) -> bool:
    return bool(self.counts)

  def __str__(self) -> str:
    return "\n".join(self.lines())


def from_dict(kinds: Mapping[str, Kind], stored: Any) -> Findings:
  """Findings as `as_dict` gave them; of unknown kinds and damaged content nothing is taken."""
  found = Findings(kinds)
  if not isinstance(stored, Mapping):
    return found
  for entry in stored.get("found", ()):
    match entry:
      case {"kind": str(kind), "count": int(count), "examples": list(examples)} if (
        kind in kinds and count > 0
      ):
        found.counts[kind] = count
        found.examples[kind] = [str(example) for example in examples[:EXAMPLES]]
  for unit, total in dict(stored.get("totals", {})).items():
    if isinstance(total, int):
      found.totals[unit] = total
  return found
