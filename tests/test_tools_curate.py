"""Demonstrations from a dump of question-and-answer sites: HTML, rules, shares of the sources, the command."""

import json
import random

import pytest

from alma_jax.corpus import curate
from alma_jax.corpus.curate import Answer, Curated, Question, Rules
from alma_jax.corpus.plain import plain, prose
from alma_jax.store.data import load_examples
from alma_jax.tools import curate as tool

LONG = "<p>" + "A telescope gathers light in proportion to its area. " * 30 + "</p>"  # 1,560 characters


@pytest.mark.parametrize(
  ("html", "text"),
  [
    ("<p>One &amp; two,\n three.</p>\n\n<p>Four</p>", "One & two, three.\n\nFour"),
    ('See <a href="https://x.org">the manual</a><img src="a.png" alt="no">.', "See the manual."),
    ("<p>Use <code>x</code>:</p><pre>a:\n    y &lt; 1\n</pre>so", "Use `x`:\n\n```\na:\n    y < 1\n```\n\nso"),
    ("<ul><li>one</li><li><p>two</p><ol><li>a</li><li>b</li></ol></li></ul>end", "- one\n- two\n  1. a\n  2. b\n\nend"),
    ("<h2>Title</h2>text<br>more<hr/>last", "Title\n\ntext\nmore\n\nlast"),
    ("plain text, 1 < 2", "plain text, 1 < 2"),
    ("<p>open <b>bold", "open bold"),
  ],
)  # fmt: skip
def test_html_becomes_text_with_its_code_and_lists(html, text):
  assert plain(html) == text


def test_prose_is_the_text_without_code():
  assert "self" not in prose(plain("<p>Say <code>self.I</code></p><pre>my = self</pre><p>done</p>"))


def question(answer=LONG, score=12, **changes):
  values = dict(source="astronomy", group="", title="Why is a wide telescope better?", body="", score=5.0)
  return Question(**values | changes, answers=(Answer("<p>worse</p>", 1), Answer(answer, score)))


@pytest.mark.parametrize(
  ("changes", "why"),
  [
    ({}, "kept"),
    (dict(score=9), "score"),
    (dict(answer="<p>Its area.</p>"), "short"),
    (dict(answer=LONG * 3), "long"),
    (dict(answer=LONG + "<p>I use one.</p>"), "first_person"),
    (dict(answer=LONG + "<p>In my view it is.</p>"), "first_person"),
    (dict(answer=LONG + "<p>I'd say so.</p>"), "first_person"),
    (dict(answer=LONG + "<p>Section I/O, part i, Myra and a mime</p><pre>I = my</pre>"), "kept_or_first_person"),
    (dict(answer=LONG + "<p>As mentioned before, it is.</p>"), "reference"),
    (dict(answer=LONG + "<p>Ask on Stack Exchange.</p>"), "reference"),
    (dict(answer=LONG + "<p>The other answers are wrong.</p>"), "reference"),
    (dict(answer=LONG + "<p>@anna is right.</p>"), "reference"),
    (dict(answer=LONG + "<p>It answers that. Other telescopes do not.</p>"), "kept"),
    (dict(title="", body="<p> </p>"), "empty_prompt"),
  ],
)
def test_each_rule_leaves_out_what_it_names(changes, why):
  found = Curated(Rules(), 10)
  got = found.add(question(**changes))
  assert got == why if why != "kept_or_first_person" else got == "first_person"  # "I/O" reads as a first person
  assert found.counts["questions"] == found.counts[got] == 1
  everything = Rules(least_score=-1e9, least_characters=0, most_characters=10**9, first_person=False, references=False)
  assert Curated(everything, 10).add(question(**changes)) == ("empty_prompt" if why == "empty_prompt" else "kept")


