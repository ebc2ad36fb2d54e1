"""The protocols: texts to the byte, requests, verdicts read or missing, games combined; numbers by hand."""

import dataclasses
import hashlib
import math

import numpy as np
import pytest

from alma_jax.evals import prompts, protocols, scoring
from alma_jax.evals.protocols import Grade, Item, Reply
from alma_jax.text.judge import A2

ALMA = (A2.instruction, A2.item)


def of(name):
  return protocols.of_name(name, ALMA)


def one(answer="Four {answer}.", baseline="4", turns=("2 + 2?",), **more):
  return Item("q1", turns, (answer,), (baseline,), **more)


# Texts

SHA256 = {  # the first 16 digits, of the published files: alpaca_eval 0.6.6, arena-hard-auto 196f6b8, FastChat 0e6d3e4
  "MT_BENCH": "0935c7ff79f38d3f",
  "MT_BENCH_REFERENCE": "8e11dbbf609a3d6f",
  "MT_BENCH_SECOND_SYSTEM": "d1e77aa107f02dd8",
  "MT_BENCH_SECOND": "33067cf18206b4ab",
  "MT_BENCH_SECOND_REFERENCE_SYSTEM": "4b8fe8086dbdf4a8",
  "MT_BENCH_SECOND_REFERENCE": "6a2b8ad2961c275c",
  "ALPACA_EVAL_SYSTEM": "4c93a9a9d5102753",
  "ALPACA_EVAL": "83eb2e1a91755f61",
  "ARENA_HARD_SYSTEM": "03f68010febd7a64",
  "ARENA_HARD_CREATIVE_SYSTEM": "171489efbca7f19f",
}


@pytest.mark.parametrize("name", SHA256)
def test_a_published_text_is_there_letter_by_letter(name):
  assert hashlib.sha256(getattr(prompts, name).encode()).hexdigest()[:16] == SHA256[name]


def test_no_text_is_left_unfilled_and_what_is_filled_in_is_not_filled_again():
  item = one("I say {question} and {output_2}.", "[[A]]", category="math", references=("four",))
  for name in protocols.NAMES:
    for ask in of(name).asks(item):
      text = ask.messages[-1]["content"]
      assert "2 + 2?" in text and "I say {question} and {output_2}." in text
      assert not [
        part
        for part in ("{question}", "{answer", "{ref_", "{instruction}")
        if part in text.replace("I say {question}", "")
      ]


def test_the_digest_changes_with_text_and_decoding():
  judge = of("mt_bench")
  others = [dataclasses.replace(judge, decoding={"temperature": 1}), dataclasses.replace(judge, texts=("x",) * 7)]
  assert len({judge.digest, *(x.digest for x in others), *(of(name).digest for name in protocols.NAMES)}) == 9
  assert of("mt_bench").digest == judge.digest


# One answer


@pytest.mark.parametrize(
  "name, said, found",
  [
    ("alma", "Rating: [[7]]", 7.0),
    ("alma", "[[8.5]] [[2]]", 8.5),
    ("alma", "Rating: [[0]]", 0.0),
    ("alma", "[[11]]", None),
    ("alma", "7", None),
    ("alma", "", None),
    ("mt_bench", "It is good. Rating: [[9]]", 9.0),
    ("mt_bench", "Rating: [6.5]", 6.5),
    ("mt_bench", "In [2023] nothing. Rating 5", None),
    ("mt_bench", "Rating: nine", None),
    ("lima_1_6", "Because ...\n4\n4", 4.0),
    ("lima_1_6", 'Because ...\n\n"5".\n', 5.0),
    ("lima_1_6", "4 or 5", None),
    ("lima_1_6", "7", None),
    ("lima_1_6", "", None),
  ],
)
def test_a_rating_is_read_or_missing(name, said, found):
  assert of(name).read(Reply(said)) == found


def test_alma_asks_with_the_papers_text():
  (ask,) = of("alma").asks(one(" Four. "))
  assert ask.messages == ({"role": "user", "content": A2.instruction + "# Prompt:\n2 + 2?\n\n# Response:\nFour."},)
  assert ask.decoding["temperature"] == 0 and ask.part == "turn_1"


