"""SPA: spread preference annotation, direct preference judgement (arXiv 2406.04412).

From an SFT model and a few thousand preference pairs of people; no reward model and no judge but the policy itself.

  python -m alma_jax.main --config=configs/spa.py:mini --workdir=runs/spa

Round 0 is the SFT model, round 1 DPO on people's pairs, and round i + 1 the paper's iteration i. docs/spa.md says what
the paper leaves open.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, TypeAlias

from alma_jax import names
from alma_jax.judges import contract, implicit
from alma_jax.llama import weights
from alma_jax.options import Checked, ConfigError, option, refuse
from alma_jax.runtime import training
from alma_jax.runtime.host import Checkpoint, Host, content_of, model_directory
from alma_jax.runtime.sampling import ManyOptions
from alma_jax.runtime.session import RunOptions
from alma_jax.runtime.session import Session as AnySession
from alma_jax.stages import agreement, evaluation, judgments, policy, preferences, responses, split, trainset
from alma_jax.stages import data as human
from alma_jax.store import layout
from alma_jax.store.handles import Data, Trainset
from alma_jax.store.records import Judgment, Prompt, Response
from alma_jax.store.runs import Artefact

NAME = layout.sft_name(1)  # of the SFT model


@dataclasses.dataclass(frozen=True)
class DataOptions(human.Sources):
  preferences: str = ""  # people's pairs: messages or prompt, chosen and rejected; empty: none (paper 5.3)
  prompts: str = ""  # unlabelled prompts
  sft: str = ""  # demonstrations; empty: `sft_model` is the SFT model
  eval: str = ""  # evaluation prompts; empty: some demonstrations are held out
  held_out: int = option(200, least=1)  # how many, then

  def __post_init__(self) -> None:
    super().__post_init__()
    self.require("prompts", *([] if self.sft else ["eval"]))


@dataclasses.dataclass(frozen=True)
class JudgeOptions(Checked):
  """The direct preference judgement: log p of the policy minus log p of a reference."""

  reference: Literal["sft", "previous", "none", "base"] = "sft"  # "previous": the policy before it; "base": model.path
  per: Literal["sequence", "token"] = "sequence"  # the sum over a response's tokens, or their mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
  """What a config of this recipe sets, beside RunOptions; each stage's Options say what is allowed."""

  feedback_rounds: int = option(least=0, most=1000)  # iterations: rounds 2, 3, ...
  data: DataOptions
  sft_model: str = ""  # the directory of an SFT model; empty: model.path is fine-tuned on data.sft
  sft: training.Options
  seeds: preferences.Options
  dpo: training.PreferenceOptions  # on people's pairs
  split: split.Options
  responses: ManyOptions
  judge: JudgeOptions
  agreement: agreement.Options
  trainset: trainset.Options
  policy_seed: int = option(100, least=0)
  policy: training.RefinedOptions  # on the model's own pairs; `mix` halves from one iteration to the next
  eval: evaluation.Options


Session: TypeAlias = AnySession[Options]


def run(s: Session) -> None:
  o = s.options
  data = human.build(s, o.data, sorted(set(o.eval.named_sets.values())))
  split.check(data, o.split, max(s.by_round))
  sft = initial(s, data)  # pi_init
  scores = [evaluation.build(s.at(0), sft, None, data, o.eval)]

  # DPO on people's pairs                                                        pi_0
  before, latest, trainsets, people = sft, sft, list[Trainset](), list[human.SeedRow]()
  if o.data.preferences:
    people = preferences.held_out(data, o.seeds, o.seed)
    trainsets.append(preferences.build(s.at(1), data, o.seeds))
    job = policy.Job(layout.stage_name(1, layout.POLICY), sft, o.dpo, o.policy_seed + 1)
    latest = policy.dpo(s.at(1), job, sft, trainsets)
    scores.append(evaluation.build(s.at(1), latest, None, data, o.eval))

  for r in s.rounds():  # iteration i = r.round - 1; r.options are this round's
    o = r.options
    # Expansion: two or more responses of pi_{i-1} to prompts of this iteration alone
    asked = split.build(r, data, o.split)
    answered = responses.build(r, asked, [latest], o.responses)
    # Direct preference judgement: log p of pi_{i-1} minus log p of the SFT model; best against worst
    references = {"sft": sft, "previous": before, "none": None, "base": r.base}
    judge = implicit.of_checkpoints(r.host, latest, references[o.judge.reference], o.judge.per)
    judged = judgments.build(r, asked, answered, judge)
    trainsets.append(trainset.build(r, asked, answered, judged, o.trainset))
    gold = by_gold(r, asked, answered)
    agreement.build(r, judge, people, agreement.Scored(judged, gold, trainsets[-1]))
    # DPO from pi_{i-1} with self-refinement and de-coupled noise detection      pi_i
    models = {"latest": latest, NAME: sft, "base": r.base}
    init = models[o.policy.init_from]
    reference = init if o.policy.ref_from == "init" else models[o.policy.ref_from]
    name, options = layout.stage_name(r.round, layout.POLICY), refined(r)
    job = policy.Job[training.PreferenceOptions](name, init, options, o.policy_seed + r.round)
    learnt = trainsets if o.policy.history == "all" else trainsets[-1:]
    before, latest = latest, policy.dpo(r, job, reference, learnt)
    scores.append(evaluation.build(r, latest, None, data, o.eval))
    if evaluation.stalled(scores, o.eval):
      s.display.say(f"round {r.round}: no better score for {o.eval.patience} rounds; the run ends here")
      break


