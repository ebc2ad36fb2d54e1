"""IFEval's verdicts and accuracies: strict on the response as it is, loose on it without first or last line or stars.

  asked = instructions_of(row, "set.jsonl, line 1")  # a row with "instruction_id_list" and "kwargs"
  verdict = verdict_of(asked, response)              # Followed(strict=(True, False), loose=(True, True))
  accuracies([verdict])["prompt_strict"]             # 0.0

A prompt counts as followed where all of its instructions are.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from alma_jax.evals.instructions import Instruction, InstructionError, checked


@dataclasses.dataclass(frozen=True)
class Followed:
  """Whether each of a prompt's instructions was followed."""

  strict: tuple[bool, ...]
  loose: tuple[bool, ...]


def instructions_of(row: Mapping[str, Any], where: str) -> tuple[Instruction, ...]:
  """The instructions of a row of the set; `where` begins the messages of its errors."""
  kinds, arguments = _list(row, "instruction_id_list", where), _list(row, "kwargs", where)
  if len(kinds) != len(arguments):
    raise InstructionError(f"{where}: {len(kinds)} items of instruction_id_list and {len(arguments)} of kwargs.")
  wrong = next((one for one in arguments if not isinstance(one, Mapping)), None)
  if wrong is not None:
    raise InstructionError(f"{where}, field kwargs: expected an object per instruction, found {wrong!r:.60}.")
  return tuple(checked(kind, one, where) for kind, one in zip(kinds, arguments, strict=True))


def _list(row: Mapping[str, Any], field: str, where: str) -> list[Any]:
  value = row.get(field)
  if not isinstance(value, list) or not value:
    found = f"found {value!r:.60}"
    raise InstructionError(f"{where}, field {field}: expected a list with an item per instruction, {found}.")
  return value


def verdict_of(instructions: Sequence[Instruction], response: str) -> Followed:
  texts = variants(response)
  strict = tuple(instruction.followed(response) for instruction in instructions)
  loose = tuple(
    followed or any(instruction.followed(text) for text in texts[1:])
    for instruction, followed in zip(instructions, strict, strict=True)
  )
  return Followed(strict, loose)


def variants(response: str) -> list[str]:
  """The response, and it without its first line, last line or both, each with and without stars; equal ones once."""
  lines = response.split("\n")
  cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
  return list(dict.fromkeys(text for whole in cut for text in (whole, whole.replace("*", ""))))


def accuracies(verdicts: Sequence[Followed]) -> dict[str, float]:
  """The four accuracies: of prompts, all of whose instructions were followed, and of instructions."""
  if not verdicts:
    raise ValueError("no verdicts")
  found = {}
  for level in ("strict", "loose"):
    followed = [getattr(verdict, level) for verdict in verdicts]
    found[f"prompt_{level}"] = sum(map(all, followed)) / len(followed)
    found[f"instruction_{level}"] = sum(map(sum, followed)) / sum(map(len, followed))
  return found


def by_kind(instructions: Sequence[Sequence[Instruction]], verdicts: Sequence[Followed]) -> dict[str, dict[str, float]]:
  """For each kind of instruction: how many there were, and the shares that were followed, strictly and loosely."""
  found: dict[str, list[tuple[bool, bool]]] = {}
  for asked, verdict in zip(instructions, verdicts, strict=True):
    for one, strict, loose in zip(asked, verdict.strict, verdict.loose, strict=True):
      found.setdefault(one.kind, []).append((strict, loose))
  return {
    kind: {"n": len(x), "strict": sum(s for s, _ in x) / len(x), "loose": sum(l for _, l in x) / len(x)}
    for kind, x in sorted(found.items())
  }
