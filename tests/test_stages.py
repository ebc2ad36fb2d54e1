"""What stages decide on the host: selection, pairs, draws, the judge's targets."""

import ast
import collections
import dataclasses
import functools
import re
import types

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from alma_jax import start
from alma_jax.corpus import draw as corpus_draw
from alma_jax.corpus.normalise import prompt_id
from alma_jax.engine import losses
from alma_jax.errors import RunError, UserError
from alma_jax.judges.contract import Verdict
from alma_jax.options import fingerprint
from alma_jax.recipes import alma as alma_recipe
from alma_jax.runtime import alarms
from alma_jax.runtime.display import Display
from alma_jax.runtime.sampling import Decoding
from alma_jax.runtime.session import Session
from alma_jax.stages import data as human
from alma_jax.stages import drafts, draw, evaluation, judge, judgments, quality, trainset
from alma_jax.stages.responses import _samples
from alma_jax.store import runs
from alma_jax.store.data import SeedRow
from alma_jax.store.records import HeldOut, Judgment, Prompt, Response
from alma_jax.store.statistics import Mean
from configs import alma


def prompt(n, cluster=0):
  messages = ({"role": "user", "content": f"prompt {n}"},)
  return Prompt(prompt_id(messages), messages, "synthetic", cluster)


def response(sample, text="answer", tokens=None, finished=True, checkpoint="sft_1"):
  tokens = tuple(range(len(text))) if tokens is None else tokens
  return Response(prompt(0).id, sample, checkpoint, text, tokens, finished, -1.0)


def selected(n, candidates, method="best_of_n", min_margin=0.0):
  """(records, reason) of prompt n in round 2 under seed 0."""
  found = trainset.select(prompt(n), candidates, 2, 0, trainset.Options(method, min_margin))
  return list(found.records), found.reason


def test_best_takes_the_highest_score_then_the_shorter_then_the_lower_id():
  long, short, other = response(0, "a long answer"), response(3, "short"), response(2, "other")
  assert trainset.best([(long, 7.0), (short, 6.9)])[0] is long
  assert trainset.best([(long, 7.0), (short, 7.0)])[0] is short
  assert trainset.best([(short, 7.0), (other, 7.0)])[0] is other


def test_selection_does_not_depend_on_the_order_of_the_responses():
  candidates = [(response(i, "x" * (1 + i % 3)), float(i % 4)) for i in range(12)]
  assert trainset.best(candidates) == trainset.best(candidates[::-1])


def test_truncated_and_empty_responses_are_never_the_best():
  cut, empty, fine = response(0, finished=False), response(1, "  "), response(2, "fine")
  (chosen,), reason = selected(0, [(cut, 9.0), (empty, 8.0), (fine, 1.0)])
  assert (chosen.response, reason) == ("fine", "selected")
  assert selected(0, [(cut, 9.0), (empty, 8.0)]) == ([], "no_finished_response")


def test_best_of_one_is_that_sample():
  only = response(0, "only")
  assert selected(0, [(only, 0.0)])[0][0].response == "only"


def test_random_selection_ignores_the_scores():
  candidates = [(response(i, f"answer {i}"), float(i)) for i in range(8)]
  inverted = [(r, 7.0 - s) for r, s in candidates]

  def pick(c, n):
    return selected(n, c, "random")[0][0].response

  assert [pick(candidates, n) for n in range(20)] == [pick(inverted, n) for n in range(20)]
  assert len({pick(candidates, n) for n in range(20)}) > 3


def test_pair_rejects_any_other_response_evenly_whatever_its_checkpoint_or_place():
  candidates = [(response(i, f"answer {i}", tokens=(i,), checkpoint=f"m{i // 3}"), float(i == 4)) for i in range(9)]
  pairs = [selected(n, candidates, "dpo")[0][0] for n in range(400)]
  assert {p.chosen for p in pairs} == {"answer 4"}
  rejected = collections.Counter(p.rejected for p in pairs)
  assert set(rejected) == {f"answer {i}" for i in range(9) if i != 4}
  # chi-square with 7 degrees of freedom: 24.3 is passed by one run in a thousand, and this one is fixed
  assert sum((n - 50) ** 2 / 50 for n in rejected.values()) < 24.3


