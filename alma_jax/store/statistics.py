"""Means with their 95 % intervals, differences and tests. NumPy alone; float64.

  mean(scores)                  Mean(value=7.31, ci95=0.12, n=200)
  paired(after, before)         the mean difference over the prompts that both hold
  clustered(scores, prompts)    the responses to one prompt are alike, so the interval takes them together
  student([7.2, 7.4, 7.1])      few values, such as one per seed

A half width `ci95` is 1.96 standard errors; `student` takes the quantile of Student's t instead.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np

Z95 = 1.96
Values = Sequence[float] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Mean:
  value: float
  ci95: float | None  # half width; None for a single value
  n: int


@dataclasses.dataclass(frozen=True)
class Interval:
  value: float
  low: float
  high: float


def mean(values: Values) -> Mean | None:
  """The mean of independent values, None where there are none."""
  values = np.asarray(values, np.float64)
  if not len(values):
    return None
  ci95 = Z95 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
  return Mean(float(values.mean()), None if ci95 is None else float(ci95), len(values))


def mean_of_sums(n: int, total: float, squares: float) -> Mean | None:
  """The mean of n values from their sum and the sum of their squares; the interval of a single value is 0 wide."""
  if not n:
    return None
  value = total / n
  variance = max(0.0, squares / n - value**2) * n / max(1, n - 1)
  return Mean(value, Z95 * math.sqrt(variance / n), n)


def mean_of_counts(sums: Mapping[str, float] | None) -> Mean | None:
  """The same for {"n", "sum", "squares"}, as manifests count them."""
  return mean_of_sums(int(sums["n"]), sums["sum"], sums["squares"]) if sums else None


def paired(left: Mapping[str, float], right: Mapping[str, float]) -> Mean | None:
  """The mean of left - right over the keys of both; what is not finite is left out."""
  differences = [left[key] - right[key] for key in left if key in right]
  return mean([x for x in differences if math.isfinite(x)])


def tie_discounted(one: Mapping[str, float], other: Mapping[str, float]) -> Mean | None:
  """LIMA's agreement of two raters over the prompts that both judged, from shares of the win (1, 0.5 for a tie, 0): 1
  where they say the same, 1/2 where one of them says tie, else 0."""
  return mean([1 - abs(np.sign(one[key] - 0.5) - np.sign(other[key] - 0.5)) / 2 for key in one if key in other])


@dataclasses.dataclass(frozen=True)
class Wins:
  """How often one of two is ahead on the questions that both have."""

  share: Mean  # won, a tie counting half
  won: int
  tied: int
  lost: int


def wins(left: Mapping[str, float], right: Mapping[str, float]) -> Wins | None:
  """How often the left score is above the right one over the keys of both; what is not finite is left out."""
  differences = np.array([left[key] - right[key] for key in left if key in right], np.float64)
  signs = np.sign(differences[np.isfinite(differences)])
  share = mean((signs + 1) / 2)
  if share is None:
    return None
  won, lost = int((signs > 0).sum()), int((signs < 0).sum())
  return Wins(share, won, len(signs) - won - lost, lost)


def clustered(values: Values, groups: np.ndarray) -> Mean | None:
  """The mean over all values; the interval takes the values of a group together. groups [n]: the group of each."""
  values = np.asarray(values, np.float64)
  if not len(values):
    return None
  codes = np.unique(groups, return_inverse=True)[1]
  sums, sizes = np.bincount(codes, values), np.bincount(codes)
  centre, clusters = float(values.mean()), len(sizes)
  if clusters < 2:
    return Mean(centre, None, len(values))
  # The residuals of a group add up before they are squared: alike values count as fewer.
  spread = math.sqrt(np.sum((sums - centre * sizes) ** 2) * clusters / (clusters - 1)) / len(values)
  return Mean(centre, Z95 * spread, len(values))


def correlation(x: Values, y: Values, groups: np.ndarray) -> Mean | None:
  """Pearson's r, None where x or y is constant. The interval is linearised and clustered by `groups`."""
  left, right = np.asarray(x, np.float64), np.asarray(y, np.float64)
  if len(left) < 3 or np.ptp(left) < 1e-9 or np.ptp(right) < 1e-9:
    return None
  left, right = (left - left.mean()) / left.std(), (right - right.mean()) / right.std()
  r = float(np.mean(left * right))
  codes = np.unique(groups, return_inverse=True)[1]
  influence = np.bincount(codes, left * right - r / 2 * (left**2 + right**2))
  clusters = len(influence)
  spread = math.sqrt(np.sum(influence**2) * clusters / max(1, clusters - 1)) / len(left)
  return Mean(r, Z95 * spread if clusters > 1 else None, len(left))


def ranks(values: Values) -> np.ndarray:
  """float64 [n]: the place of each value in ascending order, from 1; equal values share the mean of their places."""
  codes, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)[1:]
  return (np.cumsum(counts) - (counts - 1) / 2)[codes]


def spearman(x: Values, y: Values, groups: np.ndarray) -> Mean | None:
  """Spearman's rank correlation, None where x or y is constant; the interval is that of `correlation` of the ranks."""
  return correlation(ranks(x), ranks(y), groups)


