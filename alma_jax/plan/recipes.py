"""The stages of every recipe as Works, in the order of the recipe's file, by the names of store/layout.py.

  found = assumptions(given, run, defaults(by_round))
  for work in works(by_round, assumptions, width=4096): ...
  for what in not_counted(by_round): ...

A run that ends early (evaluation.patience, ISARA's alpha) does less.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from alma_jax.evals import sets
from alma_jax.plan import work
from alma_jax.plan.assumptions import Assumptions
from alma_jax.plan.work import Reading, Work
from alma_jax.runtime.sampling import ManyOptions
from alma_jax.stages import choice
from alma_jax.store import layout

Rounds = Mapping[int, Any]  # the Options of a recipe by round
ANNOTATIONS, DEMONSTRATIONS, LIMA, PREFERENCES, PAIRS = 4000, 5000, 1000, 2000, 100  # rows, as the papers have them
NEAREST_BYTES = 100.0  # of a prompt's neighbours and their cosines
CHAT = 32  # tokens of a chat format around a question, as recipes/isara.py allows for


def works(by_round: Rounds, a: Assumptions, width: int) -> Iterator[Work]:
  """The Work of a run with these Options; `width` is the model's."""
  yield from WORKS[by_round[0].recipe](by_round, a, width)


def defaults(by_round: Rounds) -> dict[str, float]:
  """Fields of Assumptions that this recipe asks for: rows of the human data, and the share of its texts that stay."""
  o = by_round[0]
  found: dict[str, float] = {"eval_prompts": o.data.held_out}
  if o.recipe == "alma":
    return found | {"demonstrations": DEMONSTRATIONS, "annotations": ANNOTATIONS, "usable": 1.0}
  if o.recipe == "isara":
    return found | {"demonstrations": o.data.pairs or PAIRS, "usable": 1.0, "kept": 1.0}
  if o.recipe == "lima":
    found["eval_prompts"] += o.choice.prompts  # those to choose by, and others
    found |= {"annotations": ANNOTATIONS} if o.choice.judge == choice.OWN else {}
    if validated := o.data.held_out if o.data.validation else o.data.validation_held_out:
      found["validation"] = validated
    return found | {"demonstrations": LIMA}
  found |= {"preferences": PREFERENCES} if o.data.preferences else {}
  return found | ({} if o.sft_model else {"demonstrations": DEMONSTRATIONS})


def of_alma(by_round: Rounds, a: Assumptions, width: int) -> Iterator[Work]:
  o, name = by_round[0], layout.stage_name
  for i, _ in enumerate(o.sft_seeds, start=1):
    yield work.training_of(layout.sft_name(i), o.sft, "sft", a.demonstrations, a.example)
  yield from work.pool(o, 0, o.draws, a, width)
  yield from work.judge_training(o.judge, a)
  if o.judge.distils:
    d = o.judge.distil
    asked = min(d.prompts, o.draws * a.usable)
    yield work.responses(name(1, layout.RESPONSES), asked, d.sample, len(o.sft_seeds), a, o.shards)
    yield from work.judged(name(1, layout.JUDGMENTS), o.judge, asked, d.sample.n, a, d.sample)
    length = a.example + work.template_tokens(o.judge)
    yield work.training_of(layout.DISTILLED, d.train, "judge.distil.train", int(asked * d.sample.n), length)
  yield from work.evaluation(0, o.eval, asked_sets(o, a), o.judge, a, o.shards, o.eval.shots)
  first = by_round.get(1, o)
  yield from work.evaluation(1, first.eval, asked_sets(first, a), o.judge, a, o.shards)
  draws, trainsets, scored = o.draws, dict[str, int](), set[tuple[str, str]]()
  for round in sorted(by_round.keys() - {0}):
    r = by_round[round]
    if r.draws > draws:
      yield from work.pool(r, round, r.draws - draws, a, width)
      draws = r.draws
    asked, n = r.draw.prompts, r.responses.sampling.n
    yield work.responses(name(round, layout.RESPONSES), asked, r.responses.sampling, _writers(r, round), a, o.shards)
    yield from work.judged(name(round, layout.JUDGMENTS), r.judge, asked, n, a, r.responses.sampling)
    trainsets[name(round, layout.TRAINSET)] = asked
    yield Work(name(round, layout.TRAINSET), asked, 0.0, asked * a.example * work.TEXT_BYTES)
    yield from _policy(r, round, trainsets, a, scored)
    yield from work.evaluation(round, r.eval, asked_sets(r, a), o.judge, a, o.shards)