def test_pair_takes_truncated_responses_as_rejected_and_refuses_equal_ones():
  best, same, cut = response(0, "good", (1,)), response(1, "good", (1,)), response(2, "cut", (2,), finished=False)
  (pair,), _ = selected(0, [(best, 9.0), (same, 9.0), (cut, 8.0)], "dpo")
  assert (pair.chosen, pair.rejected) == ("good", "cut")
  assert selected(0, [(best, 9.0), (same, 9.0)], "dpo") == ([], "no_different_response")


def test_pair_honours_the_least_margin():
  a, b, c = response(0, "a", (1,)), response(1, "b", (2,)), response(2, "c", (3,))
  scored = [(a, 9.0), (b, 8.9), (c, 4.0)]
  assert selected(0, scored, "dpo", 1.0)[0][0].rejected == "c"
  assert selected(0, scored[:2], "dpo", 1.0) == ([], "below_min_margin")


def test_pairs_of_best_and_worst_of_ordered_two_and_of_like_lengths():
  def made(n, candidates, **more):
    found = trainset.select(prompt(n), candidates, 2, 0, trainset.Options("dpo", **more))
    return [(p.chosen, p.rejected) for p in found.records] or found.reason

  scored = [(response(i, f"answer {i}", tokens=tuple(range(i, 2 * i + 3))), float(i)) for i in range(6)]
  scored[5] = (dataclasses.replace(scored[5][0], finished=False), 5.0)
  assert {made(n, scored, pairs="best_worst")[0] for n in range(20)} == {("answer 4", "answer 0")}
  assert made(0, scored, pairs="best_worst", truncated=True) == [("answer 5", "answer 0")]
  assert made(0, scored, pairs="best_worst", min_margin=4.5) == "below_min_margin"
  # 4 has 7 tokens, and 0 .. 3 have 3 .. 6
  assert made(0, scored, pairs="best_worst", length_ratio=1.5) == [("answer 4", "answer 2")]
  assert made(0, scored, pairs="best_worst", length_ratio=1.1) == "other_lengths_differ"
  ordered = [made(n, scored, pairs="ordered_random") for n in range(300)]
  assert ordered == [made(n, scored[::-1], pairs="ordered_random") for n in range(300)]  # whatever their order
  drawn = collections.Counter(tuple(x[0]) for x in ordered if isinstance(x, list))
  assert len(drawn) == 10 and all(chosen > rejected for chosen, rejected in drawn)  # every pair of 0 .. 4
  assert ordered.count("better_one_is_truncated") == 300 - drawn.total()  # a third has answer 5, which is the best
  assert 60 < ordered.count("better_one_is_truncated") < 140
  assert made(0, [(scored[1][0], 1.0)] * 2, pairs="ordered_random") == "no_different_response"
  assert made(0, [scored[1], (response(2, " ", tokens=(9,)), 0.0)], pairs="best_worst") == "others_are_empty"
  default = fingerprint(trainset.Options("dpo"))  # runs of before these options go on
  assert default == {"method": "dpo", "min_margin": 0.0} and "pairs" in fingerprint(
    trainset.Options("dpo", 0, "best_worst")
  )


def test_pairs_of_equal_scores_are_none():
  tied = [(response(0, "a", (1,)), 9.0), (response(1, "b", (2,)), 9.0)]
  assert selected(0, tied, "dpo") == ([], "no_different_response")
  (pair,), _ = selected(0, [*tied, (response(2, "c", (3,)), 8.5)], "dpo")
  assert (pair.chosen_score, pair.rejected, pair.rejected_score) == (9.0, "c", 8.5)


def test_a_score_that_is_not_finite_orders_nothing(tmp_path):
  judged = types.SimpleNamespace(
    dir=tmp_path, read=lambda share: [Judgment("f01", i, score, None, None) for i, score in enumerate((1.0, np.nan))]
  )
  with pytest.raises(RunError, match=f"{tmp_path}: the score of prompt f01, sample 1, is nan"):
    trainset._candidates(0, 1, types.SimpleNamespace(parts=0), judged)
  with pytest.raises(ValueError, match="score 1 is not"):
    losses.advantages([1.0, np.nan, 3.0])


pools = st.lists(st.integers(0, 6), min_size=1, max_size=60)  # the cluster of every prompt


