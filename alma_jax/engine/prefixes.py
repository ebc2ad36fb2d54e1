"""What many prompts begin with: groups of prompts whose common head is worth computing once.

Few-shot contexts share their header and first examples, evaluation prompts of a base model all their examples. Sorted,
prompts that begin alike are neighbours; `plan` cuts the sorted row into groups where that saves the most tokens.
"""

import itertools

COST = 256  # tokens that a head must save to pay: a pass over one short row is mostly overhead


def plan(prompts):
  """[(length of the head, [indices into prompts])]: every prompt once, the shortest first within a group.

  The head is shorter than each prompt of its group, so that every prompt keeps a last token of its own.
  """
  order = sorted(range(len(prompts)), key=lambda i: prompts[i])
  common = [_common(prompts[a], prompts[b]) for a, b in itertools.pairwise(order)]
  shortest = lambda members: sorted(members, key=lambda i: (len(prompts[i]), i))
  return [(head, shortest(members)) for head, members in _groups(prompts, order, common)]


def _groups(prompts, order, common):
  """The best groups of the sorted prompts: of each range that shares something, from the longest heads down.

  A range splits where its neighbours share least. A part that saves more with a longer head of its own stands alone,
  the others share this range's head. (An explicit stack: nested prompts can be as deep as there are prompts.)
  """
  found, stack = {}, [(0, len(order), None)] if order else []
  while stack:
    start, end, parts = stack.pop()
    members = order[start:end]
    if len(members) == 1:
      found[start, end] = 0, [(0, members)]
    elif parts is None:
      shared = min(common[start : end - 1])
      cuts = [start, *(i + 1 for i in range(start, end - 1) if common[i] == shared), end]
      parts = list(itertools.pairwise(cuts))
      stack += [(start, end, parts), *((*part, None) for part in parts)]
    else:
      # The parts' best is known by now.
      best = {part: found.pop(part) for part in parts}
      head = min(min(common[start : end - 1]), min(len(prompts[i]) for i in members) - 1)
      found[start, end] = max((_with_head(order, best, h) for h in (head, 0)), key=lambda option: option[0])
  return found[0, len(order)][1] if order else []


def _with_head(order, best, head):
  """(tokens saved, groups) if the parts that save no more on their own share a head of this length."""
  alone = [part for part, (saved, _) in best.items() if saved > head * (part[1] - part[0])]
  rest = [i for part in best if part not in alone for i in order[slice(*part)]]
  saved = sum(best[part][0] for part in alone) + (head * (len(rest) - 1) - COST if head and rest else 0)
  return saved, [*(group for part in alone for group in best[part][1]), *([(head, rest)] if rest else [])]


def _common(a, b):
  n = min(len(a), len(b))
  return next((i for i in range(n) if a[i] != b[i]), n)