def test_mt_bench_asks_about_both_turns_and_with_references_where_the_category_needs_them():
  item = Item("81", ("First?", "Second?"), ("one", "two"), category="writing")
  first, second = of("mt_bench").asks(item)
  assert first.messages[0]["content"] == "You are a helpful assistant."
  assert "[Question]\nFirst?\n" in first.messages[1]["content"] and "Second?" not in first.messages[1]["content"]
  assert second.messages[0]["content"].endswith('for example: "Rating: [[5]]".\n\n')
  assert "### User:\nSecond?\n\n### Assistant A:\ntwo\n" in second.messages[1]["content"]
  math_item = dataclasses.replace(item, category="math", references=("1", "2"))
  first, second = of("mt_bench").asks(math_item)
  assert "[The Start of Reference Answer]\n1\n" in first.messages[1]["content"]
  assert "### Reference answer:\n2\n" in second.messages[1]["content"]
  with pytest.raises(protocols.ProtocolError, match=r"81 is of the category 'math'.* each of its 2 answers; it has 0"):
    of("mt_bench").asks(dataclasses.replace(math_item, references=()))


def test_mt_benchs_grade_is_the_mean_of_what_is_there():
  judge, item = of("mt_bench"), Item("81", ("a", "b"), ("1", "2"))
  asks = judge.asks(item)
  assert judge.grade(asks, [7.0, 4.0]) == Grade(5.5, {"turn_1": 7.0, "turn_2": 4.0})
  assert judge.grade(asks, [7.0, None]).score == 7 and judge.grade(asks, [None, None]).score is None


# Two answers


def test_alpaca_eval_reads_log_probabilities_and_undoes_the_order():
  judge = of("alpaca_eval")
  tokens = (("M", math.log(0.6)), ("m", math.log(0.2)), ("The", math.log(0.1)))
  assert judge.read(Reply("M", tokens)) == pytest.approx(2 - 0.25)
  assert judge.read(Reply("M", (("M", -0.1), ("x", -3.0)))) == 2 and judge.read(Reply("m", (("m", -5.0),))) == 1
  assert judge.read(Reply("M", (("Both", -0.1),))) is None and judge.read(Reply("M")) is None
  orders = {}
  for question in ("Say 1.", "Say 2.", "Say 3.", "Say 4."):
    (ask,) = judge.asks(one("model's", "baseline's", (question,)))
    text = ask.messages[1]["content"]
    assert (text.index("model's") < text.index("baseline's")) == ask.swapped
    orders[ask.swapped] = ask
    # 0.25 for the first answer: 0.75 for the model if it stands second
    assert judge.grade([ask], [1.75]).score == pytest.approx(0.25 if ask.swapped else 0.75)
  assert set(orders) == {True, False}
  assert judge.grade([orders[True]], [1.75]).parts == {"preference": pytest.approx(1.25)}


def test_alpaca_evals_equal_answers_are_a_tie_without_a_request():
  judge = of("alpaca_eval")
  assert judge.asks(one("4", "4")) == [] and judge.grade([], []) == Grade(0.5, {"preference": 1.5})


@pytest.mark.parametrize(
  "labels, score",
  [(("B", "A"), 1), (("A", "B"), 0), (("B", "C"), 1), (("C", "B"), 0), (("A", "A"), 0.5), (("C", "C"), 0.5)],
)
def test_limas_two_games_make_one_verdict(labels, score):
  judge = of("lima_pairwise")
  asks = judge.asks(one("model's", "baseline's"))
  assert [
    ask.messages[0]["content"].index("model's") < ask.messages[0]["content"].index("baseline's") for ask in asks
  ] == [
    False,
    True,
  ]
  assert judge.grade(asks, labels).score == score
  assert judge.grade(asks, [labels[0], None]).score is None


def test_limas_label_is_read_or_missing():
  judge = of("lima_pairwise")
  assert judge.read(Reply("So ...\n[[C]]")) == "C" and judge.read(Reply("[[A]] no, [[B]]")) is None
  assert judge.read(Reply("A")) is None


@pytest.mark.parametrize(
  "said, then, now",
  [
    ("My final verdict is tie: [[A=B]]", "A=B", "A=B"),
    ("[[A>B]] ... [[A>B]]", "A>B", "A>B"),
    ("[[A>B]] ... [[B>>A]]", None, "B>>A"),
    ("[[a>>b]]", None, "A>>B"),
    ("[A>B]", None, "A>B"),
    ("[[B<<A]]", None, "A>>B"),
    ("[[A>>>B]]", None, None),
    ("no label", None, None),
  ],
)
def test_arena_hards_label_by_either_edition(said, then, now):
  assert of("arena_hard_2024").read(Reply(said)) == then and of("arena_hard_2025").read(Reply(said)) == now


