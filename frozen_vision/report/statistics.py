"""Intervals, ranks and comparisons of scores over seeds and test examples.

A score of a cell varies with the seed (initialisation, order, sometimes the data) and with the examples it
was tested on. Both sources are in every interval and every test here: with s^2 the variance between S seeds
and B that of the mean over bootstrap samples of N test examples, the half-width of an interval is

    sqrt(t(S - 1)^2 s^2 / S + t(N - 1)^2 B)

with t(k) the quantile of Student's distribution for k degrees of freedom (Howe, JASA 1974). Few seeds weigh
as much as they must: t(2) is 4.3. Adding the variances first and approximating their degrees of freedom
(Satterthwaite) declared too many winners in simulations, whenever three seeds happened to lie close together.
Where seeds have test data of their own, s^2 contains the examples' part already, and the interval is too wide
rather than too narrow. Two backbones are compared on the differences of each seed and of each example, that
is, paired. All in float64, and a function of its arguments.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import math

from jaxtyping import Float
import numpy as np
from scipy import special

DRAWS = 2000
LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Scores:
  """What one backbone reached in one row of the table.

  Attributes:
    by_seed: the score of each seed.
    examples: of each seed, a score of every test example, whose mean is compared between backbones; NaN for
      an example without one. Empty where there are none.
    data: of each seed, what identifies its test examples: seeds of equal text share them.
    is_mean: whether a score is the mean of its examples, so that they tell its interval, too. AP and mIoU of
      a whole set are not.
  """

  by_seed: Mapping[int, float]
  examples: Mapping[int, Float[np.ndarray, "_"]] = dataclasses.field(default_factory=dict)
  data: Mapping[int, str] = dataclasses.field(default_factory=dict)
  is_mean: bool = False


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over seeds with its interval; the bounds are NaN where nothing tells them.

  Attributes:
    p_value: two-sided, of the mean being zero; NaN where it cannot be tested.
    seeds: how many.
  """

  mean: float
  low: float
  high: float
  p_value: float
  seeds: int


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two backbones in one row.

  Attributes:
    first, second: their names.
    row: of the table.
    difference: the advantage of the first over the second, positive where the first is better; of errors it
      is the second minus the first.
    adjusted: the p-value after Holm's correction over all comparisons of the report.
    winner: the better one's name where `adjusted` is at most the level, else an empty text.
    by_examples: whether differences of single examples were used, or seeds alone.
  """

  first: str
  second: str
  row: str
  difference: Estimate
  adjusted: float
  winner: str
  by_examples: bool


@dataclasses.dataclass(frozen=True)
class MeanRank:
  """The mean over rows of a backbone's rank, 1 the best, with an interval from a bootstrap over the rows."""

  mean: float
  low: float
  high: float


def estimate(scores: Scores, *, level: float = LEVEL) -> Estimate:
  """The mean of a cell's scores over seeds, with its interval of confidence 1 - `level`."""
  seeds = sorted(scores.by_seed)
  examples = {seed: scores.examples[seed] for seed in seeds if seed in scores.examples}
  use = scores.is_mean and len(examples) == len(seeds)
  return _estimate(
    np.array([scores.by_seed[seed] for seed in seeds]),
    _groups(seeds, examples, scores.data) if use else [],
    level,
  )


def difference(first: Scores, second: Scores, *, level: float = LEVEL) -> tuple[Estimate, bool]:
  """(the mean difference of two backbones over the seeds that both have, whether by examples).

  Where all seeds have examples of the same number and data, differences are those of the examples: of a score
  that is no mean of examples, the compared quantity is then the mean of the examples' scores.
  """
  seeds = sorted(set(first.by_seed) & set(second.by_seed))
  paired = {}
  for seed in seeds:
    one, other = first.examples.get(seed), second.examples.get(seed)
    same = first.data.get(seed) == second.data.get(seed)
    if one is not None and other is not None and len(one) == len(other) and same:
      paired[seed] = np.asarray(one, np.float64) - np.asarray(other, np.float64)
  if seeds and len(paired) == len(seeds) and all(np.isfinite(each).any() for each in paired.values()):
    means = np.array([np.nanmean(paired[seed]) for seed in seeds])
    return _estimate(means, _groups(seeds, paired, first.data), level), True
  means = np.array([first.by_seed[seed] - second.by_seed[seed] for seed in seeds])
  return _estimate(means, [], level), False


