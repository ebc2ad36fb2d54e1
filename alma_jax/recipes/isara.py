"""ISARA: iterative self-alignment with retrieval-augmented in-context learning (arXiv 2401.06785).

From a base model and fewer than a hundred question-answer pairs D_0; no instruction, no judge, no other model.

  python -m alma_jax.main --config=configs/isara.py:mini --workdir=runs/isara

Round 1 is the control, D_0 alone; round k + 1 is the paper's iteration k. The paper leaves its numbers and filters
open: docs/isara.md says which are ours.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from alma_jax import names
from alma_jax.options import Checked, ConfigError, option, refuse, spread
from alma_jax.runtime import training
from alma_jax.runtime.host import Checkpoint, Host
from alma_jax.runtime.sampling import ManyOptions
from alma_jax.runtime.sampling import Options as SamplingOptions
from alma_jax.runtime.session import RunOptions
from alma_jax.runtime.session import Session as AnySession
from alma_jax.stages import categories, drafts, evaluation, neighbours, pairs, policy, prompts, responses
from alma_jax.stages import data as human
from alma_jax.store import layout
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Data, Trainset
from alma_jax.store.records import Prompt
from alma_jax.store.runs import Artefact
from alma_jax.store.statistics import Mean
from alma_jax.text import fewshot

MOST = 100  # pairs of D_0: the method is for limited samples
ROOM = 32  # tokens of a chat format around a question


@dataclasses.dataclass(frozen=True)
class DataOptions(human.Sources):
  sft: str = ""  # the pairs that D_0 is taken from: messages, or prompt and response
  eval: str = ""  # evaluation prompts; empty: hold some of the pairs out
  held_out: int = option(20, least=1)  # how many, then
  pairs: int = option(0, least=0, most=MOST)  # D_0 is so many of them, drawn by the seed; 0: all, at most 100

  def __post_init__(self) -> None:
    super().__post_init__()
    self.require("sft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionOptions(Checked):
  """The section `prompts`: how questions are written, and which of them are asked."""

  writing: drafts.Options = spread(drafts.Options)
  entering: prompts.Options = spread(prompts.Options)
  words: tuple[int, int] = (4, 150)  # the fewest and the most of a question


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerOptions(Checked):
  """The section `responses`: one answer to each question, after its shots."""

  sampling: SamplingOptions = spread(SamplingOptions)
  template: str = option("answers", names=names.DIALOGUES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
  """What a config of this recipe sets, beside RunOptions; each stage's Options say what is allowed."""

  feedback_rounds: int = option(least=0, most=1000)  # the most iterations: rounds 2, 3, ...
  data: DataOptions
  categories: categories.Options
  writer: Literal["latest", "base"] = "latest"  # who writes questions and answers
  start: Literal["base", "sft_1"] = "base"  # M_0, who is the latest in iteration 1; "sft_1": after D_0 alone
  prompts: QuestionOptions
  neighbours: neighbours.Options
  responses: AnswerOptions
  pairs: pairs.Options
  alpha: float = option(0.1, least=0, most=1)  # the run ends before an iteration that keeps less of what it generates
  sft: training.Options  # of D_0 alone
  policy_seed: int = option(100, least=0)
  policy: training.MixedOptions
  eval: evaluation.Options


Session: TypeAlias = AnySession[Options]


def run(s: Session) -> None:
  o = s.options
  data, seeds = read(s)  # D_0
  pool, asked = [seeds], list[Artefact[Prompt]]()
  evaluated(s.at(0), s.base, data, o.eval.shots)
  sft = policy.mixed(s, policy.Job(layout.sft_name(1), s.base, o.sft, 1), seeds)
  scores = [evaluated(s.at(1), sft, data)]
  latest = sft if o.start == "sft_1" else s.base  # M_0

  for r in s.rounds():  # iteration k; r.options are this round's
    o, writer = r.options, latest if r.options.writer == "latest" else r.base
    # Questions: in-context learning after random examples of D_0 .. D_{k-1}; new ones enter
    growing = drafts.Growing(writer, pool, o.prompts.words)
    drafted = drafts.build(r, data, o.prompts.writing, layout.round_name(r.round), growing=growing)
    asked.append(prompts.build(r, data, drafted, o.prompts.entering, asked))
    # Answers: in-context learning after the nearest pairs of D_0 .. D_{k-1}
    shots = neighbours.build(r, asked[-1], pool, o.neighbours, o.prompts.writing.decoding.max_new_tokens + ROOM)
    template = names.resolve(names.DIALOGUES, o.responses.template, "responses.template")
    answers = responses.build(r, asked[-1], [writer], once(o), responses.Shots(template, shots, pool))
    # Filter, and stop below alpha
    written = pairs.Answered(asked[-1], shots, answers, o.prompts.writing.draws)
    kept = pairs.build(r, written, pool, o.pairs)  # D_k
    facts = kept.manifest
    said = f"round {r.round}: {facts['rows']:,} of {facts['generated']:,} are kept ({facts['kept_share']:.1%})"
    s.display.say(f"{said}; {facts['growth']:.2f} generated pairs for each human one")
    if facts["kept_share"] < o.alpha:
      s.display.say(f"round {r.round}: that is less than alpha, {o.alpha:g}; the run ends before training on it")
      break
    pool.append(kept)
    # M_k: SFT on gamma D_0 + (1 - gamma) D_1 .. D_k
    init = latest if o.policy.init_from == "latest" else r.base
    name, seed = layout.stage_name(r.round, layout.POLICY), o.policy_seed + r.round
    latest = policy.mixed(r, policy.Job(name, init, o.policy, seed), seeds, pool[1:])
    scores.append(evaluated(r, latest, data))
    if evaluation.stalled(scores, o.eval):
      s.display.say(f"round {r.round}: no better score for {o.eval.patience} rounds; the run ends here")
      break


