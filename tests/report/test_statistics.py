"""Intervals, ranks and comparisons of the report, against scipy, plain loops and simulated scores."""

import math

import numpy as np
import pytest
from scipy import stats

from frozen_vision.report import statistics
from frozen_vision.report.statistics import Scores


def _rng(*seed):
  return np.random.default_rng([21, *seed])


def test_seeds_alone_give_students_interval_and_paired_test():
  first, second = _rng(0).normal(0.6, 0.1, 5), _rng(1).normal(0.5, 0.1, 5)
  one, other = (Scores(dict(enumerate(values))) for values in (first, second))
  found = statistics.estimate(one)
  expected = stats.t.interval(0.95, 4, first.mean(), stats.sem(first))
  np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-12)
  assert found.mean == pytest.approx(first.mean()) and found.seeds == 5
  result, by_examples = statistics.difference(one, other)
  expected = stats.ttest_rel(first, second)
  assert result.p_value == pytest.approx(expected.pvalue, rel=1e-5) and not by_examples
  interval = expected.confidence_interval()
  np.testing.assert_allclose((result.low, result.high), (interval.low, interval.high), rtol=1e-10)


def test_the_bootstraps_variance_is_that_of_drawing():
  values = _rng(2).exponential(size=40)
  rng = _rng(3)
  drawn = [np.mean(values[rng.integers(40, size=40)]) for _ in range(20_000)]
  assert statistics.bootstrap_variance(values) == pytest.approx(np.var(drawn), rel=0.05)


def test_seeds_and_examples_are_in_one_interval():
  examples = {seed: _rng(4, seed).binomial(1, 0.7, 50).astype(float) for seed in range(3)}
  scores = {seed: float(values.mean()) for seed, values in examples.items()}
  shared = Scores(scores, examples, dict.fromkeys(range(3), "the same"), is_mean=True)
  found = statistics.estimate(shared)
  between = np.var(list(scores.values()), ddof=1) / 3 * stats.t.ppf(0.975, 2) ** 2
  of_examples = np.var(np.mean(list(examples.values()), axis=0)) / 50 * stats.t.ppf(0.975, 49) ** 2
  half = math.sqrt(between + of_examples)
  np.testing.assert_allclose((found.mean - found.low, found.high - found.mean), half, rtol=1e-9)
  # Data of their own: the seeds' examples are independent.
  own = statistics.estimate(Scores(scores, examples, is_mean=True))
  of_examples = sum(np.var(values) / 50 for values in examples.values()) / 9 * stats.t.ppf(0.975, 49) ** 2
  assert own.high - own.low == pytest.approx(2 * math.sqrt(between + of_examples))
  # A score that is no mean of its examples has the seeds' interval.
  assert statistics.estimate(Scores(scores, examples)) == statistics.estimate(Scores(scores))


def test_one_seed_without_examples_has_no_interval_and_is_not_tested():
  found = statistics.estimate(Scores({0: 0.5}))
  assert found.mean == 0.5 and math.isnan(found.low) and math.isnan(found.high)
  [comparison] = statistics.compare({"row": {"a": Scores({0: 0.9}), "b": Scores({0: 0.1})}})
  assert math.isnan(comparison.adjusted) and not comparison.winner
  assert statistics.compare({"row": {"a": Scores({0: 0.9}), "b": Scores({1: 0.1})}}) == []


def test_examples_without_a_score_are_left_out_and_others_are_paired():
  nan = math.nan
  one = Scores({0: 0.5}, {0: np.array([1, nan, 0, 1, 1.0])})
  other = Scores({0: 0.5}, {0: np.array([0, 1, 0, nan, 0.0])})
  result, by_examples = statistics.difference(one, other)
  assert by_examples and result.mean == pytest.approx(2 / 3)  # of the first, third and fifth
  # Of other data, examples cannot be paired.
  moved = Scores({0: 0.5}, {0: np.zeros(5)}, {0: "elsewhere"})
  assert not statistics.difference(one, moved)[1]


def test_equal_differences_are_decided_by_their_number():
  def scores(value, count):
    return Scores({0: value}, {0: np.full(count, value)}, is_mean=True)

  assert statistics.difference(scores(1.0, 9), scores(0.0, 9))[0].p_value == 2.0**-8
  assert statistics.difference(scores(1.0, 9), scores(1.0, 9))[0].p_value == 1.0


def test_holm_is_the_step_down_procedure():
  rng = _rng(5)
  for _ in range(50):
    p_values = rng.uniform(size=7) ** 3
    rejected = set()
    for count, place in enumerate(np.argsort(p_values)):  # as the paper describes it
      if p_values[place] > 0.05 / (7 - count):
        break
      rejected.add(int(place))
    adjusted = statistics.holm(list(p_values))
    assert {place for place, value in enumerate(adjusted) if value <= 0.05} == rejected
    assert all(a >= p for a, p in zip(adjusted, p_values))
  assert statistics.holm([0.02, math.nan, 0.04])[::2] == [0.04, 0.04]


