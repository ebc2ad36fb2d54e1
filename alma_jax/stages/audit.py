"""Answers sorted into levels, such as fail, pass and excellent (LIMA's audit of 50), or unsafe and safe.

A person sorts them through a form, or a judge does by its score: `bounds` are the least scores of the second level, the
third and so on.
"""

import dataclasses
from typing import Any

from alma_jax import names
from alma_jax.judges import contract, human
from alma_jax.judges.contract import Answered, check_missing
from alma_jax.keys import key_of
from alma_jax.options import Checked, ConfigError, fingerprint, option
from alma_jax.runtime.host import Host
from alma_jax.runtime.session import Session
from alma_jax.store import layout, statistics
from alma_jax.store.records import Answer, Rated
from alma_jax.store.runs import Artefact


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  judge: str = ""  # "human", or a judge as of names.EVALUATORS; empty: no audit
  asked: str = "test"  # the set whose answers are sorted
  prompts: int = option(50, least=0)  # so many of them, drawn at random; 0: all
  levels: tuple[str, ...] = ("fail", "pass", "excellent")  # from the lowest
  bounds: tuple[float, ...] = ()  # of a judge's score, one less than levels

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.judge and self.judge != human.HUMAN:
      names.check(names.EVALUATORS, self.judge, "judge")
      if len(self.bounds) != len(self.levels) - 1 or list(self.bounds) != sorted(self.bounds):
        raise ConfigError(
          f"bounds is {self.bounds!r}; a judge sorts into {len(self.levels)} levels by {len(self.levels) - 1} rising"
          " scores"
        )


def check(host: Host, options: Options, section: str) -> None:
  """Raise a UserError where the judge of this section of the config cannot be made."""
  if options.judge and options.judge != human.HUMAN:
    judge = contract.by_name(names.EVALUATORS, options.judge, host, options, f"{section}.judge")
    contract.without_rows(judge, f"{section}.judge")


def build(s: Session[Any], answered: Artefact[Answer], options: Options, name: str) -> Artefact[Rated] | None:
  """The round's `audit-NAME`: the level of each answer, and the share of each level; None without a judge."""
  if not options.judge:
    return None
  by_person = options.judge == human.HUMAN
  judge = None if by_person else contract.by_name(names.EVALUATORS, options.judge, s.host, options, f"{name}.judge")
  by = judge.identity if judge else "a person"
  fields = {"config": fingerprint(options), "judge": by, "seed": s.options.seed}
  stage = s.stage(f"{layout.AUDIT}-{name}", fields, {"answers": answered})
  if not stage.done:
    first = {row.prompt_id: row for row in reversed(answered.read())}  # the first answer to each prompt
    rows = sorted(first.values(), key=lambda row: key_of(s.options.seed, "audit", name, row.prompt_id))
    rows = rows[: options.prompts or None] if by_person or s.run.process == 0 else []  # a judge is asked by one host
    levels: list[int | None] = []
    if judge is None:
      texts = [(human.shown(row.messages), row.response) for row in rows]
      allowed = {level: float(i) for i, level in enumerate(options.levels)}
      found = human.graded(s, stage, f"{layout.AUDIT}-{name}", texts, "level", allowed)
      levels += [int(level) for level in found]
    else:
      pairs = [Answered(row.messages, row.response, row.finished, f"prompt {row.prompt_id}") for row in rows]
      scores = [verdict.score for verdict in contract.scores(judge, pairs, missing=True)]
      check_missing(by, sum(score is None for score in scores), len(scores))
      levels += [None if x is None else sum(x >= bound for bound in options.bounds) for x in scores]
    if stage.mine(1):
      stage.write_part(0, 1, [Rated(row.prompt_id, level) for row, level in zip(rows, levels, strict=True)], Rated)
    known = [level for level in levels if level is not None]
    shares = {}
    for i, level in enumerate(options.levels):
      mean = statistics.mean([float(x == i) for x in known])
      shares[level] = dataclasses.asdict(mean) if mean else None
    stage.finish(judge=by, asked=options.asked, levels=shares)
    said = ", ".join(f"{level} {of['value']:.0%}" for level, of in shares.items() if of)
    s.display.say(f"{stage.name}: {said} (n = {len(known):,}), by {by}")
  return Artefact(stage, Rated)
