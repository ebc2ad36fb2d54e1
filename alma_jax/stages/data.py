"""The seeds: the run's own checked copy of the human data (demonstrations, annotations, evaluation prompts).

Everything later reads this copy, so a run can be understood, resumed and moved without the files it began with. The
names "mini" stand for data that the miniature world writes for the run's seed.
"""

import dataclasses
import json
import pathlib

from alma_jax.corpus.normalise import prompt_id
from alma_jax.keys import key_of
from alma_jax.options import ConfigError
from alma_jax.store import shards
from alma_jax.store.data import load_examples

FILES = {"sft": ("response",), "judge": ("response", "score"), "eval": ()}  # name -> what a row must have


@dataclasses.dataclass(frozen=True)
class Seeds:
  sft: list  # of SeedRow
  judge: list
  eval: list
  digests: dict  # of the three files, for fingerprints

  def ids(self, name):
    return {prompt_id(row.messages) for row in getattr(self, name)}


def build(session, c):
  """The Seeds of the finished stage `seeds`."""
  sources = {name: c.data[name] for name in FILES}
  for name in ("sft", "judge"):
    if not sources[name]:
      raise ConfigError(f"config.data.{name} is empty: give a JSONL or Parquet file or a TFDS name")
  fields = {"config": {"data": c.data.to_dict()}, "contents": {n: _digest(s) for n, s in sources.items()}}
  if "mini" in sources.values():
    fields["config"]["seed"] = c.seed
  stage = session.run.stage("seeds", fields)
  if not stage.done:
    counts = {}
    if session.run.process == 0:
      counts = _write(stage.dir, sources, c)
    stage.finish(counts=counts, files=[f"{name}.jsonl" for name in FILES])
    for name, count in stage.manifest["counts"].items():
      session.run.log("data", file=name, **count)
  rows = (load_examples(stage.dir / f"{name}.jsonl", need)[0] for name, need in FILES.items())
  return Seeds(*rows, digests={name: stage.manifest["files"][f"{name}.jsonl"]["digest"] for name in FILES})


def _write(directory, sources, c):
  """Write the three files; counts of what was read, dropped and moved."""
  if "mini" in sources.values():
    from alma_jax.mini import seeds as mini

    mini.make(directory / ".mini", c.seed)
  counts, rows = {}, {}
  for name, source in sources.items():
    if name == "eval" and not source:
      continue
    path = directory / ".mini" / f"{name}.jsonl" if source == "mini" else source
    rows[name], report = load_examples(path, FILES[name])
    counts[name] = {key: report[key] for key in ("rows", "kept", "empty", "duplicate")}
  if not sources["eval"]:  # nobody gave evaluation prompts: some demonstrations' prompts become them
    ids = sorted({prompt_id(r.messages) for r in rows["sft"]}, key=lambda i: key_of("eval", i))
    held = set(ids[: max(1, min(c.data.held_out, len(ids) // 10))])
    rows["eval"] = [r for r in rows["sft"] if prompt_id(r.messages) in held]
    rows["sft"] = [r for r in rows["sft"] if prompt_id(r.messages) not in held]
    counts["eval"] = {"held_out_of_sft": len(rows["eval"])}
  # An evaluation prompt that is also a demonstration or an annotation would measure memory.
  asked = {prompt_id(r.messages) for r in rows["eval"]}
  for name in ("sft", "judge"):
    clean = [r for r in rows[name] if prompt_id(r.messages) not in asked]
    counts[name]["equals_eval_prompt"] = len(rows[name]) - len(clean)
    rows[name] = clean
  for name, kept in rows.items():
    with shards.atomic(directory / f"{name}.jsonl") as file:
      file.write("".join(json.dumps(_plain(row, FILES[name]), ensure_ascii=False) + "\n" for row in kept).encode())
  return counts


def _plain(row, need):
  return {"messages": list(row.messages)} | {key: getattr(row, key) for key in need}


def _digest(source):
  path = pathlib.Path(source)
  return shards.digest(path) if source and path.is_file() else source
