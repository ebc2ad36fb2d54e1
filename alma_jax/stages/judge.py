"""The judge: fine-tuned from the base model on the annotations, then distilled on its own scores.

Self-distillation needs a target that is not the judge's own distribution, or nothing would be learned: the default
`two_hot` puts the mean score on its two neighbouring integers, `rounded` on the nearest one. The distilled judge is
taken only if there are enough held-out annotations to tell, and it orders them no worse than before; the manifest says
which one was taken, and why.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from alma_jax import names
from alma_jax.corpus.normalise import prompt_id
from alma_jax.engine import score
from alma_jax.errors import RunError
from alma_jax.judges import contract, reward
from alma_jax.judges.contract import Answered, Judge
from alma_jax.judges.own import OwnJudge
from alma_jax.judges.reward import RewardJudge
from alma_jax.keys import key_of
from alma_jax.options import Checked, ConfigError, fingerprint, option
from alma_jax.runtime import alarms, sampling, training
from alma_jax.runtime.batches import Examples, Rated, compact
from alma_jax.runtime.host import Checkpoint, Host
from alma_jax.runtime.session import Session
from alma_jax.store import layout, statistics
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Data
from alma_jax.store.records import Judgment, Prompt, Response
from alma_jax.store.runs import Artefact
from alma_jax.text import chat
from alma_jax.text import judge as templates
from alma_jax.text.chat import Messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilOptions(Checked):
  prompts: int = option(0, least=0)  # synthetic prompts, answered by the initial models; 0: no distillation
  target: Literal["two_hot", "rounded"] = "two_hot"
  # With fewer held-out annotations, or pairs of them with different scores, the distilled judge is not taken
  least_rows: int = option(50, least=1)
  least_pairs: int = option(200, least=1)
  sample: sampling.ManyOptions
  train: training.Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  # "finetuned"; "few_shot": the base model with three examples (Table 3); "regression": a scalar head; docs/judges.md
  kind: str = option("finetuned", names=names.JUDGES)
  # "integer": the likeliest score (Table 3); "sampled": the mean of `samples` draws (3.3.2)
  mode: Literal["expected", "integer", "sampled"] = "expected"
  samples: int = option(8, least=1)  # draws of "sampled"; reasonings of a template that reasons first
  template: str = option("a2", names=names.JUDGE_TEMPLATES)
  # Of the annotated prompts, to measure the judge and to accept or refuse the distilled one; at least one prompt
  held_out: float = option(0.05, least=0, most=0.5)
  train: training.Options
  distil: DistilOptions

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.kind == "finetuned" and self.distil.prompts and self.reasons:
      raise ConfigError(
        f"distil.prompts is {self.distil.prompts:,}, and the template {self.template!r} reasons: a judge is distilled"
        " on scores without reasons; set distil.prompts to 0"
      )

  @property
  def reasons(self) -> bool:
    return isinstance(self.judge_template(), templates.ReasonedTemplate)

  def judge_template(self) -> templates.JudgeTemplate:
    return names.resolve(names.JUDGE_TEMPLATES, self.template, "judge.template")

  @property
  def distils(self) -> bool:
    return self.kind == "finetuned" and self.distil.prompts > 0


@dataclasses.dataclass(frozen=True)
class Scored:
  """What the judge is trained on: a response and the integer score it should get."""

  name: str
  messages: Messages
  response: str
  score: float
  weight: float = 1.0
  reason: str = ""  # for a template that reasons


def check(host: Host, options: Options) -> None:
  """Raise a UserError if the tokenizer cannot write the template, or no annotation has room in the training's rows."""
  templates.check_writable(host.tokenizer, options.judge_template())
  what = f"template {options.template!r} with a prompt and a response of one word takes"
  least = _around(host, options)
  if options.kind == "finetuned":
    training.check_row_length(host, options.train, "config.judge.train", least, what)
  if options.kind == "regression":
    shortest = chat.encode_example(host.tokenizer, host.chat, [{"role": "user", "content": "a"}], "a")[0]
    what = "a prompt and a response of one word take"
    training.check_row_length(host, options.train, "config.judge.train", len(shortest), what)
  if options.distils:
    training.check_row_length(host, options.distil.train, "config.judge.distil.train", least, what)


