"""SPA's recipe on planted texts and rewards: whose prompts, whose pairs, who is trained from whom and against whom; the
same bytes on two hosts and after any kill. A model is run by the last test alone, which kills a training."""

import collections
import dataclasses
import itertools
import json
import os

import jax
import numpy as np
import pytest
from sessions import on_two_hosts, session_in

from alma_jax import start
from alma_jax.corpus.normalise import prompt_id
from alma_jax.engine.losses import SelfRefinement
from alma_jax.errors import RunError
from alma_jax.judges import implicit
from alma_jax.judges.contract import Verdict
from alma_jax.keys import key_of
from alma_jax.llama import sharding
from alma_jax.options import ConfigError, build
from alma_jax.recipes import spa as recipe
from alma_jax.runtime import sampling, training
from alma_jax.runtime.host import Checkpoint
from alma_jax.runtime.metrics import StepLog
from alma_jax.runtime.sampling import Draft
from alma_jax.stages import evaluation, policy, preferences, split
from alma_jax.store import shards
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Data, Trainset
from alma_jax.store.records import Judgment, Pair, Response
from configs import spa

PARTS = (6, 9)


class Crash(BaseException):
  """Stands for the process being killed: nothing catches it."""


@pytest.fixture(scope="module", autouse=True)
def without_syncing():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, "fsync", lambda handle: None)
    yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  directory, c = tmp_path_factory.mktemp("data"), spa.get_config("mini")
  files = {
    "sft": [{"prompt": f"sft {i}", "response": f"answer {i}"} for i in range(3)],
    "preferences": [{"prompt": f"pair {i}", "chosen": f"good {i}", "rejected": f"bad bad {i}"} for i in range(16)],
    "prompts": [{"prompt": text} for text in ("pair 3", "eval 1", *(f"prompt {i}" for i in range(16)))],
    "eval": [{"prompt": f"eval {i}"} for i in range(3)],
  }
  for name, rows in files.items():
    c.data[name] = str(directory / f"{name}.jsonl")
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  c.split.parts, c.shards, c.seeds.held_out, c.agreement.gold = PARTS, 3, 4, "rules:length"
  c.responses.n = 4
  return c


def reward(text):
  return float(np.random.default_rng(list(text.encode())).integers(0, 40)) / 8


@pytest.fixture(autouse=True)
def planted(monkeypatch):
  """Models write words that follow from the key; the implicit reward follows from the text. What was trained, and what
  was judged: [(job, reference, trainsets)], [(policy, reference, per)]."""
  trained, judged = [], []

  def written(host, checkpoint, requests, options, stops, bar):
    found = []
    for request in requests:
      rng = np.random.default_rng(request.key)
      words = rng.choice(["a", "b c", "d e f", " "], p=[0.4, 0.3, 0.2, 0.1])
      found.append(Draft(str(words), tuple(map(ord, words)), bool(rng.random() < 0.8), (-1.0,)))
    return found

  def made(name, job, *more):
    trained.append((job, *more))
    return Checkpoint(name, job.init.directory, f"{key_of(name)}")

  wraps = implicit.of_checkpoints
  monkeypatch.setattr(sampling, "drafts", written)
  monkeypatch.setattr(implicit, "of_checkpoints", lambda host, *x: judged.append(x) or wraps(host, *x))
  monkeypatch.setattr(
    implicit.ImplicitJudge, "shown_scores", lambda self, pairs, bar: [Verdict(reward(pair[1])) for pair in pairs]
  )
  monkeypatch.setattr(evaluation, "build", lambda *_: {})
  monkeypatch.setattr(policy, "sft", lambda s, job, data: made(job.name, job))
  monkeypatch.setattr(policy, "dpo", lambda s, job, reference, sets: made(job.name, job, reference, list(sets)))
  return trained, judged


def of_stage(run, name, kind):
  directory = run / name
  parts = json.loads((directory / "manifest.json").read_text())["parts"]
  return [row for part in parts for row in shards.read_records(directory / part["name"], kind)]


