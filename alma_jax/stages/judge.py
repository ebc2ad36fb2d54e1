"""The judge: fine-tuned from the base model on the annotations, then distilled on its own scores.

Self-distillation needs a target that is not the judge's own distribution, or nothing would be learned: the default
`two_hot` puts the mean score on its two neighbouring integers, `rounded` on the nearest one. The distilled judge is
taken only if it agrees with held-out annotations no worse than before; the manifest says which one was taken.
"""

import dataclasses
import math

import numpy as np

from alma_jax.session import training
from alma_jax.session.sampling import drafts
from alma_jax.session.scoring import Judge, template_by_name, verdicts
from alma_jax.session.session import key_of
from alma_jax.store.records import Prompt, prompt_id
from alma_jax.store.runs import RunError
from alma_jax.text import chat
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
  fields = _fields(session, session.base, c, train=c.judge.train.to_dict()) | {"data": {"judge": data.digests["judge"]}}
  stage = session.run.stage("judge", fields)
  if not stage.done:
    rows = [(row.messages, row.response, row.score, 1.0) for row in train]
    examples, counts = _examples(session, template, rows, c.judge.train)
    _, facts = training.train(session, stage, session.base, examples, c.judge.train, key_of(c.seed, "judge")[0])
    counts |= {"annotations": len(train), "held_out": len(held_out)}
    training.finish(session, stage, counts | facts)
  return Judge(training.trained(stage), template, c.judge.mode)


def distil(session, judge, data, pool, checkpoints, c):
  """The Judge after self-distillation on synthetic prompts and responses, or `judge` itself if that is no worse."""
  if not c.judge.distil.prompts:
    return judge
  _, held_out = _split(data.judge, c)
  fields = _fields(session, judge.checkpoint, c, distil=c.judge.distil.to_dict())
  fields |= {"data": {"judge": data.digests["judge"]}, "checkpoints": [x.content for x in checkpoints]}
  stage = session.run.stage("judge_distilled", fields, {"pool": pool})
  if not stage.done:
    pairs = _synthetic_pairs(session, pool, checkpoints, c)
    mean_judge = dataclasses.replace(judge, mode="expected")
    with session.bar("judge_distilled: scores", len(pairs), "responses") as bar:
      scored = verdicts(session, mean_judge, pairs, bar)
    rows = [(m, r, s, w) for (m, r), v in zip(pairs, scored) for s, w in targets(v.score, c.judge.distil.target)]
    options = c.judge.distil.train
    examples, counts = _examples(session, judge.template, rows, options)
    model, facts = training.train(
      session, stage, judge.checkpoint, examples, options, key_of(c.seed, "judge_distilled")[0]
    )
    before = disagreement(session, mean_judge, held_out)
    candidate = training.Checkpoint("judge_distilled", model, f"candidate of {judge.checkpoint.content}")
    after = disagreement(session, dataclasses.replace(mean_judge, checkpoint=candidate), held_out)
    session.free()
    accepted = after <= before
    training.finish(
      session,
      stage,
      counts | facts | {"pairs": len(pairs)},
      held_out={"rows": len(held_out), "before": before, "after": after},
      accepted=accepted,
    )
  if not stage.manifest["accepted"]:
    return judge
  return dataclasses.replace(judge, checkpoint=training.trained(stage))


def targets(score, kind):
  """[(integer score, weight)] that a score is distilled to."""
  if kind == "rounded":
    return [(min(10, math.floor(score + 0.5)), 1.0)]
  low = min(9, math.floor(score))
  return [(s, w) for s, w in ((low, low + 1 - score), (low + 1, score - low)) if w > 0]


def disagreement(session, judge, rows):
  """Mean absolute difference between the judge's score and the annotator's."""
  found = verdicts(session, judge, [(row.messages, row.response) for row in rows])
  return float(np.mean([abs(v.score - row.score) for v, row in zip(found, rows)]))


def _synthetic_pairs(session, pool, checkpoints, c):
  """(messages, response) pairs: prompts of the pool, one response from each checkpoint."""
  d = c.judge.distil
  prompts = sorted(pool.read(Prompt), key=lambda p: key_of(c.seed, "distil", p.id))[: d.prompts]
  if len(prompts) < d.prompts:
    raise RunError(f"judge.distil.prompts asks for {d.prompts} prompts and the pool has {len(prompts)}")
  rows = [tuple(chat.encode_prompt(session.tokenizer, session.chat, p.messages)) for p in prompts]
  fit = [i for i, ids in enumerate(rows) if len(ids) <= d.sample.max_prompt_tokens]
  stops, pairs = chat.stop_ids(session.tokenizer, session.chat), []
  with session.bar("judge_distilled: samples", len(fit) * len(checkpoints), "samples") as bar:
    for number, checkpoint in enumerate(checkpoints):
      keys = [key_of(c.seed, 1, "distil", prompts[i].id, number) for i in fit]
      written = drafts(session, checkpoint, [rows[i] for i in fit], keys, stops, d.sample, bar)
      pairs += [(prompts[i].messages, draft.text) for i, draft in zip(fit, written) if draft.text.strip()]
  return pairs


def _split(annotations, c):
  """(training rows, held-out rows), split by prompt."""
  ids = sorted({prompt_id(row.messages) for row in annotations}, key=lambda i: key_of(c.seed, "held_out", i))
  held = set(ids[: max(1, round(len(ids) * c.judge.held_out))])
  is_held = lambda row: prompt_id(row.messages) in held
  return [r for r in annotations if not is_held(r)], [r for r in annotations if is_held(r)]


def _examples(session, template, rows, options):
  """([(ids, weights)], counts): the template with the score as the answer; rows too long to hold it are dropped."""
  kept, dropped = [], 0
  for messages, response, score, weight in rows:
    ids, mask = judge_example(session.tokenizer, session.chat, template, messages, response, math.floor(score + 0.5))
    if len(ids) > options.row_length:
      dropped += 1
    else:
      kept.append((ids, np.asarray(mask, np.float32) * weight))
  if not kept:
    raise RunError(f"no judge example fits into {options.row_length} tokens (row_length)")
  return kept, {"examples_too_long": dropped}


def _fields(session, init, c, **parts):
  return {
    "config": {"seed": c.seed, "held_out": c.judge.held_out, **parts},
    "init": init.content,
    "text": session.describe_text(),
    "template": dataclasses.asdict(template_by_name(c.judge.template)),
    "dtype": session.dtype,
    "mesh": dict(session.mesh.shape),
  }
