"""LIMA: less is more for alignment (arXiv 2305.11206).

One SFT on a thousand chosen demonstrations; of the models that its epochs end with, the one that writes best.

  python -m alma_jax.main --config=configs/lima.py:mini --workdir=runs/lima

Every line of `run` is a stage of the run directory; a round is an epoch. Where a person chooses, compares or audits,
the run writes a form, ends with exit status 75, and the same command goes on when the form is filled in.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from alma_jax import names
from alma_jax.corpus.normalise import prompt_id
from alma_jax.errors import RunError, waited
from alma_jax.judges import human as people
from alma_jax.judges import pairwise
from alma_jax.judges.contract import Judge, by_name
from alma_jax.keys import key_of
from alma_jax.options import ConfigError, option, refuse
from alma_jax.runtime import training
from alma_jax.runtime.host import Checkpoint, Host
from alma_jax.runtime.session import RunOptions
from alma_jax.runtime.session import Session as AnySession
from alma_jax.stages import audit as audits
from alma_jax.stages import choice, compare, evaluation, judge, loss, policy
from alma_jax.stages import data as human
from alma_jax.store import layout
from alma_jax.store.handles import Data, PromptSet
from alma_jax.store.records import Answer
from alma_jax.store.runs import Artefact


@dataclasses.dataclass(frozen=True)
class DataOptions(human.Sources):
  sft: str = ""  # the demonstrations; dialogues are rows with more turns
  judge: str = ""  # annotations, for choice.judge "own"
  eval: str = ""  # prompts; empty: hold some demonstrations out
  held_out: int = option(50, least=1)  # how many, then
  validation: str = ""  # demonstrations whose loss is measured beside; empty: hold some out
  validation_held_out: int = option(0, least=0)  # how many, then; 0: measure no loss

  def __post_init__(self) -> None:
    super().__post_init__()
    self.require("sft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
  """What a config of this recipe sets, beside RunOptions; each stage's Options say what is allowed."""

  data: DataOptions
  sft_seed: int = option(1, least=0)
  sft: training.Options
  judge: judge.Options  # for choice.judge "own"
  choice: choice.Options
  eval: evaluation.Options
  compare: compare.Options
  audit: audits.Options
  safety: audits.Options

  def __post_init__(self) -> None:
    super().__post_init__()
    epochs = self.sft.epochs
    if self.choice.last > epochs:
      refuse("choice.last", self.choice.last, f"must be at most sft.epochs, which is {epochs:g}")
    if not 1 <= self.sft.keep_epochs <= self.choice.first:
      refuse("sft.keep_epochs", self.sft.keep_epochs, f"must be from 1 to choice.first, which is {self.choice.first}")
    if pairwise.compares(self.choice.judge) and not self.choice.pairwise:
      refuse("choice.judge", self.choice.judge, "compares two answers: set choice.pairwise, or take a judge of one")
    if self.choice.judge == choice.OWN and not self.data.judge:
      raise ConfigError("data.judge is empty, and choice.judge is 'own': give annotations for the judge to learn from")
    known = [*([layout.TEST_SET] if self.choice.prompts else []), *self.eval.named_sets]
    used = {"compare": self.compare.against, "audit": self.audit.judge, "safety": self.safety.judge}
    for section, given in used.items():
      asked = getattr(self, section).asked
      if given and asked not in known:
        refuse(f"{section}.asked", asked, f"may be {', '.join(map(repr, known)) or 'a set of eval.sets'}", known)


Session: TypeAlias = AnySession[Options]


def run(s: Session) -> None:
  o = s.options
  data = human.build(s, o.data, sorted(o.eval.named_sets.values()))
  dev, *tests = prompt_sets(data, o)
  compare.check_shared(o.compare, tests)

  # Training: 15 epochs, dropout that rises over the layers; the loss is no reason to stop   (section 3)
  sft = policy.sft(s, policy.Job(layout.sft_name(1), s.base, o.sft, o.sft_seed), data)
  models = training.by_epoch(sft)

  # Epochs 5 .. 10 answer the dev prompts; a judge or a person says which of them is best    (section 3, figure 9)
  chooser = made_chooser(s, data, o)
  comparer = None
  if o.choice.pairwise and o.choice.judge not in (people.HUMAN, choice.OWN):
    comparer = pairwise.made(s.host, o.choice, o.choice.judge, o.choice.margin, "choice.judge")
  epochs = {}
  for epoch in range(o.choice.first, o.choice.last + 1):
    r, once = s.at(epoch, o), dataclasses.replace(o.eval, n=1)
    evaluation.build(r, models[epoch], chooser, data, once, sets=[dev])
    written = answers(r, models[epoch], dev, data, once)
    graded = evaluation.grades(r, written, dev, evaluation.NamedJudge(layout.JUDGE, chooser, True)) if chooser else None
    epochs[epoch] = choice.Epoch(models[epoch], written, graded, loss.build(r, models[epoch], data, o.sft))
  if o.choice.pairwise and chooser:  # a judge of single answers compares by its scores
    comparer = comparer or pairwise.ByScores(chooser, o.choice.margin)
  chosen = choice.build(s, epochs, o.choice, comparer)

  # Evaluation of the chosen model: grades, other models' answers, levels                    (section 4)
  if tests:
    r = s.at(chosen.epoch, o)
    evaluation.build(r, chosen.checkpoint, chooser, data, o.eval, sets=tests)
    written = {asked.name: answers(r, chosen.checkpoint, asked, data, o.eval) for asked in tests}
    steps: list[Callable[[], object]] = []
    if o.compare.against:
      steps.append(functools.partial(compare.build, r, written[o.compare.asked], o.compare))
    for name, options in {"answers": o.audit, "safety": o.safety}.items():
      if options.judge:
        steps.append(functools.partial(audits.build, r, written[options.asked], options, name))
    waited(steps)
  s.display.say(f"chosen: {chosen.checkpoint.directory}")