def test_arena_hard_counts_clear_wins_three_times_and_drops_by_edition():
  old, new = of("arena_hard_2024"), of("arena_hard_2025")
  asks = old.asks(one("model's", "baseline's"))
  # game_1: the baseline is A and wins a little; game_2: the model is A and wins clearly.
  assert old.grade(asks, ["A>B", "A>>B"]) == Grade(0.75, {"game_1": "A>B", "game_2": "A>>B"}, (0.0, 1.0, 1.0, 1.0))
  assert new.grade(asks, ["A>B", "A>>B"]).battles == (0.0, 1.0, 1.0, 1.0)
  assert old.grade(asks, ["B>>A", "A=B"]).battles == (1.0, 1.0, 1.0, 0.5)
  assert old.grade(asks, [None, "A>B"]).battles == (1.0,) and new.grade(asks, [None, "A>B"]).score is None
  assert old.grade(asks, [None, None]).score is None


def test_only_arena_hards_first_edition_asks_once_more():
  judge, (ask, _) = of("arena_hard_2024"), of("arena_hard_2024").asks(one())
  again = judge.again(ask, Reply("I think"))
  assert again is not None and [m["role"] for m in again.messages] == ["system", "user", "assistant", "user"]
  assert again.messages[-1]["content"].startswith("continue your judgment and finish by")
  assert judge.again(again, Reply("I still think")) is None
  assert judge.again(ask, Reply("[[A>B]] [[B>A]]")) is None and of("arena_hard_2025").again(ask, Reply("")) is None


def test_creative_writing_has_its_own_system_text():
  judge = of("arena_hard_2025")
  assert judge.asks(one(category="creative_writing"))[0].messages[0]["content"] == prompts.ARENA_HARD_CREATIVE_SYSTEM
  assert judge.asks(one(category="hard_prompt"))[0].messages[0]["content"] == prompts.ARENA_HARD_SYSTEM


def test_a_comparison_without_the_other_answer_is_refused():
  with pytest.raises(protocols.ProtocolError, match=r"q1 has 1 turns, 1 answers and 0 of the model .*--against"):
    of("arena_hard_2024").asks(Item("q1", ("?",), ("!",)))
  with pytest.raises(protocols.ProtocolError, match="no protocol 'mtbench'; there are alma, mt_bench"):
    of("mtbench")


# Numbers


def test_win_rate_with_ties_and_missing_by_hand():
  found = scoring.win_rate([1.0, 0.5, 0.2, None])
  # mean of 1, .5, .2; the standard error is sd(1, .5, .2) / sqrt(3) = .404145 / 1.732051
  assert found.value == pytest.approx(56.666667) and found.standard_error == pytest.approx(23.333333)
  assert (found.discrete, found.wins, found.losses, found.ties, found.n, found.missing) == (50.0, 1, 1, 1, 3, 1)
  with pytest.raises(scoring.ScoringError, match="none of the 2 questions has a verdict"):
    scoring.win_rate([None, None])


def test_mt_benchs_average_is_over_all_ratings():
  ratings = [(1, 1, "math", 9), (1, 2, "math", 4), (2, 1, "writing", 8), (2, 2, "writing", None)]
  found = scoring.mt_bench([scoring.Rated(*x) for x in ratings])
  assert found.average == 7 and found.turns == {1: 8.5, 2: 4.0} and found.categories == {"math": 6.5, "writing": 8.0}
  assert (found.n, found.missing) == (3, 1)  # the mean of the turns' means would be 6.25


def test_arena_hards_score_is_the_bradley_terry_win_rate():
  battles = [(0.0, 1.0, 1.0, 1.0), (0.5, 0.0), (), (1.0,)]
  found = scoring.arena_hard(battles)
  assert found.value == pytest.approx(100 * 4.5 / 7) and (found.battles, found.questions, found.missing) == (7, 3, 1)
  # The first edition's own way: Elo by logistic regression in base 10, scale 400, from 1000, a tie as half a win each.
  flat, rating = np.concatenate([x for x in battles if x]), 0.0
  for _ in range(60):
    p = 1 / (1 + 10 ** (-rating / 400))
    rating += 400 / math.log(10) * np.sum(flat - p) / (len(flat) * p * (1 - p))
  assert found.value == pytest.approx(100 / (1 + 10 ** ((1000 - (1000 + rating)) / 400)))


