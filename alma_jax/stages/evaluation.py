"""How good a checkpoint is: its answers to sets of prompts, and the scores that judges give them.

The prompts `data.eval` are always asked; `eval.sets` names more sets. The run's judge always grades; `eval.judges`
names more judges, whose scores nothing that is trained ever sees. Answers and grades are stages of their own, so a set
or a judge that is added to a run later makes new evaluation stages and changes nothing else:

  round_02/eval             round_02/eval.judge             round_02/eval.truth               data.eval
  round_02/eval-mt_bench    round_02/eval-mt_bench.judge    round_02/eval-mt_bench.truth      another set

Each round has one row in progress.csv.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alma_jax import names
from alma_jax.corpus.normalise import prompt_id
from alma_jax.engine.sample import Request
from alma_jax.evals import sets as benchmarks
from alma_jax.judges import contract
from alma_jax.judges.contract import Answered, Judge
from alma_jax.keys import key_of
from alma_jax.options import ConfigError, fingerprint, labelled, option, refuse
from alma_jax.runtime import alarms, sampling
from alma_jax.runtime.display import Bar
from alma_jax.runtime.host import Checkpoint, Host
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards, statistics
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Data, PromptSet
from alma_jax.store.records import Answer, Grade, Prompt
from alma_jax.store.runs import Artefact
from alma_jax.store.statistics import Mean
from alma_jax.text import chat, fewshot

Row = dict[str, Any]  # of progress.csv


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(sampling.Options):
  """Judges and sets are written "NAME=WHAT", where WHAT is a judge ("armo=reward:/models/ArmoRM", "my_judges:Polite")
  or a file of prompts ("mt_bench=mt_bench.jsonl"). NAME stands in columns and in names of stages; without it the last
  word of WHAT does."""

  judges: tuple[str, ...] = ()  # beside the run's own judge; nothing that is trained sees their scores
  sets: tuple[str, ...] = ()  # beside data.eval
  # Stop after this many rounds in a row without a better score by the first of `judges`; 0: make all rounds
  patience: int = option(0, least=0, practical=True)
  n: int = option(1, least=1, later=True)  # answers to each prompt; intervals are over prompts
  few_shot: str = option("dialogue", names=names.DIALOGUES)  # how a base model is shown its examples
  shots: int = option(3, least=0)

  def __post_init__(self) -> None:
    super().__post_init__()
    for field in ("judges", "sets"):
      labelled(field, getattr(self, field))
    for spec in self.named_judges.values():
      names.check(names.EVALUATORS, spec, "judges")
    if layout.JUDGE in self.named_judges:
      refuse("judges", self.judges, f"cannot name a judge {layout.JUDGE!r}: that is the run's own")
    if self.patience and not self.judges:
      raise ConfigError(f"patience is {self.patience}: the round to stop at is found by a judge of `judges`; name one")

  @property
  def named_judges(self) -> dict[str, str]:
    return labelled("judges", self.judges)

  @property
  def named_sets(self) -> dict[str, str]:
    return labelled("sets", self.sets)

  def template(self) -> fewshot.FewShot:
    return names.resolve(names.DIALOGUES, self.few_shot, "eval.few_shot")


@dataclasses.dataclass(frozen=True)
class Asker:
  """How a checkpoint is asked: in the chat format, or, with `shots`, as a base model that continues examples."""

  s: Session[Any]
  template: fewshot.FewShot
  shots: Sequence[SeedRow]

  def ids(self, row: SeedRow) -> tuple[int, ...]:
    host = self.s.host
    if not self.shots:
      return tuple(chat.encode_prompt(host.tokenizer, host.chat, row.messages))
    shown = [{"prompt": fewshot.last_user_turn(x.messages), "response": x.response} for x in self.shots]
    return tuple(fewshot.few_shot_ids(host.tokenizer, self.template, shown, fewshot.last_user_turn(row.messages)))

  @property
  def stops(self) -> sampling.Stops:
    host = self.s.host
    return sampling.Stops(chat.stop_ids(host.tokenizer, host.chat), (self.template.stop,) if self.shots else ())


def stages(round: int, options: Options, own: bool, sets: Sequence[str] | None = None) -> dict[str, float]:
  """The stages of a round's evaluation with their sizes; `own`: the run has a judge of its own."""
  asked = [layout.MAIN_SET, *options.named_sets] if sets is None else sets
  answers = [layout.stage_name(round, layout.answers_name(name)) for name in asked]
  judges = [*options.named_judges, *([layout.JUDGE] if own else [])]
  return dict.fromkeys([*answers, *(layout.grades_name(name, judge) for name in answers for judge in judges)], 1.0)


