"""Means, intervals and tests against textbook values, scipy and simulation."""

import math

import numpy as np
import pytest
import scipy.stats

from alma_jax.store import statistics
from alma_jax.store.statistics import Interval, Mean


def test_the_mean_is_the_same_from_values_and_from_sums():
  values = np.random.default_rng(0).normal(7, 2, 200)
  found = statistics.mean(values)
  assert found == Mean(values.mean(), 1.96 * values.std(ddof=1) / math.sqrt(200), 200)
  summed = statistics.mean_of_sums(200, float(sum(values)), float(sum(values**2)))
  assert (summed.value, summed.ci95) == pytest.approx((found.value, found.ci95), rel=1e-9)
  assert statistics.mean([]) is None and statistics.mean_of_sums(0, 0.0, 0.0) is None
  assert statistics.mean([3.0]) == Mean(3.0, None, 1) and statistics.mean_of_sums(1, 3.0, 9.0) == Mean(3.0, 0.0, 1)


def test_sums_of_equal_values_have_no_negative_variance():
  assert statistics.mean_of_sums(3, 0.1 + 0.1 + 0.1, 3 * 0.1**2).ci95 == pytest.approx(0, abs=1e-8)


def test_pairs_are_those_that_both_hold_with_finite_values():
  after, before = {"a": 3.0, "b": 5.0, "c": 1.0, "e": math.nan}, {"b": 4.0, "a": 1.0, "d": 9.0, "e": 1.0}
  found = statistics.paired(after, before)
  assert found == statistics.mean([2.0, 1.0]) and found.n == 2
  assert statistics.paired(after, {}) is None


def test_a_clustered_interval_counts_equal_values_once():
  values = np.random.default_rng(0).normal(0, 1, 50)
  alone = statistics.mean(values)
  repeated = statistics.clustered(np.repeat(values, 4), np.repeat(np.arange(50), 4))
  assert (repeated.value, repeated.ci95, repeated.n) == pytest.approx((alone.value, alone.ci95, 200))
  single = statistics.clustered(values, np.arange(50) * 7)
  assert (single.value, single.ci95) == pytest.approx((alone.value, alone.ci95))
  assert statistics.clustered(values, np.zeros(50)).ci95 is None and statistics.clustered([], np.zeros(0)) is None


def test_clustered_intervals_of_a_simulation_hold_the_truth_95_times_in_100():
  generator, held = np.random.default_rng(1), 0
  for _ in range(1000):
    sizes = generator.integers(1, 6, 80)
    groups = np.repeat(np.arange(80), sizes)
    values = generator.normal(0, 1, 80)[groups] + generator.normal(0, 1, len(groups))
    found = statistics.clustered(values, groups)
    held += abs(found.value) < found.ci95
  assert 920 <= held <= 970


def test_correlation_is_pearsons_with_an_interval_like_the_textbooks():
  x, noise = np.random.default_rng(0).normal(0, 1, (2, 4000))
  found = statistics.correlation(x, x + noise, np.arange(4000))
  assert found.value == pytest.approx(scipy.stats.pearsonr(x, x + noise)[0])
  assert found.ci95 == pytest.approx(1.96 * (1 - found.value**2) / math.sqrt(4000), rel=0.06)
  assert statistics.correlation(x, np.ones(4000), np.arange(4000)) is None


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 29, 199, 1000, 20001])
def test_students_t(df):
  for t in (0.0, 0.3, 1.0, 2.5, 40.0):
    assert statistics.t_within(t, df) == pytest.approx(1 - 2 * scipy.stats.t.sf(t, df), abs=1e-12)
    assert statistics.t_within(-t, df) == statistics.t_within(t, df)
  for p in (0.025, 0.4, 0.5, 0.8, 0.975, 0.9999):
    assert statistics.t_quantile(p, df) == pytest.approx(scipy.stats.t.ppf(p, df), rel=1e-8, abs=1e-12)


def test_few_values_have_students_interval():
  assert statistics.student([1.0, 2.0, 4.0]).ci95 == pytest.approx(4.302653 * np.std([1, 2, 4], ddof=1) / math.sqrt(3))
  assert statistics.student([5.0]) == Mean(5.0, None, 1) and statistics.student([]) is None


def test_p_values():
  values = np.random.default_rng(3).normal(0.4, 1, 12)
  assert statistics.p_value(values) == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue)
  assert statistics.p_value([0.0, 0.0]) == 1 and statistics.p_value([1.0, 1.0]) == 0


def test_holm():
  assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert statistics.holm([0.9, 0.6]) == pytest.approx([1.0, 1.0]) and statistics.holm([]).tolist() == []