def test_the_rounds_of_a_run(config, tmp_path, planted):
  trained, judged = planted
  s = session_in(tmp_path, config)
  recipe.run(s)
  (sft, seeds, first, second) = trained
  assert sft[0].name == "sft_1"
  # Round 1: DPO of the SFT model on people's pairs that are not held out
  assert (seeds[0].init.name, seeds[1].name, seeds[0].name) == ("sft_1", "sft_1", "round_01/policy")
  assert not isinstance(seeds[0].options.preference, SelfRefinement)
  pairs = seeds[2][0].in_order(Pair)
  assert len(pairs) == 12 and all(p.chosen.startswith("good") and p.rejected.startswith("bad") for p in pairs)
  # Rounds 2 and 3: from the policy before and against it, with lambda 1/2 and 1/4, on their own pairs
  for round, found, mix in ((2, first, 0.5), (3, second, 0.25)):
    before = f"round_{round - 1:02d}/policy"
    assert (found[0].init.name, found[1].name, found[0].options.preference.mix) == (before, before, mix)
    assert [x.name for x in found[2]] == [f"round_{round:02d}/trainset"]
  assert [(x.name, y.name, per) for x, y, per in judged] == [
    ("round_01/policy", "sft_1", "sequence"),
    ("round_02/policy", "sft_1", "sequence"),
  ]
  # Every round has prompts of its own, none of them a seed's or an evaluation prompt
  ids = [[r.prompt_id for r in of_stage(tmp_path, f"round_{r:02d}/responses", Response)] for r in (2, 3)]
  asked = [set(x) for x in ids]
  assert tuple(map(len, asked)) == PARTS and not asked[0] & asked[1]
  assert asked[0] | asked[1] < {prompt_id([{"role": "user", "content": f"prompt {i}"}]) for i in range(16)}


def test_pairs_and_agreement_are_those_of_brute_force(config, tmp_path):
  s = session_in(tmp_path, config)
  recipe.run(s)
  answers = collections.defaultdict(list)
  for r in of_stage(tmp_path, "round_03/responses", Response):
    answers[r.prompt_id].append(r)
  scores = {(j.prompt_id, j.sample_id): j.score for j in of_stage(tmp_path, "round_03/judgments", Judgment)}
  wanted, agrees = {}, []
  for id, found in answers.items():
    written = [r for r in found if r.text.strip()]  # a truncated one may be chosen
    best, worst = (max(map(lambda r: sign * reward(r.text), written), default=0.0) for sign in (1, -1))
    if best > -worst:
      wanted[id] = (best, -worst)
    found.sort(key=lambda r: r.sample_id)
    for a, b in zip(found[::2], found[1::2], strict=False):
      assert scores[id, a.sample_id] == reward(a.text)
      if len(a.text) != len(b.text):
        longer, shorter = (a, b) if len(a.text) > len(b.text) else (b, a)
        agrees.append(np.sign(reward(longer.text) - reward(shorter.text)) / 2 + 0.5)
  pairs = of_stage(tmp_path, "round_03/trainset", Pair)
  assert {p.prompt_id: (p.chosen_score, p.rejected_score) for p in pairs} == wanted and len(wanted) > 3
  counts = json.loads((tmp_path / "round_03/agreement/manifest.json").read_text())["counts"]
  assert counts["gold"] == {"n": len(agrees), "sum": sum(agrees), "squares": sum(x * x for x in agrees)}
  held = {p.prompt_id for p in of_stage(tmp_path, "round_01/trainset", Pair)}
  people = [i for i in range(16) if prompt_id([{"role": "user", "content": f"pair {i}"}]) not in held]
  right = [np.sign(reward(f"good {i}") - reward(f"bad bad {i}")) / 2 + 0.5 for i in people]
  assert len(people) == 4 and counts["held_out"]["n"] == 4 and counts["held_out"]["sum"] == sum(right)
  assert counts["margin"]["sum"] == sum(a - b for a, b in wanted.values())
  assert counts["chosen_characters"]["sum"] == sum(len(p.chosen) for p in pairs)