def compare(
  table: Mapping[str, Mapping[str, Scores]],
  *,
  lower_is_better: Sequence[str] = (),
  level: float = LEVEL,
  pairs: Sequence[tuple[str, str, str]] | None = None,
) -> list[Comparison]:
  """Every pair of backbones in every row, with Holm's correction over all of them.

  A winner is named only where the table's own score, the mean over seeds, points the same way as what was
  compared.

  Args:
    table: {row: {backbone: scores}}; pairs of which one lacks a row are left out of it.
    lower_is_better: rows, such as errors, of which a smaller score wins.
    pairs: (row, first, second) of those that are compared and corrected for; by default all.
  """
  if pairs is None:
    pairs = [(row, *pair) for row, cells in table.items() for pair in itertools.combinations(cells, 2)]
  found = []
  for row, first, second in pairs:
    sign, cells = -1.0 if row in lower_is_better else 1.0, table.get(row, {})
    if not {first, second} <= set(cells) or not set(cells[first].by_seed) & set(cells[second].by_seed):
      continue
    result, by_examples = difference(cells[first], cells[second], level=level)
    shown = estimate(cells[first]).mean - estimate(cells[second]).mean
    found.append((row, first, second, _signed(result, sign), by_examples, sign * shown))
  adjusted = holm([result.p_value for _, _, _, result, _, _ in found])
  comparisons = []
  for (row, first, second, result, by_examples, shown), p_value in zip(found, adjusted):
    wins = p_value <= level and result.mean * shown > 0
    winner = (first if result.mean > 0 else second) if wins else ""
    comparisons.append(Comparison(first, second, row, result, p_value, winner, by_examples))
  return comparisons


def holm(p_values: Sequence[float]) -> list[float]:
  """P-values corrected for their number so that one false rejection among all is as rare as the level says.

  Holm (1979): the k-th smallest of m is multiplied by m - k + 1, and is at least as large as those before it.
  NaN, what was not tested, stays NaN and does not count.
  """
  tested = sorted((p_value, place) for place, p_value in enumerate(p_values) if not math.isnan(p_value))
  adjusted, largest = [math.nan] * len(p_values), 0.0
  for rank, (p_value, place) in enumerate(tested):
    largest = max(largest, min(1.0, (len(tested) - rank) * p_value))
    adjusted[place] = largest
  return adjusted


def mean_ranks(
  table: Mapping[str, Mapping[str, Scores]],
  *,
  lower_is_better: Sequence[str] = (),
  level: float = LEVEL,
  draws: int = DRAWS,
) -> dict[str, MeanRank]:
  """The mean rank of every backbone over `ranked_rows`; equal scores share a rank.

  The interval is that of a bootstrap which draws rows, and in every row seeds, with replacement; the bounds
  are NaN where there are fewer than two rows. Rows of a table are few and not independent: it says how far
  the order hangs on the choice of rows, not how it would be on any other task.

  Returns:
    {backbone: its mean rank}; empty where there is no such row, or one backbone.
  """
  names, rows = _names(table), ranked_rows(table)
  if len(names) < 2 or not rows:
    return {}
  rng = np.random.default_rng(0)
  means, drawn = [], []
  for row in rows:
    seeds = _common_seeds(table[row])
    sign = 1.0 if row in lower_is_better else -1.0
    scores = sign * np.array([[table[row][name].by_seed[seed] for seed in seeds] for name in names])
    weights = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=draws) / len(seeds)
    means.append(_ranks(scores.mean(axis=1)[None])[0])
    drawn.append(_ranks(weights @ scores.T))  # [draws, backbones]
  picked = rng.integers(len(rows), size=(draws, len(rows)))
  spread = np.stack(drawn)[picked, np.arange(draws)[:, None]].mean(axis=1)
  bounds = np.quantile(spread, (level / 2, 1 - level / 2), axis=0)
  if len(rows) < 2:
    bounds = np.full((2, len(names)), math.nan)
  centre = np.mean(means, axis=0)
  return {
    name: MeanRank(float(centre[i]), float(bounds[0, i]), float(bounds[1, i])) for i, name in enumerate(names)
  }