def _policy(
  o: Any, round: int, trainsets: dict[str, int], a: Assumptions, scored: set[tuple[str, str]]
) -> Iterator[Work]:
  """A round's training, and the reference's log-probs of those `trainsets` that it has not `scored` before."""
  stage, method = layout.stage_name(round, layout.POLICY), o.trainset.method
  if method == "grpo":
    forward = 1 if o.grpo.init_from == o.grpo.ref_from else 2
    yield work.training_of(stage, o.grpo, "grpo", o.draw.prompts * o.responses.sampling.n, a.example, forward)
    return
  options, section = (o.dpo, "dpo") if method == "dpo" else (o.policy, "policy")
  learnt = trainsets if options.history == "all" else dict([list(trainsets.items())[-1]])
  examples = sum(learnt.values())
  if method != "dpo":
    yield work.training_of(stage, options, section, examples + a.demonstrations, a.example)
    return
  model = options.init_from if options.ref_from == "init" else options.ref_from
  if model == "latest":
    model = layout.sft_name(1) if round == 2 else layout.stage_name(round - 1, layout.POLICY)
  yield from _unscored(learnt, model, o.dpo, section, a, scored)
  yield work.preferences(stage, options, section, examples, a)


def _unscored(
  learnt: dict[str, int], model: str, options: Any, section: str, a: Assumptions, scored: set[tuple[str, str]]
) -> Iterator[Work]:
  new = {stage: pairs for stage, pairs in learnt.items() if (stage, model) not in scored}
  scored |= {(stage, model) for stage in new}
  yield from work.references(new, model, options, section, a)


def of_lima(by_round: Rounds, a: Assumptions, width: int) -> Iterator[Work]:
  o = by_round[0]
  judge = o.judge if o.choice.judge == choice.OWN else None
  dev = {layout.MAIN_SET: min(a.eval_prompts, o.choice.prompts or a.eval_prompts)}
  tests = asked_sets(o, a) | {layout.TEST_SET: a.eval_prompts - dev[layout.MAIN_SET]}
  yield work.training_of(layout.sft_name(1), o.sft, "sft", a.demonstrations, a.example)
  if judge:
    yield from work.judge_training(judge, a)
  for epoch in range(o.choice.first, o.choice.last + 1):
    yield from work.evaluation(epoch, dataclasses.replace(o.eval, n=1), dev, judge, a, o.shards)
    if a.validation:
      yield work.scoring(layout.stage_name(epoch, layout.LOSS), o.sft, "sft", a.validation, a.example)
  # Of the chosen epoch, which may be an earlier one
  tests = {name: rows for name, rows in tests.items() if rows and name != layout.MAIN_SET}
  yield from work.evaluation(o.choice.last, o.eval, tests, judge, a, o.shards)


def of_isara(by_round: Rounds, a: Assumptions, width: int) -> Iterator[Work]:
  o, name = by_round[0], layout.stage_name
  pairs = min(a.demonstrations, o.data.pairs or PAIRS)
  yield from work.evaluation(0, o.eval, asked_sets(o, a), None, a, o.shards, o.eval.shots)
  yield work.training_of(layout.sft_name(1), o.sft, "sft", pairs, a.example)
  yield from work.evaluation(1, o.eval, asked_sets(o, a), None, a, o.shards)
  for round in sorted(by_round.keys() - {0}):
    r = by_round[round]
    writing, answering = r.prompts.writing, r.responses.sampling
    yield work.drafts(name(round, layout.DRAFTS), writing, writing.draws, a.prompt, o.shards)
    asked, new = int(writing.draws * a.usable), writing.decoding.max_new_tokens
    if r.neighbours.method == "knn":
      embedded = asked + pairs
      tokens, longest = embedded * min(a.prompt, new + CHAT), new + CHAT
      yield Reading(
        name(round, layout.NEIGHBOURS), embedded, tokens, 100.0 * asked, longest, layers=r.neighbours.layers
      )
    once = ManyOptions(decoding=answering.decoding, max_prompt_tokens=answering.max_prompt_tokens, n=1)
    prompt = min(a.prompt + r.neighbours.shots * a.example, answering.max_prompt_tokens)
    answers = work.responses(name(round, layout.RESPONSES), asked, once, 1, a, o.shards)
    yield dataclasses.replace(answers, prompt_tokens=prompt)
    kept = int(asked * a.kept)
    pairs += kept
    yield Work(name(round, layout.TRAINSET), kept, 0.0, kept * a.example * work.TEXT_BYTES)
    yield work.training_of(name(round, layout.POLICY), r.policy, "policy", pairs, a.example)
    yield from work.evaluation(round, r.eval, asked_sets(r, a), None, a, o.shards)


