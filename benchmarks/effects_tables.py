"""The tables of `benchmarks.effects`, from the committed results alone.

A row compares two arms, or two rounds, in pairs: d[seed, prompt] is the difference of the ground truths of two answers
to one prompt. Given are the mean, its 95 % interval by Student's t over the seeds of all bases, the same by a bootstrap
over seeds and prompts, and the smallest true difference that so many seeds would show 8 times in 10. A row "appears" if
the interval over seeds excludes 0 on the side of the paper.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from alma_jax.mini import seeds, world
from alma_jax.store import statistics

Key = tuple[str, int]  # base and seed
Found = Mapping[Key, Mapping[str, Any]]  # arm -> what is kept of it
DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Row:
  """`left` minus `right`, each an arm and a round; the paper says that it is "above", "equal", or nothing."""

  what: str
  left: tuple[str, int]
  right: tuple[str, int]
  paper: Literal["above", "equal", ""] = "above"


TABLE_4 = "Table 4: diverse prompts"
ROWS = {
  "Figure 2: growth": (
    Row("initial SFT minus base 3-shot", ("default", 1), ("default", 0)),
    Row("round 6 minus initial SFT", ("default", 6), ("default", 1)),
    Row("round 10 minus round 6", ("default", 10), ("default", 6)),
    Row("round 10 minus round 6, random prompts", ("random_prompts", 10), ("random_prompts", 6), ""),
  ),
  TABLE_4: (
    Row("diverse minus random, round 6", ("default", 6), ("random_prompts", 6)),
    Row("diverse minus random, round 10", ("default", 10), ("random_prompts", 10)),
  ),
  "What the effect of diverse prompts rests on": (
    Row("last token minus mean pooling, round 10", ("default", 10), ("mean_pooling", 10), ""),
    Row("mean pooling minus random prompts, round 10", ("mean_pooling", 10), ("random_prompts", 10), ""),
  ),
  "Table 5: who writes the responses": (
    Row("three minus the latest only, round 6", ("default", 6), ("latest_only", 6)),
    Row("three minus two initial models, round 6", ("default", 6), ("two_sft_only", 6)),
    Row("three minus one initial model, round 6", ("default", 6), ("one_sft_only", 6)),
  ),
  "Table 6: N x K x R spent otherwise": (
    Row("twice N, half K", ("more_n", 6), ("default", 6), ""),
    Row("half N, twice K", ("more_k", 6), ("default", 6), ""),
    Row("two rounds instead of five, 2.5 x K", ("fewer_rounds", 3), ("default", 6), ""),
  ),
  "Table 7: DPO": (
    Row("DPO minus best of n, round 6", ("dpo", 6), ("default", 6), "equal"),
    Row("DPO minus initial SFT, round 6", ("dpo", 6), ("default", 1)),
    Row("without the NLL term minus initial SFT, round 6", ("dpo_without_nll", 6), ("default", 1), ""),
  ),
  "GRPO, not in the paper": (Row("GRPO minus initial SFT, round 6", ("grpo", 6), ("default", 1)),),
  "Control": (
    Row("judge's choice minus a random response, round 6", ("default", 6), ("no_judge", 6)),
    Row("a random response minus initial SFT, round 6", ("no_judge", 6), ("default", 1), ""),
  ),
}
WORLDS: Mapping[world.Chatter, str] = {"all": "around all prompts", "front": "in front of the dense kind's alone"}
JUDGES = (
  ("fine-tuned minus base 3-shot", "fine-tuned", "base 3-shot"),
  ("real-valued minus integer", "fine-tuned", "fine-tuned, integer"),
  ("self-distilled minus fine-tuned", "distilled", "fine-tuned"),
)


def load(results: pathlib.Path, chatter: world.Chatter = "dense") -> dict[Key, dict[str, Any]]:
  """What is kept of the bases of one world, by base and seed, then by arm."""
  found: dict[Key, dict[str, Any]] = {}
  for path in sorted(results.glob("*.json")):
    result = json.loads(path.read_text())
    if result.get("chatter", "dense") == chatter:
      found.setdefault((result["base"], result["seed"]), {})[result["arm"]] = result
  return found


def truth(found: Mapping[str, Any], place: tuple[str, int]) -> np.ndarray | None:
  """int [prompts]: the ground truth of an arm's answers in a round; None where the arm has not been run."""
  arm, round = place
  told = found.get(arm, {}).get("truth", {}).get(str(round))
  return None if told is None else np.array([int(x, 16) for x in told])


def differences(found: Found, row: Row) -> tuple[list[Key], np.ndarray]:
  """The seeds that have both arms, and their differences [seeds, prompts]."""
  pairs = {key: (truth(arms, row.left), truth(arms, row.right)) for key, arms in found.items()}
  both = {key: left - right for key, (left, right) in pairs.items() if left is not None and right is not None}
  return list(both), np.array(list(both.values()), np.float64)