def initial(s: Session, data: Data) -> Checkpoint:
  """The SFT model: a given one, or the base model fine-tuned on the demonstrations."""
  o = s.options
  if not o.sft_model:
    return policy.sft(s, policy.Job(NAME, s.base, o.sft, 1), data)
  directory = model_directory(o.sft_model)
  return Checkpoint(NAME, directory, content_of(directory))


def refined(r: Session) -> training.RefinedOptions:
  """How the round's policy is trained: lambda is 1/2, 1/4, 1/8, ... from the first iteration on."""
  options = r.options.policy
  loss = dataclasses.replace(options.preference, mix=options.preference.mix * 0.5 ** (r.round - 2))
  return dataclasses.replace(options, preference=loss)


def by_gold(r: Session, asked: Artefact[Prompt], answered: Artefact[Response]) -> Artefact[Judgment] | None:
  """The gold judge's scores of the round's responses, which nothing that is trained sees."""
  options = r.options.agreement
  if not options.gold:
    return None
  judge = contract.by_name(names.EVALUATORS, options.gold, r.host, options, "agreement.gold")
  return judgments.build(r, asked, answered, contract.without_rows(judge, "agreement.gold"), layout.GOLD)


# What is checked at the start, and what `--check` says


def check(by_round: Mapping[int, Options]) -> None:
  """Raise a ConfigError for values that are wrong together."""
  for o in by_round.values():
    if bool(o.sft_model) == bool(o.data.sft):
      raise ConfigError("give data.sft to fine-tune the base model, or sft_model, an SFT model: one of the two")
    if o.trainset.method != "dpo":
      refuse("trainset.method", o.trainset.method, "must be 'dpo': this recipe learns from pairs")
    if o.responses.n < 2:
      refuse("responses.n", o.responses.n, "must be at least 2, to make a pair of")
    for field in ("init_from", "ref_from"):
      allowed = ("latest", NAME, "base", *(["init"] if field == "ref_from" else []))
      if (name := getattr(o.policy, field)) not in allowed:
        refuse(f"policy.{field}", name, f"may be {', '.join(map(repr, allowed))}", allowed)
    if o.split != by_round[0].split:
      raise ConfigError("split differs from round to round: split.parts names the size of every round")
    if not o.data.preferences and o.feedback_rounds == 0:
      raise ConfigError("data.preferences is empty and feedback_rounds is 0: there is nothing to learn from")


def checks(host: Host, by_round: Mapping[int, Options]) -> Iterator[Callable[[], object]]:
  """Steps that raise a UserError where a length does not suit the model, or a model or judge cannot be used."""
  o = by_round[0]
  if o.sft_model:
    yield functools.partial(_check_sft_model, host, o.sft_model)
  for where, options in {"config.sft": o.sft, "config.dpo": o.dpo, "config.policy": o.policy}.items():
    yield functools.partial(policy.check_row_length, host, options, where)
  if o.agreement.gold:
    yield lambda: contract.without_rows(
      contract.by_name(names.EVALUATORS, o.agreement.gold, host, o.agreement, "agreement.gold"), "agreement.gold"
    )
  for options in {of.eval for of in by_round.values()}:
    yield functools.partial(evaluation.check, host, options)


def _check_sft_model(host: Host, path: str) -> None:
  directory = model_directory(path)
  weights.files(directory)
  implicit.check_same_tokens(host.tokenizer, host.directory, directory, "config.sft_model")


def models(by_round: Mapping[int, Options]) -> int:
  """How many trained models a run keeps."""
  o = by_round[0]
  return bool(o.data.sft) + bool(o.data.preferences) + len(by_round) - 1


def stages(by_round: Mapping[int, Options]) -> dict[str, float]:
  """The stages of a run in about their order, with their sizes beside others of their kind."""
  o = by_round[0]
  found = {layout.SEEDS: 1.0} | ({} if o.sft_model else {layout.sft_name(1): 1.0}) | evaluation.stages(0, o.eval, False)
  if o.data.preferences:
    found |= dict.fromkeys((layout.stage_name(1, name) for name in (layout.TRAINSET, layout.POLICY)), 1.0)
    found |= evaluation.stages(1, by_round.get(1, o).eval, False)
  for round in sorted(by_round.keys() - {0}):
    made = [layout.PROMPTS, layout.RESPONSES, layout.JUDGMENTS, layout.TRAINSET, layout.AGREEMENT, layout.POLICY]
    made += [layout.GOLD] if by_round[round].agreement.gold else []
    found |= dict.fromkeys((layout.stage_name(round, name) for name in made), 1.0)
    found |= evaluation.stages(round, by_round[round].eval, False)
  return found


def plan(by_round: Mapping[int, Options]) -> Iterator[str]:
  """What a run would do, a line for each kind of work."""
  o = by_round[0]
  yield f"sft       {f'{o.sft.epochs:g} epochs on data.sft' if o.data.sft else o.sft_model}"
  yield f"round 1   {f'DPO on data.preferences, {o.dpo.epochs:g} epochs' if o.data.preferences else 'no pairs'}"
  for round, r in sorted(by_round.items()):
    if round:
      loss = r.policy.preference
      yield (
        f"round {round:<3} {r.split.size(round):,} prompts x {r.responses.n} responses, judged against"
        f" {r.judge.reference} per {r.judge.per}; {r.trainset.pairs}; DPO with smoothing {loss.smoothing:g}, mix"
        f" {loss.mix * 0.5 ** (round - 2):g}"
      )