def of_spa(by_round: Rounds, a: Assumptions, width: int) -> Iterator[Work]:
  o, name, trainsets = by_round[0], layout.stage_name, dict[str, int]()
  scored, latest, held = set[tuple[str, str]](), layout.sft_name(1), 0
  if not o.sft_model:
    yield work.training_of(latest, o.sft, "sft", a.demonstrations, a.example)
  yield from work.evaluation(0, o.eval, asked_sets(o, a), None, a, o.shards)
  if o.data.preferences:
    held = min(o.seeds.held_out, a.preferences // 4)
    trainsets[name(1, layout.TRAINSET)] = a.preferences - held
    yield from _unscored(trainsets, latest, o.dpo, "dpo", a, scored)
    latest = name(1, layout.POLICY)
    yield work.preferences(latest, o.dpo, "dpo", a.preferences - held, a)
    yield from work.evaluation(1, by_round.get(1, o).eval, asked_sets(o, a), None, a, o.shards)
  for round in sorted(by_round.keys() - {0}):
    r = by_round[round]
    asked, models = r.split.size(round), 1 if r.judge.reference == "none" else 2
    yield work.responses(name(round, layout.RESPONSES), asked, r.responses, 1, a, o.shards)
    read = work.after_prompts(name(round, layout.JUDGMENTS), asked, r.responses.n, 0, a, r.responses)
    yield dataclasses.replace(read, logprobs=True, models=models)
    trainsets[name(round, layout.TRAINSET)] = asked
    yield Work(name(round, layout.TRAINSET), asked, 0.0, asked * (a.prompt + 2 * a.response) * work.TEXT_BYTES)
    if held:
      people = work.after_prompts(name(round, layout.AGREEMENT), held, 2, 0, a, r.responses)
      yield dataclasses.replace(people, logprobs=True, models=models)
    learnt = trainsets if r.policy.history == "all" else {name(round, layout.TRAINSET): asked}
    init = latest if r.policy.init_from == "latest" else r.policy.init_from
    reference = {"init": init, "latest": latest}.get(r.policy.ref_from, r.policy.ref_from)
    yield from _unscored(learnt, reference, r.policy, "policy", a, scored)
    latest = name(round, layout.POLICY)
    yield work.preferences(latest, r.policy, "policy", sum(learnt.values()), a)
    yield from work.evaluation(round, r.eval, asked_sets(r, a), None, a, o.shards)


WORKS: dict[str, Callable[[Rounds, Assumptions, int], Iterator[Work]]] = {
  "alma": of_alma, "lima": of_lima, "isara": of_isara, "spa": of_spa,
}  # fmt: skip


def asked_sets(o: Any, a: Assumptions) -> dict[str, int]:
  """The prompts of data.eval, and those of the files of eval.sets that are here."""
  here = {name: file for name, file in o.eval.named_sets.items() if pathlib.Path(file).is_file()}
  return {layout.MAIN_SET: a.eval_prompts} | {name: len(sets.read(file).rows) for name, file in here.items()}


def not_counted(by_round: Rounds) -> Iterator[str]:
  """Work of these Options that `works` leaves out."""
  o = by_round[0]
  judge = o.judge if o.recipe == "alma" or (o.recipe == "lima" and o.choice.judge == choice.OWN) else None
  if judge and judge.kind not in work.OWN:
    yield f"the judge {judge.kind!r}, which is no model that the run trains or shows examples"
  elif judge and judge.reasons:
    yield f"the reasonings of the judge's template {judge.template!r}"
  if o.recipe == "lima" and o.choice.judge not in (choice.OWN, "human"):
    yield f"the judge of config.choice: {o.choice.judge}"
  if o.recipe == "spa" and o.agreement.gold:
    yield f"config.agreement.gold: {o.agreement.gold}"
  if given := sorted({spec for r in by_round.values() for spec in r.eval.judges}):
    yield f"config.eval.judges: {', '.join(given)}"
  files = {name: file for r in by_round.values() for name, file in r.eval.named_sets.items()}
  if absent := sorted(name for name, file in files.items() if not pathlib.Path(file).is_file()):
    yield f"config.eval.sets whose files are not here: {', '.join(absent)}"


def _writers(o: Any, round: int) -> int:
  sizes = {"sft": len(o.sft_seeds), "latest": int(round > 2)}
  return max(1, sum(sizes.get(name, 1) for name in o.responses.checkpoints))
