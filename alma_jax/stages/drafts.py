"""Drafts: what the base model writes when it is shown a few of the demonstrations' prompts as a list.

Every draw shows 3 to 5 of them and lets the base model write the next item. What ended properly and is short enough is
a draft; stages/prompts.py decides which drafts enter the pool.
"""

import collections
import dataclasses

import numpy as np

from alma_jax.corpus.normalise import prompt_id
from alma_jax.keys import key_of, random_numbers
from alma_jax.runtime.sampling import drafts
from alma_jax.store.records import Prompt
from alma_jax.text import fewshot


def build(session, data, c, name="pool", first=0):
  """The finished stage `NAME/drafts` of the draws from `first` on, a part per share of them."""
  p = c.prompts
  template = fewshot.few_shot_by_name(fewshot.LISTS, p.template)
  shown = list(dict.fromkeys(fewshot.first_user_turn(row.messages) for row in data.sft))
  options = {key: value for key, value in p.to_dict().items() if key not in ("similarity", "ngram")}
  fields = {
    "config": {"seed": c.seed, "first": first, "prompts": options},
    "text": {"few_shot": dataclasses.asdict(template), **session.describe_text()},
    "data": {"sft": data.digests["sft"]},
    "base": session.base.content,
  }
  stage = session.run.stage(f"{name}/drafts", fields)
  missing = stage.mine(c.shards)
  if stage.done:
    return stage
  tok = session.tokenizer
  eos = () if tok.eos_id is None else (tok.eos_id,)
  shots = _shots(random_numbers(c.seed, "shots"), p.draws, len(shown), p.shots)
  # Neighbours in this order begin with the same shots, which the sampler then reads once.
  parts = np.array_split(first + np.lexsort(shots[first:].T[::-1]), c.shards)
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


def _user(text):
  return ({"role": "user", "content": text},)
