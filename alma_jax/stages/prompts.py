"""The pool: prompts that the base model invents from a few of the seeds, each once.

Every draw shows 3 to 5 seed prompts as a list and lets the base model write the next item. What ended properly and is
short enough enters the pool, unless it is a seed, an annotated or an evaluation prompt, or is there already: equal but
for spelling, or nearly (corpus/duplicates.py). The pool has as many parts as the drafts; nothing here needs all of it in
memory. report.json holds examples of what was removed, and what the evaluation prompts share with pool and seeds.

A pool can be added to in a later round: a larger `prompts.draws` there makes more drafts, numbered on, and a pool of
its own, `pool_07/`, without anything that an earlier one has.
"""

import collections
import dataclasses
import shutil

import numpy as np

from alma_jax.corpus import contamination, duplicates
from alma_jax.corpus.normalise import normalised, prompt_id
from alma_jax.store import shards
from alma_jax.store.records import Prompt

TOGETHER = 2**25  # ids that are sorted at once
SHOWN = 20  # removed near-duplicates in the report


def build(session, data, draws, c, earlier=()):
  """The finished stage `NAME/prompts` of the drafts in `NAME/drafts` that enter; nothing of the human data, nor of the
  `earlier` pools' prompts, does."""
  name = draws.name.partition("/")[0]
  fields = {"config": {"similarity": c.prompts.similarity, "ngram": c.prompts.ngram}, "data": data.digests}
  inputs = {"drafts": draws, **{stage.name: stage for stage in earlier}}
  stage = session.run.stage(f"{name}/prompts", fields, inputs)
  if not stage.done:
    _select(session, stage, draws, data, earlier, c)
  if session.run.process == 0:  # also after a start that was killed just here
    shutil.rmtree(stage.dir / "near", ignore_errors=True)
  return stage


def _select(session, stage, draws, data, earlier, c):
  human = {"demonstration": data.sft, "annotation": data.judge, "eval_prompt": data.eval}
  taken = {name: shards.id_numbers(ids) for name, ids in _ids_of(human).items()}
  taken |= {f"prompt_of_{pool.name.partition('/')[0]}": shards.read_ids(_paths(pool)) for pool in earlier}
  fresh = _first_of_each(draws, taken)
  mine = stage.mine(draws.parts)
  near = _near(session, stage, draws, fresh, human, earlier, c) if c.prompts.similarity else None
  for part in mine:
    prompts = draws.read(Prompt, part)
    why = fresh[part]
    if near:
      _, removals = near.decisions(part)
      why = why.copy()
      at = np.flatnonzero(why == 0)
      for removal in removals:
        why[at[removal.row]] = -1 - near.kind(removal)
    reasons = collections.Counter(why.tolist())
    counts = {"unique": reasons.pop(0, 0), "duplicate": reasons.pop(DUPLICATE, 0)}
    counts |= {f"equals_{name}": reasons[i] for i, name in enumerate(taken, start=1) if reasons[i]}
    if near:
      counts |= {f"near_{name}": reasons[-1 - i] for i, name in enumerate(near.kinds) if reasons[-1 - i]}
    stage.write_part(part, draws.parts, [p for p, reason in zip(prompts, why) if not reason], Prompt, counts)
  session.run.barrier(f"{stage.name}: parts")
  if session.run.process == 0:
    report = {"contamination": _contamination(stage, draws.parts, human, c)}
    if near:
      report["near_duplicates"] = near.examples()
    shards.write_json(stage.dir / "report.json", report)
  stage.finish(files=["report.json"])


DUPLICATE = 1000  # why a draft does not enter: it is there already; 1, 2, ...: it equals something else


