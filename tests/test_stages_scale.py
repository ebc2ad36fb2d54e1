"""No stage reads a whole round into memory, and working share by share changes no number."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIMITS = {2_000: 0.75e9, 10_000: 1.5e9}  # prompts -> bytes of the whole process: Python, JAX and the work


def run(directory, prompts, samples):
  command = [sys.executable, "tests/scale.py", str(directory), str(prompts), str(samples)]
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=900)
  assert done.returncode == 0 and "report.html:" not in done.stderr, done.stderr[-3000:]
  return json.loads(done.stdout)


@pytest.mark.parametrize("prompts", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_responses(tmp_path, prompts):
  """400,000 responses, or two million."""
  found = run(tmp_path / "run", prompts, 200)
  assert found["counts"]["selected"] == found["rows"] == found["graded"] == prompts
  assert found["peak"] < LIMITS[prompts]


def test_the_numbers_are_those_of_a_read_of_everything_at_once(tmp_path):
  found = run(tmp_path / "run", 300, 7)
  from alma_jax.stages import trainset
  from alma_jax.store.records import Example, Judgment, Prompt, Response
  from alma_jax.store.runs import read_stage

  place = tmp_path / "run" / "round_02"
  scores = {(j.prompt_id, j.sample_id): j.score for j in read_stage(place / "judgments", Judgment)}
  candidates = {}
  for r in read_stage(place / "responses", Response):
    candidates.setdefault(r.prompt_id, []).append((r, scores[r.prompt_id, r.sample_id]))
  whole = [
    trainset.select(prompt, candidates[prompt.id], 2, 0, trainset.Options())
    for prompt in read_stage(place / "prompts", Prompt)
  ]
  kept = [record for selection in whole for record in selection.records]
  rows = read_stage(place / "trainset", Example)
  assert [rows[at] for at in np.load(place / "trainset" / "order.npy")] == kept
  gains = [s.top - np.mean([score for _, score in candidates[s.records[0].prompt_id]]) for s in whole if s.records]
  assert found["counts"]["judge_gain_sum"] == pytest.approx(sum(gains))
  assert found["counts"]["prompts_kept"] == len(gains)