def read(s: Session) -> tuple[Data, Trainset]:
  """The human data with the rows of D_0 alone, and D_0."""
  o = s.options
  data = human.build(s, o.data, sorted(set(o.eval.named_sets.values())))
  rows = d_0(o, data.sft)
  fields = {"data": data.digests["sft"], "pairs": o.data.pairs, "seed": s.options.seed, **o.categories.fields()}
  seeds = pairs.human(s.at(1), rows, fields)
  return dataclasses.replace(data, sft=rows, digests={**data.digests, "sft": seeds.content}), seeds


def d_0(o: Options, rows: Sequence[SeedRow]) -> list[SeedRow]:
  """The rows of D_0: of the categories that are chosen, at most as many as are asked for."""
  found = pairs.drawn(categories.chosen(o.categories, rows), o.data.pairs, o.seed)
  if len(found) > MOST:
    raise ConfigError(
      f"data.sft has {len(found):,} pairs, and D_0 is at most {MOST}: set data.pairs, or choose by categories.seeds"
    )
  return found


def evaluated(r: Session, checkpoint: Checkpoint, data: Data, shots: int = 0) -> dict[str, Mean]:
  """The round's evaluation, also by category; the mean scores on data.eval."""
  o = r.options
  means = evaluation.build(r, checkpoint, None, data, o.eval, shots=shots)
  seen = {categories.category(o.categories, row) for row in data.sft}
  categories.build(r, evaluation.prompt_sets(data, o.eval), list(o.eval.named_judges), seen, o.categories)
  return means


def once(o: Options) -> ManyOptions:
  """How the one answer to each question is drawn."""
  how = o.responses.sampling
  return ManyOptions(decoding=how.decoding, max_prompt_tokens=how.max_prompt_tokens, n=1)


# What is checked at the start, and what `--check` says


def check(by_round: Mapping[int, Options]) -> None:
  """Raise a ConfigError for values that are wrong together."""
  for o in by_round.values():
    if not 1 <= o.prompts.words[0] <= o.prompts.words[1]:
      refuse("prompts.words", o.prompts.words, "must be the fewest and the most of a question, at least (1, 1)")
    if not o.eval.judges:
      raise ConfigError("eval.judges is empty: this recipe has no judge of its own, so name one that grades")
    if o.categories.judge and o.categories.judge not in o.eval.named_judges:
      refuse("categories.judge", o.categories.judge, f"must be one of eval.judges: {', '.join(o.eval.named_judges)}")


def checks(host: Host, by_round: Mapping[int, Options]) -> Iterator[Callable[[], object]]:
  """Steps that raise a UserError where D_0 is too large, a template does not suit the tokenizer, a length does not suit
  the model, or a judge cannot be made."""
  o = by_round[0]
  yield functools.partial(seeds_of, o)
  for table, word in ((names.LISTS, o.prompts.writing.template), (names.DIALOGUES, o.responses.template)):
    template: fewshot.FewShot = names.resolve(table, word, "template")
    yield functools.partial(fewshot.check_writable, host.tokenizer, template)
  yield functools.partial(policy.check_row_length, host, o.sft, "config.sft")
  yield functools.partial(policy.check_row_length, host, o.policy, "config.policy")
  for options in {of.eval for of in by_round.values()}:
    yield functools.partial(evaluation.check, host, options)


def seeds_of(o: Options) -> list[SeedRow]:
  """The rows of D_0 as they are now; none where the data is not on this machine, as a run may have its own copy."""
  if o.data.sft not in names.DATA.words and not pathlib.Path(o.data.sft).is_file():
    return []
  with tempfile.TemporaryDirectory() as directory:
    return d_0(o, human.read(o.data, pathlib.Path(directory), o.seed)[0]["sft"])


def models(by_round: Mapping[int, Options]) -> int:
  """How many trained models a run keeps."""
  return len(by_round)


def stages(by_round: Mapping[int, Options]) -> dict[str, float]:
  """The stages of a run in about their order, with their sizes beside others of their kind."""
  found = {layout.SEEDS: 1.0, layout.stage_name(1, layout.TRAINSET): 1.0, layout.sft_name(1): 1.0}
  for round in sorted({0, 1, *by_round}):
    o = by_round.get(round, by_round[0])
    if round > 1:
      made = (layout.DRAFTS, layout.PROMPTS, layout.NEIGHBOURS, layout.RESPONSES, layout.TRAINSET, layout.POLICY)
      found |= dict.fromkeys((layout.stage_name(round, name) for name in made), 1.0)
    found |= evaluation.stages(round, o.eval, False)
    found |= {layout.categories_name(round, judge): 1.0 for judge in o.eval.named_judges}
  return found


def plan(by_round: Mapping[int, Options]) -> Iterator[str]:
  """What a run would do, a line for each kind of work."""
  o = by_round[0]
  found = len(seeds_of(o))
  said = f"{found:,} pairs" if found else f"at most {o.data.pairs or MOST} pairs of data.sft"
  yield f"D_0       {said}; {o.sft.epochs:g} epochs on them alone are the control"
  for round, r in sorted(by_round.items()):
    if round:
      yield (
        f"round {round:<3} {r.prompts.writing.draws:,} questions and answers by {r.writer}, after"
        f" {r.neighbours.shots} pairs each ({r.neighbours.method}); {r.policy.epochs:g} epochs from"
        f" {r.policy.init_from}, gamma {r.policy.gamma:g}; ends below {r.alpha:g} kept"
      )