def drawn(labels, used, k, round=2, seed=0, method="diverse", ids=None):
  """Row numbers, and the ids that they have."""
  labels = np.asarray(labels, np.int32)
  ids = np.arange(len(labels), dtype=np.uint64) * np.uint64(7) if ids is None else ids
  queues, options = corpus_draw.build(labels, ids, seed), draw.Options(prompts=k, method=method)
  return draw.drawn(queues, np.array(sorted(used), np.int64), options, round).tolist()


@given(pools, st.data())
def test_draw_spreads_over_clusters_and_never_repeats(membership, data):
  used, labels = set(), np.array(membership)
  for round in range(2, 5):
    left = len(labels) - len(used)
    if not left:
      with pytest.raises(RunError, match="only 0 are unused"):
        drawn(labels, used, 1, round)
      return
    k = data.draw(st.integers(1, left))
    rows = drawn(labels, used, k, round)
    assert len(set(rows)) == len(rows) == k and not used & set(rows)
    counts = collections.Counter(labels[rows].tolist())
    unused = collections.Counter(labels[row] for row in range(len(labels)) if row not in used)
    # as even as the clusters allow: one that gave fewer than another's last has no more to give
    for cluster, room in unused.items():
      assert counts[cluster] >= min(room, max(counts.values()) - 1)
    used |= set(rows)


@given(pools, st.randoms())
def test_draw_does_not_depend_on_the_order_of_the_pool(membership, rng):
  labels, order = np.array(membership), list(range(len(membership)))
  rng.shuffle(order)
  for method in ("diverse", "random"):
    k = (len(labels) + 1) // 2
    one = drawn(labels, (), k, method=method)
    two = drawn(labels[order], (), k, method=method, ids=np.array(order, np.uint64) * np.uint64(7))
    assert one == [order[row] for row in two]


def test_draw_differs_between_rounds_and_seeds():
  labels = np.arange(500) % 50
  draws = [set(drawn(labels, (), 20, round, seed)) for seed, round in ((0, 2), (0, 3), (1, 2))]
  assert len(draws[0] & draws[1]) < 8 and len(draws[0] & draws[2]) < 8


def test_draw_from_too_small_a_pool_says_what_is_left_and_what_helps():
  asks = r"round 3 draws 4 prompts, but of the pool's 5 only 3 are unused. What helps: a smaller draw\.prompts, or more"
  with pytest.raises(RunError, match=asks) as error:
    drawn([0] * 5, {0, 1}, 4, 3)
  (value,) = re.findall(r'--config\.rounds="(.*?)"', str(error.value))
  # What it says can be typed: with a number, it is the value of an override.
  assert ast.literal_eval(value.replace("NUMBER", "2048")) == {3: {"prompts": {"draws": 2048}}}
  with pytest.raises(RunError, match=r"a smaller judge\.distil\.prompts, or a larger prompts\.draws"):
    drawn([0] * 5, (), 6, 1)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 200])
