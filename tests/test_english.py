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
  return list(itertools.islice(corpus.documents(0, TEXTS, corpus.evaluation()[1], corpus.WEB), COUNT))


def prompts_of(documents: list[tuple[str, str]]) -> list[str]:
  return [prompt for _, text in documents for prompt in re.findall(r"^(?:Task:|#) (.*)$", text, re.MULTILINE)]


def test_a_seed_fixes_the_corpus(documents: list[tuple[str, str]]) -> None:
  """Also from one process to the next: sets and hashes of strings have no part in it."""
  again = list(itertools.islice(corpus.documents(0, TEXTS, corpus.evaluation()[1], corpus.WEB), 200))
  assert again == documents[:200]
  assert list(itertools.islice(corpus.documents(1, TEXTS, set(), corpus.WEB), 200)) != again
  told = "\n".join(text for _, text in documents[:50])
  assert hashlib.sha256(told.encode()).hexdigest()[:16] == "aff4169866f96ca0"


def test_no_evaluation_prompt_is_read(documents: list[tuple[str, str]]) -> None:
  evaluated, taken = corpus.evaluation()
  assert len(evaluated) == len(taken) == corpus.EVALUATED
  prompts = prompts_of(documents)
  assert len(prompts) > COUNT
  assert not taken & {key(prompt) for prompt in prompts}
  seen = {key(prompt) for prompt in prompts[:1000]}
  fresh = prompts_of(list(itertools.islice(corpus.documents(0, TEXTS, seen, corpus.WEB), COUNT)))
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


def test_written_verdicts_and_ratings_are_true(documents: list[tuple[str, str]]) -> None:
  """Clauses are read back from the documents, and texts are judged anew."""
  found, seen = set(), set()
  for _, text in [document for document in documents if document[0] in ("check", "rated")][:400]:
    lines = dict(line.split(": ", 1) for line in text.split("\n"))
    verdicts = re.findall(r"(\S.*?) (yes|no)[.]", lines["Check"])
    for clause, verdict in verdicts:
      asked = corpus.read_task(f"{clause}.")
      assert asked and asked.kept(lines["Answer"]) == [verdict == "yes"]
      found.add((asked.constraints[0].kind, verdict))
    if "Task" in lines:
      asked = corpus.read_task(lines["Task"])
      assert asked and lines["Rating"] == str(asked.rating(lines["Answer"]))
      assert " ".join(f"{clause}." for clause, _ in verdicts) == asked.prompt
      seen.add(lines["Rating"])
  assert found == {(kind, verdict) for kind in corpus.KINDS for verdict in ("yes", "no")}
  assert seen == {"0", "3", "5", "7", "10"}


def test_a_roll_tells_the_words_of_its_text(documents: list[tuple[str, str]]) -> None:
  for _, text in [document for document in documents if document[0] == "roll"]:
    before, after = text.split(". Seen: ")
    here = set(before.replace(",", "").split()[1:])
    assert all((word in here) == (verdict == "yes") for word, verdict in map(str.split, after.split(", ")))


def test_a_prompt_says_its_task() -> None:
  for task in corpus.evaluation()[0]:
    assert corpus.read_task(task.prompt) == task
  assert corpus.read_task("Write about the fox. Sing.") is corpus.read_task("") is None


def test_writers_keep_what_they_mean_to_keep() -> None:
  rng, kept = random.Random(0), 0
  for _ in range(300):
    task = corpus.draw_task(rng, even=True)
    kept += task.rating(corpus.answer(rng, task, set())) == 10
  assert kept >= 295
