"""The round's training data: each prompt's best response, preference pairs of best and another, or all, graded.

Selection looks at the judge's scores only. A response that hit the length limit or is empty cannot be the best one;
equal scores go to the shorter response, then to the lower sample id. Whatever is left out is counted. Work goes share
by share: one share of the prompts with all their responses is in memory at a time.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from alma_jax.engine import losses
from alma_jax.errors import RunError
from alma_jax.keys import key_of
from alma_jax.options import Checked, fingerprint, option, refuse
from alma_jax.runtime import alarms
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards
from alma_jax.store.handles import Trainset
from alma_jax.store.records import Example, Graded, Judgment, Pair, Prompt, Response
from alma_jax.store.runs import Artefact, Stage

Candidate = tuple[Response, float]  # a response and its score


@dataclasses.dataclass(frozen=True)
class Options(Checked):
  # "best_of_n"; "dpo": best against another (Table 7); "random": no judge; "grpo": all responses, graded
  method: Literal["best_of_n", "dpo", "random", "grpo"] = "best_of_n"
  min_margin: float = option(0.0, least=0)  # dpo: the least difference of the two scores, which is never 0
  # dpo, the paper's 5.3: the best response against any other, or against the worst; or any two, the better one chosen
  pairs: Literal["best_random", "best_worst", "ordered_random"] = option("best_random", later=True)
  truncated: bool = option(False, later=True)  # a response that hit the length limit may be the chosen one (SPA)
  length_ratio: float = option(0.0, least=0, later=True)  # dpo: the longer of the two has at most so many times the
  # tokens of the shorter, a control for length; 0: any lengths

  def __post_init__(self) -> None:
    super().__post_init__()
    if 0 < self.length_ratio < 1:
      refuse("length_ratio", self.length_ratio, "is a ratio of the longer to the shorter response: at least 1, or 0")

  @property
  def kind(self) -> type[Example] | type[Pair] | type[Graded]:
    return {"dpo": Pair, "grpo": Graded}.get(self.method, Example)


@dataclasses.dataclass(frozen=True)
class Selection:
  """The records made from a prompt's responses, or none and why."""

  records: Sequence[Example | Pair | Graded]
  reason: str = "selected"
  top: float = 0.0  # the judge's score of the selected response, of the best where all are kept


def build(
  s: Session[Any],
  asked: Artefact[Prompt],
  answered: Artefact[Response],
  judged: Artefact[Judgment],
  options: Options,
) -> Trainset:
  """The round's `trainset`, a part for each share of the prompts."""
  shares = s.options.shards
  fields = {
    "config": {"seed": s.options.seed, "trainset": fingerprint(options), "shards": shares},
    "round": s.round,
  }
  inputs = {"prompts": asked, "responses": answered, "judgments": judged}
  stage = s.stage(layout.TRAINSET, fields, inputs)
  if stage.done:
    return Trainset(stage, options.kind)
  prompts, missing = asked.read(), stage.mine(shares)
  with s.display.bar(stage.name, sum(len(prompts[share::shares]) for share in missing), "prompts") as bar:
    for share in missing:
      candidates = _candidates(share, shares, answered, judged)
      records, counts = [], collections.Counter()
      gain, kept = 0.0, 0
      for prompt in prompts[share::shares]:
        found = select(prompt, candidates[prompt.id], s.round, s.options.seed, options)
        counts[found.reason] += 1
        if found.records:
          records += found.records
          own = [score for _, score in candidates[prompt.id]]
          gain, kept = gain + found.top - sum(own) / len(own), kept + 1
        bar.update(1)
      # The judge's score of the selected response minus the mean of the prompt's, summed over the prompts kept.
      facts = {"judge_gain_sum": gain, "prompts_kept": kept}
      stage.write_part(share, shares, records, options.kind, {**counts, **facts})
  s.run.barrier(f"{stage.name}: parts")
  if s.run.process == 0:
    shards.save_array(stage.dir / "order.npy", _order(stage, shares, [prompt.id for prompt in prompts]))
  bounds = s.options.alarms
  stage.finish(
    files=["order.npy"],
    alarms=lambda counts: alarms.selected(bounds, counts.get("prompts_kept", 0), len(prompts)),
  )
  alarms.say(s.display, stage)
  return Trainset(stage, options.kind)


def _candidates(
  share: int, shares: int, answered: Artefact[Response], judged: Artefact[Judgment]
) -> dict[str, list[Candidate]]:
  """The responses to one share of the prompts with their scores, by prompt."""
  scores = {(j.prompt_id, j.sample_id): j.score for j in judged.read(share)}
  wrong = next((key for key, score in scores.items() if not math.isfinite(score)), None)
  if wrong:  # no order follows from it
    raise RunError(
      f"{judged.dir}: the score of prompt {wrong[0]}, sample {wrong[1]}, is {scores[wrong]}; delete this stage to have"
      " it made again"
    )
  candidates = collections.defaultdict(list)
  for part in range(share, answered.parts, shares):
    for response in answered.read(part):
      candidates[response.prompt_id].append((response, scores[response.prompt_id, response.sample_id]))
  return candidates