def test_the_bootstrap_finds_the_interval_of_a_mean_also_by_groups():
  values = np.random.default_rng(0).normal(3, 2, 300)
  found, wanted = statistics.bootstrap(values, np.mean), statistics.mean(values)
  half = (found.high - found.low) / 2
  assert found.value == wanted.value and half == pytest.approx(wanted.ci95, rel=0.08)
  groups = np.repeat(np.arange(300), 3)[::-1]
  grouped = statistics.bootstrap(np.repeat(values, 3), np.mean, groups)
  assert (grouped.high - grouped.low) / 2 == pytest.approx(wanted.ci95, rel=0.08)
  assert statistics.bootstrap(np.ones((5, 2)), lambda rows: rows.sum() / len(rows), draws=50) == Interval(2, 2, 2)


@pytest.mark.parametrize("n", [6, 10, 40])
def test_an_effect_that_is_detectable_is_found_with_that_power(n):
  effect = statistics.detectable(1.5, n)
  samples = np.random.default_rng(n).normal(effect, 1.5, (4000, n))
  power = np.mean(scipy.stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05)
  assert power == pytest.approx(0.8, abs=0.035)
  assert statistics.detectable(1.0, 1001) == pytest.approx(statistics.detectable(1.0, 1000), rel=0.003)
  assert statistics.detectable(1.0, 1) == math.inf


def test_ranks_and_spearman_are_scipys():
  rng = np.random.default_rng(0)
  x, y = rng.integers(0, 6, 200), rng.normal(0, 1, 200)
  np.testing.assert_array_equal(statistics.ranks(x), scipy.stats.rankdata(x))
  found = statistics.spearman(x, x + y, np.arange(200))
  assert found.value == pytest.approx(scipy.stats.spearmanr(x, x + y)[0]) and found.n == 200
  assert statistics.spearman(np.ones(200), y, np.arange(200)) is None


def test_ordered_counts_pairs_as_brute_force_does():
  rng = np.random.default_rng(0)
  scores, old, labels = rng.integers(0, 5, 30) / 2, rng.integers(0, 5, 30), rng.integers(0, 11, 30)
  pairs = [(i, j) for i in range(30) for j in range(i) if labels[i] != labels[j]]

  def brute(scores):
    return np.mean([
      0.5 if scores[i] == scores[j] else float((scores[i] > scores[j]) == (labels[i] > labels[j])) for i, j in pairs
    ])  # fmt: skip

  found = statistics.ordered(scores, labels, np.arange(30))
  assert (found.value, found.n) == pytest.approx((brute(scores), len(pairs)))
  assert statistics.ordered(scores, labels, np.arange(30), old).value == pytest.approx(brute(scores) - brute(old))
  assert statistics.ordered(labels, labels, np.arange(30)) == Mean(1.0, 0.0, len(pairs))
  assert statistics.ordered(-labels, labels, np.arange(30)).value == 0.0
  assert statistics.ordered(scores, np.ones(30), np.arange(30)) is None and statistics.ordered([], [], []) is None


def test_the_interval_of_ordered_holds_the_truth_95_times_in_100_also_where_prompts_repeat():
  """The truth of labels and scores that are both normal with correlation r: 1/2 + asin(r) / pi (Kendall)."""
  generator, held, paired = np.random.default_rng(2), 0, 0
  r = 1 / math.sqrt(2)
  truth = 0.5 + math.asin(r) / math.pi
  for _ in range(400):
    groups = np.repeat(np.arange(40), 2)
    labels = (generator.normal(0, 1, 40)[groups] + generator.normal(0, 1, 80)) / math.sqrt(2)
    scores = labels + (generator.normal(0, 1, 40)[groups] + generator.normal(0, 1, 80)) / math.sqrt(2)
    other = labels + (generator.normal(0, 1, 40)[groups] + generator.normal(0, 1, 80)) / math.sqrt(2)
    found = statistics.ordered(scores, labels, groups)
    held += abs(found.value - truth) < found.ci95
    change = statistics.ordered(scores, labels, groups, other)
    paired += abs(change.value) < change.ci95
  assert 365 <= held <= 392 and 365 <= paired <= 392


def test_agreement_is_tie_discounted():
  one = {"same": 1.0, "both tie": 0.5, "one tie": 0.5, "opposite": 0.0, "alone": 1.0}
  other = {"same": 1.0, "both tie": 0.5, "one tie": 0.0, "opposite": 1.0}
  found = statistics.tie_discounted(one, other)
  assert (found.value, found.n) == ((1 + 1 + 0.5 + 0) / 4, 4)
  assert statistics.tie_discounted(other, {}) is None