@dataclasses.dataclass(frozen=True)
class Summary:
  """A row's numbers over the seeds."""

  n: int
  mean: float
  half: float  # of the interval over seeds
  low: float  # of the bootstrap over seeds and prompts
  high: float
  detectable: float
  positive: int  # seeds above 0


def summary(d: np.ndarray) -> Summary:
  """d [seeds, prompts], or [seeds] where there are no prompts."""
  each = d.mean(axis=1) if d.ndim == 2 else d
  over = statistics.student(each)
  assert over is not None
  low, high = both_ways(d) if d.ndim == 2 else (float("nan"), float("nan"))
  spread = float(each.std(ddof=1)) if len(each) > 1 else float("nan")
  least = statistics.detectable(spread, len(each))
  half = float("nan") if over.ci95 is None else over.ci95
  return Summary(len(each), over.value, half, low, high, least, int((each > 0).sum()))


def both_ways(d: np.ndarray) -> tuple[float, float]:
  """The 95 % percentile interval of the mean of d [seeds, prompts] where seeds and prompts are drawn anew."""
  generator, (n, m) = np.random.default_rng(0), d.shape
  weights = [generator.multinomial(count, np.full(count, 1 / count), DRAWS) / count for count in (n, m)]
  means = ((weights[0] @ d) * weights[1]).sum(axis=1)
  low, high = np.quantile(means, [0.025, 0.975])
  return float(low), float(high)


def verdict(s: Summary, paper: str) -> str:
  """What a row says of the paper's effect."""
  if np.isnan(s.half):
    return "one seed"
  above, below = s.mean - s.half > 0, s.mean + s.half < 0
  if paper == "equal":
    return "no difference seen" if not above and not below else "above" if above else "below"
  if not paper:
    return "above 0" if above else "below 0" if below else "no difference seen"
  return "appears" if above else "reversed" if below else "does not appear"


def line(what: str, s: Summary, paper: str, digits: int = 2) -> str:
  ends = "" if np.isnan(s.low) else f"[{s.low:+.{digits}f}, {s.high:+.{digits}f}]"
  return (
    f"  {what:56} {s.n:3}  {s.mean:+.{digits}f} +- {s.half:.{digits}f}  {ends:16} {s.positive:2} above 0"
    f"  least {s.detectable:.{digits}f}  {verdict(s, paper)}"
  )


def show(results: pathlib.Path) -> None:
  """Prints every table that there are results for."""
  found = load(results)
  if not found:
    print(f"{results} holds no results; make some: python -m benchmarks.effects run")
    return
  names = sorted({base for base, _ in found})
  print(f"{len(found)} seeds: " + ", ".join(f"{sum(b == base for b, _ in found)} of base {base}" for base in names))
  print("difference of scores 0..10 by the ground truth; n, mean +- t over seeds, [bootstrap over seeds and prompts],")
  print("seeds above 0, smallest difference that is found 8 times in 10, and what that says of the paper's effect")
  for title, rows in ROWS.items():
    table(title, rows, found)
  for chatter, where in WORLDS.items():
    if other := load(results, chatter):
      table(f"{TABLE_4}, where chatter stands {where}", ROWS[TABLE_4], other)
      coverage(other)
  scores(found)
  judges(found)
  samples(found)
  coverage(found)
  coverage(found, ("default", "random_prompts", "mean_pooling"))
  budget(found)
  by_kind(found)


def table(title: str, rows: Sequence[Row], found: Found) -> None:
  """Prints the rows that there are results for, over all bases and for each."""
  lines = []
  for row in rows:
    keys, d = differences(found, row)
    if keys:
      lines.append(line(row.what, summary(d), row.paper))
      of = sorted({base for base, _ in keys})
      for base in of if len(of) > 1 else ():
        part = d[[key[0] == base for key in keys]]
        if len(part) > 1:
          lines.append(line(f"    base {base}", summary(part), row.paper))
  if lines:
    print(f"\n{title}", *lines, sep="\n")


def mean_line(values: Sequence[float], digits: int = 2) -> str:
  """The mean of a value over the seeds, with its interval."""
  over = statistics.student(values)
  assert over is not None
  return f"{over.value:.{digits}f}" + ("" if over.ci95 is None else f" +- {over.ci95:.{digits}f}")


def scores(found: Found) -> None:
  print("\nMean scores")
  for arm, rounds in (("default", (0, 1, 6, 10)), ("random_prompts", (6, 10))):
    for r in rounds:
      values = [float(t.mean()) for arms in found.values() if (t := truth(arms, (arm, r))) is not None]
      if values:
        print(f"  {arm:16} round {r:2}   n = {len(values):2}   {mean_line(values)}")