def ordered(scores: Values, labels: Values, groups: np.ndarray, before: Values | None = None) -> Mean | None:
  """Of all pairs with different labels, the share whose scores differ the same way, equal scores counting half; with
  `before`, by how much that is above the share of these other scores. n counts the pairs.

  The interval linearises the share, a ratio of two sums over pairs, and takes the rows of a group together: a row's
  part is twice the sum over its own pairs, since every pair is one of two rows.
  """
  told, meant = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
  old = None if before is None else np.asarray(before, np.float64)
  lead, pairs = np.zeros(len(told)), np.zeros(len(told))  # summed over the pairs of each row
  for start in range(0, len(told), 1024):
    rows = slice(start, start + 1024)
    right = np.sign(told[rows, None] - told)
    right = right if old is None else right - np.sign(old[rows, None] - old)
    truth = np.sign(meant[rows, None] - meant)
    lead[rows], pairs[rows] = 0.5 * (right * truth).sum(axis=1), np.abs(truth).sum(axis=1)
  if not pairs.any():
    return None
  whole = pairs.sum()
  value = lead.sum() / whole
  codes = np.unique(groups, return_inverse=True)[1]
  influence = np.bincount(codes, 2 * (lead - value * pairs))
  clusters = len(influence)
  spread = math.sqrt(np.sum(influence**2) * clusters / max(1, clusters - 1)) / whole
  share = value + (0.5 if old is None else 0.0)
  return Mean(float(share), Z95 * spread if clusters > 1 else None, int(whole) // 2)


def student(values: Values) -> Mean | None:
  """The mean of a few independent values, such as one per seed, with the interval of Student's t."""
  values = np.asarray(values, np.float64)
  n = len(values)
  if n < 2:
    return mean(values)
  half = t_quantile(0.975, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
  return Mean(float(values.mean()), half, n)


def t_within(t: float, df: int) -> float:
  """P(|T| <= t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
  angle = math.atan2(abs(t), math.sqrt(df))
  # cos^k of the angle times 1/2 3/4 5/6 ... (even df) or 2/3 4/5 6/7 ... (odd df): a term per two degrees of freedom
  above = np.arange(1 + df % 2, df - 2, 2)
  terms = np.cumprod(np.concatenate([[1.0], above / (above + 1) * math.cos(angle) ** 2])) if df > 1 else np.zeros(1)
  if df % 2 == 0:
    return math.sin(angle) * float(terms.sum())
  return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * float(terms.sum()))


def t_quantile(p: float, df: int) -> float:
  """The t below which Student's t with df degrees of freedom lies with probability p; 0 < p < 1."""
  if p < 0.5:
    return -t_quantile(1 - p, df)
  low, high = 0.0, 1.0
  while t_within(high, df) < 2 * p - 1:
    low, high = high, 2 * high
  for _ in range(60):  # halves an interval [low, 2 low] down to the last bits
    middle = (low + high) / 2
    low, high = (middle, high) if t_within(middle, df) < 2 * p - 1 else (low, middle)
  return (low + high) / 2


def p_value(values: Values) -> float:
  """Two-sided p of Student's t test that the values' mean is 0, as of paired differences; 1 if all of them are 0."""
  values = np.asarray(values, np.float64)
  error = values.std(ddof=1) / math.sqrt(len(values))
  if error == 0:
    return float(values.mean() == 0)
  return max(0.0, 1 - t_within(float(values.mean() / error), len(values) - 1))


def holm(p: Values) -> np.ndarray:
  """The p values of a family of tests, adjusted by Holm's step-down method: below 0.05 is significant in the family."""
  p = np.asarray(p, np.float64)
  order = np.argsort(p, kind="stable")
  stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
  adjusted = np.empty(len(p))
  adjusted[order] = np.minimum(1.0, stepped)
  return adjusted


def bootstrap(
  values: np.ndarray,
  statistic: Callable[[np.ndarray], float],
  groups: np.ndarray | None = None,
  seed: int = 0,
  draws: int = 2000,
) -> Interval:
  """A statistic of the rows of `values` with its 95 % percentile interval; with `groups` [n] whole groups are drawn."""
  values, generator = np.asarray(values), np.random.default_rng(seed)
  if groups is None:
    members = [np.array([i]) for i in range(len(values))]
  else:
    codes = np.unique(groups, return_inverse=True)[1]
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
  found = []
  for _ in range(draws):
    drawn = generator.integers(0, len(members), len(members))
    found.append(statistic(values[np.concatenate([members[i] for i in drawn])]))
  low, high = np.quantile(found, [0.025, 0.975])
  return Interval(float(statistic(values)), float(low), float(high))


def detectable(spread: float, n: int, power: float = 0.8) -> float:
  """The true mean difference that n values with this standard deviation show at p < 0.05 with probability `power`."""
  if n < 2:
    return math.inf
  if n > 1000:
    quantiles = [NormalDist().inv_cdf(p) for p in (0.975, power)]
  else:
    quantiles = [t_quantile(p, n - 1) for p in (0.975, power)]
  return sum(quantiles) * spread / math.sqrt(n)
