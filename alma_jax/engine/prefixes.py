"""Groups of prompts whose common head is worth computing once.

  for head, members in plan(prompts): ...   # prompts[i][:head] is the same for all i of members

Few-shot contexts share their header and first examples, evaluation prompts of a base model all their examples.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

COST = 256  # tokens that a head must save to pay: a pass over one short row is mostly overhead

Span = tuple[int, int]  # a part of the sorted prompts, without its end


class Group(NamedTuple):
  head: int  # how many tokens its prompts begin with in common; 0: they share nothing
  members: list[int]  # indices of prompts


class Option(NamedTuple):
  """One way to group a span of the sorted prompts."""

  saved: int  # tokens
  groups: list[Group]


def plan(prompts: Sequence[tuple[int, ...]]) -> list[Group]:
  """Groups that hold every prompt once, and within a group the shortest prompt first.

  A head is shorter than each prompt of its group, so that every prompt keeps a last token of its own. A head of h
  tokens saves h for each prompt but one, less COST. For a header H of 30 tokens and examples A, B of 90:

    sorted prompts    shared with the next    one head for all: H saves 30 x 39 - 256 = 914
    H A 1             120                     a head for each part: HA and HB save 2 x (120 x 19 - 256) = 4048
    ...               120
    H A 20             30   <- the span splits where neighbours share least
    H B 1             120
    ...               120                     plan: [(120, [the twenty of A]), (120, [the twenty of B])]
    H B 20
  """
  order = sorted(range(len(prompts)), key=lambda i: prompts[i])
  common = [_common(prompts[a], prompts[b]) for a, b in itertools.pairwise(order)]
  # An explicit stack: nested prompts can be as deep as there are prompts. A span is met twice, first without its
  # parts, which it then leaves on the stack above itself, and again when `found` has the best option of each part.
  found: dict[Span, Option] = {}
  stack: list[tuple[Span, list[Span] | None]] = [((0, len(order)), None)] if order else []
  while stack:
    (start, end), parts = stack.pop()
    members = order[start:end]
    if len(members) == 1:
      found[start, end] = Option(0, [Group(0, members)])
    elif parts is None:
      shared = min(common[start : end - 1])
      cuts = [start, *(i + 1 for i in range(start, end - 1) if common[i] == shared), end]
      parts = list(itertools.pairwise(cuts))
      stack += [((start, end), parts), *((part, None) for part in parts)]
    else:
      best = {part: found.pop(part) for part in parts}
      head = min(min(common[start : end - 1]), min(len(prompts[i]) for i in members) - 1)
      found[start, end] = max((_with_head(order, best, h) for h in (head, 0)), key=lambda option: option.saved)
  groups = found[0, len(order)].groups if order else []
  return [Group(head, sorted(members, key=lambda i: (len(prompts[i]), i))) for head, members in groups]


def _with_head(order: Sequence[int], best: Mapping[Span, Option], head: int) -> Option:
  """The option in which the parts share a head of this length, except those that save more on their own."""
  alone = [part for part, option in best.items() if option.saved > head * (part[1] - part[0])]
  rest = [i for part in best if part not in alone for i in order[slice(*part)]]
  saved = sum(best[part].saved for part in alone) + (head * (len(rest) - 1) - COST if head and rest else 0)
  return Option(
    saved, [*(group for part in alone for group in best[part].groups), *([Group(head, rest)] if rest else [])]
  )


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
  """How many tokens both begin with."""
  n = min(len(a), len(b))
  return next((i for i in range(n) if a[i] != b[i]), n)
