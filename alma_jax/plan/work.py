"""What the stages of ALMA do, as counts: how many texts, how many tokens, which training.

  for work in of_alma(by_round, assumptions, width=4096): ...     # in the run's order, by the names of store/layout.py

Numbers that only a run can tell (lengths, the size of the human data) come from the assumptions.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from alma_jax.plan.assumptions import Assumptions
from alma_jax.runtime import sampling, training
from alma_jax.stages import judge as judge_stage
from alma_jax.store import layout

JUDGMENT_BYTES = 130  # of each judgment: thirteen numbers and its two ids, not compressed
TEXT_BYTES = 4  # of a token's text: assumed
LETTERS = 4  # of a token of a judge's template: assumed
OWN = "finetuned", "few_shot", "regression"  # kinds of judges that are models of the run
SEED_PASSES = 7  # what the seeds of k-means cost, in its iterations; see docs/speed.md


@dataclasses.dataclass(frozen=True)
class Work:
  stage: str
  rows: int  # what it makes or reads
  tokens: float
  disk: float  # bytes that stay


@dataclasses.dataclass(frozen=True)
class Sampling(Work):
  options: sampling.Options
  prompts: int  # that are prefilled, once for each model that writes
  prompt_tokens: float
  samples_per_prompt: float


@dataclasses.dataclass(frozen=True)
class Reading(Work):
  """A forward pass over texts: judging, after prefixes that are read once each, and embedding."""

  longest: int  # tokens of a row
  prefixes: int = 0
  prefix_tokens: float = 0.0
  longest_prefix: int = 0
  layers: int = 0  # 0: all


@dataclasses.dataclass(frozen=True)
class Clustering(Work):
  k: int
  dims: int
  passes: float


@dataclasses.dataclass(frozen=True)
class Training(Work):
  options: training.Options
  section: str  # of the config
  examples: int
  length: float  # mean tokens of an example, or of a pair's two sides
  sides: int = 1
  forward: int = 0  # more forward passes over the data: log-probs under a reference


def of_alma(by_round: Mapping[int, Any], a: Assumptions, width: int) -> Iterator[Work]:
  """The Work of a run of recipes/alma.py with these Options; `width` is the model's."""
  o = by_round[0]
  for i, _ in enumerate(o.sft_seeds, start=1):
    yield _training(layout.sft_name(i), o.sft, "sft", a.demonstrations, a.example)
  yield from _pool(o, 0, o.draws, a, width)
  pool = o.draws * a.usable
  if o.judge.kind in ("finetuned", "regression"):
    length = a.example + (_template_tokens(o) if o.judge.kind == "finetuned" else 0)
    kept = int(a.annotations * (1 - o.judge.held_out))
    yield _training(layout.JUDGE, o.judge.train, "judge.train", kept, length)
  if o.judge.distils:
    d = o.judge.distil
    asked = min(d.prompts, pool)
    yield _responses(layout.stage_name(1, layout.RESPONSES), asked, d.sample, len(o.sft_seeds), a)
    yield from _judged(layout.stage_name(1, layout.JUDGMENTS), o, asked, d.sample.n, a, d.sample)
    length = a.example + _template_tokens(o)
    yield _training(layout.DISTILLED, d.train, "judge.distil.train", int(asked * d.sample.n), length)
  yield from _evaluation(0, o, a)
  yield from _evaluation(1, by_round.get(1, o), a)
  draws, examples = o.draws, 0
  for round in sorted(by_round.keys() - {0}):
    r = by_round[round]
    if r.draws > draws:
      yield from _pool(r, round, r.draws - draws, a, width)
      draws = r.draws
    name, asked, n = layout.stage_name, r.draw.prompts, r.responses.sampling.n
    yield _responses(name(round, layout.RESPONSES), asked, r.responses.sampling, _writers(r, round), a)
    yield from _judged(name(round, layout.JUDGMENTS), r, asked, n, a, r.responses.sampling)
    examples += asked
    yield Work(name(round, layout.TRAINSET), asked, 0.0, asked * a.example * TEXT_BYTES)
    yield _policy(name(round, layout.POLICY), r, asked * n, examples, a)
    yield from _evaluation(round, r, a)


def not_counted(by_round: Mapping[int, Any]) -> Iterator[str]:
  """Work of these Options that `of_alma` leaves out."""
  o = by_round[0]
  if o.judge.kind not in OWN:
    yield f"the judge {o.judge.kind!r}, which is no model that the run trains or shows examples"
  elif o.judge.reasons:
    yield f"the reasonings of the judge's template {o.judge.template!r}"
  for section in ("judges", "sets"):
    if given := sorted({name for r in by_round.values() for name in getattr(r.eval, section)}):
      yield f"config.eval.{section}: {', '.join(given)}"
  if o.data.eval:
    yield f"evaluation prompts of data.eval beyond {o.data.held_out}"