def test_mean_ranks_equal_a_plain_loop():
  rng = _rng(6)
  names, rows = ["a", "b", "c"], ["x", "y", "z"]
  table = {
    row: {name: Scores({seed: round(float(rng.uniform()), 1) for seed in range(3)}) for name in names}
    for row in rows
  }
  found = statistics.mean_ranks(table, lower_is_better=["z"])
  for name in names:
    ranks = []
    for row in rows:
      means = [np.mean(list(table[row][other].by_seed.values())) for other in names]
      ranks.append(stats.rankdata(means if row == "z" else -np.array(means))[names.index(name)])
    assert found[name].mean == pytest.approx(np.mean(ranks))
    assert found[name].low <= found[name].mean <= found[name].high
  assert sum(each.mean for each in found.values()) == pytest.approx(6)
  assert statistics.mean_ranks({"x": {"a": Scores({0: 1.0})}}) == {}
  # A row that one backbone lacks is left out; one row alone has no interval.
  lacking = {"x": table["x"], "y": {"a": table["y"]["a"]}}
  assert math.isnan(statistics.mean_ranks(lacking)["a"].low)
  # So is one whose backbones have no seed in common.
  apart = {name: Scores({seed: 0.5}) for seed, name in enumerate(names)}
  assert statistics.ranked_rows({**table, "apart": apart}) == rows
  with_apart = statistics.mean_ranks({**table, "apart": apart}, lower_is_better=["z"])
  assert with_apart == found


def test_errors_are_won_by_the_smaller():
  def scores(level, seed):
    return Scores({each: level + 0.001 * _rng(7, seed, each).normal() for each in range(4)})

  table = {"error": {"a": scores(0.1, 0), "b": scores(0.4, 1)}}
  [comparison] = statistics.compare(table, lower_is_better=["error"])
  assert comparison.winner == "a" and comparison.difference.mean == pytest.approx(0.3, abs=0.01)
  assert comparison.difference.low < comparison.difference.mean < comparison.difference.high
  assert statistics.compare(table)[0].winner == "b"
  assert statistics.mean_ranks(table, lower_is_better=["error"])["a"].mean == 1


def test_a_winner_is_also_ahead_in_the_table():
  one = Scores({0: 0.4}, {0: np.linspace(0.5, 0.7, 30)})
  other = Scores({0: 0.5}, {0: np.linspace(0.1, 0.2, 30)})
  [comparison] = statistics.compare({"AP": {"a": one, "b": other}})
  assert comparison.adjusted < 0.01 and not comparison.winner


def _simulated(draw, *, kind, run_noise, gain=0.0, seeds=3, examples=40, names=("a", "b", "c")):
  """Scores of backbones that are equally good but for `gain` of the first.

  Every example has a difficulty of its own, which all backbones feel, and every run is off by `run_noise`.
  """
  rng = _rng(8, draw)
  table = {}
  for row in ("first", "second"):
    hardness = {seed: rng.normal(0, 1, examples) for seed in range(seeds)}
    if kind == "shared":
      hardness = dict.fromkeys(range(seeds), hardness[0])
    cells = {}
    for name in names:
      runs = {seed: rng.normal(0, run_noise) + gain * (name == "a") for seed in range(seeds)}
      right = {
        seed: (hardness[seed] + rng.normal(0, 1, examples) + runs[seed] > 0).astype(float) for seed in runs
      }
      data = {seed: kind if kind == "shared" else str(seed) for seed in runs}
      means = {seed: float(values.mean()) for seed, values in right.items()}
      cells[name] = Scores(means, {} if kind == "none" else right, data, is_mean=True)
    table[row] = cells
  return table


@pytest.mark.parametrize(
  ("kind", "run_noise", "seeds"),
  [("shared", 0.0, 3), ("shared", 0.3, 3), ("own", 0.3, 3), ("none", 0.3, 3), ("shared", 0.0, 1)],
)
def test_equal_backbones_rarely_win(kind, run_noise, seeds):
  """Over 1,000 reports of three equal backbones, at most 5 % name any winner at all."""
  wrong = sum(
    any(
      each.winner for each in statistics.compare(_simulated(i, kind=kind, run_noise=run_noise, seeds=seeds))
    )
    for i in range(1000)
  )
  assert wrong <= 50


def test_intervals_cover_the_truth():
  """With a truth of one half, 95 % intervals of single cells hold it in 93 % of 1,000 draws or more."""
  for kind, run_noise in (("shared", 0.0), ("own", 0.3), ("none", 0.3)):
    inside = 0
    for i in range(1000):
      found = statistics.estimate(_simulated(i, kind=kind, run_noise=run_noise, names=("a",))["first"]["a"])
      inside += found.low <= 0.5 <= found.high
    assert inside >= 930, kind


@pytest.mark.parametrize(("seeds", "least"), [(3, 40), (5, 85)])
def test_a_better_backbone_wins_where_it_should(seeds, least):
  """An advantage of one standard deviation of the examples is seen in most reports; 3 seeds are few."""
  won = 0
  for i in range(100):
    found = statistics.compare(_simulated(i, kind="shared", run_noise=0.1, gain=1.0, seeds=seeds))
    won += any(each.winner == "a" for each in found)
    assert all(each.winner in ("a", "") for each in found if "a" in (each.first, each.second))
  assert won >= least