def check_annotations(annotations: Sequence[SeedRow], options: Options, seed: int) -> None:
  """Raise a RunError if the annotations are too few for the judge."""
  there = f"data.judge gives {len(annotations)} annotated response{'s' * (len(annotations) != 1)}"
  if options.kind == "finetuned" and not _split(annotations, options.held_out, seed)[0]:
    raise RunError(
      f"{there}, all to one prompt. The judge is measured on held-out prompts, at least one, and none is left to train"
      " on: give annotated responses to two prompts or more"
    )
  if options.kind == "few_shot" and len(annotations) < 3:
    raise RunError(f"{there}, and judge.kind 'few_shot' shows three: give three or more")
  lacking = sum(not (row.reason or "").strip() for row in annotations)
  if lacking and options.kind in ("finetuned", "few_shot") and options.reasons:
    raise RunError(
      f"{there}, and {lacking:,} have no `reason`; the judge learns from it to reason as its template"
      f" {options.template!r} asks: add the field, or take another judge.template"
    )


def check_lengths(host: Host, options: Options, written: sampling.Options, where: str) -> None:
  """Raise a ConfigError if the longest prompt and response do not fit into the model's positions with the template."""
  around, positions, template = _around(host, options), host.config.max_positions, options.judge_template()
  if isinstance(template, templates.ReasonedTemplate):
    around += template.most_tokens
  if written.longest <= positions < around + written.longest:  # a longer one is an error without the template
    raise ConfigError(
      f"{where}: max_prompt_tokens + max_new_tokens is {written.longest:,}, and the judge's template"
      f" {options.template!r} adds {around:,}; together they must be at most {positions:,}, the model's positions"
    )


def _around(host: Host, options: Options) -> int:
  """The tokens of the shortest judge example: the template's own, with a prompt and a response of one word."""
  shortest = [{"role": "user", "content": "a"}]
  return len(templates.judge_example(host.tokenizer, host.chat, options.judge_template(), shortest, "a", 10)[0])


def of_user(s: Session[Any], options: Options) -> Judge:
  """A judge of the user's own, named "package.module:NAME"."""
  return contract.by_name(names.JUDGES, options.kind, s.host, options, "judge.kind")


def few_shot(s: Session[Any], data: Data, options: Options) -> OwnJudge:
  """The untrained judge: the base model with three worked examples (low, middle, high score)."""
  shown = _shown(data.judge, s.options.seed)
  return _asked(s, s.base, options, tuple(map(shot, shown)))


def shot(row: SeedRow) -> templates.Shot:
  """An annotation as a worked example."""
  return templates.Shot(row.messages, row.response or "", round(row.score or 0.0), row.reason or "")


def _asked(s: Session[Any], model: Checkpoint, options: Options, shots: tuple[templates.Shot, ...] = ()) -> OwnJudge:
  """The model asked as the options say."""
  return OwnJudge(s.host, model, options.judge_template(), options.mode, shots, options.samples, s.options.seed)


