"""The round's training data: each prompt's best response, preference pairs of best and another, or all, graded.

Selection looks at the judge's scores only. A response that hit the length limit or is empty cannot be the best one;
equal scores go to the shorter response, then to the lower sample id. Whatever is left out is counted.
"""

import collections

from alma_jax.engine import losses
from alma_jax.keys import key_of
from alma_jax.store.records import Example, Graded, Judgment, Pair, Prompt, Response

KINDS = {"best_of_n": Example, "random": Example, "dpo": Pair, "grpo": Graded}


def build(session, round, prompts, responses, judgments, c):
  """The finished stage `round_RR/trainset`: Examples (method "best_of_n" or "random"), Pairs ("dpo") or Graded
  responses ("grpo")."""
  fields = {"config": {"seed": c.seed, "trainset": c.trainset.to_dict()}, "round": round}
  inputs = {"prompts": prompts, "responses": responses, "judgments": judgments}
  stage = session.run.stage(f"round_{round:02d}/trainset", fields, inputs)
  if stage.done or not stage.mine(1):
    stage.finish()
    return stage
  scores = {(j.prompt_id, j.sample_id): j.score for j in judgments.read(Judgment)}
  candidates = collections.defaultdict(list)
  for response in responses.read(Response):
    candidates[response.prompt_id].append((response, scores[response.prompt_id, response.sample_id]))
  select = {Example: example, Pair: pair, Graded: graded}[KINDS[c.trainset.method]]
  kept, counts = [], collections.Counter()
  gain, prompts_kept = 0.0, 0
  for prompt in prompts.read(Prompt):
    found, reason = select(prompt, candidates[prompt.id], round, c)
    counts[reason] += 1
    if found:
      kept += found
      own = [score for _, score in candidates[prompt.id]]
      top = found[0].chosen_score if isinstance(found[0], Pair) else max(x.score for x in found)
      gain, prompts_kept = gain + top - sum(own) / len(own), prompts_kept + 1
  # The judge's score of the selected (of the best, where all are kept) minus that of all, on average.
  counts["judge_gain"] = gain / max(1, prompts_kept)
  stage.write_part(0, 1, kept, KINDS[c.trainset.method], dict(counts))
  stage.finish()
  return stage


def example(prompt, candidates, round, c):
  """([Example of the best response] or [], reason). Method "random" takes any eligible response instead."""
  eligible = _eligible(candidates)
  if not eligible:
    return [], "no_finished_response"
  if c.trainset.method == "random":
    response, score = min(eligible, key=lambda x: key_of(c.seed, round, "random", prompt.id, x[0].sample_id))
  else:
    response, score = best(eligible)
  return [Example(prompt.id, prompt.messages, response.text, round, response.checkpoint, score)], "selected"


def pair(prompt, candidates, round, c):
  """([Pair] or [], reason): the best response against one drawn from the others, truncated ones included."""
  eligible = _eligible(candidates)
  if not eligible:
    return [], "no_finished_response"
  response, score = best(eligible)
  others = [x for x in candidates if x[0].text.strip() and x[0].tokens != response.tokens]
  others = [x for x in others if score - x[1] >= c.trainset.min_margin]
  if not others:
    return [], "no_different_response"
  rejected, low = min(others, key=lambda x: key_of(c.seed, round, "rejected", prompt.id, x[0].sample_id))
  return [Pair(prompt.id, prompt.messages, response.text, rejected.text, score, low, round)], "selected"


def graded(prompt, candidates, round, c):
  """([Graded] or [], reason): all responses; one that hit the length limit gets the lowest score of its group."""
  candidates = [x for x in candidates if x[0].text.strip()]
  lowest = min((score for _, score in candidates), default=0.0)
  scores = [score if response.finished else lowest for response, score in candidates]
  advantages = losses.advantages(scores)
  if not advantages.any():
    return [], "no_different_scores"
  rows = [
    Graded(prompt.id, prompt.messages, r.sample_id, r.text, r.finished, score, float(a), round, r.checkpoint)
    for (r, _), score, a in zip(candidates, scores, advantages)
  ]
  return rows, "selected"


def best(candidates):
  """The (response, score) of the highest score; ties: shorter, then lower sample id."""
  return min(candidates, key=lambda x: (-x[1], len(x[0].tokens), x[0].sample_id))


def _eligible(candidates):
  return [(response, score) for response, score in candidates if response.finished and response.text.strip()]
