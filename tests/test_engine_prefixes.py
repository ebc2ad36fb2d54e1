"""Shared heads of prompts: what is planned is always valid, and saves what can be saved in the cases that matter."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from alma_jax.engine import prefixes


def saved(prompts, plan):
  return sum(head * (len(members) - 1) - prefixes.COST for head, members in plan if head)


def check(prompts, plan):
  assert sorted(i for _, members in plan for i in members) == list(range(len(prompts)))
  for head, members in plan:
    assert len({prompts[i][:head] for i in members}) == 1
    assert all(len(prompts[i]) > head for i in members)
    assert [len(prompts[i]) for i in members] == sorted(len(prompts[i]) for i in members)
  assert saved(prompts, plan) >= 0


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple), max_size=30, unique=True))
@settings(max_examples=200, deadline=None)
def test_every_prompt_is_in_one_group_whose_head_it_begins_with(prompts):
  long = [tuple(itertools.chain.from_iterable([t] * 60 for t in p)) for p in prompts]  # so that heads pay
  check(long, prefixes.plan(long))
  check(prompts, prefixes.plan(prompts))


def test_contexts_that_share_a_header_and_the_first_example():
  header, tails = (1,) * 30, iter(range(10, 10**6))
  shots = [tuple([100 + s] * 90) for s in range(3)]
  prompts = [(*header, *shots[i % 3], *(next(tails) for _ in range(50 + i % 7))) for i in range(60)]
  plan = prefixes.plan(prompts)
  check(prompts, plan)
  assert sorted((head, len(members)) for head, members in plan) == [(120, 20)] * 3


def test_where_the_first_examples_differ_the_header_is_shared():
  tails = iter(range(10, 10**6))
  prompts = [((1,) * 80 + tuple(next(tails) for _ in range(9))) for _ in range(12)]
  assert [(head, len(members)) for head, members in prefixes.plan(prompts)] == [(80, 12)]


def test_few_or_short_heads_are_left_alone():
  assert [head for head, _ in prefixes.plan([(1, 2, 3, i) for i in range(20)])] == [0]
  assert [head for head, _ in prefixes.plan([(1,) * 200 + (i,) for i in range(2)])] == [0]


def test_prompts_that_begin_one_another_and_no_prompts():
  prompts = [(1,) * n for n in range(1, 3000)]  # deeper than Python's stack
  check(prompts, prefixes.plan(prompts))
  assert prefixes.plan([]) == []
