"""A config file's sweep: what it expands to, which mistakes are found, and the table of what came out."""

import dataclasses
import json
import math

import numpy as np
import pytest

from alma_jax import start, sweeps
from alma_jax.options import ConfigError
from alma_jax.store import layout, shards, statistics
from alma_jax.store.records import Answer, Grade
from alma_jax.store.runs import Run
from configs import alma

SWEEP = """
def sweep(add):
  for seed in (0, 1):
    for n in (4, 9):
      add(seed=seed, responses=dict(n=n))
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "sweep_file.py"
  path.write_text(SWEEP)
  return path


def expand(file, workdir="runs", **more):
  config = alma.mini()
  for name, value in more.items():
    config[name] = value
  return sweeps.expand(sweeps.Shared(str(file), alma.mini(), config, start.checked_options), workdir)


def test_a_unit_is_the_command_that_runs_it(file):
  units = expand(file, "/runs/t", feedback_rounds=2)
  assert [unit.number for unit in units] == [1, 2, 3, 4]
  config, workdir, *values = units[3].arguments
  assert config == f"--config={file}" and workdir.startswith("--workdir=/runs/t/04_seed=1,n=9_")
  assert values == ["--config.feedback_rounds=2", "--config.responses.n=9", "--config.seed=1"]
  assert (units[3].config.responses.n, units[3].config.feedback_rounds) == (9, 2)
  assert len({unit.directory for unit in units}) == 4 and {unit.state() for unit in units} == {""}


def test_directories_are_found_again_when_variants_are_added_before(file, tmp_path):
  before = {unit.directory.name: unit.overrides for unit in expand(file, tmp_path)}
  for name in before:
    (tmp_path / name).mkdir()
  file.write_text(SWEEP.replace("(4, 9)", "(2, 4, 9)"))
  after = {unit.directory.name: unit.overrides for unit in expand(file, tmp_path)}
  assert len(after) == 6 and before.items() <= after.items()


@pytest.mark.parametrize(
  "call, message",
  [
    ("add(seed=1, respones=dict(n=4))", "unit 5 (seed=1 respones.n=4): config has no field 'respones.n'; did you mean"),
    ("add(responses=dict(temprature=1.0))", "did you mean 'responses.temperature'?"),
    ("add(responses=4)", "responses is a section; give it a dict"),
    ("add(responses=dict(n='4'))", "responses.n is a int, not '4'"),
    ("add(rounds={20: dict(seed=1)})", "an entry for round 20"),
    ("add(rounds={3: dict(sed=1)})", "did you mean 'seed'?"),
    ("add(seed=0, responses=dict(n=4))", "the same as work unit 1"),
  ],
)
def test_all_variants_are_checked(file, call, message):
  file.write_text(f"{SWEEP}  {call}\n")
  with pytest.raises(ConfigError) as error:
    expand(file)
  assert message in str(error.value)


def test_a_file_without_a_sweep_is_one_unit_or_an_error(file):
  file.write_text("")
  shared = sweeps.Shared(str(file), alma.mini(), alma.mini(), start.checked_options)
  with pytest.raises(ConfigError, match="has no function sweep"):
    sweeps.expand(shared, "runs")
  [unit] = sweeps.expand(shared, "runs/one", alone=True)
  assert unit.arguments == (f"--config={file}", "--workdir=runs/one")


# The table


def finished(unit, scores, judge="truth", identity="truth 1"):
  """A finished run in the unit's directory, whose round 2 has these scores by prompt; None: the answers are gone."""
  mean = statistics.mean(list(scores.values()))
  with Run(unit.directory) as run:
    run.save_config(json.loads(json.dumps(unit.config.to_dict(), default=str)))
    run.log("start", devices=["cpu"] * 3)
    answers = [Answer(prompt, (), "", 1, True) for prompt in scores]
    name = layout.stage_name(2, layout.EVALUATION)
    for stage, records, kind, extra in (
      (name, answers, Answer, {}),
      (
        layout.grades_name(name, judge),
        [Grade(prompt, score) for prompt, score in scores.items()],
        Grade,
        {"judge": {"name": judge, "identity": identity, "scale": [0.0, 10.0], "selects": judge == "judge"}},
      ),
    ):
      shards.write_json(run.dir / stage / "seconds.json", {"seconds": 41.0})  # of an earlier start
      made = run.stage(stage, {})
      made.write_part(0, 1, records, kind)
      made.finish(**extra)
    run.progress({"round": 2, "n": mean.n, judge: mean.value, f"{judge}_ci95": mean.ci95})
    run.log("end")


def scores(n, seed, among=40):
  """Scores that depend on the prompt (much), on n (0.5 more for 9) and on chance."""
  chance = np.random.default_rng([n, seed])
  return {f"p{i}": 0.2 * i + 0.5 * (n == 9) + chance.normal() for i in range(n == 9, among)}


def test_the_table_compares_variants_prompt_by_prompt(file, tmp_path):
  units = expand(file, tmp_path / "runs")
  made = {}
  for unit in units:
    n, seed = unit.overrides["responses"]["n"], unit.overrides["seed"]
    made[seed, n] = scores(n, seed)
    finished(unit, made[seed, n])
  assert {unit.state() for unit in units} == {"finished"}
  lines = sweeps.table(units)
  row = " ".join(lines[1].split())
  mean, seconds = statistics.mean(list(made[0, 4].values())), sweeps.device_seconds(units[0].directory)
  assert row == f"1 finished 2 40 truth {mean.value:.3f} ± {mean.ci95:.3f} {seconds:.0f} seed=0 responses.n=4"
  assert 2 * 41 * 3 <= seconds < 2 * 71 * 3  # two stages on three devices; each took a moment more
  # By hand: differences of the 39 prompts that both have, those of one prompt in both seeds as one cluster.
  both = np.array([[made[s, 9][f"p{i}"] - made[s, 4][f"p{i}"] for i in range(1, 40)] for s in (0, 1)])
  by_prompt = both.sum(0) - 2 * both.mean()
  prompts = 1.96 * math.sqrt((by_prompt**2).sum() * 39 / 38) / both.size
  by_seed = both.mean(1)
  seeds = 12.706 * by_seed.std(ddof=1) / math.sqrt(2)
  line = next(line for line in lines[lines.index("Paired differences to: responses.n=4") :] if "n=9" in line)
  assert line.startswith(f"  {both.mean():+.3f} ± {prompts:.3f} over 39 prompts ± {seeds:.3f} over 2 seeds  ")
  assert any(line.startswith("  truth 1  ") and "n = 2" in line for line in lines)  # means over seeds


def test_variants_with_judges_of_their_own_are_not_compared(file, tmp_path):
  units = expand(file, tmp_path / "runs")
  for unit in units:
    finished(unit, scores(4, 0), judge="judge", identity=f"own {unit.number}")
  lines = sweeps.table(units)
  assert "  not compared (each has a judge of its own)  responses.n=9" in lines
  assert not any("over seeds" in line for line in lines)


def test_another_config_in_the_directory_is_not_finished(file, tmp_path):
  unit = expand(file, tmp_path / "runs")[0]
  finished(unit, scores(4, 0))
  assert dataclasses.replace(unit, config=alma.mini()).state() == "begun"
