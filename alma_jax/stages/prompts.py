"""The pool: prompts that the base model invents from a few of the seeds, each once.

Every draw shows 3 to 5 seed prompts as a list and lets the base model write the next item. What ended properly, is
short enough and is neither a seed, nor an evaluation prompt, nor already there, enters the pool.
"""

import collections
import dataclasses

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
  stops = (*fewshot.stop_ids_of(tok, template), *(() if tok.eos_id is None else (tok.eos_id,)))
  with session.bar("pool: prompts", len(range(p.draws)) * len(missing) // c.shards, "prompts") as bar:
    for part in missing:
      contexts, keys = [], []
      for draw in range(part, p.draws, c.shards):
        random = random_numbers(c.seed, "shots", draw)
        size = int(random.integers(p.shots[0], p.shots[1] + 1))
        shots = [shown[i] for i in random.choice(len(shown), min(size, len(shown)), replace=False)]
        contexts.append(fewshot.few_shot_ids(tok, template, [{"prompt": s} for s in shots]))
        keys.append(key_of(c.seed, 0, "prompts", draw))
      fit = [i for i, ids in enumerate(contexts) if len(ids) <= p.max_prompt_tokens]
      written = drafts(session, session.base, [contexts[i] for i in fit], [keys[i] for i in fit], stops, p, bar)
      records, counts = [], collections.Counter(context_too_long=len(contexts) - len(fit))
      for draft in written:
        text, ended = fewshot.first_item(draft.text, template, draft.finished)
        reason = None if ended else "cut_off"
        reason = reason or ("empty" if not text else "too_long" if len(text) > p.max_characters else None)
        counts[reason or "usable"] += 1
        if not reason:
          records.append(Prompt(prompt_id(_user(text)), _user(text), "synthetic"))
      stage.write_part(part, c.shards, records, Prompt, {"draws": len(contexts), **counts})
  stage.finish()
  return stage


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
