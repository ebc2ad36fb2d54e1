"""How often the judge that selects agrees with who knows better: people's held-out pairs, and a gold judge's order of
the same responses. Nothing that is trained sees it."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alma_jax import names
from alma_jax.corpus.normalise import prompt_id
from alma_jax.judges import contract
from alma_jax.judges.contract import Answered, Judge
from alma_jax.options import Checked
from alma_jax.runtime.display import Bar
from alma_jax.runtime.session import Session
from alma_jax.store import layout, statistics
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Trainset
from alma_jax.store.records import Agreement, Judgment, Pair
from alma_jax.store.runs import Artefact

PEOPLE, GOLD = "held_out", "gold"
IN_WORDS = {PEOPLE: "held-out pairs of people", GOLD: "pairs that the gold judge orders"}


@dataclasses.dataclass(frozen=True)
class Options(Checked):
  gold: str = ""  # a judge whose order of a round's responses counts as right, a word of names.EVALUATORS; "": none

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.gold:
      names.check(names.EVALUATORS, self.gold, "gold")


@dataclasses.dataclass(frozen=True)
class Scored:
  """What a round has made: the judge's scores of its responses, the gold judge's, and the pairs that came of them."""

  judged: Artefact[Judgment]
  gold: Artefact[Judgment] | None
  trainset: Trainset


def build(s: Session[Any], judge: Judge, people: Sequence[SeedRow], scored: Scored) -> Artefact[Agreement]:
  """The round's `agreement`, a part for each share of the prompts, and its sums in words on the screen."""
  shares = s.options.shards
  fields = {"judge": judge.identity, "dtype": s.host.dtype, "shards": shares}
  fields["people"] = [[prompt_id(row.messages), row.chosen, row.rejected] for row in people]
  inputs: dict[str, Any] = {"judgments": scored.judged, "trainset": scored.trainset}
  stage = s.stage(layout.AGREEMENT, fields, inputs | ({"gold": scored.gold} if scored.gold else {}))
  if not stage.done:
    missing = stage.mine(shares)
    with s.display.bar(stage.name, sum(2 * len(people[share::shares]) for share in missing), "answers") as bar:
      for share in missing:
        found = _of_people(judge, people[share::shares], bar)
        if scored.gold:
          found += _of_gold(scored.judged.read(share), scored.gold.read(share))
        stage.write_part(share, shares, found, Agreement, _counts(found, scored.trainset.read(share)))
    stage.finish()
  for line in said(stage.manifest["counts"]):
    s.display.say(f"round {s.round}: {line}")
  return Artefact(stage, Agreement)


def _of_people(judge: Judge, people: Sequence[SeedRow], bar: Bar) -> list[Agreement]:
  pairs = [
    Answered(row.messages, text, True, f"held-out pair on line {row.line}") for row in people for text in row.answers
  ]
  found = [verdict.number for verdict in contract.scores(judge, pairs, bar)]
  both = zip(people, found[::2], found[1::2], strict=True)
  return [Agreement(prompt_id(row.messages), PEOPLE, chosen - rejected, 1.0) for row, chosen, rejected in both]


def _of_gold(judged: Sequence[Judgment], gold: Sequence[Judgment]) -> list[Agreement]:
  """The responses to each prompt two by two, 0 and 1, 2 and 3, ...; pairs that are equal to the gold judge say nothing.

  Scores of four responses by the judge and by the gold judge, and what is compared:

    judge   .2 .7 .1 .4        0 1:  .2 - .7 = -.5, wrong       2 3:  equal to the gold judge
    gold     9  4  6  6
  """
  right = {(j.prompt_id, j.sample_id): j.score for j in gold}
  by_prompt = collections.defaultdict(list)
  for j in sorted(judged, key=lambda j: j.sample_id):
    by_prompt[j.prompt_id].append((j.score, right[j.prompt_id, j.sample_id]))
  found = []
  for prompt, scores in by_prompt.items():
    for (a, gold_a), (b, gold_b) in zip(scores[::2], scores[1::2], strict=False):
      if gold_a != gold_b:
        sign = 1 if gold_a > gold_b else -1
        found.append(Agreement(prompt, GOLD, sign * (a - b), abs(gold_a - gold_b)))
  return found


def _counts(found: Sequence[Agreement], pairs: Sequence[Any]) -> dict[str, Any]:
  """Sums for means over all shares: how often the judge is right, a tie being half right, and what the pairs are."""
  counts: dict[str, Any] = {}
  for source in (PEOPLE, GOLD):
    right = [0.5 if x.margin == 0 else float(x.margin > 0) for x in found if x.source == source]
    counts[source] = _sums(right)
  kept = [x for x in pairs if isinstance(x, Pair)]
  counts["margin"] = _sums([x.chosen_score - x.rejected_score for x in kept])
  counts["chosen_characters"] = _sums([float(len(x.chosen)) for x in kept])
  counts["rejected_characters"] = _sums([float(len(x.rejected)) for x in kept])
  return counts


def _sums(values: Iterable[float]) -> dict[str, float]:
  of = list(values)
  return {"n": len(of), "sum": sum(of), "squares": sum(x * x for x in of)}


def said(counts: Mapping[str, Any]) -> list[str]:
  """The sums of a finished stage in words."""
  lines = []
  for source, whose in IN_WORDS.items():
    if mean := statistics.mean_of_counts(counts[source]):
      agrees = f"{mean.value:.1%} +- {mean.ci95 or 0.0:.1%} of {mean.n:,} {whose}"
      lines.append(f"the judge agrees with {agrees}")
  margin, *lengths = (
    statistics.mean_of_counts(counts[name]) for name in ("margin", "chosen_characters", "rejected_characters")
  )
  if margin:
    chosen, rejected = (mean.value if mean else 0.0 for mean in lengths)
    words = f"{margin.n:,} pairs, a margin of {margin.value:.2f} on average"
    lines.append(f"{words}; chosen {chosen:.1f} characters, rejected {rejected:.1f}")
  return lines