def prompt_sets(data: Data, o: Options) -> list[PromptSet]:
  """The prompts to choose by, then those to evaluate the chosen model on; the rest of data.eval is the set `test`."""
  order = sorted(data.eval, key=lambda row: key_of("dev", prompt_id(row.messages)))
  count = o.choice.prompts or len(order)
  if count > len(order) - bool(o.choice.prompts):
    raise RunError(
      f"data.eval has {len(order):,} prompts and choice.prompts, which are set apart to choose by, is {count:,}: none"
      " is left for the set 'test'. Give more prompts, or set choice.prompts to fewer or to 0, for all"
    )
  digest = data.digests["eval"]
  found = [PromptSet(layout.MAIN_SET, order[:count], f"{digest}, the first {count}" if o.choice.prompts else digest)]
  if order[count:]:
    found.append(PromptSet(layout.TEST_SET, order[count:], f"{digest}, without the first {count}"))
  return found + [evaluation.prompt_set(name, file) for name, file in o.eval.named_sets.items()]


def answers(
  r: Session, model: Checkpoint, asked: PromptSet, data: Data, options: evaluation.Options
) -> Artefact[Answer]:
  return evaluation.answers(evaluation.Asker(r, options.template(), ()), model, asked, data, options)


def made_chooser(s: Session, data: Data, o: Options) -> Judge | None:
  """The judge that grades every epoch's answers; None where a person does, or an endpoint that compares two answers."""
  if o.choice.judge == choice.OWN:
    return judge.of_annotations(s, data, o.judge)
  if o.choice.judge == people.HUMAN or pairwise.compares(o.choice.judge):
    return None
  return by_name(names.EVALUATORS, o.choice.judge, s.host, o.choice, "choice.judge")


# What is checked at the start, and what `--check` says


def check(by_round: Mapping[int, Options]) -> None:
  """Raise a ConfigError for values that are wrong together; the Options of this recipe check them all."""


def checks(host: Host, by_round: Mapping[int, Options]) -> Iterator[Callable[[], object]]:
  """Steps that raise a UserError where a file cannot be read, a judge cannot be made, or a length does not suit."""
  o = by_round[0]
  yield functools.partial(policy.check_row_length, host, o.sft, "config.sft")
  if o.choice.judge == choice.OWN:
    yield functools.partial(judge.check, host, o.judge)
    yield functools.partial(judge.check_lengths, host, o.judge, o.eval, "config.eval")
  elif o.choice.judge != people.HUMAN:
    yield functools.partial(pairwise.made, host, o.choice, o.choice.judge, o.choice.margin, "choice.judge")
  yield functools.partial(evaluation.check, host, o.eval)
  yield functools.partial(compare.check, host, o.compare)
  for section, options in {"audit": o.audit, "safety": o.safety}.items():
    yield functools.partial(audits.check, host, options, section)


def models(by_round: Mapping[int, Options]) -> int:
  """How many trained models a run keeps."""
  o = by_round[0]
  own = o.choice.judge == choice.OWN and o.judge.kind in ("finetuned", "regression")
  return int(o.sft.epochs) - o.sft.keep_epochs + 1 + own


def stages(by_round: Mapping[int, Options]) -> dict[str, float]:
  """The stages of a run until an epoch is chosen, with their sizes beside others of their kind."""
  o = by_round[0]
  found = {layout.SEEDS: 1.0, layout.sft_name(1): 1.0}
  for epoch in range(o.choice.first, o.choice.last + 1):
    found |= evaluation.stages(epoch, o.eval, o.choice.judge != people.HUMAN, [layout.MAIN_SET])
    found[layout.stage_name(epoch, layout.LOSS)] = 1.0
  return found | {layout.CHOICE: 1.0}


def plan(by_round: Mapping[int, Options]) -> Iterator[str]:
  """What a run would do, a line for each kind of work."""
  o = by_round[0]
  yield f"sft       {o.sft.epochs:g} epochs, dropout 0 to {o.sft.dropout:g}; all kept from {o.sft.keep_epochs} on"
  how = "compares each with the one before" if o.choice.pairwise else "grades each"
  asked = f"{o.choice.prompts:,} prompts" if o.choice.prompts else "all of data.eval"
  yield f"choice    epochs {o.choice.first} to {o.choice.last}, {asked}; {o.choice.judge} {how}"
  judges = ", ".join(o.eval.named_judges) or "the judge that chooses"
  yield f"eval      {o.eval.n} answers to each test prompt, graded by {judges}"
  for model in o.compare.files:
    yield f"compare   with {model}, by {', '.join(o.compare.judges)}"
  for name, options in {"audit": o.audit, "safety": o.safety}.items():
    if options.judge:
      yield f"{name:<9} {options.asked}: {', '.join(options.levels)}, by {options.judge}"
