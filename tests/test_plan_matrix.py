"""Quick plans against the compilers' figures of every program of the matrix (benchmarks/results/compiled)."""

import json
import pathlib

import pytest

from alma_jax.plan.work import Sampling, Training
from benchmarks import compiled

FILE = pathlib.Path(__file__).parents[1] / "benchmarks/results/compiled/low_effort.jsonl"


@pytest.fixture(scope="module")
def matrix():
  """The largest program of each stage on each machine, beside the quick plan's Step."""
  return list(compiled.compared(map(json.loads, FILE.read_text().splitlines())))


def test_the_slots_that_are_planned_fit_on_every_machine(matrix):
  found = [each for each in matrix if isinstance(each.step.work, Sampling)]
  assert len(found) == 9
  for each in found:
    assert each.row["peak"] <= each.step.peak <= 1.08 * each.row["peak"] and each.step.peak <= each.step.usable, (
      each.row
    )


def test_peaks_are_what_the_compilers_say_on_every_machine(matrix):
  # In these steps the compiler reduces the head's gradient at once, which the plan takes to lie there in the layers.
  early = {("v6e:2x4", "dpo"), ("v6e:2x4", "grpo"), ("v5p:2x2x2", "grpo")}
  for each in matrix:
    near = 0.06 if isinstance(each.step.work, Training) else 0.08
    near = 0.09 if (each.row["topology"], each.row["stage"]) in early else near
    assert each.step.peak == pytest.approx(each.row["peak"], rel=near), each.row
    assert each.row["peak"] <= each.row["usable"]


def test_what_a_step_sends_is_what_the_compilers_say_on_every_machine(matrix):
  # A step that fits only when the compiler makes things anew gathers weights anew.
  others = {("v6e:2x4", "grpo")}
  found = [each for each in matrix if isinstance(each.step.work, Training) and each.row["sent"]]
  for each in found:
    if (each.row["topology"], each.row["stage"]) not in others:
      assert each.step.collective == pytest.approx(each.row["sent"], rel=0.07), each.row
  assert len(found) == 32