def _pool(o: Any, round: int, draws: int, a: Assumptions, width: int) -> Iterator[Work]:
  name, drafts = layout.pool_name(round), o.prompts.writing
  shown = min(sum(drafts.shots) / 2 * a.prompt, drafts.max_prompt_tokens)
  new = min(a.prompt, drafts.decoding.max_new_tokens)
  yield Sampling(
    f"{name}/{layout.DRAFTS}", draws, draws * new, draws * (new * TEXT_BYTES + 64), drafts, draws, shown, 1
  )
  prompts = int(draws * a.usable)
  yield Work(f"{name}/{layout.PROMPTS}", prompts, 0.0, prompts * (new * TEXT_BYTES + 64))
  dims, limit = min(o.embeddings.dims, width), drafts.max_prompt_tokens
  if round == 0:
    sample = min(prompts, o.embeddings.sample)
    yield Reading(f"{name}/{layout.PROJECTION}", sample, sample * new, 0.0, limit, layers=o.embeddings.layers)
  embedded = f"{name}/{layout.EMBEDDINGS}"
  yield Reading(embedded, prompts, prompts * new, 2.0 * prompts * dims, limit, layers=o.embeddings.layers)
  if round == 0:
    k = min(o.clusters.k, max(1, prompts))
    of = min(prompts, o.clusters.per_centroid * k) if o.clusters.per_centroid else prompts
    passes = o.clusters.iterations + SEED_PASSES + prompts / max(1, of)  # and the labels of all
    yield Clustering(f"{name}/{layout.CLUSTERS}", of, 0.0, 4.0 * k * dims + 12 * prompts, k, dims, passes)


def _responses(stage: str, asked: float, options: sampling.ManyOptions, writers: int, a: Assumptions) -> Sampling:
  rows = int(asked * options.n)
  new = min(a.response, options.decoding.max_new_tokens)
  disk, own = rows * a.response_bytes, max(1, min(writers, options.n))
  return Sampling(stage, rows, rows * new, disk, options, int(asked) * own, a.prompt, options.n / own)


def _judged(stage: str, o: Any, asked: float, n: int, a: Assumptions, sampled: sampling.Options) -> Iterator[Work]:
  """Of a judge that is the model's own: a judge of another kind runs elsewhere, or as its owner wrote it."""
  if o.judge.kind not in OWN:
    return
  rows, template = int(asked * n), 0 if o.judge.kind == "regression" else _template_tokens(o)
  before, longest = template + a.prompt, sampled.decoding.max_new_tokens
  yield Reading(
    stage,
    rows,
    rows * a.response,
    rows * JUDGMENT_BYTES,
    longest,
    int(asked),
    before,
    template + sampled.max_prompt_tokens,
  )


def _evaluation(round: int, o: Any, a: Assumptions) -> Iterator[Work]:
  """Of data.eval alone: what other sets hold is not known before they are read."""
  asked, n = o.data.held_out, o.eval.n
  if not asked or (not round and not o.eval.shots):
    return
  tokens = min(a.response, o.eval.decoding.max_new_tokens)
  prompt = a.prompt + (0 if round else o.eval.shots * a.example)
  stage, rows = layout.stage_name(round, layout.answers_name()), asked * n
  disk = rows * a.example * TEXT_BYTES
  yield Sampling(stage, rows, rows * tokens, disk, o.eval, asked, min(prompt, o.eval.max_prompt_tokens), n)
  yield from _judged(layout.grades_name(stage), o, asked, n, a, o.eval)


def _policy(stage: str, o: Any, responses: int, examples: int, a: Assumptions) -> Training:
  """A round's training: on `examples`, those of all rounds so far, or on all its `responses`."""
  method = o.trainset.method
  if method == "grpo":
    return _training(stage, o.grpo, "grpo", responses, a.example, forward=2)
  options, section = (o.dpo, "dpo") if method == "dpo" else (o.policy, "policy")
  learnt = examples if options.history == "all" else o.draw.prompts
  if method == "dpo":
    made = _training(stage, options, section, learnt, a.prompt + 2 * a.response, forward=1)
    return dataclasses.replace(made, sides=2)
  return _training(stage, options, section, learnt + a.demonstrations, a.example)


def _training(
  stage: str, options: training.Options, section: str, examples: int, length: float, forward: int = 0
) -> Training:
  examples = max(1, examples)
  tokens = examples * length * options.epochs
  return Training(stage, examples, tokens, 0.0, options, section, examples, length, forward=forward)


def steps(work: Training) -> int:
  """The steps of a training, as runtime/batches.py counts them."""
  per_epoch = math.ceil(work.examples / work.options.batch)
  return max(1, math.ceil(round(work.options.epochs * per_epoch, 6)))


def _writers(o: Any, round: int) -> int:
  sizes = {"sft": len(o.sft_seeds), "latest": int(round > 2)}
  return max(1, sum(sizes.get(name, 1) for name in o.responses.checkpoints))


def _template_tokens(o: Any) -> int:
  options: judge_stage.Options = o.judge
  template = options.judge_template()
  return (len(template.instruction) + len(template.item) + len(template.answer_open)) // LETTERS
