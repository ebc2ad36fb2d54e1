"""The chosen model beside other models' answers to the same prompts: won, tied or lost, by judges or by people.

  round_07/compare-alpaca.gpt4        a stage for each file and judge: one that is added later makes only its own
  round_07/compare-alpaca.human_1

With two judges or raters the report has their tie-discounted agreement.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from alma_jax import names
from alma_jax.corpus.normalise import prompt_id
from alma_jax.errors import RunError, waited
from alma_jax.evals import answers
from alma_jax.judges import human, pairwise
from alma_jax.judges.contract import Answered, check_missing
from alma_jax.options import Checked, ConfigError, labelled, option
from alma_jax.runtime.host import Host
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards, statistics
from alma_jax.store.handles import PromptSet
from alma_jax.store.records import Answer, Compared
from alma_jax.store.runs import Artefact, Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
  """Files and judges are written "NAME=WHAT", as in the section `eval`; "human" is a form that people fill in."""

  against: tuple[str, ...] = ()  # files of other models' answers, in any layout of `evaluate grade`
  asked: str = "test"  # the set that they answer
  judges: tuple[str, ...] = ()
  raters: int = option(1, least=1)  # people; each fills in a form of their own
  margin: float = option(0.0, least=0)  # a judge of single answers: scores that differ by at most this are a tie

  def __post_init__(self) -> None:
    super().__post_init__()
    for spec in self.named_judges.values():
      names.check(names.EVALUATORS, spec, "judges")
    labelled("against", self.against)
    if self.against and not self.judges:
      raise ConfigError("judges is empty, and against names answers to compare with: say who compares, or 'human'")

  @property
  def named_judges(self) -> dict[str, str]:
    return labelled("judges", [entry for entry in self.judges if entry != human.HUMAN])

  @property
  def files(self) -> dict[str, str]:
    return labelled("against", self.against)

  @property
  def people(self) -> list[str]:
    return [f"{human.HUMAN}_{i}" for i in range(1, self.raters + 1)] if human.HUMAN in self.judges else []


def check(host: Host, options: Options) -> None:
  """Raise a UserError where a file cannot be read or a judge cannot be made."""
  for file in options.files.values():
    _others(file)
  for name, spec in options.named_judges.items():
    pairwise.made(host, options, spec, options.margin, f"compare.judges, {name}")


def check_shared(options: Options, sets: Sequence[PromptSet]) -> None:
  """Raise a RunError where a file answers none of the prompts that are asked: before anything is trained."""
  for asked in sets:
    if asked.name == options.asked:
      mine = {prompt_id(row.messages) for row in asked.rows}
      for file in options.files.values():
        _shared(mine, _others(file), file, asked.name)


def _shared(mine: Collection[str], theirs: Mapping[str, str], file: str, asked: str) -> list[str]:
  """The prompts that the file answers, too, in the order of `mine`."""
  common = [prompt for prompt in mine if prompt in theirs]
  if not common:
    raise RunError(f"compare.against: {file} answers none of the {len(mine):,} prompts of {asked}")
  return common


def build(s: Session[Any], answered: Artefact[Answer], options: Options) -> list[Artefact[Compared]]:
  """One artefact for each file and judge."""
  mine = {row.prompt_id: row for row in answered.read()}  # the first of several answers
  return waited(_steps(s, answered, mine, options))


def _steps(
  s: Session[Any], answered: Artefact[Answer], mine: Mapping[str, Answer], options: Options
) -> Iterator[Callable[[], Artefact[Compared]]]:
  judges = {
    name: pairwise.made(s.host, options, spec, options.margin, f"compare.judges, {name}")
    for name, spec in options.named_judges.items()
  }
  for model, file in options.files.items():
    for name in (*judges, *options.people):
      yield functools.partial(_compared, s, answered, mine, model, file, name, judges.get(name))


def _compared(
  s: Session[Any],
  answered: Artefact[Answer],
  mine: Mapping[str, Answer],
  model: str,
  file: str,
  name: str,
  judge: pairwise.PairJudge | None,
) -> Artefact[Compared]:
  by = judge.identity if judge else f"a person, {name}"
  fields = {"file": shards.digest(file), "judge": by}
  stage = s.stage(f"{layout.COMPARED}-{model}.{name}", fields, {"answers": answered})
  if stage.done:
    return Artefact(stage, Compared)
  theirs = _others(file)
  common = _shared(mine, theirs, file, answered.name)
  asked = common if judge is None or s.run.process == 0 else []  # an endpoint is asked by one host
  found = _shares(s, stage, {p: mine[p] for p in asked}, theirs, name, judge) if asked else []
  if stage.mine(1):
    stage.write_part(0, 1, [Compared(p, share) for p, share in zip(asked, found, strict=True)], Compared)
  known = [share for share in found if share is not None]
  numbers = {word: _mean([float(sign(x)) for x in known]) for word, sign in OUTCOMES.items()}
  stage.finish(counts={"without_an_answer": len(mine) - len(common)}, model=model, judge=by, outcomes=numbers)
  s.display.say(f"{stage.name}: {in_words(stage.manifest)}")
  check_missing(by, len(found) - len(known), len(found))
  return Artefact(stage, Compared)


def _shares(
  s: Session[Any],
  stage: Stage,
  mine: Mapping[str, Answer],
  theirs: Mapping[str, str],
  name: str,
  judge: pairwise.PairJudge | None,
) -> list[float | None]:
  if judge is None:
    pairs = [human.Pair(human.shown(row.messages), row.response, theirs[p]) for p, row in mine.items()]
    return list(human.compared(s, stage, stage.name.rpartition("/")[2], pairs))
  contests = [
    pairwise.Contest(Answered(row.messages, row.response, row.finished), Answered(row.messages, theirs[p]))
    for p, row in mine.items()
  ]
  with s.display.bar(stage.name, len(contests), "pairs") as bar:
    return judge.shares(contests, bar)


def won(share: float) -> bool:
  return share > 0.5


def tied(share: float) -> bool:
  return share == 0.5


def lost(share: float) -> bool:
  return share < 0.5


OUTCOMES = {"win": won, "tie": tied, "lose": lost}


def in_words(manifest: Mapping[str, Any]) -> str:
  """ "53 % won, 21 % tied, 26 % lost against alpaca (n = 300)"."""
  win, tie, lose = (manifest["outcomes"][word] for word in OUTCOMES)
  if not win:
    return f"no verdict against {manifest['model']}"
  shares = f"{win['value']:.0%} won, {tie['value']:.0%} tied, {lose['value']:.0%} lost"
  return f"{shares} against {manifest['model']} (n = {win['n']:,}), by {manifest['judge']}"


def _mean(values: list[float]) -> dict[str, Any] | None:
  mean = statistics.mean(values)
  return dataclasses.asdict(mean) if mean else None


def _others(file: str) -> dict[str, str]:
  """The first answer of another model to each prompt, by the prompt's id."""
  found: dict[str, str] = {}
  for row in answers.read(file):
    if not row.turns or not row.answers:
      raise answers.AnswersError(f"{row.where}: a row of answers to compare with needs a prompt and a response")
    asked = prompt_id(({"role": "user", "content": row.turns[0]},))
    found.setdefault(asked, row.answers[0])
  return found
