"""How good a checkpoint is: its answers to the evaluation prompts, scored by the run's judge and, if the config names
one, by an evaluator that the pipeline never sees. One row of progress.csv per round."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from alma_jax import names
from alma_jax.corpus.normalise import prompt_id
from alma_jax.engine.sample import Request
from alma_jax.judges import contract
from alma_jax.judges.contract import Answered, Judge
from alma_jax.keys import key_of
from alma_jax.options import fingerprint, option
from alma_jax.runtime import sampling
from alma_jax.runtime.display import Bar
from alma_jax.runtime.host import Checkpoint
from alma_jax.runtime.session import Session
from alma_jax.store import layout, statistics
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Data
from alma_jax.store.records import Evaluation
from alma_jax.store.runs import Artefact
from alma_jax.text import chat, fewshot

Summary = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(sampling.Options):
  evaluator: str = option("none", names=names.EVALUATORS)
  few_shot: str = option("dialogue", names=names.DIALOGUES)  # how a base model is shown its examples
  shots: int = option(3, least=0)

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


def build(
  s: Session[Any], checkpoint: Checkpoint, judge: Judge, data: Data, options: Options, shots: int = 0
) -> Summary:
  """The round's `eval` on the prompts `data.eval`, summarised.

  With `shots` the checkpoint is a base model that answers after that many of the demonstrations.
  """
  seed, shares = s.options.seed, s.options.shards
  evaluator = None
  if options.evaluator != "none":
    evaluator = contract.by_name(names.EVALUATORS, options.evaluator, s.host, options, "eval.evaluator")
  asker = Asker(s, options.template(), data.sft[:shots])
  fields = {
    "config": {"seed": seed, "eval": fingerprint(options), "shards": shares, "dtype": s.host.dtype},
    "checkpoint": checkpoint.content,
    "judge": judge.identity,
    "evaluator": evaluator and evaluator.identity,
    "data": {"eval": data.digests["eval"]} | ({"sft": data.digests["sft"]} if shots else {}),
    "text": s.describe_text() | {"few_shot": dataclasses.asdict(asker.template) if shots else None},
  }
  stage = s.stage(layout.EVALUATION, fields)
  if not stage.done:
    missing = stage.mine(shares)
    with s.display.bar(stage.name, sum(len(data.eval[i::shares]) for i in missing), "answers") as bar:
      for part in missing:
        answers = _answers(asker, checkpoint, data.eval[part::shares], options, bar)
        records = _graded(answers, judge, evaluator)
        stage.write_part(part, shares, records, Evaluation, _sums(records))
    scorers = {"judge": judge.identity, "evaluator": evaluator and evaluator.identity}
    stage.finish(checkpoint=checkpoint.name, scorers=scorers)
    s.display.say(in_words(s.round, checkpoint.name, summarised(stage.manifest["counts"])))
  counts = Artefact(stage, Evaluation).manifest["counts"]
  if evaluator:
    contract.check_missing(evaluator.identity, counts["n"] - counts["graded"], counts["n"])
  summary = summarised(counts)
  s.run.progress({"round": s.round, "checkpoint": checkpoint.name, **summary})
  return summary


@dataclasses.dataclass(frozen=True)
class Answer:
  row: SeedRow
  text: str
  finished: bool
  tokens: int


def _answers(asker: Asker, checkpoint: Checkpoint, rows: Sequence[SeedRow], options: Options, bar: Bar) -> list[Answer]:
  """The checkpoint's answer to each row; a prompt that finds no room gets an empty one."""
  s = asker.s
  prompts = [asker.ids(row) for row in rows]
  fit = [i for i, ids in enumerate(prompts) if len(ids) <= options.max_prompt_tokens]
  ids = [prompt_id(rows[i].messages) for i in fit]
  requests = [
    Request(prompts[i], key_of(s.options.seed, s.round, "eval", id), f"evaluation prompt {id}")
    for i, id in zip(fit, ids, strict=True)
  ]
  written = sampling.drafts(s.host, checkpoint, requests, options, asker.stops, bar)
  found = [Answer(row, "", False, 0) for row in rows]
  for i, draft in zip(fit, written, strict=True):
    found[i] = Answer(rows[i], draft.text, draft.finished, len(draft.tokens))
  return found


def _graded(answers: Sequence[Answer], judge: Judge, evaluator: Judge | None) -> list[Evaluation]:
  pairs = [
    Answered(a.row.messages, a.text, a.finished, f"evaluation prompt {prompt_id(a.row.messages)}") for a in answers
  ]
  judged = contract.scores(judge, pairs)
  scores = [v.score for v in contract.scores(evaluator, pairs, missing=True)] if evaluator else [None] * len(pairs)
  return [
    Evaluation(prompt_id(a.row.messages), a.row.messages, a.text, a.tokens, a.finished, verdict.number, score)
    for a, verdict, score in zip(answers, judged, scores, strict=True)
  ]


def _sums(records: Sequence[Evaluation]) -> dict[str, float]:
  graded = [r.score for r in records if r.score is not None]
  return {
    "n": len(records),
    "graded": len(graded),
    "score": float(sum(graded)),
    "score_squared": float(sum(x * x for x in graded)),
    "judge_score": float(sum(r.judge_score for r in records)),
    "judge_score_squared": float(sum(r.judge_score**2 for r in records)),
    "finished": sum(r.finished for r in records),
    "tokens": sum(r.tokens for r in records),
  }


def summarised(sums: dict[str, Any]) -> Summary:
  """Means with 95 % intervals from a manifest's sums."""
  n = sums["n"]
  out: Summary = {"n": n}
  for name, count in (("score", sums["graded"]), ("judge_score", n)):
    if mean := statistics.mean_of_sums(count, sums[name], sums[f"{name}_squared"]):
      out |= {name: round(mean.value, 4), f"{name}_ci95": round(mean.ci95 or 0.0, 4)}
  return out | {"finished": round(sums["finished"] / n, 4), "tokens": round(sums["tokens"] / n, 2)}


def in_words(round: int, name: str, summary: Summary) -> str:
  scores = [
    f"{label} {summary[key]:.2f} +- {summary[f'{key}_ci95']:.2f}"
    for key, label in (("score", "score"), ("judge_score", "judge"))
    if key in summary
  ]
  return f"round {round}, {name}: {', '.join(scores)} ({summary['n']} prompts)"
