"""The pool: prompts that the base model invents, each once.

A draft (stages/drafts.py) enters the pool unless it is a demonstration's, an annotation's or an evaluation prompt, or
is there already: equal but for spelling, or nearly (corpus/duplicates.py). The pool has as many parts as the drafts;
nothing here needs all of it in memory. report.json holds examples of what was removed, and what the evaluation prompts
share with the pool and the human data.

A later round can add to the pool: a larger `prompts.draws` there makes more drafts, numbered on, and a pool of its own,
`pool_07/`, without anything that an earlier one has.
"""

import collections
import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alma_jax.corpus import contamination, duplicates
from alma_jax.corpus.normalise import normalised, prompt_id
from alma_jax.options import Checked, option
from alma_jax.runtime.session import Session
from alma_jax.store import layout, shards
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Data
from alma_jax.store.records import Prompt
from alma_jax.store.runs import Artefact, Stage
from alma_jax.text.chat import Messages

TOGETHER = 2**25  # ids that are sorted at once
SHOWN = 20  # removed near-duplicates in the report
DUPLICATE = 1000  # why a draft does not enter: it is there already; 1, 2, ...: it equals something else

Human = Mapping[str, Sequence[SeedRow]]  # the human data by what it is called in counts


@dataclasses.dataclass(frozen=True)
class Options(Checked):
  similarity: float = option(
    0.7, least=0, most=1
  )  # ROUGE-L from which a prompt is a near-duplicate; 0: equal ones only
  ngram: int = option(8, least=1)  # words that an evaluation prompt and another text share, for the report


def build(
  s: Session[Any], data: Data, drafts: Artefact[Prompt], options: Options, earlier: Sequence[Artefact[Prompt]] = ()
) -> Artefact[Prompt]:
  """Stage `POOL/prompts` of the drafts that enter. No text of the human data and none of the `earlier` pools does."""
  fields = {"config": dataclasses.asdict(options), "data": data.digests}
  inputs = {"drafts": drafts, **{stage.name: stage for stage in earlier}}
  stage = s.run.stage(layout.beside(drafts.name, layout.PROMPTS), fields, inputs)
  if not stage.done:
    _select(s, stage, drafts, data, earlier, options)
  if s.run.process == 0:  # also after a start that was killed just here
    shutil.rmtree(stage.dir / "near", ignore_errors=True)
  return Artefact(stage, Prompt)


def _select(
  s: Session[Any],
  stage: Stage,
  drafts: Artefact[Prompt],
  data: Data,
  earlier: Sequence[Artefact[Prompt]],
  options: Options,
) -> None:
  human = {"demonstration": data.sft, "annotation": data.judge, "eval_prompt": [*data.eval, *data.held_out]}
  taken = {name: shards.id_numbers(ids) for name, ids in _ids_of(human).items()}
  taken |= {f"prompt_of_{layout.parent_of(pool.name)}": pool.ids() for pool in earlier}
  fresh = _first_of_each(drafts, taken)
  mine = stage.mine(drafts.parts)
  near = None
  if options.similarity:
    near = _Near.found(s, stage, _Texts(drafts, fresh, human, earlier), options.similarity)
  for part in mine:
    why = fresh[part]
    if near:
      why = why.copy()
      at = np.flatnonzero(why == 0)
      for removal in near.removals(part):
        why[at[removal.row]] = -1 - near.kind(removal)
    reasons = collections.Counter(why.tolist())
    counts = {"unique": reasons.pop(0, 0), "duplicate": reasons.pop(DUPLICATE, 0)}
    counts |= {f"equals_{name}": reasons[i] for i, name in enumerate(taken, start=1) if reasons[i]}
    if near:
      counts |= {f"near_{name}": reasons[-1 - i] for i, name in enumerate(near.kinds) if reasons[-1 - i]}
    kept = [prompt for prompt, reason in zip(drafts.read(part), why, strict=True) if not reason]
    stage.write_part(part, drafts.parts, kept, Prompt, counts)
  s.run.barrier(f"{stage.name}: parts")
  if s.run.process == 0:
    report: dict[str, Any] = {"contamination": _contamination(stage, drafts.parts, human, options.ngram)}
    if near:
      report["near_duplicates"] = near.examples()
    shards.write_json(stage.dir / layout.REPORT, report)
  stage.finish(files=[layout.REPORT])


