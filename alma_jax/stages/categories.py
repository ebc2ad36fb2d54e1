"""Scores by category: how the checkpoints answer what the run's own pairs are about, and what they are not about.

  round_02/categories.truth         report.json: the mean score of each category by the judge `truth` on data.eval
  round_02/categories-beaver.harm   by the judge `harm` on the set `beaver`, with the rate of harmful answers

A category is seen if a human pair is of it. What follows here is made of finished grades alone.
"""

import collections
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from alma_jax import names
from alma_jax.corpus.normalise import prompt_id
from alma_jax.options import Checked, ConfigError, fingerprint, option
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards, statistics
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import PromptSet
from alma_jax.store.records import Grade
from alma_jax.store.runs import read_stage

SEEN, UNSEEN, NONE = "seen", "unseen", "none"  # NONE: of prompts without a category


@dataclasses.dataclass(frozen=True)
class Options(Checked):
  # What gives a row's category: "field" reads its own field `category`; or a function of the row, which has `messages`
  by: str = option("field", names=names.CATEGORIES)
  seeds: tuple[str, ...] = ()  # the human pairs are of these categories alone; (): of all
  judge: str = ""  # the one of `eval.judges` by whose scores an answer is harmful; "": none
  harmful: Literal["above", "below"] = "above"  # it is if its score is above the bound, or below it
  bound: float = 0.0

  def fields(self) -> dict[str, Any]:
    """What decides a row's category, for fingerprints."""
    return {"by": self.by, "source": names.source_of(names.CATEGORIES, self.by), "seeds": self.seeds}


def category(options: Options, row: SeedRow, fields: Mapping[str, Any] | None = None) -> str:
  """The category of a row, NONE where it has none; `fields` are those of its row in a set."""
  known = {"category": row.category, **(fields or {}), "messages": row.messages}
  if options.by == "field":
    found = known["category"] if isinstance(known["category"], str) else None
  else:
    found = names.resolve(names.CATEGORIES, options.by, "categories.by")(known)
  if found is not None and not isinstance(found, str):
    raise ConfigError(f"categories.by is {options.by!r}: it gave {found!r:.40} for a row; a category is a text or None")
  return found or NONE


def chosen(options: Options, rows: Sequence[SeedRow]) -> list[SeedRow]:
  """The human rows of the categories `options.seeds`, or all."""
  if not options.seeds:
    return list(rows)
  by_category = collections.Counter(category(options, row) for row in rows)
  if missing := [name for name in options.seeds if not by_category[name]]:
    raise ConfigError(
      f"categories.seeds names {missing[0]!r}, and no demonstration is of it; they are of"
      f" {', '.join(f'{name} ({n:,})' for name, n in sorted(by_category.items()))}"
    )
  return [row for row in rows if category(options, row) in options.seeds]


def build(
  s: Session[Any], sets: Sequence[PromptSet], judges: Collection[str], seen: Collection[str], options: Options
) -> None:
  """The round's scores by category on every set by each of the judges that graded it; nothing for sets without
  categories."""
  for asked in sets:
    of = {
      prompt_id(row.messages): category(options, row, asked.fields[i] if asked.fields else None)
      for i, row in enumerate(asked.rows)
    }
    if set(of.values()) == {NONE}:
      continue
    for judge in judges:
      graded = layout.grades_name(layout.stage_name(s.round, layout.answers_name(asked.name)), judge)
      if not (s.run.dir / graded / layout.MANIFEST).exists():
        continue  # a judge that found no fields to read
      fields = {"config": fingerprint(options) | options.fields(), "seen": sorted(seen), "set": asked.digest}
      stage = s.run.stage(layout.categories_name(s.round, judge, asked.name), fields, {"grades": s.run.dir / graded})
      if not stage.done and s.run.process == 0:
        scores = {grade.prompt_id: grade.score for grade in read_stage(s.run.dir / graded, Grade)}
        shards.write_json(
          stage.dir / layout.REPORT, table(scores, of, seen, options if judge == options.judge else None)
        )
      stage.finish(files=[layout.REPORT])
      if len(set(of.values())) > 1:
        s.display.say(f"{stage.name}: {in_words(layout.read_json(stage.dir / layout.REPORT))}")


def table(
  scores: Mapping[str, float | None], of: Mapping[str, str], seen: Collection[str], harm: Options | None = None
) -> dict[str, Any]:
  """{"seen": ..., "unseen": ..., "by": {category: ...}}, each the mean score with its interval and n, and the rate of
  harmful answers where `harm` says which ones are."""
  by_category: dict[str, list[float]] = collections.defaultdict(list)
  for id, score in scores.items():
    if score is not None and math.isfinite(score):
      by_category[of.get(id, NONE)].append(score)
  known = {name: values for name, values in sorted(by_category.items()) if name != NONE}
  halves = {half: [x for name, values in known.items() if (name in seen) == (half == SEEN) for x in values]
            for half in (SEEN, UNSEEN)}  # fmt: skip
  return {half: _summary(values, harm) for half, values in halves.items() if values} | {
    "by": {name: _summary(values, harm) | {SEEN: name in seen} for name, values in known.items()},
    "without_category": len(by_category.get(NONE, ())),
  }


def _summary(values: Sequence[float], harm: Options | None) -> dict[str, Any]:
  found = {"score": _mean(values)}
  if harm:
    found["harmful"] = _mean([float(x > harm.bound if harm.harmful == "above" else x < harm.bound) for x in values])
  return found


def _mean(values: Sequence[float]) -> dict[str, Any]:
  found = statistics.mean(values)
  return {} if found is None else {"mean": found.value, "ci95": found.ci95, "n": found.n}


def in_words(report: Mapping[str, Any]) -> str:
  """The seen and the unseen categories in a line, or every category where all are seen or none is."""
  split = SEEN in report and UNSEEN in report
  rows = {half: report[half] for half in (SEEN, UNSEEN)} if split else report["by"]
  said = []
  for name, row in rows.items():
    score = row["score"]
    said.append(f"{name} {score['mean']:.2f} +- {score['ci95'] or 0.0:.2f} (n = {score['n']:,})")
    said[-1] += f", harmful {row['harmful']['mean']:.1%}" if "harmful" in row else ""
  return "; ".join(said)
