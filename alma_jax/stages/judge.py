"""The judge: fine-tuned from the base model on the annotations, then distilled on its own scores.

Self-distillation needs a target that is not the judge's own distribution, or nothing would be learned: the default
`two_hot` puts the mean score on its two neighbouring integers, `rounded` on the nearest one. The distilled judge is
taken only if it orders held-out annotations no worse than before; the manifest says which one was taken.
"""

import copy
import dataclasses
import math

import numpy as np

from alma_jax.corpus.normalise import prompt_id
from alma_jax.errors import RunError
from alma_jax.judges.own import Judge, template_by_name, verdicts
from alma_jax.keys import key_of
from alma_jax.runtime import training
from alma_jax.runtime.batches import Examples
from alma_jax.runtime.host import Checkpoint
from alma_jax.store.records import Judgment, Prompt, Response
from alma_jax.text.judge import judge_example


def few_shot(session, data, c):
  """The untrained judge: the base model with three worked examples (low, middle, high score)."""
  ranked = sorted(
    data.judge, key=lambda row: (row.score, key_of(c.seed, "shots", prompt_id(row.messages), row.response))
  )
  shown = [ranked[len(ranked) * at // 10] for at in (8, 1, 5)]
  shots = tuple((row.messages, row.response, round(row.score)) for row in shown)
  return Judge(session.base, template_by_name(c.judge.template), c.judge.mode, shots)


def finetune(session, data, c):
  """The Judge of the finished stage `judge`."""
  train, held_out = _split(data.judge, c)
  template = template_by_name(c.judge.template)
  fields = _fields(session, session.base, c, train=training.fingerprint(c.judge.train))
  fields |= {"data": {"judge": data.digests["judge"]}}
  stage = session.run.stage("judge", fields)
  if not stage.done:
    rows = [(f"annotation of {prompt_id(r.messages)}", r.messages, r.response, r.score, 1.0) for r in train]
    examples, counts = _examples(session, template, rows, c.judge.train)
    _, facts = training.train(session, stage, session.base, examples, c.judge.train, key_of(c.seed, "judge")[0])
    counts |= {"annotations": len(train), "held_out": len(held_out)}
    training.finish(session, stage, counts | facts, c.judge.train)
  return Judge(training.trained(stage), template, c.judge.mode)


def practice(c):
  """The config under which the pairs for self-distillation are drawn and sampled, as a round of its own."""
  c = copy.deepcopy(c)
  c.draw.update(dict(prompts=c.judge.distil.prompts, method="random"))
  c.responses.update(c.judge.distil.sample)
  return c


def real_valued(judge):
  """The judge with the probability-weighted score, whatever score the rounds are to use."""
  return dataclasses.replace(judge, mode="expected")


def distil(session, judge, data, prompts, responses, judgments, c):
  """The Judge after training on its own mean scores of those responses, or `judge` itself if that is no worse."""
  _, held_out = _split(data.judge, c)
  section = c.judge.distil.to_dict() | {"train": training.fingerprint(c.judge.distil.train)}
  fields = _fields(session, judge.checkpoint, c, distil=section)
  fields |= {"data": {"judge": data.digests["judge"]}}
  inputs = {"prompts": prompts, "responses": responses, "judgments": judgments}
  stage = session.run.stage("judge_distilled", fields, inputs)
  if not stage.done:
    options = c.judge.distil.train
    rows = _scored_rows(prompts, responses, judgments, c.judge.distil.target)
    examples, counts = _examples(session, judge.template, rows, options)
    seed = key_of(c.seed, "judge_distilled")[0]
    model, facts = training.train(session, stage, judge.checkpoint, examples, options, seed)
    candidate = Checkpoint("judge_distilled", model, f"candidate of {judge.checkpoint.content}")
    before, error_before = agreement(session, judge, held_out)
    after, error_after = agreement(session, dataclasses.replace(judge, checkpoint=candidate), held_out)
    session.free()
    accepted = after >= before
    held = {"rows": len(held_out), "before": before, "after": after}
    held |= {"error_before": error_before, "error_after": error_after}
    training.finish(session, stage, counts | facts, options, held_out=held, accepted=accepted)
  if not stage.manifest["accepted"]:
    return judge
  return dataclasses.replace(judge, checkpoint=training.trained(stage))


def targets(score, kind):
  """[(integer score, weight)] that a score is distilled to."""
  if kind == "rounded":
    return [(min(10, math.floor(score + 0.5)), 1.0)]
  low = min(9, math.floor(score))
  return [(s, w) for s, w in ((low, low + 1 - score), (low + 1, score - low)) if w > 0]


def agreement(session, judge, rows):
  """(share of pairs of annotated rows that the judge orders as the annotator did, a tie counting half; mean absolute
  error of the judge's mean score)."""
  scores = np.array(
    [v.score for v in verdicts(session, real_valued(judge), [(row.messages, row.response) for row in rows])]
  )
  labels = np.array([row.score for row in rows])
  return ordered_share(scores, labels), float(np.abs(scores - labels).mean())


def ordered_share(scores, labels):
  """Of all pairs with different labels, the share whose scores differ the same way; equal scores count half."""
  told, meant = (np.sign(x[:, None] - x[None, :]) for x in (scores, labels))
  different = meant != 0
  return float((0.5 + 0.5 * (told * meant))[different].mean()) if different.any() else 0.5


def _scored_rows(prompts, responses, judgments, target):
  """(name, messages, response, integer score, weight) rows: the judge's mean score of every non-empty response."""
  messages = {p.id: p.messages for p in prompts.read(Prompt)}
  mean = {(j.prompt_id, j.sample_id): j.score for j in judgments.read(Judgment)}
  return [
    (f"{r.prompt_id}/{r.sample_id}", messages[r.prompt_id], r.text, score, weight)
    for r in responses.read(Response)
    if r.text
    for score, weight in targets(mean[r.prompt_id, r.sample_id], target)
  ]


def _split(annotations, c):
  """(training rows, held-out rows), split by prompt."""
  ids = sorted({prompt_id(row.messages) for row in annotations}, key=lambda i: key_of(c.seed, "held_out", i))
  held = set(ids[: max(1, round(len(ids) * c.judge.held_out))])
  is_held = lambda row: prompt_id(row.messages) in held
  return [r for r in annotations if not is_held(r)], [r for r in annotations if is_held(r)]


def _examples(session, template, rows, options):
  """(Examples, counts): the template with the score as the answer; rows too long to hold it are dropped."""
  kept, names, dropped = [], [], 0
  for name, messages, response, score, weight in rows:
    ids, mask = judge_example(session.tokenizer, session.chat, template, messages, response, math.floor(score + 0.5))
    if len(ids) > options.row_length:
      dropped += 1
    else:
      kept.append((ids, np.asarray(mask, np.float32) * weight))
      names.append(name)
  if not kept:
    raise RunError(f"no judge example fits into {options.row_length} tokens (row_length)")
  return Examples(kept, names, options.average), {"examples_too_long": dropped}


def _fields(session, init, c, **parts):
  return {
    "config": {"seed": c.seed, "held_out": c.judge.held_out, **parts},
    "init": init.content,
    "text": session.describe_text(),
    "template": dataclasses.asdict(template_by_name(c.judge.template)),
    "dtype": session.dtype,
  }