def ranked_rows(table: Mapping[str, Mapping[str, Scores]]) -> list[str]:
  """The rows that have a seed in common of all backbones of the table: those that `mean_ranks` uses."""
  names = set(_names(table))
  return [row for row, cells in table.items() if set(cells) == names and _common_seeds(cells)]


def _names(table: Mapping[str, Mapping[str, Scores]]) -> list[str]:
  return list(dict.fromkeys(name for cells in table.values() for name in cells))


def _common_seeds(cells: Mapping[str, Scores]) -> list[int]:
  return sorted(set.intersection(*(set(scores.by_seed) for scores in cells.values())))


def _ranks(scores: Float[np.ndarray, "d k"]) -> Float[np.ndarray, "d k"]:
  """Ranks from 1 of the smallest on, along the last axis; equal ones get the mean of theirs."""
  below = np.sum(scores[:, :, None] > scores[:, None, :], axis=2)
  equal = np.sum(scores[:, :, None] == scores[:, None, :], axis=2)
  return below + (equal + 1) / 2


def _signed(found: Estimate, sign: float) -> Estimate:
  if sign > 0:
    return found
  return dataclasses.replace(found, mean=-found.mean, low=-found.high, high=-found.low)


def _groups(
  seeds: Sequence[int], examples: Mapping[int, np.ndarray], data: Mapping[int, str]
) -> list[tuple[float, Float[np.ndarray, "_"]]]:
  """(fraction of the seeds, mean of each example over them) of every set of seeds with the same test data."""
  groups: dict[tuple[str, int], list[np.ndarray]] = {}
  for seed in seeds:
    # Without a word about its data, a seed has data of its own.
    groups.setdefault((data.get(seed, f"of seed {seed}"), len(examples[seed])), []).append(examples[seed])
  return [
    (len(parts) / len(seeds), np.mean(np.asarray(parts, np.float64), axis=0)) for parts in groups.values()
  ]


def _estimate(
  means: Float[np.ndarray, "s"], groups: Sequence[tuple[float, np.ndarray]], level: float
) -> Estimate:
  """The estimate from the means of seeds and the examples of groups of seeds; see the module."""
  count = len(means)
  if not count:
    return Estimate(math.nan, math.nan, math.nan, math.nan, 0)
  mean = float(np.mean(means))
  parts: dict[int, float] = collections.defaultdict(float)  # variances by their degrees of freedom
  if count > 1:
    parts[count - 1] += float(np.var(means, ddof=1)) / count
  for fraction, values in groups:
    values = values[np.isfinite(values)]
    if len(values) > 1:
      parts[len(values) - 1] += fraction**2 * bootstrap_variance(values)
  # One seed, or seeds without an effect, and no examples: nothing tells how far the score may be off.
  if not parts or (not groups and not sum(parts.values())):
    return Estimate(mean, math.nan, math.nan, math.nan, count)
  # Values that are equal but for rounding have no variance; a sign test of their number decides.
  if sum(parts.values()) <= (1e-12 * max(1.0, abs(mean))) ** 2:
    p_value = 2.0 ** -max(parts) if abs(mean) > 1e-12 else 1.0
    return Estimate(mean, mean, mean, p_value, count)
  half = _half_width(parts, level)
  return Estimate(mean, mean - half, mean + half, _p_value(mean, parts), count)


def _half_width(parts: Mapping[int, float], level: float) -> float:
  """Half of the interval of confidence 1 - `level`, from its variances by their degrees of freedom."""
  terms = (variance * special.stdtrit(degrees, level / 2) ** 2 for degrees, variance in parts.items())
  return math.sqrt(sum(terms))


def _p_value(mean: float, parts: Mapping[int, float]) -> float:
  """The level at which the interval ends at zero, at least e^-60; half-widths fall as the level grows."""
  low, high = -60.0, 0.0  # of its logarithm
  for _ in range(24):
    middle = (low + high) / 2
    low, high = (middle, high) if _half_width(parts, math.exp(middle)) > abs(mean) else (low, middle)
  return math.exp(high)


def bootstrap_variance(values: Float[np.ndarray, "n"]) -> float:
  """The variance of the mean of `values` over bootstrap samples, n values drawn with replacement.

  It is known without drawing: the variance of one draw, with n in its denominator, over n.
  """
  return float(np.var(values)) / len(values)
