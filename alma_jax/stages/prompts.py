"""The pool: prompts that the base model invents from a few of the seeds, each once.

Every draw shows 3 to 5 seed prompts as a list and lets the base model write the next item. What ended properly, is
short enough and is neither a seed, nor an evaluation prompt, nor already there, enters the pool.
"""

import collections
import dataclasses

import numpy as np

from alma_jax.session.sampling import drafts
from alma_jax.session.session import key_of, random_numbers
from alma_jax.store.records import Prompt, prompt_id
from alma_jax.text import fewshot


def build(session, data, c):
  """The finished stage `pool/prompts`. The demonstrations' first user turns are shown; no prompt of the human data
  enters the pool."""
  template = fewshot.few_shot_by_name(fewshot.LISTS, c.prompts.template)
  shown = list(dict.fromkeys(fewshot.first_user_turn(messages) for messages in (row.messages for row in data.sft)))
  fields = {
    "config": {"seed": c.seed, "prompts": c.prompts.to_dict()},
    "text": {"few_shot": dataclasses.asdict(template), **session.describe_text()},
    "data": {"sft": data.digests["sft"]},
    "base": session.base.content,
  }
  draws = _draws(session, template, shown, fields, c)
  stage = session.run.stage("pool/prompts", fields | {"data": data.digests}, {"drafts": draws})
  if stage.done:
    return stage
  mine = stage.mine(1)
  if mine:
    forbidden = {"demonstration": data.ids("sft"), "annotation": data.ids("judge"), "eval_prompt": data.ids("eval")}
    kept, counts = _unique(draws.read(Prompt), forbidden)
    stage.write_part(0, 1, kept, Prompt, counts)
  stage.finish()
  return stage


def _draws(session, template, shown, fields, c):
  """Stage `pool/drafts`: what the model wrote, as it wrote it, a part per share of the draws."""
  p = c.prompts
  stage = session.run.stage("pool/drafts", fields)
  missing = stage.mine(c.shards)
  if stage.done:
    return stage
  tok = session.tokenizer
  eos = () if tok.eos_id is None else (tok.eos_id,)
  shots = _shots(random_numbers(c.seed, "shots"), p.draws, len(shown), p.shots)
  # Neighbours in this order begin with the same shots, which the sampler then reads once.
  parts = np.array_split(np.lexsort(shots.T[::-1]), c.shards)
  with session.bar("pool: prompts", sum(len(parts[i]) for i in missing), "prompts") as bar:
    for part in missing:
      contexts, keys = [], []
      for draw in parts[part].tolist():
        show = [{"prompt": shown[i]} for i in shots[draw] if i >= 0]
        contexts.append(fewshot.few_shot_ids(tok, template, show))
        keys.append(key_of(c.seed, 0, "prompts", draw))
      fit = [i for i, ids in enumerate(contexts) if len(ids) <= p.max_prompt_tokens]
      asked = [contexts[i] for i in fit], [keys[i] for i in fit]
      written = drafts(session, session.base, *asked, eos, p, bar, stop_strings=(template.stop,))
      records, counts = [], collections.Counter(context_too_long=len(contexts) - len(fit))
      for draft in written:
        text, reason = draft.text, None if draft.finished else "cut_off"
        reason = reason or ("empty" if not text else "too_long" if len(text) > p.max_characters else None)
        counts[reason or "usable"] += 1
        if not reason:
          records.append(Prompt(prompt_id(_user(text)), _user(text), "synthetic"))
      stage.write_part(part, c.shards, records, Prompt, {"draws": len(contexts), **counts})
  stage.finish()
  return stage


def _shots(random, draws, seeds, sizes):
  """[draws, most] seeds that each draw shows, different ones in random order, then -1: a size between the two of
  `sizes` for every draw. More draws leave the first ones as they are."""
  least, most = (min(size, seeds) for size in sizes)
  numbers = random.random((draws, most + 1))
  shots = np.empty((draws, most), np.int64)
  for place in range(most):
    # One of those not shown yet, by its rank among them: every smaller one that is shown moves it up.
    shots[:, place] = numbers[:, place] * (seeds - place)
    for shown in np.sort(shots[:, :place], axis=1).T:
      shots[:, place] += shots[:, place] >= shown
  size = least + (numbers[:, most] * (most - least + 1)).astype(int)
  return np.where(np.arange(most) < size[:, None], shots, -1)


def _unique(drafted, forbidden):
  """Each prompt once, in the order of ids, which depends on nothing but the prompts."""
  counts, kept = collections.Counter(), {}
  for prompt in drafted:
    where = next((name for name, ids in forbidden.items() if prompt.id in ids), None)
    if where:
      counts[f"equals_{where}"] += 1
    elif prompt.id in kept:
      counts["duplicate"] += 1
      # Spellings of one prompt: the smallest text stands, whatever the order.
      kept[prompt.id] = min(kept[prompt.id], prompt, key=lambda x: x.messages[0]["content"])
    else:
      kept[prompt.id] = prompt
  counts["unique"] = len(kept)
  return [kept[i] for i in sorted(kept)], dict(counts)


def _user(text):
  return ({"role": "user", "content": text},)