def build(
  s: Session[Any],
  checkpoint: Checkpoint,
  judge: Judge | None,
  data: Data,
  options: Options,
  shots: int = 0,
  sets: Sequence[PromptSet] | None = None,
) -> dict[str, Mean]:
  """The round's answers to every set, graded by every judge; the mean score by each judge on the first set.

  With `shots` the checkpoint is a base model that answers after that many of the demonstrations. `sets` are others than
  `data.eval` and those of the options; without `data.eval` they add to the round's row. Without a `judge` of the run's
  own those of the options grade alone.
  """
  asker = Asker(s, options.template(), data.sft[:shots])
  asked = {chosen.name: chosen for chosen in (prompt_sets(data, options) if sets is None else sets)}
  answered = {name: answers(asker, checkpoint, chosen, data, options) for name, chosen in asked.items()}
  graders = ({layout.JUDGE: judge} if judge else {}) | {
    name: grader.of(checkpoint) if isinstance(grader, contract.ReadsModel) else grader
    for name in options.named_judges
    for grader in [made(s.host, options, name)]
  }
  found: dict[tuple[str, str], Mean] = {}
  for name, grader in graders.items():  # all sets by one judge, then the next: each judge's model is loaded once
    for chosen, artefact in answered.items():
      if not asked[chosen].fits(grader):
        continue
      selects = judge is not None and grader.identity == judge.identity
      graded = grades(s, artefact, asked[chosen], NamedJudge(name, grader, selects))
      if (mean := mean_of(graded)) is not None:
        found[chosen, name] = mean
  row: Row = {"round": s.round, "checkpoint": checkpoint.name}
  columns = [*options.named_judges, layout.JUDGE]  # who grades is read before who selects
  for chosen, artefact in answered.items():
    row |= _columns(chosen, described(artefact, len(asked[chosen].rows)))
    for name in columns:
      if (chosen, name) in found:
        row |= _columns(chosen, in_columns(name, found[chosen, name], graders[name].identity))
  first = next(iter(asked))
  means = {name: found[first, name] for name in columns if (first, name) in found}
  said = [f"{name} {mean.value:.2f} +- {mean.ci95 or 0.0:.2f}" for name, mean in means.items()]
  step = f"round {s.round}, " if layout.epoch_of(checkpoint.name.rpartition("/")[2]) is None else ""
  s.display.say(f"{step}{checkpoint.name}: {', '.join(said) or 'answered'} ({len(asked[first].rows)} prompts)")
  s.run.progress(row, more=layout.MAIN_SET not in asked)
  return means


@dataclasses.dataclass(frozen=True)
class NamedJudge:
  name: str  # in columns and in names of stages
  judge: Judge
  selects: bool  # its scores choose what is trained on


def made(host: Host, options: Options, name: str) -> Judge:
  """A judge of `eval.judges`."""
  return contract.by_name(names.EVALUATORS, options.named_judges[name], host, options, "eval.judges")


def prompt_sets(data: Data, options: Options) -> list[PromptSet]:
  """The evaluation prompts `data.eval`, and the sets in the files that the options name."""
  main = PromptSet(layout.MAIN_SET, data.eval, data.digests["eval"])
  return [main, *(prompt_set(name, file) for name, file in options.named_sets.items())]


def prompt_set(name: str, file: str) -> PromptSet:
  """The set in a file of any layout of `evals.sets`. Of a conversation of several turns the first one is asked."""
  found = benchmarks.read(file)
  return PromptSet(name, found.rows, found.sha256, [question.row for question in found.questions])


