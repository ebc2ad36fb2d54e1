"""The English prototype's corpus: deterministic, free of evaluation prompts, and true by IFEval's own checks."""

import hashlib
import itertools
import random
import re

import pytest

from alma_jax.evals.instructions import checked
from alma_jax.mini.seeds import key
from benchmarks import english_corpus as corpus

TEXTS = ["The first paragraph of somebody else.", "Another one, which is longer."]
COUNT = 1500  # documents


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
  return list(itertools.islice(corpus.documents(0, TEXTS, corpus.evaluation()[1]), COUNT))


def prompts_of(documents: list[tuple[str, str]]) -> list[str]:
  return [prompt for _, text in documents for prompt in re.findall(r"^(?:Task:|#) (.*)$", text, re.MULTILINE)]


def test_a_seed_fixes_the_corpus(documents: list[tuple[str, str]]) -> None:
  """Also from one process to the next: sets and hashes of strings have no part in it."""
  again = list(itertools.islice(corpus.documents(0, TEXTS, corpus.evaluation()[1]), 200))
  assert again == documents[:200]
  assert list(itertools.islice(corpus.documents(1, TEXTS, set()), 200)) != again
  told = "\n".join(text for _, text in documents[:50])
  assert hashlib.sha256(told.encode()).hexdigest()[:16] == "872888449cd3f10d"


def test_no_evaluation_prompt_is_read(documents: list[tuple[str, str]]) -> None:
  evaluated, taken = corpus.evaluation()
  assert len(evaluated) == len(taken) == corpus.EVALUATED
  prompts = prompts_of(documents)
  assert len(prompts) > COUNT
  assert not taken & {key(prompt) for prompt in prompts}
  unrated = [document for document in documents if document[0] != "rated"]  # all have two constraints or more
  seen = {key(prompt) for prompt in prompts_of(unrated)}
  fresh = prompts_of(list(itertools.islice(corpus.documents(0, TEXTS, seen), COUNT)))
  assert not seen & {key(prompt) for prompt in fresh}  # the very stream that drew them


@pytest.mark.parametrize(
  ("kind", "value", "instruction", "arguments", "good", "bad"),
  [
    ("about", "fox", "keywords:existence", {"keywords": ["fox"]}, "A fox sat.", "A cat sat."),
    ("word", "lamp", "keywords:existence", {"keywords": ["lamp"]}, "My lamp was wet.", "My map was wet."),
    ("avoid", "my", "keywords:forbidden_words", {"forbidden_words": ["my"]}, "One lamp.", "My lamp."),
    ("end", "at last", "startend:end_checker", {"end_phrase": "at last."}, "He sat at last.", "At last he sat."),
    (
      "start", "Today", "length_constraints:nth_paragraph_first_word",
      {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "Today"}, "Today he sat.", "He sat today.",
    ),
    ("comma", None, "punctuation:no_comma", {}, "He sat and ran.", "He sat, and ran."),
  ],
)  # fmt: skip
def test_kinds_are_ifevals(
  kind: str, value: str | None, instruction: str, arguments: dict[str, object], good: str, bad: str
) -> None:
  asked = corpus.constraint(kind, () if value is None else (value,), "clause")
  official = checked(instruction, arguments, "test")
  assert asked.kept(good) and official.followed(good)
  assert not asked.kept(bad) and not official.followed(bad)
  assert not asked.kept(" ")


def test_count_is_exact_and_lower_has_no_capital() -> None:
  two = corpus.constraint("count", ("two sentences",), "clause")
  texts = ["The fox sat.", "The fox sat. A cat ran.", "The fox sat. A cat ran. The dog hid."]
  assert [two.kept(text) for text in texts] == [False, True, False]
  lower = corpus.constraint("lower", (), "clause")
  assert lower.kept("the fox sat.") and not lower.kept("The fox sat.") and not lower.kept("")


def test_written_ratings_are_true(documents: list[tuple[str, str]]) -> None:
  """Tasks are read back from their prompts, clause by clause, and texts are rated anew."""
  clauses = {}
  for kind, texts in {**corpus.CLAUSES, "about": [f"{opening} {{}}." for opening in corpus.ASKING]}.items():
    values = corpus.WORDS["P"] + corpus.WORDS["T"] if kind == "about" else corpus.VALUES.get(kind, [""])
    clauses |= {text.format(value): (kind, value) for text in texts for value in values}
  pattern = re.compile("|".join(re.escape(clause) for clause in sorted(clauses, key=len, reverse=True)))
  found = set()
  for _, text in [document for document in documents if document[0] == "rated"][:300]:
    task, *rest = text.split("\n")
    kinds = [clauses[clause] for clause in pattern.findall(task)]
    asked = [corpus.constraint(kind, (value,) if value else (), "") for kind, value in kinds]
    assert task.removeprefix("Task: ") == " ".join(pattern.findall(task))
    for said, mark in zip(rest[::2], rest[1::2], strict=True):
      kept = [constraint.kept(said.removeprefix("Answer: ")) for constraint in asked]
      assert mark == f"Rating: {round(10 * sum(kept) / len(kept))}"
      found.add(mark)
  assert found == {f"Rating: {mark}" for mark in (0, 3, 5, 7, 10)}


def test_writers_keep_what_they_mean_to_keep() -> None:
  rng, kept = random.Random(0), 0
  for _ in range(300):
    task = corpus.draw_task(rng, even=True)
    kept += task.rating(corpus.answer(rng, task, set())) == 10
  assert kept >= 295