@pytest.mark.parametrize("checkpoints", [1, 2, 3])
def test_shares_of_the_checkpoints_are_equal_and_cover_every_sample(n, checkpoints):
  extra = collections.Counter()
  for number in range(60):
    shares = [list(_samples(prompt(number), which, checkpoints, n)) for which in range(checkpoints)]
    assert sorted(s for share in shares for s in share) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    extra.update(which for which, share in enumerate(shares) if len(share) > n // checkpoints)
  if n % checkpoints:
    assert len(extra) == checkpoints  # the remainder rotates with the prompt


@pytest.mark.parametrize(
  ("score", "two_hot", "rounded"),
  [
    (7.3, [(7, 0.7), (8, 0.3)], [(7, 1.0)]),
    (7.5, [(7, 0.5), (8, 0.5)], [(8, 1.0)]),
    (0.0, [(0, 1.0)], [(0, 1.0)]),
    (10.0, [(10, 1.0)], [(10, 1.0)]),
    (9.96, [(9, 0.04), (10, 0.96)], [(10, 1.0)]),
  ],
)
def test_distillation_targets(score, two_hot, rounded):
  found = judge.targets(score, "two_hot")
  assert [s for s, _ in found] == [s for s, _ in two_hot]
  assert [w for _, w in found] == pytest.approx([w for _, w in two_hot])
  assert sum(s * w for s, w in found) == pytest.approx(score)  # the mean is kept
  assert judge.targets(score, "rounded") == rounded


@pytest.mark.parametrize(
  ("prompts", "kind", "message"),
  [
    ([0], "finetuned", "data.judge gives 1 annotated response, all to one prompt.*two prompts or more"),
    ([0, 0, 0], "finetuned", "data.judge gives 3 annotated responses, all to one prompt"),
    ([0, 1], "finetuned", None),
    ([0, 1], "few_shot", "data.judge gives 2 annotated responses, and judge.kind 'few_shot' shows three"),
    ([0, 1, 1], "few_shot", None),
  ],
)
def test_too_few_annotations_are_said_before_anything_is_trained(prompts, kind, message):
  options = dataclasses.replace(start.checked_options(alma.mini())[0].judge, kind=kind)
  rows = [SeedRow(prompt(n).messages, f"answer {i}", 5.0, i) for i, n in enumerate(prompts)]
  if message is None:
    judge.check_annotations(rows, options, 0)
  else:
    with pytest.raises(RunError, match=message):
      judge.check_annotations(rows, options, 0)


def test_a_template_that_reasons_needs_reasons_and_is_not_distilled():
  config = alma.mini()
  config.judge.template = "a2_reasoned"
  with pytest.raises(UserError, match=r"config.judge.distil.prompts is 384, and the template 'a2_reasoned' reasons"):
    start.checked_options(config)
  config.judge.distil.prompts = 0
  options = start.checked_options(config)[0].judge
  rows = [SeedRow(prompt(n).messages, "answer", 5.0, n, reason="it is") for n in range(3)]
  judge.check_annotations(rows, options, 0)
  rows[1] = dataclasses.replace(rows[1], reason=" ")
  with pytest.raises(RunError, match="gives 3 annotated responses, and 1 have no `reason`"):
    judge.check_annotations(rows, options, 0)


def of_rows(rows):
  return types.SimpleNamespace(prompts=types.SimpleNamespace(manifest={"rows": rows}))


def test_a_pool_that_is_too_small_for_all_rounds_is_said_when_it_is_made():
  config = alma.mini()  # 384 prompts for the judge, then 24 for each of nine rounds: 600
  by_round = start.checked_options(config)
  alma_recipe.check_pool(by_round, [of_rows(600)], 2048)
  with pytest.raises(RunError, match="the pool has 599 different prompts, and up to round 10 600 are drawn") as error:
    alma_recipe.check_pool(by_round, [of_rows(599)], 2048)
  assert "{10: {'prompts': {'draws': NUMBER}}}" in str(error.value)
  config.rounds = {9: {"prompts": {"draws": 2058}}}  # ten drafts more, which may be ten prompts
  by_round = start.checked_options(config)
  alma_recipe.check_pool(by_round, [of_rows(590)], 2048)
  with pytest.raises(RunError, match="the pool has 589 "):
    alma_recipe.check_pool(by_round, [of_rows(589)], 2048)
  with pytest.raises(RunError, match="the pool has 599 "):  # they were seven prompts
    alma_recipe.check_pool(by_round, [of_rows(592), of_rows(7)], 2058)


def test_responses_that_models_do_not_share_evenly_are_said():
  config = alma.mini()
  config.responses.n = 32
  assert list(alma_recipe.notes(start.checked_options(config))) == [
    "rounds 3 .. 10: 32 responses per prompt from 3 checkpoints are 10 or 11 from each; which ones write one more"
    " rotates from prompt to prompt"
  ]
  config.rounds = {r: {"responses": {"checkpoints": ("sft",)}} for r in range(3, 11)}
  assert list(alma_recipe.notes(start.checked_options(config))) == []


def test_shares_above_a_twentieth_are_said(capsys):
  s = dataclasses.make_dataclass("View", ["display"])(Display())
  Session.tell(
    s, "round_02/responses", {"truncated": 6, "empty": 5}, 100, {"truncated": "are cut", "empty": "are empty"}
  )
  assert capsys.readouterr().err.strip() == "round_02/responses: 6 of 100 are cut (6.0%)"


def test_held_out_annotations_share_no_prompt_with_the_rest():
  @dataclasses.dataclass(frozen=True)
  class Row:
    messages: tuple
    response: str
    score: float

  rows = [Row(prompt(i // 2).messages, f"answer {i}", 5.0) for i in range(80)]
  train, held = judge._split(rows, 0.1, 0)
  assert len(held) == 8 and len(train) == 72
  assert not {prompt_id(r.messages) for r in train} & {prompt_id(r.messages) for r in held}


def options_of_evaluation(**more):
  return evaluation.Options(decoding=Decoding(4), max_prompt_tokens=4, **more)


@pytest.mark.parametrize(
  ("entries", "named"),
  [
    (("mini",), {"mini": "mini"}),
    (("truth=mini", "again=mini"), {"truth": "mini", "again": "mini"}),
  ],
)
def test_judges_of_evaluations_have_names(entries, named):
  assert options_of_evaluation(judges=entries).named_judges == named


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (dict(judges=("mini", "mini")), "names 'mini' twice"),
    (dict(judges=("judge=mini",)), "that is the run's own"),
    (dict(judges=("minni",)), "did you mean 'mini'"),
    (dict(sets=("A B=x.jsonl",)), "NAME of a-z"),
    (dict(patience=2), "name one"),
  ],
)
def test_wrong_judges_and_sets_are_refused(more, message):
  with pytest.raises(UserError, match=message):
    options_of_evaluation(**more)


def test_a_run_ends_after_rounds_without_a_better_score():
  options = options_of_evaluation(judges=("truth=mini",), patience=2)

  def stalled(*scores):
    return evaluation.stalled([{"truth": Mean(x, 0.1, 9), "judge": Mean(9.0, 0.1, 9)} for x in scores], options)

  assert not stalled(1.0, 2.0, 1.5) and stalled(1.0, 2.0, 1.5, 2.0) and not stalled(1.0, 2.0, 1.5, 2.1)
  assert not evaluation.stalled([{"truth": Mean(1.0, 0.1, 9)}] * 9, dataclasses.replace(options, patience=0))


# The distilled judge, and how good a judge is


def annotations(scores, each=1):
  """`each` annotations of a prompt, with these scores."""
  return [SeedRow(prompt(i // each).messages, f"answer {i}", float(score), i) for i, score in enumerate(scores)]


def test_the_gate_keeps_the_undistilled_judge_where_too_few_annotations_could_tell():
  labels = np.arange(60) % 10
  better, worse = labels + 0.5, np.where(labels == 3, 9, labels)
  bounds = judge.DistilOptions
  how = types.SimpleNamespace(least_rows=bounds.least_rows, least_pairs=bounds.least_pairs)
  assert (how.least_rows, how.least_pairs) == (50, 200)
  taken = judge._gate(worse, better, annotations(labels), how)
  assert taken.accepted and taken.numbers["pairs"] == (60**2 - 10 * 6**2) // 2
  assert taken.numbers["change"] == pytest.approx(taken.numbers["after"] - taken.numbers["before"])
  assert "lowers" not in taken.reason and "1.000 +- 0.000 of 1,620 held-out pairs" in taken.reason
  assert not judge._gate(better, worse, annotations(labels), how).accepted
  few = judge._gate(worse[:49], better[:49], annotations(labels[:49]), how)
  assert not few.accepted and few.reason.startswith("not taken: 49 held-out annotations with 1,080 pairs")
  alike = np.array([0] * 56 + [1] * 3)  # 168 pairs
  assert not judge._gate(alike, alike, annotations(alike), how).accepted
  lowered = judge._gate(
    worse[:49], better[:49], annotations(labels[:49]), types.SimpleNamespace(least_rows=49, least_pairs=9)
  )
  assert lowered.accepted and "the usual bounds, 50 annotations and 200 pairs, would keep" in lowered.reason
  one = np.full(60, 5)
  assert not judge._gate(better, better, annotations(one), how).accepted


def test_the_untrained_judge_is_not_measured_by_what_it_is_shown():
  rows = annotations(np.arange(200) % 11, each=2)
  data = types.SimpleNamespace(judge=rows)
  s = types.SimpleNamespace(options=types.SimpleNamespace(seed=0))
  shown = {prompt_id(row.messages) for row in judge._shown(rows, 0)}
  tuned, few = (
    {prompt_id(row.messages) for row in judge.held_out(s, data, types.SimpleNamespace(held_out=0.5, kind=kind))}
    for kind in ("finetuned", "few_shot")
  )
  assert tuned & shown and few == tuned - shown


def held(scores, labels, probs=None):
  return [
    HeldOut(prompt(i).id, float(label), float(score), probs)
    for i, (score, label) in enumerate(zip(scores, labels, strict=True))
  ]


def test_quality_is_what_the_textbooks_say_on_the_annotators_scale():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 11, 300)
  scores = np.clip(labels + rng.normal(0, 2, 300), 0, 10)
  uniform = (1 / 11,) * 11
  found = quality.of("own", (0.0, 10.0), held(scores, labels, uniform), annotations(labels))
  assert found.spearman.value == pytest.approx(scipy.stats.spearmanr(scores, labels)[0])
  assert found.error.value == pytest.approx(np.abs(scores - labels).mean())
  assert found.deviation == pytest.approx(scores.std())
  assert found.entropy == pytest.approx(np.log2(11))
  assert found.entropy_of_labels == pytest.approx(scipy.stats.entropy(np.bincount(labels), base=2))
  assert sum(b.rows for b in found.calibration) == 300
  here = (scores >= 4) & (scores < 6)
  middle = next(b for b in found.calibration if b.low == 4)
  assert (middle.rows, middle.score, middle.label) == pytest.approx(
    (here.sum(), scores[here].mean(), labels[here].mean())
  )
  assert found.calibration_error == pytest.approx(sum(b.rows * abs(b.score - b.label) for b in found.calibration) / 300)
  # Another scale is stretched to the annotators'; a judge without one has no error, and is ordered all the same.
  other = quality.of("own", (-1.0, 1.0), held(scores / 5 - 1, labels), annotations(labels))
  assert other.error.value == pytest.approx(found.error.value) and other.entropy is None
  free = quality.of("own", None, held(scores * 1e3, labels), annotations(labels))
  assert (free.error, free.calibration, free.agreement) == (None, [], found.agreement)
  nothing = quality.of("own", (0.0, 10.0), [], annotations(labels))
  assert nothing.agreement is None and "nothing to measure it by" in quality.in_words(dataclasses.asdict(nothing))


# Alarms

BOUNDS = alarms.Options()


@pytest.mark.parametrize(
  ("quiet", "raised"),
  [
    (alarms.spread(BOUNDS, 0.1, (0.0, 10.0)), alarms.spread(BOUNDS, 0.099, (0.0, 10.0))),
    (alarms.spread(BOUNDS, 0.011, (0.0, 1.0)), alarms.spread(BOUNDS, 0.0099, (0.0, 1.0))),
    (alarms.spread(BOUNDS, 0.1, None), alarms.spread(BOUNDS, 0.0, None)),
    (alarms.entropy(BOUNDS, 1.89, 2.0), alarms.entropy(BOUNDS, 1.9, 2.0)),
    (alarms.length(BOUNDS, 0.6), alarms.length(BOUNDS, -0.61)),
    (alarms.length(BOUNDS, None), alarms.length(BOUNDS, 1.0)),
    (alarms.cut_off(BOUNDS, 95, 100), alarms.cut_off(BOUNDS, 96, 100)),
    (alarms.selected(BOUNDS, 5, 10), alarms.selected(BOUNDS, 4, 10)),
    (alarms.selected(BOUNDS, 0, 0), alarms.selected(BOUNDS, 0, 1)),
  ],
)
def test_alarms_are_raised_beyond_their_bounds_alone(quiet, raised):
  assert not quiet and len(raised) == 1


def test_a_judge_of_no_use_and_data_of_no_use_raise_alarms():
  labels = np.arange(110) % 11
  marginal = quality.of("own", (0.0, 10.0), held(np.full(110, 5.0), labels, (1 / 11,) * 11), annotations(labels))
  assert set(quality._alarms(marginal, (0.0, 10.0), BOUNDS)) == {"spread", "entropy"}
  sharp = quality.of("own", (0.0, 10.0), held(labels, labels, (1.0,) + (0.0,) * 10), annotations(labels))
  assert not quality._alarms(sharp, (0.0, 10.0), BOUNDS)
  same = {"judge": annotations([7] * 9), "sft": [SeedRow((), "Yes.", None, 1)] * 19 + [SeedRow((), "No.", None, 1)]}
  found = human._alarms(same, BOUNDS)
  assert (
    set(found) == {"annotations", "alike"} and "19 of 20 demonstrations have one response: 'Yes.'" in found["alike"]
  )
  assert not human._alarms({"judge": annotations([7, 8]), "sft": same["sft"][:9] + same["sft"][-1:]}, BOUNDS)


def test_the_sums_of_judgments_over_shares_give_deviation_and_rank_correlation():
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 200, 4000)
  scores = np.clip(5 + (lengths - 100) / 40 + rng.normal(0, 0.8, 4000), 0, 10)
  shares = [
    judgments._counts([Verdict(x) for x in scores[i::4].tolist()], (0.0, 10.0))
    | judgments._length(scores[i::4].tolist(), lengths[i::4].tolist())
    for i in range(4)
  ]
  whole = functools.reduce(runs._summed, shares)
  assert alarms.deviation(4000, whole["score_sum"], whole["score_squares"]) == pytest.approx(scores.std())
  rank = whole["length_spearman"]["sum"] / whole["length_spearman"]["responses"]
  assert rank == pytest.approx(scipy.stats.spearmanr(scores, lengths)[0], abs=0.005) and rank > 0.6
  assert set(judgments._alarms(whole, (0.0, 10.0), BOUNDS)) == {"length"}
  flat = judgments._counts([Verdict(5.0)] * 9, (0.0, 10.0)) | judgments._length([5.0] * 9, list(range(9)))
  assert "length_spearman" not in flat and set(judgments._alarms(flat, (0.0, 10.0), BOUNDS)) == {"spread"}


def test_alarms_stand_in_the_manifest_after_the_sums_of_all_parts(tmp_path):
  said = []
  with runs.Run(tmp_path) as run:
    stage = run.stage("a", {})
    for part in range(2):
      stage.write_part(part, 2, [], HeldOut, {"cut": 3})
    stage.finish(alarms=lambda counts: alarms.cut_off(BOUNDS, counts["cut"], 6))
    alarms.say(types.SimpleNamespace(say=said.append), stage)
    assert runs.load_manifest(stage.dir)["alarms"].keys() == {"cut_off"}
    assert said == [f"alarm: a: {stage.manifest['alarms']['cut_off']}"] and "6 of 6 answers (100.0%)" in said[0]
    quiet = run.stage("b", {})
    quiet.finish(alarms=lambda counts: {})
    assert "alarms" not in quiet.manifest


# What few-shot contexts show


def test_shots_are_drawn_evenly_without_repeats_and_more_draws_change_none():
  draws, seeds = 30_000, 7
  shots = drafts._shots(np.random.default_rng(0), draws, seeds, (3, 5))
  sizes = (shots >= 0).sum(axis=1)
  assert scipy.stats.chisquare(np.bincount(sizes)[3:]).pvalue > 1e-3 and set(sizes) == {3, 4, 5}
  assert (np.diff((shots >= 0).astype(int), axis=1) <= 0).all()  # -1 only at the end
  shown = np.sort(np.where(shots >= 0, shots, -1 - np.arange(5)), axis=1)
  assert (np.diff(shown, axis=1) > 0).all()  # none twice
  # Ordered pairs of the first two, and the last place of the longest: all alike.
  pairs = np.bincount(shots[:, 0] * seeds + shots[:, 1], minlength=seeds**2).reshape(seeds, seeds)
  assert not np.diag(pairs).any()
  assert scipy.stats.chisquare(pairs[~np.eye(seeds, dtype=bool)]).pvalue > 1e-3
  assert scipy.stats.chisquare(np.bincount(shots[sizes == 5, 4])).pvalue > 1e-3
  np.testing.assert_array_equal(drafts._shots(np.random.default_rng(0), 100, seeds, (3, 5)), shots[:100])


def test_few_seeds_are_shown_as_far_as_they_go():
  shots = drafts._shots(np.random.default_rng(0), 50, 2, (3, 5))
  assert shots.shape == (50, 2) and (np.sort(shots, axis=1) == [0, 1]).all()