def check(host: Host, options: Options) -> None:
  """Raise a UserError where a set cannot be read, a judge cannot be made or finds no set with the fields it reads."""
  sets = [prompt_set(name, file) for name, file in options.named_sets.items()]
  for name in options.named_judges:
    judge = made(host, options, name)
    if not any(chosen.fits(judge) for chosen in sets):
      contract.without_rows(judge, "eval.judges")


def answers(asker: Asker, checkpoint: Checkpoint, asked: PromptSet, data: Data, options: Options) -> Artefact[Answer]:
  """The round's answers to one set of prompts."""
  s = asker.s
  seed, shares = s.options.seed, s.options.shards
  decides = fingerprint(options, without=("judges", "sets"))
  fields = {
    "config": {"seed": seed, "eval": decides, "shards": shares, "dtype": s.host.dtype},
    "checkpoint": checkpoint.content,
    "data": {"eval": asked.digest} | ({"sft": data.digests["sft"]} if asker.shots else {}),
    "text": s.describe_text() | {"few_shot": dataclasses.asdict(asker.template) if asker.shots else None},
  }
  stage = s.stage(layout.answers_name(asked.name), fields)
  if not stage.done:
    missing = stage.mine(shares)
    with s.display.bar(stage.name, options.n * sum(len(asked.rows[i::shares]) for i in missing), "answers") as bar:
      for part in missing:
        records = _answers(asker, checkpoint, asked.rows[part::shares], options, bar)
        counts = {"finished": sum(r.finished for r in records), "tokens": sum(r.tokens for r in records)}
        counts["prompts_too_long"] = sum(not (r.finished or r.tokens) for r in records)  # who is asked writes a token
        stage.write_part(part, shares, records, Answer, counts)
    bounds, total = s.options.alarms, options.n * len(asked.rows)
    stage.finish(
      alarms=lambda counts: alarms.cut_off(bounds, total - counts["finished"], total), checkpoint=checkpoint.name
    )
    alarms.say(s.display, stage)
    left_out = f"prompts get an empty answer: they have more than {options.max_prompt_tokens:,} tokens"
    s.tell(stage.name, stage.manifest["counts"], total, {"prompts_too_long": left_out})
  return Artefact(stage, Answer)


def _answers(asker: Asker, checkpoint: Checkpoint, rows: Sequence[SeedRow], options: Options, bar: Bar) -> list[Answer]:
  """The checkpoint's answers to each row, one after the other; a prompt that finds no room gets empty ones."""
  s = asker.s
  prompts = [ids for row in rows for ids in [asker.ids(row)] * options.n]
  found = [Answer(prompt_id(r.messages), tuple(r.messages), "", 0, False) for r in rows for _ in range(options.n)]
  fit = [i for i, ids in enumerate(prompts) if len(ids) <= options.max_prompt_tokens]
  requests = []
  for i in fit:
    id, sample = found[i].prompt_id, i % options.n
    key = key_of(s.options.seed, s.round, "eval", id, *([sample] if sample else []))
    requests.append(Request(prompts[i], key, f"evaluation prompt {id}"))
  written = sampling.drafts(s.host, checkpoint, requests, options, asker.stops, bar)
  for i, draft in zip(fit, written, strict=True):
    found[i] = dataclasses.replace(found[i], response=draft.text, tokens=len(draft.tokens), finished=draft.finished)
  return found