def artefacts(directory):
  """Every file with its bytes, without times."""
  found = {}
  for path in sorted(path for path in directory.glob("*/**/*") if path.is_file()):
    content = path.read_bytes()
    if path.name == "manifest.json":
      content = {k: v for k, v in json.loads(content).items() if k not in ("seconds", "finished_at", "seal")}
    found[path.relative_to(directory).as_posix()] = content
  return {name: x for name, x in found.items() if ".made" not in name}


def test_two_hosts_and_any_kill_give_the_same_bytes(config, tmp_path, monkeypatch):
  recipe.run(session_in(tmp_path / "one", config))
  wanted = artefacts(tmp_path / "one")
  on_two_hosts(tmp_path / "two", config, recipe.run)
  assert artefacts(tmp_path / "two") == wanted
  seen, replace = collections.Counter(), os.replace

  def killed(old, new):  # before every second file has its name, after every other one
    name = str(new)
    kill = not seen[name] and "round_" in name and not name.endswith(("seconds.json", "config.json"))
    seen[name] += 1
    seen["kills"] += kill
    if kill and seen["kills"] % 2:
      raise Crash
    replace(old, new)
    if kill:
      raise Crash

  monkeypatch.setattr(os, "replace", killed)
  one = session_in(tmp_path / "killed", config)
  for _ in range(300):
    try:
      recipe.run(one)
      break
    except Crash:
      shards.remove_temporaries(one.run.dir)
  assert artefacts(one.run.dir) == wanted
  for stage in ("prompts", "responses", "judgments", "gold", "trainset", "agreement"):
    assert any(f"round_03/{stage}/" in name for name in seen)
  assert seen["kills"] > 60


@pytest.mark.parametrize(
  ("said", "found"),
  [
    ("previous", ["sft_1", "round_01/policy"]),
    ("none", [None, None]),
    ("base", ["base", "base"]),
  ],
)
def test_references_of_the_judgement(said, found, config, tmp_path, planted):
  c = config.copy_and_resolve_references()
  c.judge.reference, c.judge.per = said, "token"
  recipe.run(session_in(tmp_path, c))
  assert [(x[1] and x[1].name, x[2]) for x in planted[1]] == [(name, "token") for name in found]


def test_without_seeds_a_given_model_is_where_the_run_begins(config, tmp_path, planted):
  c = config.copy_and_resolve_references()
  c.data.sft, c.data.preferences, c.sft_model, c.judge.reference = "", "", "mini", "base"
  recipe.run(session_in(tmp_path, c))
  trained, judged = planted
  assert [x[0].name for x in trained] == ["round_02/policy", "round_03/policy"]
  assert trained[0][0].init.name == trained[0][1].name == "sft_1"
  assert [(x.name, y.name) for x, y, _ in judged] == [("sft_1", "base"), ("round_02/policy", "base")]
  assert not list((tmp_path).glob("round_01*"))
  counts = json.loads((tmp_path / "round_02/agreement/manifest.json").read_text())["counts"]
  assert counts["held_out"]["n"] == 0 and counts["gold"]["n"] > 0


def test_labels_are_turned_round_by_the_share_that_is_asked_for(config, tmp_path):
  s = session_in(tmp_path, config).at(1)
  rows = [SeedRow(({"role": "user", "content": f"p {i}"},), None, None, i, f"g {i}", f"b {i}") for i in range(40)]
  data = Data([], [], [], {"preferences": "0"}, preferences=rows)
  noisy = preferences.Options(held_out=0, flipped=0.3)
  pairs, count = preferences._pairs(rows, 1, noisy, 0)
  turned = {p.chosen for p in pairs if p.chosen.startswith("b")}
  assert count == len(turned) == 12
  more = {p.chosen for p in preferences._pairs(rows, 1, dataclasses.replace(noisy, flipped=0.5), 0)[0]}
  assert turned < more  # the noise of a larger share holds that of a smaller one
  held = preferences.held_out(data, preferences.Options(held_out=100), 0)
  assert len(held) == 10 and held == [row for row in rows if row in held]  # a quarter at most, in their order
  assert preferences.build(s, data, noisy).manifest["counts"]["flipped"] == 12