def _shown(annotations: Sequence[SeedRow], seed: int) -> list[SeedRow]:
  """The three annotations that the untrained judge is shown."""
  ranked = sorted(
    annotations, key=lambda row: (row.score, key_of(seed, "shots", prompt_id(row.messages), row.response))
  )
  return [ranked[len(ranked) * at // 10] for at in (8, 1, 5)]


def held_out(s: Session[Any], data: Data, options: Options) -> list[SeedRow]:
  """The annotations that the judge of this kind never sees, to measure it by."""
  rows = _split(data.judge, options.held_out, s.options.seed)[1]
  seen = _shown(data.judge, s.options.seed) if options.kind == "few_shot" else []
  prompts = {prompt_id(row.messages) for row in seen}
  return [row for row in rows if prompt_id(row.messages) not in prompts]


def finetuned(s: Session[Any], data: Data, options: Options) -> OwnJudge:
  """The judge that the stage `judge` trains on the annotations."""
  seed = s.options.seed
  train, held_out = _split(data.judge, options.held_out, seed)
  if options.distils and (why := _undecided(held_out, options.distil)):
    s.display.say(f"{layout.DISTILLED}: will not be taken: {why}")
  fields = _fields(s, s.base, options, train=fingerprint(options.train))
  fields |= {"data": {"judge": data.digests["judge"]}}
  stage = s.run.stage(layout.JUDGE, fields)
  if not stage.done:
    rows = [
      Scored(
        f"annotation of {prompt_id(r.messages)}", r.messages, r.response or "", r.score or 0.0, reason=r.reason or ""
      )
      for r in train
    ]
    examples, counts = _examples(s, options.judge_template(), rows, options.train)
    _, facts = training.train(s, stage, s.base, examples, options.train, key_of(seed, "judge")[0])
    counts |= {"annotations": len(train), "held_out": len(held_out)}
    training.finish(s, stage, counts | facts, options.train)
  return _asked(s, training.trained(stage), options)


def of_annotations(s: Session[Any], data: Data, options: Options) -> Judge:
  """The judge that `kind` describes, without distillation."""
  made = {"few_shot": few_shot, "regression": regression, "finetuned": finetuned}
  return made[options.kind](s, data, options) if options.kind in made else of_user(s, options)


RIDGE = 0.1  # of the mean square of a hidden state's numbers


def regression(s: Session[Any], data: Data, options: Options) -> RewardJudge:
  """The paper's reward modeling (3.3): a scalar head on the base model, trained on the annotations' scores with the
  squared error. The stage's model is a reward model like others, reward:RUN/judge/model."""
  seed = s.options.seed
  train, held_out = _split(data.judge, options.held_out, seed)
  fields = _fields(s, s.base, options, kind=options.kind, train=fingerprint(options.train))
  fields |= {"data": {"judge": data.digests["judge"]}}
  stage = s.run.stage(layout.JUDGE, fields)
  if not stage.done:
    rated, counts = _rated(s, train, options.train)
    model, facts = training.train(s, stage, s.base, rated, options.train, key_of(seed, "judge")[0])
    order, error = agreement(reward.trained(s.host, model), held_out)
    s.host.free()
    counts |= {"annotations": len(train), "held_out": len(held_out)}
    held = {"rows": len(held_out), "agreement": order, "error": error}
    training.finish(s, stage, counts | facts, options.train, held_out=held)
  return reward.trained(s.host, training.trained(stage).directory)


def _rated(s: Session[Any], train: Sequence[SeedRow], options: training.Options) -> tuple[Rated, dict[str, int]]:
  """The annotated conversations in the chat format, and counts: those that are too long are dropped."""
  tok, fmt, host, rows, kept = s.host.tokenizer, s.host.chat, s.host, [], []
  for row in train:
    prompt, response = chat.encode_prompt(tok, fmt, row.messages), chat.encode_response(tok, fmt, row.response or "")
    if len(prompt) + len(response) <= options.row_length:
      rows.append((tuple(prompt[:-1]), (*prompt[-1:], *response)))
      kept.append(row)
  if not kept:
    raise RunError(f"no annotation fits into {options.row_length} tokens (row_length)")
  scores = np.array([row.score for row in kept])
  hidden = score.last_states(host.model(s.base, "stacked"), rows, host.reading())
  sequences = [compact(prefix + suffix, [True] * len(prefix + suffix)) for prefix, suffix in rows]
  called = [f"annotation of {prompt_id(row.messages)}" for row in kept]
  return Rated(sequences, called, scores, _least_squares(hidden, scores)), {"examples_too_long": len(train) - len(kept)}


def _least_squares(hidden: np.ndarray, scores: np.ndarray) -> np.ndarray:
  """fp32 [D, 1]: the head that training begins with, fitted to the base model's hidden states [n, D]."""
  x = hidden.astype(np.float64)
  gram = x.T @ x
  ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
  return np.linalg.solve(gram + ridge, x.T @ scores).astype(np.float32)[:, None]


def real_valued(judge: OwnJudge) -> OwnJudge:
  """The judge with the probability-weighted score, whatever score the rounds are to use."""
  return dataclasses.replace(judge, mode="expected")


@dataclasses.dataclass(frozen=True)
class Practice:
  """The responses that a judge is distilled on, with its own scores of them."""

  asked: Artefact[Prompt]
  answered: Artefact[Response]
  judged: Artefact[Judgment]

  def rows(self, target: str) -> list[Scored]:
    """The judge's mean score of every response that is not empty, as integers with weights."""
    messages = {p.id: p.messages for p in self.asked.read()}
    mean = {(j.prompt_id, j.sample_id): j.score for j in self.judged.read()}
    return [
      Scored(f"{r.prompt_id}/{r.sample_id}", messages[r.prompt_id], r.text, score, weight)
      for r in self.answered.read()
      if r.text
      for score, weight in targets(mean[r.prompt_id, r.sample_id], target)
    ]


def distilled(s: Session[Any], judge: OwnJudge, data: Data, practice: Practice, options: Options) -> OwnJudge:
  """The judge after training on its own mean scores, or `judge` itself if the training made it worse."""
  seed, how = s.options.seed, options.distil
  _, held_out = _split(data.judge, options.held_out, seed)
  fields = _fields(s, judge.checkpoint, options, distil=fingerprint(how))
  fields |= {"data": {"judge": data.digests["judge"]}}
  inputs = {"prompts": practice.asked, "responses": practice.answered, "judgments": practice.judged}
  stage = s.run.stage(layout.DISTILLED, fields, inputs)
  if not stage.done:
    examples, counts = _examples(s, judge.template, practice.rows(how.target), how.train)
    order = key_of(seed, "judge_distilled")[0]
    model, facts = training.train(s, stage, judge.checkpoint, examples, how.train, order)
    candidate = Checkpoint(layout.DISTILLED, model, f"candidate of {judge.checkpoint.content}")
    both = real_valued(judge), real_valued(dataclasses.replace(judge, checkpoint=candidate))
    before, after = (_scores(j, held_out) for j in both)
    s.host.free()
    found = _gate(before, after, held_out, how)
    too_few = _undecided(held_out, how)
    training.finish(
      s,
      stage,
      counts | facts,
      how.train,
      alarms=lambda _: {"held_out": found.reason} if too_few else {},
      held_out=found.numbers,
      accepted=found.accepted,
      reason=found.reason,
    )
    alarms.say(s.display, stage)
    s.display.say(f"{stage.name}: {found.reason}")
  if not stage.manifest["accepted"]:
    return judge
  return dataclasses.replace(judge, checkpoint=training.trained(stage))


def targets(score: float, kind: str) -> list[tuple[int, float]]:
  """The integer scores that a score is distilled to, with their weights: 7.3 to 7 (.7) and 8 (.3) if two-hot."""
  if kind == "rounded":
    return [(min(10, math.floor(score + 0.5)), 1.0)]
  low = min(9, math.floor(score))
  return [(s, w) for s, w in ((low, low + 1 - score), (low + 1, score - low)) if w > 0]


def agreement(judge: Judge, rows: Sequence[SeedRow]) -> tuple[float | None, float]:
  """The share of pairs of annotated rows that the judge orders as the annotator did, a tie counting half, None if there
  are none; and the mean absolute error of the judge's score."""
  scores, labels = _scores(judge, rows), np.array([row.score or 0.0 for row in rows])
  share = statistics.ordered(scores, labels, np.arange(len(rows)))
  return share and share.value, float(np.abs(scores - labels).mean())


def _scores(judge: Judge, rows: Sequence[SeedRow]) -> np.ndarray:
  """The judge's score of each annotated row."""
  pairs = [
    Answered(row.messages, row.response or "", name=f"annotation of prompt {prompt_id(row.messages)}") for row in rows
  ]
  return np.array([v.number for v in contract.scores(judge, pairs)])


@dataclasses.dataclass(frozen=True)
class _Gate:
  """Whether the distilled judge is taken."""

  accepted: bool
  numbers: dict[str, Any]
  reason: str


def _gate(before: np.ndarray, after: np.ndarray, rows: Sequence[SeedRow], options: DistilOptions) -> _Gate:
  """From the scores of held-out rows by the judge before and after its distillation."""
  labels = np.array([row.score or 0.0 for row in rows])
  prompts = np.array([prompt_id(row.messages) for row in rows], dtype=str)
  numbers: dict[str, Any] = {"rows": len(rows), "pairs": 0}
  for name, scores in (("before", before), ("after", after)):
    numbers[f"error_{name}"] = float(np.abs(scores - labels).mean()) if len(rows) else None
  shares = [statistics.ordered(scores, labels, prompts) for scores in (before, after)]
  change = statistics.ordered(after, labels, prompts, before)
  too_few = _undecided(rows, options)
  old, new = shares
  if old is None or new is None or change is None:  # no two annotations differ in score
    return _Gate(False, numbers, f"not taken: {too_few or 'no two held-out annotations differ in score'}")
  numbers["pairs"] = new.n
  for name, share in (("before", old), ("after", new), ("change", change)):
    numbers |= {name: share.value, f"{name}_ci95": share.ci95}
  accepted = not too_few and new.value >= old.value
  said = (
    f"it orders {_share(new)} of {new.n:,} held-out pairs as the annotators did and the fine-tuned judge {_share(old)},"
    f" a change of {change.value:+.3f}" + ("" if change.ci95 is None else f" +- {change.ci95:.3f}")
  )
  said += f" ({len(rows):,} annotations)"
  usual = DistilOptions.least_rows, DistilOptions.least_pairs
  if not too_few and (len(rows) < usual[0] or new.n < usual[1]):
    said += (
      f"; the usual bounds, {usual[0]} annotations and {usual[1]} pairs, would keep the fine-tuned judge: this config"
      f" lowers them to {options.least_rows} and {options.least_pairs}"
    )
  return _Gate(accepted, numbers, f"{'taken' if accepted else 'not taken'}: " + (f"{too_few}; " * bool(too_few)) + said)


def _share(found: statistics.Mean) -> str:
  return f"{found.value:.3f}" + ("" if found.ci95 is None else f" +- {found.ci95:.3f}")


def _undecided(rows: Sequence[SeedRow], options: DistilOptions) -> str:
  """Why the held-out annotations are too few to take the distilled judge, or ""."""
  scores = collections.Counter(row.score for row in rows)
  pairs = (len(rows) ** 2 - sum(n**2 for n in scores.values())) // 2
  if len(rows) >= options.least_rows and pairs >= options.least_pairs:
    return ""
  return (
    f"{len(rows):,} held-out annotations with {pairs:,} pairs of different scores are too few to tell whether it is"
    f" better (at least {options.least_rows} and {options.least_pairs}): raise judge.held_out, annotate more, or set"
    " judge.distil.prompts to 0"
  )


def _split(annotations: Sequence[SeedRow], share: float, seed: int) -> tuple[list[SeedRow], list[SeedRow]]:
  """The training rows and the held-out rows, split by prompt."""
  ids = sorted({prompt_id(row.messages) for row in annotations}, key=lambda i: key_of(seed, "held_out", i))
  held = set(ids[: max(1, round(len(ids) * share))])
  train, held_out = [], []
  for row in annotations:
    (held_out if prompt_id(row.messages) in held else train).append(row)
  return train, held_out


def _examples(
  s: Session[Any], template: templates.JudgeTemplate, rows: Sequence[Scored], options: training.Options
) -> tuple[Examples, dict[str, int]]:
  """The template with the score as the answer, and counts: rows too long to hold it are dropped."""
  kept, row_names, dropped = [], [], 0
  for row in rows:
    score = math.floor(row.score + 0.5)
    tok, fmt = s.host.tokenizer, s.host.chat
    ids, mask = templates.judge_example(tok, fmt, template, row.messages, row.response, score, row.reason)
    if len(ids) > options.row_length:
      dropped += 1
    else:
      kept.append(compact(ids, np.asarray(mask, np.float32) * row.weight))
      row_names.append(row.name)
  if not kept:
    raise RunError(
      f"the judge has {len(rows):,} rows to learn from, and none of them fits with the template into"
      f" {options.row_length} tokens: raise row_length, in judge.train or judge.distil.train"
    )
  meaning = f"rows are dropped: with the template they are longer than {options.row_length:,} tokens (row_length)"
  s.tell("judge", {"dropped": dropped}, len(rows), {"dropped": meaning})
  return Examples(kept, row_names, options.average), {"examples_too_long": dropped}


def _fields(s: Session[Any], init: Checkpoint, options: Options, **parts: Any) -> dict[str, Any]:
  return {
    "config": {"seed": s.options.seed, "held_out": options.held_out, **parts},
    "init": init.content,
    "text": s.describe_text(),
    "template": dataclasses.asdict(options.judge_template()),
    "dtype": s.host.dtype,
  }