def _first_of_each(draws, taken):
  """[why each draft of a part does not enter; 0: it does], part by part. The first of equal drafts stands."""
  columns = [shards.read_ids([path]) for path in _paths(draws)]
  why = [np.full(len(ids), DUPLICATE, np.int16) for ids in columns]
  ranges = max(1, -(-sum(map(len, columns)) // TOGETHER))
  for at in range(ranges):
    inside = [np.flatnonzero(ids % np.uint64(ranges) == at) for ids in columns]
    together = np.concatenate([ids[rows] for ids, rows in zip(columns, inside)])
    _, first = np.unique(together, return_index=True)
    ends = np.cumsum([len(rows) for rows in inside])
    for part, begin in enumerate(ends - [len(rows) for rows in inside]):
      own = first[(first >= begin) & (first < ends[part])] - begin
      why[part][inside[part][own]] = 0
  for number, ids in reversed(list(enumerate(taken.values(), start=1))):
    for part, own in enumerate(columns):
      why[part][np.isin(own, ids)] = number
  return why


def _paths(stage):
  return [stage.part_path(part, stage.parts) for part in range(stage.parts)]


def _ids_of(human):
  return {name: sorted({prompt_id(row.messages) for row in rows}) for name, rows in human.items()}


def _text(messages):
  return "\n".join(normalised(message["content"]) for message in messages)


@dataclasses.dataclass(frozen=True)
class _Near:
  """What was found out about near-duplicates: the parts of `pool` are the human data, the earlier pools' parts, and
  the drafts' parts."""

  pool: duplicates.Pool
  draws: object
  fresh: list
  human: dict  # name -> {id: text}
  earlier: list  # (stage, part)
  kinds: tuple  # of what a draft can be near to: the human data by name, an earlier pool, the pool itself

  def decisions(self, part):
    return duplicates.decisions(self.pool, 1 + len(self.earlier) + part)

  def kind(self, removal):
    """The place in `kinds` of what the removed one is near to."""
    if removal.kept_part > 0:
      return len(self.human) + (removal.kept_part > len(self.earlier))
    return next(i for i, ids in enumerate(self.human.values()) if removal.kept_id in ids)

  def examples(self):
    """Some of the removed, spread over the parts, with what they are near to."""
    chosen, per_part = [], -(-SHOWN // self.draws.parts)
    for part in range(self.draws.parts):
      _, removals = self.decisions(part)
      chosen += [(part, removal) for removal in sorted(removals, key=lambda removal: removal.id)[:per_part]]
    return [
      {
        "removed": self._prompt(1 + len(self.earlier) + part, removal.row, removal.id),
        "near": self.kinds[self.kind(removal)],
        "kept": self._prompt(removal.kept_part, removal.kept_row, removal.kept_id),
        "similarity": round(removal.similarity, 3),
      }
      for part, removal in chosen[:SHOWN]
    ]

  def _prompt(self, part, row, id):
    if part == 0:
      return next(ids[id] for ids in self.human.values() if id in ids)
    if part <= len(self.earlier):
      stage, part = self.earlier[part - 1]
    else:
      stage, part = self.draws, part - 1 - len(self.earlier)
      row = int(np.flatnonzero(self.fresh[part] == 0)[row])
    (prompt,) = shards.read_rows(stage.part_path(part, stage.parts), [row], Prompt)
    return prompt.messages[-1]["content"]


def _near(session, stage, draws, fresh, human, earlier, c):
  """Finds the drafts that nearly are what stands already, with every host's share of the work."""
  host, hosts, barrier = session.run.process, session.run.processes, session.run.barrier
  texts, seen = {}, set()
  for name, rows in human.items():
    texts[name] = {id: row.messages for row in rows if (id := prompt_id(row.messages)) not in seen}
    seen |= texts[name].keys()
  before = [(pool, part) for pool in earlier for part in range(pool.parts)]
  generations = (0, *(0 for _ in before), *(1 for _ in range(draws.parts)))
  pool = duplicates.Pool(stage.dir / "near", generations, c.prompts.similarity, c.seed)
  for part in range(len(generations))[host::hosts]:
    if not duplicates.signed(pool, part):
      if part == 0:
        pairs = [(id, messages) for of in texts.values() for id, messages in of.items()]
      elif part <= len(before):
        of, at = before[part - 1]
        pairs = [(prompt.id, prompt.messages) for prompt in of.read(Prompt, at)]
      else:
        at = part - 1 - len(before)
        prompts = draws.read(Prompt, at)
        pairs = [(prompts[i].id, prompts[i].messages) for i in np.flatnonzero(fresh[at] == 0)]
      duplicates.sign(pool, part, [id for id, _ in pairs], [_text(messages) for _, messages in pairs])
    stage.beat()
  barrier(f"{stage.name}: signed")
  units = duplicates.pair_units(pool)
  newest = duplicates.newest(pool)
  with session.bar("pool: near-duplicates", len(units[host::hosts]) + len(newest[host::hosts]), "units") as bar:
    for unit in units[host::hosts]:
      duplicates.find_pairs(pool, unit)
      bar.update(1)
    barrier(f"{stage.name}: paired")
    for part in newest[host::hosts]:
      duplicates.verify(pool, part)
      bar.update(1)
  barrier(f"{stage.name}: verified")
  if host == 0:
    duplicates.decide(pool)
  barrier(f"{stage.name}: decided")
  shown = {name: {id: messages[-1]["content"] for id, messages in of.items()} for name, of in texts.items()}
  kinds = (*human, "prompt_of_an_earlier_pool", "duplicate")
  return _Near(pool, draws, fresh, shown, before, kinds)


def _contamination(stage, parts, human, c):
  """What the evaluation prompts have in common with the pool, the demonstrations and the annotations."""
  index = contamination.Index({"eval": [_text(row.messages) for row in human["eval_prompt"]]}, c.prompts.ngram)
  found = {}
  for name in ("demonstration", "annotation"):
    rows = human[name]
    ids, texts = [prompt_id(row.messages) for row in rows], [_text(row.messages) for row in rows]
    found[name] = contamination.summary(index, contamination.shared(index, ids, texts))["eval"]
  overlaps = []
  for part in range(parts):
    prompts = shards.read_records(stage.part_path(part, parts), Prompt)
    overlaps += contamination.shared(index, [p.id for p in prompts], [_text(p.messages) for p in prompts])
  return found | {"pool": contamination.summary(index, overlaps)["eval"]}
