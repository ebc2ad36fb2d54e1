"""A round of many synthetic responses: its trainset, evaluation and report, and the memory that they took.

python tests/scale.py DIRECTORY PROMPTS SAMPLES     prints one JSON object
"""

import json
import pathlib
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alma_jax.corpus.normalise import prompt_id
from alma_jax.judges.contract import Verdict
from alma_jax.llama import sharding
from alma_jax.report import page
from alma_jax.runtime import alarms, sampling
from alma_jax.runtime.display import Display
from alma_jax.runtime.host import EngineOptions, Host, ModelOptions
from alma_jax.runtime.session import Session
from alma_jax.stages import evaluation, trainset
from alma_jax.store import digests, shards
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Data
from alma_jax.store.records import Judgment, Prompt, Response
from alma_jax.store.runs import Artefact, Run

SHARES, TOKENS = 64, 24


def asked(n):
  messages = ({"role": "user", "content": f"prompt number {n}"},)
  return Prompt(prompt_id(messages), messages, "synthetic", n % 97)


def table_of(kind, columns):
  return pa.table(columns, schema=shards.schema(kind))


def write_table(stage, part, parts, table, counts):
  """Write a part as the stage does, from columns: two million Python objects would take longer than the test."""
  path = stage.part_path(part, parts)
  stage.missing(parts)  # fixes the number of parts
  pq.write_table(table, path, row_group_size=shards.ROW_GROUP, compression="zstd", compression_level=1)
  row = {**digests.of_file(path).fields(), "rows": len(table), "counts": counts}
  shards.write_sealed(path.with_suffix(".json"), row)


def made(s, prompts, samples):
  """(asked, answered, judged) of a round."""
  stages = {name: s.stage(name, {"made": "up"}) for name in ("prompts", "responses", "judgments")}
  rows = [asked(n) for n in range(prompts)]
  stages["prompts"].write_part(0, 1, rows, Prompt)
  for share in range(SHARES):
    mine, random = rows[share::SHARES], np.random.default_rng(share)
    n = len(mine) * samples
    ids = np.repeat([p.id for p in mine], samples)
    sample = np.tile(np.arange(samples), len(mine))
    tokens = random.integers(0, 30_000, n * TOKENS).astype(np.int32)

    def lists(values, size, n=n):
      return pa.ListArray.from_arrays(np.arange(0, n * size + 1, size, np.int32), values)

    responses = {
      "prompt_id": ids, "sample_id": sample, "checkpoint": np.repeat("sft_1", n), "finished": random.random(n) < 0.95,
      "text": [f"response {a} of {b}" for a, b in zip(sample.tolist(), ids.tolist(), strict=True)],
      "tokens": lists(pa.array(tokens), TOKENS).cast(shards.schema(Response).field("tokens").type),
      "logprob": -random.random(n),
    }  # fmt: skip
    probs = random.dirichlet(np.ones(11), n)
    judgments = {
      "prompt_id": ids, "sample_id": sample, "score": probs @ np.arange(11), "mass": np.full(n, 0.98),
      "probs": lists(pa.array(probs.ravel()), 11).cast(shards.schema(Judgment).field("probs").type),
    }  # fmt: skip
    scores = judgments["score"]
    histogram = np.bincount((scores + 0.5).astype(int), minlength=11).tolist()
    judged = {"judged": n, "score_sum": float(scores.sum()), "mass_sum": 0.98 * n}
    judged["histogram"] = {f"{score:02d}": count for score, count in enumerate(histogram)}
    write_table(stages["responses"], share, SHARES, table_of(Response, responses), {"samples": n, "tokens": n * TOKENS})
    write_table(stages["judgments"], share, SHARES, table_of(Judgment, judgments), judged)
  for name, stage in stages.items():
    stage.finish(**({"judge": {"identity": "made up", "scale": [0, 10]}} if name == "judgments" else {}))
  kinds = {"prompts": Prompt, "responses": Response, "judgments": Judgment}
  return [Artefact(stages[name], kind) for name, kind in kinds.items()]


def evaluated(s, prompts):
  """The means of an evaluation in which every answer is "yes" and the judge says how long the prompt is."""
  judge = types.SimpleNamespace(identity="a stand-in", scale=(0.0, 100.0))
  judge.scores = lambda pairs: [Verdict(float(len(messages[-1]["content"]))) for messages, _ in pairs]
  written = sampling.Draft("yes", (1, 2), True, (-0.1, -0.2))
  sampling.drafts = lambda host, checkpoint, requests, *rest: [written] * len(requests)
  rows = [SeedRow(asked(n).messages, None, None, n) for n in range(prompts)]
  data = Data([], [], rows, {"sft": "", "judge": "", "eval": ""})
  options = evaluation.Options(decoding=sampling.Decoding(8), max_prompt_tokens=64)
  return evaluation.build(s, types.SimpleNamespace(name="a", content="a"), judge, data, options)


def session(directory):
  (pathlib.Path(directory) / "config.json").write_text('{"recipe": "alma", "feedback_rounds": 1, "rounds": {}}')
  host = Host(ModelOptions("mini", "mini"), EngineOptions(), sharding.make_mesh(), Display(speaks=False))
  options = types.SimpleNamespace(seed=0, shards=SHARES, alarms=alarms.Options())
  return Session(Run(directory), host, sharding.make_mesh(), {0: options, 2: options}, None, 2)


def main(directory, prompts, samples):
  pathlib.Path(directory).mkdir(parents=True)
  s = session(directory)
  inputs = made(s, prompts, samples)
  found = trainset.build(s, *inputs, trainset.Options())
  means = evaluated(s, prompts)
  assert page.write(s.run.dir)
  # Of this program alone: getrusage would count the pages of the process that started it, too.
  (peak,) = (int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:"))
  return {"counts": found.manifest["counts"], "rows": found.manifest["rows"], "graded": means["judge"].n, "peak": peak}


if __name__ == "__main__":
  print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
