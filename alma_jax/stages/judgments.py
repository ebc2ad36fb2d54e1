"""Judgments: the judge's score of every response of a round, share by share."""

from typing import Any

import numpy as np

from alma_jax.judges import contract
from alma_jax.judges.contract import Answered, Judge, Verdict
from alma_jax.runtime import alarms
from alma_jax.runtime.session import Session
from alma_jax.store import layout, statistics
from alma_jax.store.records import Judgment, Prompt, Response
from alma_jax.store.runs import Artefact

BINS = 11  # of the histogram over the judge's scale


def build(
  s: Session[Any],
  asked: Artefact[Prompt],
  answered: Artefact[Response],
  judge: Judge,
  name: str = layout.JUDGMENTS,
) -> Artefact[Judgment]:
  """The round's `judgments`, a part for each share of the prompts, in the order of the responses to them."""
  shares = s.options.shards
  fields = {"judge": judge.identity, "text": s.describe_text(), "dtype": s.host.dtype, "shards": shares}
  stage = s.stage(name, fields, {"prompts": asked, "responses": answered})
  if stage.done:
    return Artefact(stage, Judgment)
  messages = {p.id: p.messages for p in asked.read()}
  missing = stage.mine(shares)
  total = sum(answered.manifest["parts"][i]["rows"] for share in missing for i in parts_of(share, answered, shares))
  with s.display.bar(stage.name, total, "responses") as bar:
    for share in missing:
      responses = [r for part in parts_of(share, answered, shares) for r in answered.read(part)]
      pairs = [
        Answered(messages[r.prompt_id], r.text, r.finished, f"prompt {r.prompt_id}, sample {r.sample_id}")
        for r in responses
      ]
      found = contract.scores(judge, pairs, bar)
      records = [
        Judgment(r.prompt_id, r.sample_id, v.number, v.probs, v.mass) for r, v in zip(responses, found, strict=True)
      ]
      counts = _counts(found, judge.scale) | _length([v.number for v in found], [len(r.text) for r in responses])
      stage.write_part(share, shares, records, Judgment, counts)
  stage.finish(
    alarms=lambda counts: _alarms(counts, judge.scale, s.options.alarms),
    judge={"identity": judge.identity, "scale": judge.scale},
  )
  alarms.say(s.display, stage)
  return Artefact(stage, Judgment)


def parts_of(share: int, answered: Artefact[Response], shares: int) -> range:
  """The parts of the responses to one share of the prompts: a part for each checkpoint that wrote them."""
  return range(share, answered.parts, shares)


def _counts(found: list[Verdict], scale: contract.Scale | None) -> dict[str, Any]:
  counts: dict[str, Any] = {"judged": len(found), "score_sum": sum(v.number for v in found)}
  counts["score_squares"] = sum(v.number**2 for v in found)
  masses = [v.mass for v in found if v.mass is not None]
  if masses:
    counts["mass_sum"] = sum(masses)
  if drawn := [v.details for v in found if v.details and "unreadable" in v.details]:  # by a judge that draws samples
    counts |= {name: sum(details[name] for details in drawn) for name in ("draws", "unreadable")}
  if scale:
    # The nearest of eleven evenly spaced marks from the lowest score to the highest.
    low, width = scale[0], (scale[1] - scale[0]) / (BINS - 1)
    marks = [int((v.number - low) / width + 0.5) for v in found]
    counts["histogram"] = {f"{mark:02d}": marks.count(mark) for mark in range(BINS)}
  return counts


def _length(scores: list[float], lengths: list[int]) -> dict[str, Any]:
  """Spearman's correlation of a share's scores with the responses' characters, for a mean over shares that is weighted
  by their responses: ranks of a whole round would need the whole round in memory. A share is every n-th prompt, so its
  ranks are those of a sample. Nothing for a share in which one of the two is constant."""
  found = statistics.spearman(scores, lengths, np.arange(len(scores)))
  return {} if found is None else {"length_spearman": {"responses": found.n, "sum": found.n * found.value}}


def _alarms(counts: dict[str, Any], scale: contract.Scale | None, bounds: alarms.Options) -> alarms.Alarms:
  if not counts.get("judged"):
    return {}
  deviation = alarms.deviation(counts["judged"], counts["score_sum"], counts["score_squares"])
  length = counts.get("length_spearman")
  return alarms.spread(bounds, deviation, scale) | alarms.length(bounds, length and length["sum"] / length["responses"])
