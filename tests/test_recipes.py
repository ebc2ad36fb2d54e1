"""The recipes LIMA, ISARA and SPA whole: what they leave behind, on one host and on two, killed in every stage."""

import collections
import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import small_run
import tiny_recipes
from report_run import written
from sessions import filled_in

from alma_jax import start, sweeps
from alma_jax.corpus.normalise import prompt_id
from alma_jax.errors import UserError, Waiting
from alma_jax.mini import truth
from alma_jax.runtime import training
from alma_jax.runtime.batches import compact
from alma_jax.runtime.host import Checkpoint
from alma_jax.runtime.metrics import StepLog
from alma_jax.store import layout, shards
from alma_jax.store.records import Answer, Grade, Judgment, Pair, Prompt, Response
from alma_jax.store.runs import Stage, load_manifest, read_stage
from alma_jax.text import chat
from alma_jax.tools import export

NAMES = ("lima", "isara", "spa")
SECTIONS = {"lima": "Choice of the epoch", "isara": "Generated pairs", "spa": "Agreement of the policy"}


class Killed(BaseException):
  """Stands for the process being killed: nothing catches it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  directory = tmp_path_factory.mktemp("data")
  tiny_recipes.write_data(directory)
  return directory


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
  """The finished runs of one process."""
  workdir = tmp_path_factory.mktemp("one")
  tiny_recipes.run_all(workdir, data)
  return workdir


def test_two_processes_make_what_one_makes(one, data, tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  processes = [
    subprocess.Popen(
      [sys.executable, "tests/tiny_recipes.py", str(tmp_path), str(data)], cwd=small_run.ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env=small_run.environment(
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i),
        JAX_NUM_CPU_DEVICES="1",
      ),
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    outputs = [process.communicate(timeout=900)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
  for name in NAMES:
    assert small_run.artefacts(tmp_path / name) == small_run.artefacts(one / name)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_killed_before_every_manifest_and_in_every_training_makes_what_one_start_makes(
  name, one, data, tmp_path, monkeypatch
):
  """Checkpoints are written after every second step; trainings of more than three steps are killed in the fourth."""
  finish, write, killed, logged = Stage.finish, StepLog.write, set(), collections.Counter()

  def dying(self, *args, **kwargs):
    if not self.done and self.name not in killed:
      killed.add(self.name)
      raise Killed
    return finish(self, *args, **kwargs)

  def interrupted(self, step, metrics):
    logged[self.name, step] += 1
    if step == 3 and logged[self.name, step] == 1:
      raise Killed
    return write(self, step, metrics)

  monkeypatch.setattr(Stage, "finish", dying)
  monkeypatch.setattr(StepLog, "write", interrupted)
  config, wanted = tiny_recipes.configs(data)[name], {stage.name for stage in layout.stages(one / name)}
  for section in {"sft", "policy"} & set(config):
    config[section].checkpoint_every = 2
  for _ in range(3 * len(wanted)):
    try:
      with (s := tiny_recipes.session(tmp_path, config)).run:
        start.recipe_of(config).run(s)
        break
    except Killed:
      shards.remove_temporaries(tmp_path)
  assert killed >= wanted and small_run.artefacts(tmp_path) == small_run.artefacts(one / name)
  long = {of for of, step in logged if step == 3}
  assert long >= {"isara": {"round_02/policy"}, "lima": {"sft_1"}, "spa": {"sft_1"}}[name]
  assert all(logged[of, 0] == 1 < logged[of, 2] for of in long)  # it went on from the checkpoint
  assert (one / name / "sft_1/metrics.jsonl").read_text() == (tmp_path / "sft_1/metrics.jsonl").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_its_stages_and_its_report_has_its_own_figures(name, one, data):
  recipe = start.recipe_of(config := tiny_recipes.configs(data)[name])
  made, planned = {stage.name for stage in layout.stages(one / name)}, set(recipe.stages(start.checked_options(config)))
  # Log-probs of references belong to their trainings, what follows LIMA's choice has a round that nobody knows before,
  # and which sets have the fields that a judge reads is seen when they are read.
  others = ("/reference_", "/eval-test", "/compare-", "/audit-", ".mc", "categories-choices")
  planned, made = ({of for of in names if not any(word in of for word in others)} for names in (planned, made))
  assert planned == made != set()
  page = written(one / name)
  assert SECTIONS[name] in page and "could not be made" not in page


def turn(text):
  return [{"role": "user", "content": text}]


def test_isara_reports_seen_and_unseen_categories_harm_and_multiple_choice(one, data, tmp_path):
  """By brute force on the grades, and by the code that trains on the choices."""
  config, place = tiny_recipes.configs(data)["isara"], one / "isara/round_02"
  scores, kinds = {"seen": [], "unseen": []}, set()
  for row in read_stage(place / "eval.truth", Grade):
    asked = next(x for x in read_stage(place / "eval", Answer) if x.prompt_id == row.prompt_id)
    kinds.add(kind := truth.category({"messages": asked.messages}))
    scores["seen" if kind == "country" else "unseen"].append(row.score)
  report = layout.read_json(place / "categories.truth" / layout.REPORT)
  assert set(report["by"]) == kinds and len(kinds) > 1 and report["by"]["country"]["seen"]
  for half, values in scores.items():
    assert report[half]["score"]["mean"] == pytest.approx(np.mean(values))
    assert report[half]["harmful"]["mean"] == pytest.approx(np.mean(np.array(values) < 5))
  s = tiny_recipes.session(tmp_path, config)
  rows = [json.loads(line) for line in (data / "choices.jsonl").read_text().splitlines()]
  sequences = [
    compact(*chat.encode_example(s.host.tokenizer, s.host.chat, turn(row["prompt"]), text))
    for row in rows
    for text in row["choices"]
  ]
  policy = Checkpoint("policy", place / "policy/model", "")
  found = training.sequence_logprobs(s, policy, sequences, s.options.policy).reshape(len(rows), -1)
  wanted = {prompt_id(turn(row["prompt"])): best == 1 for row, best in zip(rows, found.argmax(axis=1), strict=True)}
  assert {row.prompt_id: row.score for row in read_stage(place / "eval-choices.mc", Grade)} == wanted
  assert len(set(wanted.values())) == 2


def test_the_chosen_epoch_is_what_other_commands_take(one, tmp_path):
  run, weight = one / "lima", "model.safetensors"
  chosen = load_manifest(run / "choice")["epoch"]
  assert {"eval-test", "compare-others.truth", "audit-answers"} <= {
    x.name for x in (run / f"round_{chosen:02d}").iterdir()
  }
  row = next(x for x in layout.progress(run) if x["round"] == str(chosen))
  assert row["n"] == "4" and row["test/n"] == "4" and row["test/truth"]
  expected = run / "sft_1" / (layout.epoch_name(1) if chosen == 1 else "")
  assert layout.newest_policy(run) == layout.policy_of(run, chosen) == expected
  row, asked = sweeps._evaluated(run)  # what a sweep's table shows
  assert (row["round"], asked) == (str(chosen), "test")
  assert export.main([f"--stage={run}", "--best", f"--output={tmp_path / 'out'}"]) == 0
  assert (tmp_path / "out" / weight).read_bytes() == (expected / "model" / weight).read_bytes()
  page = written(run)
  assert f"{chosen} (chosen)" in page and "others (truth), win" in page


def test_a_person_chooses_compares_and_audits_and_the_same_command_goes_on(one, data, tmp_path):
  run, config = tmp_path / "run", tiny_recipes.configs(data)["lima"]
  shutil.copytree(one / "lima", run)
  for path in (run / "choice", *run.glob("round_*/*-*")):
    shutil.rmtree(path)
  config.choice.judge = config.audit.judge = "human"
  config.compare.judges = ("human",)

  def started():
    with (s := tiny_recipes.session(run, config)).run:
      start.recipe_of(config).run(s)

  def grade(text):
    return 1 + len(text) % 6

  with pytest.raises(Waiting, match=r"forms/choice\.csv have no grade"):
    started()
  filled_in(run / "forms/choice.csv", lambda row: grade(row["response"]))
  with pytest.raises(Waiting) as waiting:
    started()
  said = str(waiting.value).splitlines()
  assert ["compare-others.human_1.csv" in said[0], "audit-answers.csv" in said[1], len(said)] == [True, True, 2]
  means = [
    sum(grade(row.response) for row in read_stage(run / f"round_{epoch:02d}/eval", Answer)) / 4 for epoch in (1, 2)
  ]
  manifest = load_manifest(run / "choice")
  assert [row["mean"] for row in manifest["epochs"]] == means and manifest["epoch"] == 1 + (means[1] > means[0])
  filled_in(run / "forms/audit-answers.csv", lambda row: "pass")
  filled_in(form := run / "forms/compare-others.human_1.csv", lambda row: "maybe")
  with pytest.raises(UserError, match=r"human_1\.csv, line 2, column better: 'maybe'; it may be a, tie, b$"):
    started()
  form.write_text(form.read_text().replace("maybe", "tie"))
  started()
  place = run / layout.round_name(manifest["epoch"])
  assert load_manifest(place / "audit-answers")["levels"]["pass"]["value"] == 1
  assert load_manifest(place / "compare-others.human_1")["outcomes"]["tie"]["value"] == 1


def test_spa_begins_with_a_given_model_and_judges_against_the_base_where_there_are_no_seeds(one, data, tmp_path):
  """The judgement is the difference of what the training code gives for the two models."""
  config, given = tiny_recipes.configs(data)["spa"], one / "spa/sft_1/model"
  config.data.sft = config.data.preferences = ""
  config.sft_model, config.judge.reference = str(given), "base"
  with (s := tiny_recipes.session(tmp_path, config)).run:
    start.recipe_of(config).run(s)
    place, options = tmp_path / "round_02", s.options.policy
    asked = {row.id: row for row in read_stage(place / "prompts", Prompt)}
    responses = [row for row in read_stage(place / "responses", Response) if row.finished]
    sequences = [
      compact(*chat.encode_example(s.host.tokenizer, s.host.chat, asked[row.prompt_id].messages, row.text))
      for row in responses
    ]
    ours, theirs = (
      training.sequence_logprobs(s, model, sequences, options) for model in (Checkpoint("sft_1", given, ""), s.base)
    )
  scores = {(row.prompt_id, row.sample_id): row.score for row in read_stage(place / "judgments", Judgment)}
  found = [scores[row.prompt_id, row.sample_id] for row in responses]
  assert len(found) > 12 and np.std(found) > 0.1
  np.testing.assert_allclose(found, ours - theirs, atol=1e-3)
  for pair in read_stage(place / "trainset", Pair):
    of = [scores[pair.prompt_id, i] for i in range(2)]
    assert (pair.chosen_score, pair.rejected_score) == (max(of), min(of))
  assert not (tmp_path / "round_01").exists() and not (tmp_path / "sft_1").exists()
  assert load_manifest(place / "agreement")["counts"]["held_out"]["n"] == 0
  assert (place / "policy/model/model.safetensors").read_bytes() != (given / "model.safetensors").read_bytes()