def judges(found: Found) -> None:
  """Table 3: shares of pairs in the right order, and their differences."""
  told = [arms["judges"]["judges"] for arms in found.values() if "judges" in arms]
  if not told:
    return
  print("\nTable 3: pairs of answers in the right order; a tie counts as wrong (strict), or half")
  for name in told[0]:
    strict, half = ([t[name][key] for t in told] for key in ("strict", "half"))
    print(f"  {name:24} n = {len(told):2}   strict {mean_line(strict, 3)}   half {mean_line(half, 3)}")
  for what, left, right in JUDGES:
    for key in ("strict", "half"):
      d = np.array([t[left][key] - t[right][key] for t in told])
      print(line(f"{what}, {key}", summary(d), "above", 3))


def samples(found: Found) -> None:
  """Figure 3: the choice of two judges among N samples, for each way to truncate them."""
  told = [arms["judges"] for arms in found.values() if "judges" in arms]
  for how in [name for name in (told[0] if told else ()) if name.startswith("best_of_n")]:
    print(f"\nFigure 3: ground truth of the choice among N samples ({how.partition(', ')[2]})")
    for n in told[0][how]["distilled"]:
      ours, tuned, best = (
        [t[how][judge][n][i] for t in told] for judge, i in (("distilled", 0), ("fine-tuned", 0), ("distilled", 1))
      )
      print(
        f"  N = {n:>3}   run's judge {mean_line(ours)}   undistilled {mean_line(tuned)}   truly best {mean_line(best)}"
      )
    for low, high, paper in (("1", "16", "above"), ("16", "128", "equal")):
      d = np.array([t[how]["distilled"][high][0] - t[how]["distilled"][low][0] for t in told])
      print(line(f"N = {high} minus N = {low}", summary(d), paper))


def coverage(found: Found, compared: Sequence[str] = ("default", "random_prompts")) -> None:
  """The mechanism of Table 4, where all arms have run: what is drawn, and whether the trained answers are right."""
  ran = [arms for arms in found.values() if set(compared) <= arms.keys()]
  if not ran:
    return
  print(f"\nMechanism of Table 4 ({len(ran)} seeds): shares of kinds, facts asked for, trained answers that are right")
  for arm in compared:
    told = [arms[arm] for arms in ran]
    pool = share_of_kinds([t["pool"]["kinds"] for t in told])
    drawn = share_of_kinds([drawn["kinds"] for t in told for drawn in t["drawn"].values()])
    facts = {r: np.mean([t["drawn"][r]["facts"] for t in told]) for r in ("6", "10")}
    right = {k: sum(t["trained"][k][0] for t in told) / sum(t["trained"][k][1] for t in told) for k in world.RELATIONS}
    print(f"  {arm:16} pool {pool}; drawn {drawn}; facts of 192: {facts['6']:.0f} by round 6, {facts['10']:.0f} by 10;")
    print("  " + " " * 17 + "right " + " ".join(f"{kind} {value:.2f}" for kind, value in right.items()))


def share_of_kinds(counts: Sequence[Mapping[str, int]]) -> str:
  total = sum(sum(c.values()) for c in counts)
  return " ".join(f"{kind} {sum(c.get(kind, 0) for c in counts) / total:.2f}" for kind in world.RELATIONS)


def budget(found: Found) -> None:
  """Table 6: seconds of the rounds beside the scores."""
  print("\nTable 6: wall-clock seconds of the rounds, without their evaluation")
  for arm, last in (("default", 6), ("more_n", 6), ("more_k", 6), ("fewer_rounds", 3)):
    told = [arms[arm]["round_seconds"] for arms in found.values() if arm in arms]
    if told:
      spent = [sum(seconds for r, seconds in t.items() if 2 <= int(r) <= last) for t in told]
      print(f"  {arm:16} n = {len(told):2}   rounds 2-{last}   {mean_line(spent, 1)}")


def by_kind(found: Found) -> None:
  """The mechanism of Table 5: by kind, the scores of the initial model and of later rounds."""
  kinds = np.array([task.relation for _, task in seeds.results_prompts()])
  told = [arms for arms in found.values() if truth(arms, ("default", 10)) is not None]
  if not told:
    return
  print("\nMechanism of Table 5: score by kind, and prompts on which the initial model is better than round 6")
  for kind in world.RELATIONS:
    values = {r: np.array([truth(arms, ("default", r)) for arms in told])[:, kinds == kind] for r in (1, 6, 10)}
    better = (values[1] > values[6]).mean()
    shown = "   ".join(f"round {r} {v.mean():.2f}" for r, v in values.items())
    print(f"  {kind:8} {shown}   initial better {better:.3f}")