def grades(s: Session[Any], answered: Artefact[Answer], asked: PromptSet, grader: NamedJudge) -> Artefact[Grade]:
  """One judge's scores of a finished stage of answers, a part for each of its parts."""
  name, judge, selects = grader.name, grader.judge, grader.selects
  fields = {"judge": judge.identity, "dtype": s.host.dtype}
  stage = s.run.stage(layout.grades_name(answered.name, name), fields, {"answers": answered})
  if not stage.done:
    missing = stage.mine(answered.parts)
    with s.display.bar(stage.name, sum(answered.sizes[i] for i in missing), "answers") as bar:
      for part in missing:
        n = answered.sizes[part] // max(1, len(asked.rows[part :: answered.parts]))  # answers to each prompt
        own = asked.fields[part :: answered.parts]  # as the answers are shared out
        rows = [row for row in own for _ in range(n)] or [None] * answered.sizes[part]
        pairs = [
          Answered(r.messages, r.response, r.finished, f"evaluation prompt {r.prompt_id}", row)
          for r, row in zip(answered.read(part), rows, strict=True)
        ]
        verdicts = contract.scores(judge, pairs, bar, missing=not selects)
        records = [Grade(prompt_id(pair[0]), v.score) for pair, v in zip(pairs, verdicts, strict=True)]
        stage.write_part(part, answered.parts, records, Grade, _sums(records, n))
    stage.finish(judge={"name": name, "identity": judge.identity, "scale": judge.scale, "selects": selects})
  counts = stage.manifest["counts"]
  contract.check_missing(judge.identity, counts.get("missing", counts["n"] - counts["graded"]), counts["n"])
  return Artefact(stage, Grade)


def _sums(records: Sequence[Grade], n: int) -> dict[str, float]:
  """Sums over prompts of the mean grade of their n answers; `graded` counts the prompts that have one."""
  more: dict[str, float] = {}
  if n > 1:
    known = [[float(r.score) for r in records[i : i + n] if r.score is not None] for i in range(0, len(records), n)]
    scored = [sum(of) / len(of) for of in known if of]
    more = {"missing": sum(n - len(of) for of in known)}
  else:
    scored = [float(r.score) for r in records if r.score is not None]
  squares = sum(x * x for x in scored)
  return {"n": len(records), "graded": len(scored), "score": sum(scored), "score_squared": squares} | more


def mean_of(graded: Artefact[Grade]) -> Mean | None:
  counts = graded.manifest["counts"]
  return statistics.mean_of_sums(counts["graded"], counts["score"], counts["score_squared"])


# Columns of progress.csv


def described(answered: Artefact[Answer], prompts: int) -> Row:
  counts, n = answered.manifest["counts"], answered.manifest["rows"]
  means = {"finished": round(counts["finished"] / max(1, n), 4), "tokens": round(counts["tokens"] / max(1, n), 2)}
  return {"n": prompts, **means} if n else {}


def in_columns(name: str, mean: Mean, identity: str) -> Row:
  """A mean score with its interval, its n and who gave it."""
  found = {"": round(mean.value, 4), "_ci95": round(mean.ci95 or 0.0, 4), "_n": mean.n, "_by": identity}
  return {f"{name}{ending}": value for ending, value in found.items()}


def _columns(chosen: str, row: Row) -> Row:
  """The columns of the set "mt_bench" begin with "mt_bench/"; those of data.eval have no prefix."""
  return {f"{chosen}/{name}" if chosen != layout.MAIN_SET else name: value for name, value in row.items()}


# What a run decides by evaluations


def stalled(means: Sequence[Mapping[str, Mean]], options: Options) -> bool:
  """True if the last `patience` rounds brought no better score by the first of `eval.judges`."""
  if not options.patience:
    return False
  first = next(iter(options.named_judges))
  scores = [of[first].value for of in means if first in of]
  return len(scores) > options.patience and scores.index(max(scores)) < len(scores) - options.patience


def overlap(s: Session[Any], data: Data, options: Options, pools: Sequence[Artefact[Prompt]]) -> None:
  """Say which prompts of the sets are in the pool: those of a set that was named when the run began are not."""
  if not options.sets or s.run.process != 0:
    return
  pooled = np.concatenate([pool.ids() for pool in pools])
  for asked in prompt_sets(data, options):
    ids = shards.id_numbers(sorted({prompt_id(row.messages) for row in asked.rows}))
    if met := int(np.isin(ids, pooled).sum()):
      s.run.log("overlap", set=asked.name, prompts=met, of=len(ids))
      s.display.say(f"{met:,} of {len(ids):,} prompts of the set {asked.name} are in the pool: it was named too late")