def test_games_that_agree_are_counted():
  assert scoring.consistent([(1.0, 1.0), (0.0, 1.0), (0.5, 0.5), (None, 1.0)]) == pytest.approx(2 / 3)
  assert scoring.consistent([]) is None


def annotations(seed, n, model, length, difficulty):
  """Synthetic annotations whose shares follow AlpacaEval's model, with noise."""
  rng = np.random.default_rng(seed)
  d = rng.normal(0, 1, n)
  own, baseline = rng.integers(200, 3000, n), rng.integers(200, 3000, n)
  shift = np.tanh((baseline - own) / (baseline - own).std(ddof=1))
  p = 1 / (1 + np.exp(-(length * shift + difficulty * d + model + rng.normal(0, 1.0, n))))
  rows = [scoring.Compared(*x) for x in zip(p, own, baseline, d, strict=True)]
  far = rng.normal(0, 1.5, 2 * n)
  again = np.tile(d, 2)
  gamed = 1 / (1 + np.exp(-(length * np.tanh(far) + difficulty * again + rng.normal(0, 0.5, 2 * n))))
  return rows, [scoring.Gamed(*x) for x in zip(gamed, far, again, strict=True)]


@pytest.mark.parametrize("seed, model", [(0, -1.0), (1, 0.4), (2, -2.5)])
def test_length_controlled_agrees_with_alpaca_evals_recipe_in_scikit_learn(seed, model):
  linear, selection = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.model_selection")
  rows, gamed = annotations(seed, 805, model, -0.8, 0.6)
  found = scoring.length_controlled(rows, gamed)
  # The recipe: soft targets as two rows with weights p and 1 - p, an L1 penalty, 5 folds that keep both rows together.
  delta = np.array([x.baseline_characters - x.characters for x in rows], float)
  own = np.stack([np.tanh(delta / delta.std(ddof=1)), [x.difficulty for x in rows], np.ones(len(rows))], 1)
  x = np.concatenate([own, [[math.tanh(g.length), g.difficulty, 0.0] for g in gamed]])
  p = np.array([r.share for r in (*rows, *gamed)])
  weight = np.r_[np.ones(len(rows)), np.full(len(gamed), 0.1)]
  groups = np.tile(np.arange(len(x)), 2)
  folds = list(selection.GroupKFold(5).split(np.tile(x, (2, 1)), groups=groups))
  losses = []
  for c in np.logspace(-4, 4, 10):
    fit = linear.LogisticRegression(C=c, l1_ratio=1, solver="liblinear", fit_intercept=False, random_state=123)
    held = 0.0
    for train, test in folds:
      fit.fit(
        np.tile(x, (2, 1))[train],
        np.r_[np.ones(len(x)), np.zeros(len(x))][train],
        np.r_[p * weight, (1 - p) * weight][train],
      )
      q = fit.predict_proba(np.tile(x, (2, 1))[test])[:, 1]
      held -= np.sum(np.r_[p * weight, (1 - p) * weight][test] * np.where(test < len(x), np.log(q), np.log(1 - q)))
    losses.append((held, c))
  fit = linear.LogisticRegression(
    C=min(losses)[1], l1_ratio=1, solver="liblinear", fit_intercept=False, random_state=123
  )
  fit.fit(np.tile(x, (2, 1)), np.r_[np.ones(len(x)), np.zeros(len(x))], np.r_[p * weight, (1 - p) * weight])
  official = 100 * (1 / (1 + np.exp(-own[:, 1:] @ fit.coef_[0, 1:]))).mean()
  assert found.value == pytest.approx(official, abs=0.15)
  raw = 100 * np.mean([r.share for r in rows])
  assert found.standard_error is not None and abs(raw - found.value) < 20


def test_length_controlled_says_what_it_needs():
  row = scoring.Compared(0.5, 10, 20, 0.1)
  with pytest.raises(scoring.ScoringError, match="at least 2 questions"):
    scoring.length_controlled([row])
  with pytest.raises(scoring.ScoringError, match="by the same length"):
    scoring.length_controlled([row, row])
