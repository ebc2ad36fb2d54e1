"""What stages do, as counts: how many texts, how many tokens, which training. plan/recipes.py says which a run has.

Numbers that only a run can tell (lengths, the size of the human data) come from the assumptions.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from alma_jax.plan.assumptions import Assumptions
from alma_jax.runtime import sampling, training
from alma_jax.stages import evaluation as evaluations
from alma_jax.stages import judge as judges
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
  calls: int = 1  # of the sampler, a part of the stage each


@dataclasses.dataclass(frozen=True)
class Reading(Work):
  """A forward pass over texts: judging, after prefixes that are read once each, and embedding."""

  longest: int  # tokens of a row
  prefixes: int = 0
  prefix_tokens: float = 0.0
  longest_prefix: int = 0
  layers: int = 0  # 0: all
  logprobs: bool = False  # of every token; else of some tokens after the last one
  models: int = 1  # that read it all, one after the other


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
  forward: int = 0  # more forward passes over the data, inside the stage: log-probs of policy gradients


@dataclasses.dataclass(frozen=True)
class Scoring(Training):
  """Log-probs of whole examples by the code that trains, without a step: of a reference, of a validation."""


def training_of(
  stage: str, options: training.Options, section: str, examples: float, length: float, forward: int = 0
) -> Training:
  """`length`: tokens of an example, which is cut to a row."""
  count, length = max(1, int(examples)), min(length, options.row_length)
  return Training(stage, count, count * length * options.epochs, 0.0, options, section, count, length, forward=forward)


def preferences(
  stage: str, options: training.PreferenceOptions, section: str, pairs: float, a: Assumptions
) -> Training:
  """A training on pairs, whose two responses stand behind one prompt."""
  made = training_of(stage, options, section, pairs, 0.0)
  length = min(a.prompt + 2 * a.response, 2 * options.row_length)
  return dataclasses.replace(made, tokens=made.rows * length * options.epochs, length=length, sides=2)


def scoring(stage: str, options: training.Options, section: str, examples: float, length: float) -> Scoring:
  count, length = max(1, int(examples)), min(length, options.row_length)
  return Scoring(stage, count, count * length, 8.0 * count, options, section, count, length)


def references(
  trainsets: dict[str, int], model: str, options: training.PreferenceOptions, section: str, a: Assumptions
) -> Iterator[Scoring]:
  """The log-probs of the pairs of these trainsets, {stage: pairs}, under a reference, both sides as texts of their
  own."""
  for stage, pairs in trainsets.items() if options.preference.has_reference else ():
    name = layout.beside(stage, f"reference_{model.replace('/', '_')}")
    yield scoring(name, options, section, options.preference.sides * pairs, a.prompt + a.response)


def steps(work: Training) -> int:
  """The steps of a training, as runtime/batches.py counts them; scoring reads all data once."""
  per_epoch = math.ceil(work.examples / work.options.batch)
  if isinstance(work, Scoring):
    return per_epoch
  return max(1, math.ceil(round(work.options.epochs * per_epoch, 6)))


def epochs_kept(work: Training) -> int:
  """How many models a training keeps beside its last one, as runtime/training.py counts them."""
  first, per_epoch = work.options.keep_epochs, math.ceil(work.examples / work.options.batch)
  return max(0, (steps(work) - 1) // per_epoch - first + 1) if first else 0


def drafts(stage: str, options: Any, draws: int, prompt: float, shards: int) -> Sampling:
  """`draws` prompts, each written after a list of examples of `prompt` tokens."""
  shown = min(sum(options.shots) / 2 * prompt, options.max_prompt_tokens)
  new = min(prompt, options.decoding.max_new_tokens)
  disk = draws * (new * TEXT_BYTES + 64)
  return Sampling(stage, draws, draws * new, disk, options, draws, shown, 1, shards)


def pool(o: Any, round: int, draws: int, a: Assumptions, width: int) -> Iterator[Work]:
  name, writing = layout.pool_name(round), o.prompts.writing
  yield drafts(f"{name}/{layout.DRAFTS}", writing, draws, a.prompt, o.shards)
  prompts, new = int(draws * a.usable), min(a.prompt, writing.decoding.max_new_tokens)
  yield Work(f"{name}/{layout.PROMPTS}", prompts, 0.0, prompts * (new * TEXT_BYTES + 64))
  dims, limit = min(o.embeddings.dims, width), writing.max_prompt_tokens
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


def responses(
  stage: str, asked: float, options: sampling.ManyOptions, writers: int, a: Assumptions, shards: int
) -> Sampling:
  rows = int(asked * options.n)
  new = min(a.response, options.decoding.max_new_tokens)
  disk, own = rows * a.response_bytes, max(1, min(writers, options.n))
  prompts = int(asked) * own
  return Sampling(stage, rows, rows * new, disk, options, prompts, a.prompt, options.n / own, writers * shards)


def judged(
  stage: str, o: judges.Options, asked: float, n: int, a: Assumptions, sampled: sampling.Options
) -> Iterator[Reading]:
  """By a judge that is the model's own: a judge of another kind runs elsewhere, or as its owner wrote it."""
  if o.kind not in OWN:
    return
  template = 0 if o.kind == "regression" else template_tokens(o)
  yield after_prompts(stage, asked, n, template, a, sampled)


def after_prompts(
  stage: str, asked: float, n: int, template: int, a: Assumptions, sampled: sampling.Options
) -> Reading:
  """n responses to each of the prompts are read behind them, which are read once."""
  rows, before, longest = int(asked * n), template + a.prompt, template + sampled.max_prompt_tokens
  new, disk = sampled.decoding.max_new_tokens, rows * JUDGMENT_BYTES
  return Reading(stage, rows, rows * min(a.response, new), disk, new, int(asked), before, longest)


def judge_training(o: judges.Options, a: Assumptions) -> Iterator[Training]:
  if o.kind in ("finetuned", "regression"):
    length = a.example + (template_tokens(o) if o.kind == "finetuned" else 0)
    yield training_of(layout.JUDGE, o.train, "judge.train", a.annotations * (1 - o.held_out), length)


def evaluation(
  round: int,
  o: evaluations.Options,
  sets: dict[str, int],
  judge: judges.Options | None,
  a: Assumptions,
  shards: int,
  shots: int = 0,
) -> Iterator[Work]:
  """The answers to so many prompts of each set, after `shots` examples, and the grades that the run's own judge gives
  them."""
  tokens = min(a.response, o.decoding.max_new_tokens)
  prompt = min(a.prompt + shots * a.example, o.max_prompt_tokens)
  for name, asked in sets.items():
    stage, rows = layout.stage_name(round, layout.answers_name(name)), asked * o.n
    disk = rows * a.example * TEXT_BYTES
    yield Sampling(stage, rows, rows * tokens, disk, o, asked, prompt, o.n, shards)
    if judge:
      yield from judged(layout.grades_name(stage), judge, asked, o.n, a, o)


def template_tokens(options: judges.Options) -> int:
  template = options.judge_template()
  return (len(template.instruction) + len(template.item) + len(template.answer_open)) // LETTERS