def test_values_that_are_wrong_together_and_too_few_prompts_are_said(config, tmp_path):
  wrong = {
    "sft_model": ("mini", r"give data\.sft to fine-tune the base model, or sft_model"),
    "responses.n": (1, r"responses\.n is 1; it must be at least 2"),
    "trainset.method": ("best_of_n", r"trainset\.method is 'best_of_n'; it must be 'dpo'"),
    "policy.init_from": ("sft_2", r"policy\.init_from is 'sft_2'; it may be 'latest', 'sft_1', 'base'"),
    "judge.reference": ("sft_1", r"config\.judge\.reference is 'sft_1'; it may be 'sft', 'previous'"),
    "agreement.gold": ("truth", r"config\.agreement\.gold is 'truth'"),
    "policy.loss": ("ipo", r"config\.policy\.loss is 'ipo'; it must be 'dpo'"),
    "split.parts": ((), r"config\.split\.parts is \(\)"),
    "data.prompts": ("", r"config\.data\.prompts is empty"),
    "rounds": ({3: {"split": {"parts": (4,)}}}, r"split differs from round to round: split\.parts names the size"),
  }
  for name, (value, said) in wrong.items():
    c = config.copy_and_resolve_references()
    c.update_from_flattened_dict({name: value})
    with pytest.raises(Exception, match=said) as error:
      start.checked_options(c)
    assert isinstance(error.value, ConfigError) or name == "agreement.gold"
  c = config.copy_and_resolve_references()
  c.split.parts = (10, 10)
  with pytest.raises(RunError, match=r"round 3 takes the prompts 10 \.\. 20 of data\.prompts, which has 16"):
    recipe.run(session_in(tmp_path, c))
  assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["seeds"]  # nothing was trained
  sizes = split.Options(parts=(8, 20, 30))
  assert [sizes.size(round) for round in range(2, 7)] == [8, 20, 30, 30, 30] and sizes.needed(4) == 58


def test_a_killed_training_keeps_its_window(tmp_path, monkeypatch):
  monkeypatch.undo()  # nothing is planted
  monkeypatch.setattr(os, "fsync", lambda handle: None)
  s = session_in(tmp_path, spa.get_config("mini"), sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
  asked = ({"role": "user", "content": "country : lyon oslo"},)
  words = ("france", "norway", "italy", "japan")
  pairs = [
    Pair(f"{i}{j}", asked, f"answer: {a} .", f"answer: {b} {a} .", 1.0, 0.0, 2)
    for (i, a), (j, b) in itertools.permutations(enumerate(words), 2)
  ]
  stage = s.run.stage("round_02/trainset", {})
  stage.write_part(0, 1, pairs, Pair, {})
  shards.save_array(stage.dir / "order.npy", np.arange(len(pairs)))
  stage.finish(files=["order.npy"])
  section = spa.refined(1e-3, 0.0, batch=3, row_length=32, window=2, checkpoint_every=1, checkpoint_keep=1)
  options = build(training.RefinedOptions, section, "config.policy")

  def trained(name):
    job = policy.Job[training.PreferenceOptions](name, s.base, options, 3)
    found = policy.dpo(s, job, s.base, [Trainset(stage, Pair)])
    return (found.directory / "model.safetensors").read_bytes(), (found.directory.parent / "metrics.jsonl").read_text()

  straight = trained("round_02/policy")
  rows = [json.loads(line) for line in straight[1].splitlines()]
  assert [row["threshold"] for row in rows[:2]] == [0, 0] and rows[3]["threshold"] != 0 and "margins" not in rows[0]
  write = StepLog.write

  def killed(log, step, metrics):
    if step == 3:
      raise Crash
    return write(log, step, metrics)

  monkeypatch.setattr(StepLog, "write", killed)
  with pytest.raises(Crash):
    trained("killed")
  monkeypatch.setattr(StepLog, "write", write)
  assert trained("killed") == straight
  # A checkpoint of it can be exported: its window is left where it is
  training.checkpoint_model(s.host, tmp_path / "round_02/policy/checkpoints", 2, s.mesh)
