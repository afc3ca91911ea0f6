"""Shared by the campaigns of this folder: options, damages of files, and how a campaign ends."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import pathlib
import random
import sys

from absl import app, flags

_SHOWN = 20  # faults that are printed
_LONGEST = 400  # characters of one
_SEED = flags.DEFINE_integer("seed", 0, "Of what is random.")


def generator() -> random.Random:
  """The generator of the campaign, of `--seed`."""
  return random.Random(_SEED.value)


def headline(what: str) -> str:
  """`500 damages, seed 0`."""
  return f"{what}, seed {_SEED.value}"


def damage(path: pathlib.Path, rng: random.Random, *, removes: bool) -> str:
  """Changes the content of a file that is not empty, or removes the file if `removes`, and says how."""
  data = bytearray(path.read_bytes())
  at = rng.randrange(len(data))
  kinds = ("bit", "byte", "truncated", "repeated", "zeros", "emptied")
  kind = rng.choice((*kinds, "removed") if removes else kinds)
  match kind:
    case "bit":
      data[at] ^= 1 << rng.randrange(8)
    case "byte":
      data[at] = (data[at] + rng.randrange(1, 256)) % 256
    case "truncated":
      del data[at:]
    case "repeated":
      data[at:at] = data[max(0, at - 64) : at] or b"\0"
    case "zeros":
      part = len(data[at : at + 64])
      data[at : at + 64] = bytes(part) if any(data[at : at + 64]) else bytes([1]) * part
    case "emptied":
      data.clear()
    case "removed":
      path.unlink()
      return kind
  path.write_bytes(data)
  return kind


def table(counts: Mapping[tuple[str, str], int], widths: tuple[int, int] = (14, 32)) -> list[str]:
  """A line for each pair of (what it was, what became of it), with how often that was."""
  first, second = widths
  return [
    f"  {what:{first}s} {became:{second}s} {count:6,d}" for (what, became), count in sorted(counts.items())
  ]


def finish(title: str, lines: Iterable[str], faults: Sequence[str], *details: str) -> None:
  """Prints a headline, the table and the first faults, and ends the program: status 1 if there are faults.

  Args:
    title: of the headline, which also has the number of faults and then the details.
    lines: of the table.
  """
  print(f"{title}: {', '.join([f'{len(faults)} faults', *details])}", *lines, sep="\n")
  for fault in faults[:_SHOWN]:
    print(f"  FAULT {fault[:_LONGEST]}")
  sys.exit(bool(faults))


def run(main: Callable[[], None]) -> None:
  """Parses the options and runs a campaign."""

  def checked(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
      raise app.UsageError(f"Unexpected arguments: {arguments[1:]}")
    main()

  app.run(checked)