def _first_of_each(drafts: Artefact[Prompt], taken: Mapping[str, np.ndarray]) -> list[np.ndarray]:
  """For each part, why each of its drafts does not enter; 0: it does. The first of equal drafts stands.

  `taken` holds the ids that no draft may have; the number of the first set that has a draft's id is the reason.
  """
  columns = [shards.read_ids([path]) for path in drafts.paths]
  why = [np.full(len(ids), DUPLICATE, np.int16) for ids in columns]
  # Sort the ids of one residue at a time, so that no more than about TOGETHER of them are in work.
  ranges = max(1, -(-sum(map(len, columns)) // TOGETHER))
  for at in range(ranges):
    inside = [np.flatnonzero(ids % np.uint64(ranges) == at) for ids in columns]
    together = np.concatenate([ids[rows] for ids, rows in zip(columns, inside, strict=True)])
    _, first = np.unique(together, return_index=True)
    # `first` counts through all parts; part p holds the places from its begin to its end.
    ends = np.cumsum([len(rows) for rows in inside])
    for part, begin in enumerate(ends - [len(rows) for rows in inside]):
      own = first[(first >= begin) & (first < ends[part])] - begin
      why[part][inside[part][own]] = 0
  for number, ids in reversed(list(enumerate(taken.values(), start=1))):
    for part, own in enumerate(columns):
      why[part][np.isin(own, ids)] = number
  return why


def _ids_of(human: Human) -> dict[str, list[str]]:
  return {name: sorted({prompt_id(row.messages) for row in rows}) for name, rows in human.items()}


def _text(messages: Messages) -> str:
  return "\n".join(normalised(message["content"]) for message in messages)


@dataclasses.dataclass(frozen=True)
class _Texts:
  """All texts that are compared, as numbered parts: 0 is the human data, then come the parts of the earlier pools, then
  the parts of the drafts, with those drafts alone that equal nothing else."""

  drafts: Artefact[Prompt]
  fresh: list[np.ndarray]
  human: Human
  earlier: Sequence[Artefact[Prompt]]

  @property
  def before(self) -> list[tuple[Artefact[Prompt], int]]:
    return [(pool, part) for pool in self.earlier for part in range(pool.parts)]

  @property
  def first(self) -> int:
    """The number of the first part of the drafts."""
    return 1 + len(self.before)

  def by_name(self) -> dict[str, dict[str, Messages]]:
    """The human conversations by kind and id, each under the first kind that has it."""
    found: dict[str, dict[str, Messages]] = {}
    seen: set[str] = set()
    for name, rows in self.human.items():
      found[name] = {id: row.messages for row in rows if (id := prompt_id(row.messages)) not in seen}
      seen |= found[name].keys()
    return found

  def part(self, part: int) -> list[tuple[str, Messages]]:
    """(id, messages) of each text of a part."""
    if part == 0:
      return [(id, messages) for of in self.by_name().values() for id, messages in of.items()]
    if part < self.first:
      pool, at = self.before[part - 1]
      return [(prompt.id, prompt.messages) for prompt in pool.read(at)]
    prompts, fresh = self.drafts.read(part - self.first), self.fresh[part - self.first]
    return [(prompts[i].id, prompts[i].messages) for i in np.flatnonzero(fresh == 0)]

  def one(self, part: int, row: int) -> str:
    """The last turn of the text at this row of a part after the first."""
    if part < self.first:
      artefact, at = self.before[part - 1]
    else:
      artefact, at = self.drafts, part - self.first
      row = int(np.flatnonzero(self.fresh[at] == 0)[row])
    (prompt,) = shards.read_rows(artefact.paths[at], [row], Prompt)
    return prompt.messages[-1]["content"]


@dataclasses.dataclass(frozen=True)
class _Near:
  """The near-duplicates among `texts`."""

  texts: _Texts
  pool: duplicates.Search
  human: Mapping[str, Mapping[str, str]]  # name -> {id: text}

  @classmethod
  def found(cls, s: Session[Any], stage: Stage, texts: _Texts, similarity: float) -> "_Near":
    """Find them, each process with its share of the work."""
    process, processes, barrier = s.run.process, s.run.processes, s.run.barrier
    generations = (*(0 for _ in range(texts.first)), *(1 for _ in range(texts.drafts.parts)))
    pool = duplicates.Search(stage.dir / "near", generations, similarity, s.options.seed)
    for part in range(len(generations))[process::processes]:
      if not duplicates.signed(pool, part):
        pairs = texts.part(part)
        duplicates.sign(pool, part, [id for id, _ in pairs], [_text(messages) for _, messages in pairs])
      stage.beat()
    barrier(f"{stage.name}: signed")
    units, newest = duplicates.pair_units(pool), duplicates.newest(pool)
    total = len(units[process::processes]) + len(newest[process::processes])
    with s.display.bar("pool: near-duplicates", total, "units") as bar:
      for unit in units[process::processes]:
        duplicates.find_pairs(pool, unit)
        bar.update(1)
      barrier(f"{stage.name}: paired")
      for part in newest[process::processes]:
        duplicates.verify(pool, part)
        bar.update(1)
    barrier(f"{stage.name}: verified")
    if process == 0:
      duplicates.decide(pool)
    barrier(f"{stage.name}: decided")
    human = {name: {id: messages[-1]["content"] for id, messages in of.items()} for name, of in texts.by_name().items()}
    return cls(texts, pool, human)

  @property
  def kinds(self) -> tuple[str, ...]:
    """What a draft can be near to: the human data by name, an earlier pool, the pool itself."""
    return (*self.human, "prompt_of_an_earlier_pool", "duplicate")

  def removals(self, part: int) -> Sequence[Any]:
    """What is removed from a part of the drafts."""
    _, removals = duplicates.decisions(self.pool, self.texts.first + part)
    return removals

  def kind(self, removal: Any) -> int:
    """The place in `kinds` of what the removed draft is near to."""
    if removal.kept_part > 0:
      return len(self.human) + (removal.kept_part >= self.texts.first)
    return next(i for i, ids in enumerate(self.human.values()) if removal.kept_id in ids)

  def examples(self) -> list[dict[str, Any]]:
    """Some of the removed drafts, spread over the parts, each with what it is near to."""
    chosen, parts = [], self.texts.drafts.parts
    for part in range(parts):
      first = sorted(self.removals(part), key=lambda removal: removal.id)[: -(-SHOWN // parts)]
      chosen += [(part, removal) for removal in first]
    return [
      {
        "removed": self.texts.one(self.texts.first + part, removal.row),
        "near": self.kinds[self.kind(removal)],
        "kept": self._kept(removal),
        "similarity": round(removal.similarity, 3),
      }
      for part, removal in chosen[:SHOWN]
    ]

  def _kept(self, removal: Any) -> str:
    if removal.kept_part == 0:
      return next(ids[removal.kept_id] for ids in self.human.values() if removal.kept_id in ids)
    return self.texts.one(removal.kept_part, removal.kept_row)


def _contamination(stage: Stage, parts: int, human: Human, ngram: int) -> dict[str, Any]:
  """What the evaluation prompts share with the pool, the demonstrations and the annotations."""
  index = contamination.Index({"eval": [_text(row.messages) for row in human["eval_prompt"]]}, ngram)
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