def test_a_prompt_is_taken_once_and_is_the_title_or_the_body_at_random():
  found, prompts = Curated(Rules(), 100), []
  assert [found.add(question()), found.add(question())] == ["kept", "duplicate"]
  found = Curated(Rules(), 100)
  for i in range(60):
    found.add(question(title=f"title {i}", body=f"<p>body {i}</p>"))
  prompts = [x.prompt.split()[0] for x in found.sampled()]
  assert 15 < prompts.count("title") < 45 and len(prompts) == 60
  for kind in ("title", "body"):
    found = Curated(Rules(prompt=kind), 100)
    found.add(question(title="title", body="<p>body</p>"))
    assert [x.prompt for x in found.sampled()] == [kind]
  assert Curated(Rules(), 1).add(Question("a", "", "t", "", 1.0, ())) == "no_answer"


@pytest.mark.parametrize(
  ("sizes", "count", "temperature", "wanted"),
  [
    ([1000, 100, 1], 12, 3, [8, 3, 1]),
    ([1000, 1000], 5, 3, [3, 2]),
    ([900, 100], 10, 1, [9, 1]),
    ([2, 100, 100], 30, float("inf"), [2, 14, 14]),
    ([1, 1], 10, 3, [1, 1]),
    ([], 3, 3, []),
  ],
)
def test_sources_share_by_the_root_of_their_sizes(sizes, count, temperature, wanted):
  assert curate.quotas(sizes, count, temperature) == wanted


def test_the_best_questions_of_each_source_are_taken_whatever_the_order_and_groups_share_evenly():
  rng = random.Random(0)
  dump = [
    question(source=f"s{i % 3}", group="stem" if i % 3 else "other", title=f"why {i}?", score=12, body=f"<p>{i}</p>")
    for i in range(300)
  ]
  dump = [Question(**{**vars(q), "score": float(rng.randrange(40))}) for q in dump]
  samples = []
  for order in (dump, rng.sample(dump, len(dump))):
    found = Curated(Rules(prompt="title"), 20)
    for q in order:
      found.add(q)
    samples.append(found.sampled())
  assert samples[0] == samples[1]
  by_source = {s: [x.score for x in samples[0] if x.source == s] for s in ("s0", "s1", "s2")}
  assert {s: len(of) for s, of in by_source.items()} == {"s0": 10, "s1": 5, "s2": 5}
  for source, scores in by_source.items():
    assert scores == sorted((q.score for q in dump if q.source == source), reverse=True)[: len(scores)]


def test_the_command_writes_demonstrations_and_says_what_it_left_out(tmp_path, capsys):
  rows = [
    {"source": f"s{i % 2}", "title": f"why {i}?", "score": i, "answers": [{"body": LONG, "score": 10 + i % 3 - 1}]}
    for i in range(30)
  ]
  path, output = tmp_path / "dump.jsonl", tmp_path / "lima.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert tool.main([f"--input={path}", f"--output={output}", "--count=8"]) == 0
  made, _ = load_examples(output)
  assert len(made) == 8 and all(row.response.startswith("A telescope") for row in made)
  report = json.loads((tmp_path / "lima.jsonl.report.json").read_text())
  assert report["counts"] == {"questions": 30, "score": 10, "kept": 20} and report["sampled"] == 8
  assert [(x["source"], x["fit"], x["sampled"]) for x in report["sources"]] == [("s0", 10, 4), ("s1", 10, 4)]
  assert [x["line"] for x in report["left_out"]["score"]] == [1, 4, 7, 10, 13]
  before = output.read_bytes()
  assert tool.main([f"--input={path}", f"--output={output}", "--count=8"]) == 0 and output.read_bytes() == before
  assert "8 demonstrations from 2 sources; 30 questions, 20 pass; left out: score 10" in capsys.readouterr().out
  for broken, said in (
    ({"title": "x", "answers": []}, "line 31: `source` is missing or null; present: title, answers"),
    ({"source": "s", "answers": [{"text": "x"}]}, r'line 31, field answers[0]: expected {"body", "score"}'),
    ({"source": "s", "answers": [{"body": "x", "score": "9"}]}, 'line 31, field answers[0].score: expected a number'),
  ):  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, broken]))
    assert tool.main([f"--input={path}", f"--output={output}", "--count=8"]) == 1
    assert said in capsys.readouterr().err
  assert output.read_bytes() == before
