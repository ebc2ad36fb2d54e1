"""The answers and the grades of a run, round by round, as the commands of `evaluate` read them.

for found in answered(run):                      # every round and set whose answers are finished
  found.name, found.items(about(run, files))     # "round 2"; Items with the prompts' categories and rows
scores(run, 2, "", "truth")                      # {prompt id: score}
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from alma_jax.errors import RunError
from alma_jax.evals import protocols, sets
from alma_jax.evals.protocols import Item
from alma_jax.store import data, layout, shards
from alma_jax.store.records import Answer, Grade, Turns

Said = tuple[tuple[str, str], ...]  # a conversation as role and content of its turns
About = Mapping[Said, Mapping[str, Any]]  # the fields of the rows of a set, by the conversation


@dataclasses.dataclass(frozen=True)
class Answered:
  """The finished answers of a round to a set."""

  run: pathlib.Path
  round: int
  chosen: str  # the set; layout.MAIN_SET for data.eval

  @property
  def name(self) -> str:
    return f"round {self.round}"

  @property
  def stage(self) -> str:
    return layout.stage_name(self.round, layout.answers_name(self.chosen))

  @property
  def digest(self) -> str:
    """Of the answers."""
    return layout.load_manifest(self.run / self.stage)["content"]

  def records(self) -> list[Answer]:
    return shards.read_records(layout.parts_of(self.run / self.stage) or [], Answer)

  def categories(self, about: About) -> dict[str, str]:
    """The category of each prompt that has one."""
    rows = {answer.prompt_id: about.get(said(answer.messages)) for answer in self.records()} if about else {}
    return {id: str(row["category"]) for id, row in rows.items() if row and row.get("category")}

  def items(self, about: About, against: "Answered | None" = None) -> list[Item]:
    """An item for each answer, with that of another round to the same prompt where it is asked for."""
    others = {} if against is None else {answer.prompt_id: answer.response for answer in against.records()}
    found = []
    for answer in self.records():
      item = protocols.item_of(answer.prompt_id, answer.messages, answer.response)
      baseline = (*item.answers[:-1], others[answer.prompt_id]) if answer.prompt_id in others else ()
      row = about.get(said(answer.messages))
      category = str((row or {}).get("category") or "")
      found.append(dataclasses.replace(item, baseline=baseline, category=category, row=row))
    if against is not None and (lost := [item.id for item in found if not item.baseline]):
      raise RunError(f"{self.stage} and {against.stage} answer different prompts: {len(lost):,}, the first {lost[0]}")
    return found


def answered(run: pathlib.Path) -> Iterator[Answered]:
  """The finished answers of all rounds, set by set; a RunError if there are none."""
  found = [Answered(run, round, chosen) for round in layout.rounds(run) for chosen in layout.sets_of(run, round)]
  if not found:
    raise RunError(f"{run}: no round has been evaluated yet")
  return iter(sorted(found, key=_by_set))


def _by_set(found: Answered) -> tuple[str, int]:
  return found.chosen, found.round


def about(run: pathlib.Path, chosen: str, files: Mapping[str, str]) -> About:
  """The fields of a set's prompts: of its file where that is still there, of data.eval what the run keeps."""
  if chosen == layout.MAIN_SET:
    path = run / layout.SEEDS / "eval.jsonl"
    rows = data.load_examples(path, ())[0] if path.is_file() else []
    return {said(row.messages): {"category": row.category} for row in rows}
  file = files.get(chosen)
  if file is None or not pathlib.Path(file).is_file():
    return {}
  return {said(q.messages): {**q.row, "category": q.category} for q in sets.read(file).questions}


def said(messages: Turns) -> Said:
  return tuple((turn["role"], turn["content"]) for turn in messages)


def scores(run: pathlib.Path, round: int, chosen: str, judge: str) -> dict[str, float]:
  """A judge's scores of a round's answers by prompt; those without a score are left out."""
  stage = layout.grades_name(layout.stage_name(round, layout.answers_name(chosen)), judge)
  grades = shards.read_records(layout.parts_of(run / stage) or [], Grade)
  return {grade.prompt_id: grade.score for grade in grades if grade.score is not None}


def identity(run: pathlib.Path, round: int, chosen: str, judge: str) -> str:
  """Who graded: the judge's name in the run, and its identity."""
  stage = layout.grades_name(layout.stage_name(round, layout.answers_name(chosen)), judge)
  return f"{judge}: {layout.load_manifest(run / stage)['judge']['identity']}"