def _order(stage: Stage, shares: int, prompts: Sequence[str]) -> np.ndarray:
  """int64 [rows]: the rows of all parts in the order of the prompts.

  Two shares of the prompts p0 p1 p2 p3 p4 write the parts (p0 p2 p4) and (p1 p3). Without p2, which gave nothing, the
  rows are p0 p4 p1 p3, and their order is 0 2 3 1.
  """
  ids = shards.id_numbers(prompts)
  by_id = np.argsort(ids)
  rows = shards.read_ids([stage.part_path(part, shares) for part in range(shares)], "prompt_id")
  return np.argsort(by_id[np.searchsorted(ids, rows, sorter=by_id)], kind="stable")


def select(prompt: Prompt, candidates: Sequence[Candidate], round: int, seed: int, options: Options) -> Selection:
  """What a prompt's responses give under `options.method`."""
  if options.method == "grpo":
    return graded(prompt, candidates, round)
  eligible = [x for x in candidates if x[0].text.strip() and (x[0].finished or options.truncated)]
  if not eligible:
    return Selection([], "no_finished_response")
  if options.method == "dpo":
    return pair(prompt, eligible, candidates, (seed, round), options)
  if options.method == "random":  # any eligible response
    response, score = min(eligible, key=lambda x: key_of(seed, round, "random", prompt.id, x[0].sample_id))
  else:
    response, score = best(eligible)
  return Selection([Example(prompt.id, prompt.messages, response.text, round, response.checkpoint, score)], top=score)


def pair(
  prompt: Prompt,
  eligible: Sequence[Candidate],
  candidates: Sequence[Candidate],
  seed_and_round: tuple[int, int],
  options: Options,
) -> Selection:
  """Two responses by `options.pairs`, the one with the higher score chosen. The rejected one may be truncated."""
  written = [x for x in candidates if x[0].text.strip()]
  others_are_empty = len(written) == 1 < len(candidates)

  def drawn(word: str, among: Sequence[Candidate]) -> Candidate:
    return min(among, key=lambda x: key_of(*seed_and_round, word, prompt.id, x[0].sample_id))

  if options.pairs == "ordered_random":
    first = drawn("first", written)
    others = [x for x in written if x[0].tokens != first[0].tokens]
    written = [first, *([drawn("second", others)] if others else [])]
    eligible = [x for x in eligible if x in written]
    if len(eligible) < len(written) and (not eligible or best(eligible)[1] < max(score for _, score in written)):
      return Selection([], "better_one_is_truncated")
  response, score = best(eligible)
  lower = [x for x in written if x[0].tokens != response.tokens and x[1] < score]
  apart = [x for x in lower if score - x[1] >= options.min_margin]
  like = [x for x in apart if _alike(x[0], response, options.length_ratio)]
  if not like:
    others = "others_are_empty" if others_are_empty else "no_different_response"
    return Selection([], "other_lengths_differ" if apart else "below_min_margin" if lower else others)
  if options.pairs == "best_worst":
    rejected, low = min(like, key=lambda x: (x[1], x[0].sample_id))
  else:
    rejected, low = drawn("rejected", like)
  made = Pair(prompt.id, prompt.messages, response.text, rejected.text, score, low, seed_and_round[1])
  return Selection([made], top=score)


def _alike(a: Response, b: Response, ratio: float) -> bool:
  """Whether the lengths of two responses differ by no more than the ratio; 0: they may."""
  short, long = sorted((len(a.tokens), len(b.tokens)))
  return not ratio or long <= ratio * short


def graded(prompt: Prompt, candidates: Sequence[Candidate], round: int) -> Selection:
  """All responses; one that hit the length limit gets the lowest score of its group."""
  candidates = [x for x in candidates if x[0].text.strip()]
  lowest = min((score for _, score in candidates), default=0.0)
  scores = [score if response.finished else lowest for response, score in candidates]
  advantages = losses.advantages(scores)
  if not advantages.any():
    return Selection([], "no_different_scores")
  rows = [
    Graded(prompt.id, prompt.messages, r.sample_id, r.text, r.finished, score, float(a), round, r.checkpoint)
    for (r, _), score, a in zip(candidates, scores, advantages, strict=True)
  ]
  return Selection(rows, top=max(scores))


def best(candidates: Sequence[Candidate]) -> Candidate:
  """The candidate with the highest score; ties go to the shorter response, then to the lower sample id."""
  return min(candidates, key=lambda x: (-x[1], len(x[0].tokens), x[0].sample_id))
