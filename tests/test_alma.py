"""The whole recipe, run as a user runs it: what it leaves behind, killed runs, several hosts, changed configs."""

import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
import small_run

import configs.alma
from alma_jax import start
from alma_jax.corpus.normalise import prompt_id
from alma_jax.recipes import alma
from alma_jax.report import graded
from alma_jax.store import layout, records, shards
from alma_jax.store.runs import load_manifest, read_stage
from alma_jax.tools import export

JUDGES = ("truth", "twin", "match", "judge")
README = (small_run.ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return small_run.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
  """A finished small run on one device; tests that change it take a copy."""
  workdir = tmp_path_factory.mktemp("run") / "run"
  done = small_run.finished(workdir, *data, JAX_LOG_COMPILES="1")
  (workdir.parent / "output").write_text(done.stdout)
  return workdir


def test_the_recipe_says_its_stages(run):
  config = configs.alma.mini()
  for value in small_run.SMALL:
    *path, leaf = value.partition("=")[0].split(".")
    section = functools.reduce(lambda node, name: node[name], path, config)
    section[leaf] = type(section[leaf])(value.partition("=")[2])
  planned = alma.stages(start.checked_options(config))
  assert set(planned) == {stage.name for stage in layout.stages(run)}
  assert planned["round_03/policy"] > planned["round_02/policy"]  # a training on all rounds so far


def variant(run, tmp_path, *stages):
  """A copy of the run without the given stages, so that a variant makes only those."""
  shutil.copytree(run, tmp_path / "variant")
  for stage in stages:
    for path in (tmp_path / "variant").glob(stage):
      shutil.rmtree(path)
  return tmp_path / "variant"


def test_pool_holds_no_seed_annotation_or_evaluation_prompt(run):
  pool = read_stage(run / "pool" / "prompts", records.Prompt)
  human = set()
  for name in ("sft", "judge", "eval"):
    rows = [json.loads(line) for line in (run / "seeds" / f"{name}.jsonl").open()]
    human |= {prompt_id(row["messages"]) for row in rows}
  assert len(pool) > 50
  assert len({p.id for p in pool}) == len(pool)
  assert not human & {p.id for p in pool}
  counts = load_manifest(run / "pool" / "prompts")["counts"]
  drafts = load_manifest(run / "pool" / "drafts")["counts"]
  assert drafts["draws"] == 192
  assert (
    counts["unique"]
    + counts.get("duplicate", 0)
    + sum(count for name, count in counts.items() if name.startswith("equals_"))
    == drafts["usable"]
  )


def test_rounds_after_the_first_compile_nothing(run):
  """Other prompts, lengths and checkpoints, and a longer training set, run in the programs that are there."""
  first, _, later = (run.parent / "output").read_text().partition("\nround 2, ")
  assert "Compiling jit(_segment)" in first and "Compiling jit(_read)" in first
  assert "round_03/policy" in later
  assert "Compiling" not in later


def test_rounds_draw_unused_prompts_from_different_clusters(run):
  drawn = [read_stage(run / f"round_{r:02d}" / "prompts", records.Prompt) for r in (2, 3)]
  assert [len(prompts) for prompts in drawn] == [6, 6]
  assert not {p.id for p in drawn[0]} & {p.id for p in drawn[1]}
  assert all(len({p.cluster for p in prompts}) == 6 for prompts in drawn)


def test_responses_come_in_equal_shares_from_three_checkpoints(run):
  by_round = {r: read_stage(run / f"round_{r:02d}" / "responses", records.Response) for r in (2, 3)}
  assert {x.checkpoint for x in by_round[2]} == {"sft_1", "sft_2"}
  assert {x.checkpoint for x in by_round[3]} == {"sft_1", "sft_2", "round_02/policy"}
  for r, checkpoints in ((2, 2), (3, 3)):
    for prompt in {x.prompt_id for x in by_round[r]}:
      mine = [x for x in by_round[r] if x.prompt_id == prompt]
      assert sorted(x.sample_id for x in mine) == list(range(6))
      assert all(sum(x.checkpoint == c for x in mine) == 6 // checkpoints for c in {x.checkpoint for x in mine})


def test_trainset_is_the_best_finished_response_of_each_prompt(run):
  for r in (2, 3):
    place = run / f"round_{r:02d}"
    scores = {(j.prompt_id, j.sample_id): j for j in read_stage(place / "judgments", records.Judgment)}
    responses = read_stage(place / "responses", records.Response)
    examples = read_stage(place / "trainset", records.Example)
    assert len(examples) == 6
    for example in examples:
      mine = [x for x in responses if x.prompt_id == example.prompt_id and x.finished and x.text]
      top = max(scores[x.prompt_id, x.sample_id].score for x in mine)
      assert example.score == top
      assert any(x.text == example.response and scores[x.prompt_id, x.sample_id].score == top for x in mine)
    for j in scores.values():
      assert abs(sum(s * p for s, p in enumerate(j.probs)) - j.score) < 1e-5
      assert abs(sum(j.probs) - 1) < 1e-5 and 0 < j.mass <= 1 + 1e-5


def test_policies_train_on_all_data_so_far(run):
  seeds = sum(1 for _ in (run / "seeds" / "sft.jsonl").open())
  counts = [load_manifest(run / name)["counts"]["examples"] for name in ("sft_1", "round_02/policy", "round_03/policy")]
  assert counts == [seeds, seeds + 6, seeds + 12]


def test_exported_policy_answers_in_transformers_as_in_the_evaluation(run):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("jinja2")
  directory = run / "round_03" / "policy" / "model"
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  model = transformers.AutoModelForCausalLM.from_pretrained(directory)
  answers = read_stage(run / "round_03" / "eval", records.Answer)
  for answer in answers[:8]:
    ids = tokenizer.apply_chat_template(list(answer.messages), add_generation_prompt=True, return_tensors="pt")
    ids = ids if torch.is_tensor(ids) else ids["input_ids"]
    out = model.generate(ids, max_new_tokens=16, do_sample=False)  # stops by generation_config.json alone
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == answer.response


def test_second_start_changes_nothing(run):
  before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.suffix in (".parquet", ".safetensors", ".npy")}
  before |= {p: p.stat().st_mtime_ns for p in run.rglob("manifest.json")}
  values = [
    f"data.{name}={json.loads((run / 'config.json').read_text())['data'][name]}" for name in ("sft", "judge", "eval")
  ]
  small_run.finished(run, *values)
  assert before == {p: p.stat().st_mtime_ns for p in before}


def test_changed_value_is_named_and_nothing_is_overwritten(run, data):
  before = small_run.artefacts(run)
  stopped = small_run.start(run, *data, "responses.temperature=0.9")
  assert stopped.returncode == 1
  for word in ("round_02/responses", "config.responses.temperature", "0.7", "0.9", "--workdir"):
    assert word in stopped.stdout, stopped.stdout
  assert "Traceback" not in stopped.stdout
  assert small_run.artefacts(run) == before


def test_changed_data_file_is_named(run, data, tmp_path):
  source = data[0].partition("=")[2]
  changed = tmp_path / "sft.jsonl"
  changed.write_text("".join(open(source).readlines()[:-1]))
  stopped = small_run.start(run, f"data.sft={changed}", *data[1:])
  assert stopped.returncode == 1
  assert "stage seeds" in stopped.stdout and "data.sft" in stopped.stdout


def test_broken_data_file_is_named_with_line_and_field(data, tmp_path):
  broken = tmp_path / "judge.jsonl"
  broken.write_text('{"prompt": "a", "response": "b", "score": 3}\n{"prompt": "a", "response": "b", "score": 11}\n')
  stopped = small_run.start(tmp_path / "run", *data, f"data.judge={broken}")
  assert stopped.returncode == 1
  assert "judge.jsonl" in stopped.stdout and "line 2" in stopped.stdout and "score" in stopped.stdout
  assert "Traceback" not in stopped.stdout


def test_preferences_then_policy_gradients_and_a_checkpoint_on_the_way(run, data, tmp_path, capsys):
  """Round 2 on pairs of the best and another, round 3 on all responses of the model that came out."""
  workdir = variant(run, tmp_path, "round_02/trainset", "round_02/policy", "round_02/eval*", "round_03")
  third = {"trainset": {"method": "grpo"}, "responses": {"checkpoints": ("latest",)}}
  values = "trainset.method=dpo", f"rounds={{3: {third}}}", "dpo.batch=4", "grpo.batch=16"
  kept = "dpo.checkpoint_every=1", "dpo.checkpoint_keep=1"
  small_run.finished(workdir, *data, *values, *kept)
  pairs = read_stage(workdir / "round_02" / "trainset", records.Pair)
  assert pairs and all(p.chosen != p.rejected and p.chosen_score >= p.rejected_score for p in pairs)
  first = json.loads((workdir / "round_02" / "policy" / "metrics.jsonl").open().readline())
  assert abs(first["loss"] - first["nll"] - 0.693147) < 1e-4  # DPO starts at ln 2; nll_weight is 1
  graded = read_stage(workdir / "round_03" / "trainset", records.Graded)
  assert {row.source for row in graded} == {"round_02/policy"}
  for prompt in {row.prompt_id for row in graded}:
    own = [row for row in graded if row.prompt_id == prompt]
    assert abs(sum(row.advantage for row in own)) < 1e-6 < max(row.advantage for row in own)
  first = json.loads((workdir / "round_03" / "policy" / "metrics.jsonl").open().readline())
  assert first["clipped"] == 0 and first["kl"] > 0  # it wrote them itself, and is not its reference any more

  stage = f"--stage={workdir / 'round_02' / 'policy'}"
  assert export.main([stage]) == 0 and "checkpoints after steps 1, 2" in capsys.readouterr().out
  assert export.main([stage, "--step=77", f"--output={tmp_path / 'no'}"]) == 1
  assert "no checkpoint after step 77; there are 1, 2" in capsys.readouterr().err
  assert export.main([stage, "--step=1", f"--output={tmp_path / 'exported'}"]) == 0
  on_the_way, last = (
    safetensors.numpy.load_file(directory / "model.safetensors")
    for directory in (tmp_path / "exported", workdir / "round_02" / "policy" / "model")
  )
  before = safetensors.numpy.load_file(workdir / "sft_1" / "model" / "model.safetensors")

  def far(a, b):
    return sum(float(np.abs(a[name] - b[name]).sum()) for name in a)

  assert 0 < far(before, on_the_way) < far(before, last)
  names = {path.name for path in (workdir / "round_02" / "policy" / "model").iterdir()}
  assert {path.name for path in (tmp_path / "exported").iterdir()} == names

  # How trainings are run may change in a run that has begun; what is finished stays.
  practical = "dpo.checkpoint_every=50", "dpo.remat=full", "grpo.passes=2", "judge.train.remat=none"
  made = [load_manifest(workdir / f"round_{r:02d}" / "policy")["finished_at"] for r in (2, 3)]
  small_run.finished(workdir, *data, *values, *practical)
  assert made == [load_manifest(workdir / f"round_{r:02d}" / "policy")["finished_at"] for r in (2, 3)]


def test_untrained_judge_integer_scores_random_prompts_and_one_checkpoint(run, data, tmp_path):
  workdir = variant(run, tmp_path, "round_*", "judge*")
  small_run.finished(
    workdir, *data, "judge.kind=few_shot", "judge.mode=integer", "draw.method=random", "feedback_rounds=1",
    "responses.checkpoints=('sft_2',)",
  )  # fmt: skip
  assert not (workdir / "judge").exists()
  judgments = read_stage(workdir / "round_02" / "judgments", records.Judgment)
  assert all(j.score == max(range(11), key=lambda s: j.probs[s]) for j in judgments)
  assert {x.checkpoint for x in read_stage(workdir / "round_02" / "responses", records.Response)} == {"sft_2"}


OWN = '''
import dataclasses
from alma_jax.judges.contract import Verdict
from alma_jax.text.chat import EOS, ChatFormat, Turn

FORMAT = ChatFormat(name="asked", system=None, user=Turn("# ", " \\n "), header="A: ", stop=EOS)


class Words:
  """More words are better, from 0 to 16."""
  identity, scale = "words", (0.0, 16.0)

  def __init__(self, runtime, options):
    self.tokenizer = runtime.tokenizer

  def scores(self, pairs):
    return [Verdict(float(min(16, len(response.split())))) for messages, response in pairs]


def vowels(runtime, options):
  return Vowels()


@dataclasses.dataclass
class Vowels:
  identity: str = "vowels"
  scale: tuple | None = None

  def scores(self, pairs):
    return [Verdict(float(sum(letter in "aeiou" for letter in response))) for _, response in pairs]
'''


def test_a_users_own_judge_evaluator_and_chat_format_need_no_fork(data, tmp_path):
  """They stand in a file beside the config, outside the package, and are named in the config."""
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "things.py").write_text(OWN)
  (tmp_path / "mine" / "config.py").write_text("from configs.alma import get_config\n")
  values = (
    "judge.kind=things:Words", "eval.judges=('things:vowels',)", "model.chat=things:FORMAT", "feedback_rounds=1",
  )  # fmt: skip
  command = small_run.command(tmp_path / "run", *data, *values)
  command[command.index("--config=configs/alma.py:mini")] = f"--config={tmp_path}/mine/config.py:mini"

  def started():
    return subprocess.run(
      command, cwd=tmp_path, env=small_run.environment(), text=True, timeout=400,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

  done = started()
  assert done.returncode == 0, done.stdout[-3000:]
  place = tmp_path / "run" / "round_02"
  texts = {(r.prompt_id, r.sample_id): r.text for r in read_stage(place / "responses", records.Response)}
  judged = read_stage(place / "judgments", records.Judgment)
  assert judged and all(j.score == min(16, len(texts[j.prompt_id, j.sample_id].split())) for j in judged)
  assert all(j.probs is None and j.mass is None for j in judged)
  judge = load_manifest(place / "judgments")["judge"]
  assert judge["identity"].startswith("words ") and judge["scale"] == [0.0, 16.0]
  grades = read_stage(place / "eval.vowels", records.Grade)
  for answer, grade in zip(read_stage(place / "eval", records.Answer), grades, strict=True):
    assert grade.score == sum(letter in "aeiou" for letter in answer.response)
  template = json.loads((place / "policy" / "model" / "tokenizer_config.json").read_text()).get("chat_template")
  assert "# " in (template or (place / "policy" / "model" / "chat_template.jinja").read_text())
  # Another text of the user's file is another judge.
  (tmp_path / "mine" / "things.py").write_text(OWN.replace("min(16,", "min(8,"))
  changed = started()
  assert changed.returncode == 1 and "judge:" in changed.stdout and "words " in changed.stdout


def test_a_rounds_override_applies_to_that_round_only(run, data, tmp_path):
  workdir = variant(run, tmp_path, "round_03")
  small_run.finished(workdir, *data, "rounds={3: {'responses': {'n': 3}}}")
  assert len(read_stage(workdir / "round_03" / "responses", records.Response)) == 18
  assert json.loads((workdir / "round_03" / "config.json").read_text())["responses"]["n"] == 3
  assert json.loads((workdir / "round_02" / "config.json").read_text())["responses"]["n"] == 6


def test_run_killed_again_and_again_equals_one_that_was_not(run, data, tmp_path):
  """Three signals at random moments; `python -m benchmarks.kills` is the long form."""
  flags, seed = small_run.command("", *data), random.randrange(10**6)
  flags = [flag for flag in flags if flag.startswith("--config")]
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.kills", "--kills=3", f"--seed={seed}", f"--workdir={tmp_path}",
     f"--straight={run}", *flags],
    cwd=small_run.ROOT, env=small_run.environment(), text=True, timeout=400, capture_output=True,
  )  # fmt: skip
  assert done.returncode == 0, (seed, done.stdout, done.stderr[-3000:])
  assert "3 kills" in done.stdout and "0 files differ" in done.stdout, (seed, done.stdout)


def two_hosts(workdir, values):
  """Two processes with a device each, joined by jax.distributed."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [
    subprocess.Popen(
      small_run.command(workdir, *values), cwd=small_run.ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env=small_run.environment(
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i),
        JAX_NUM_CPU_DEVICES="1", JAX_COMPILATION_CACHE_DIR=f"{workdir}_compiled",
      ),
    )
    for i in range(2)
  ]  # fmt: skip


def until(reached, processes, seconds=120):
  deadline = time.monotonic() + seconds
  while not reached() and all(p.poll() is None for p in processes) and time.monotonic() < deadline:
    time.sleep(0.02)
  assert reached()


def test_a_signal_to_one_host_stops_both_and_one_process_goes_on(data, tmp_path):
  values = (*data, "sft.epochs=60.0", "sft.checkpoint_every=1000")

  def logged(name):
    return (tmp_path / name / "sft_1" / "metrics.jsonl").read_text().splitlines()

  processes = two_hosts(tmp_path / "moved", values)
  until(lambda: (tmp_path / "moved/sft_1/metrics.jsonl").exists() and len(logged("moved")) > 20, processes)
  processes[1].send_signal(signal.SIGTERM)
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  assert [process.returncode for process in processes] == [143, 143], outputs[0][-3000:] + outputs[1][-3000:]
  (saved,) = (path.name for path in (tmp_path / "moved" / "sft_1" / "checkpoints").iterdir())
  assert 20 < int(saved) < 180 and "sft_1: stopped and saved" in outputs[0]
  for name in ("moved", "straight"):
    process = subprocess.Popen(
      small_run.command(tmp_path / name, *values), cwd=small_run.ROOT, env=small_run.environment(),
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until((tmp_path / name / "sft_1" / "manifest.json").exists, [process])
    process.terminate()
    process.wait(60)
  moved, straight = ([json.loads(line) for line in logged(name)] for name in ("moved", "straight"))
  assert [row["step"] for row in moved] == [row["step"] for row in straight] == list(range(1, 181))
  assert [row["loss"] for row in moved] == pytest.approx([row["loss"] for row in straight], rel=1e-3, abs=1e-4)


def test_two_hosts_make_the_artefacts_of_one(data, tmp_path):
  """Two processes with a device each, joined by jax.distributed, against one process with two devices."""
  values = (*data, "feedback_rounds=2")
  small_run.finished(tmp_path / "one", *values, JAX_NUM_CPU_DEVICES="2")
  processes = two_hosts(tmp_path / "two", values)
  outputs = [process.communicate(timeout=400)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
  assert small_run.artefacts(tmp_path / "two") == small_run.artefacts(tmp_path / "one")
  assert not list(tmp_path.glob("two_compiled/*"))  # read back, such programs may hang


def test_pipeline_never_sees_the_ground_truth_after_the_seeds(run, data, tmp_path):
  """With a scorer that lies after the seeds are made, evaluations change and nothing else does."""
  poisoned = tmp_path / "poisoned"
  poisoned.mkdir()
  shutil.copytree(run / "seeds", poisoned / "seeds")
  lie = (
    "import sys, runpy; from alma_jax.mini import world; world.score = lambda *a, **k: 0.0;"
    "runpy.run_module('alma_jax.main', run_name='__main__', alter_sys=False)"
  )
  flags = small_run.command(poisoned, *data)[3:]
  done = subprocess.run(
    [sys.executable, "-c", lie, *flags], cwd=small_run.ROOT, env=small_run.environment(), text=True, timeout=400,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-3000:]
  leave_out = ("/eval.truth/",)
  assert small_run.artefacts(poisoned, leave_out) == small_run.artefacts(run, leave_out)
  lied, told = ({x.score for x in read_stage(of / "round_03" / "eval.truth", records.Grade)} for of in (poisoned, run))
  assert lied == {0.0} and max(told) > 5


def test_a_set_and_a_judge_that_are_added_later_make_evaluations_only(run, data, tmp_path, capsys):
  workdir = variant(run, tmp_path)
  before = small_run.artefacts(workdir)
  asked, met = tmp_path / "asked.jsonl", read_stage(run / "pool" / "prompts", records.Prompt)[0]
  rows = [
    {"messages": turns, "reference": "yes"} for turns in (list(met.messages), [{"role": "user", "content": "hi"}])
  ]
  asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
  judges = "eval.judges=('truth=mini','twin=mini','match=rules:exact_match')"  # the last reads `reference`
  done = small_run.finished(workdir, *data, f"eval.sets=('more={asked}',)", judges)
  assert "1 of 2 prompts of the set more are in the pool" in done.stdout
  after = small_run.artefacts(workdir)
  assert {name: after[name] for name in before} == before
  rounds = [f"round_{r:02d}" for r in range(4)]
  made = {f"{r}/{of}" for r in rounds for of in ("eval.twin", "eval-more", *map("eval-more.{}".format, JUDGES))}
  assert {name.rpartition("/")[0] for name in after.keys() - before.keys()} == made
  rows = layout.progress(workdir)
  assert all(row["twin"] == row["truth"] and row["more/n"] == "2" and row["judge_by"] for row in rows)
  assert all(row["more/match"] == "0.0" and "match" not in row for row in rows)
  best = graded.best(workdir)
  assert best and not best.by.selects and f"best round by truth, which selects nothing: {best.round}" in done.stdout
  assert max(rows[1:], key=lambda row: float(row["truth"]))["round"] == str(best.round)
  assert export.main([f"--stage={workdir}", "--best", f"--output={tmp_path / 'model'}"]) == 0
  chosen = layout.policy_of(workdir, best.round) / "model"
  assert (tmp_path / "model" / "model.safetensors").read_bytes() == (chosen / "model.safetensors").read_bytes()
  assert export.main([f"--stage={workdir}", "--best", "--by=judge", f"--output={tmp_path / 'other'}"]) == 1
  assert "selects" in capsys.readouterr().err


def test_interrupted_run_leaves_no_lock(data, tmp_path):
  process = subprocess.Popen(
    small_run.command(tmp_path / "run", *data), cwd=small_run.ROOT, env=small_run.environment(),
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  deadline = time.monotonic() + 60
  while not (tmp_path / "run" / "seeds" / "manifest.json").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  assert (tmp_path / "run" / ".lock").exists()
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 143
  assert not (tmp_path / "run" / ".lock").exists()


COLLECTED = """
import gc, os, signal, sys, time
from alma_jax import start
signal.signal(signal.SIGINT, signal.default_int_handler)
sent = getattr(signal, sys.argv[1])
def collected(phase, info):
  gc.callbacks.remove(collected)
  os.kill(os.getpid(), sent)
  for _ in range(1000): pass
def work():
  gc.callbacks.append(collected)
  gc.collect()
  os.write(1, b"collected\\n")
  try:
    time.sleep(60)
  finally:
    if sent == signal.SIGINT:
      os.write(1, b"unwinding\\n")
      time.sleep(60)
sys.exit(start.status(work, ""))
"""


@pytest.mark.parametrize("sent, lines", [("SIGTERM", ["collected"]), ("SIGINT", ["collected", "unwinding"])])
def test_a_signal_while_garbage_is_collected_is_not_lost_and_a_second_interrupt_ends_at_once(sent, lines):
  process = subprocess.Popen(
    [sys.executable, "-c", COLLECTED, sent], cwd=small_run.ROOT, env=small_run.environment(), text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip
  assert [process.stdout.readline().strip() for _ in lines] == lines
  if sent == "SIGINT":
    process.send_signal(signal.SIGINT)  # in the middle of unwinding
  assert process.wait(30) == (143 if sent == "SIGTERM" else -signal.SIGINT), process.stderr.read()[-2000:]
  process.communicate()


def test_an_error_that_a_library_makes_of_a_signal_ends_as_the_signal_does(capsys):
  def work():
    try:
      signal.raise_signal(signal.SIGTERM)
    except SystemExit:
      raise RuntimeError("wrapped") from None

  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  try:
    assert start.status(work, "") == 143
  finally:
    for sent, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
      signal.signal(sent, handler)
  assert capsys.readouterr().err == "stopped (RuntimeError); the same command goes on from here\n"


def test_arrays_and_shards_open_with_public_tools(run):
  import pyarrow.parquet as pq

  table = pq.read_table(run / "round_02" / "responses" / shards.part_name(0, 4))
  assert {"prompt_id", "sample_id", "text", "tokens", "finished"} <= set(table.column_names)
  clusters = {name: np.load(run / "pool" / "clusters" / f"{name}.npy") for name in ("labels", "ids", "centroids")}
  assert clusters["centroids"].shape == (24, 64) and set(clusters["labels"]) == set(range(24))
  pool = read_stage(run / "pool" / "prompts", records.Prompt)
  assert [f"{id:016x}" for id in clusters["ids"]] == [p.id for p in pool] and len(clusters["labels"]) == len(pool)
  assert os.path.getsize(run / "progress.csv") > 0


# What a run would do


def check(tmp_path, *values):
  flags = [*small_run.command(tmp_path / "run", *values), "--check"]
  return subprocess.run(
    flags, cwd=small_run.ROOT, env=small_run.environment(), text=True, timeout=200, capture_output=True
  )


def test_check_says_what_the_run_would_do_and_writes_nothing(data, tmp_path):
  done = check(tmp_path, *data)
  assert done.returncode == 0, done.stderr
  assert "nothing is wrong" in done.stdout and "6 prompts x 6 responses = 36 from sft, latest" in done.stdout
  rows = sum(1 for _ in open(data[0].partition("=")[2]))
  assert f"sft: rows {rows}" in done.stdout and "GB are free" in done.stdout
  assert not (tmp_path / "run").exists()


def test_check_names_everything_that_is_wrong_at_once(data, tmp_path):
  (tmp_path / "judge.jsonl").write_text('{"prompt": "a", "response": "b", "score": 11}\n')
  values = f"data.judge={tmp_path / 'judge.jsonl'}", "judge.template=a1", "responses.max_new_tokens=100000"
  done = check(tmp_path, *data, *values)
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "line 1" in done.stderr and "judge template 'a1'" in done.stderr and "config.responses: max_" in done.stderr
  assert "the judge's template 'a1' adds" in done.stderr
  assert "4 problems" in done.stdout and not (tmp_path / "run").exists()


# The default run

TABLE = """\
round checkpoint            n           truth           judge  tokens  finished
    0 base                576     3.76 ± 0.16     3.38 ± 0.14     4.0    100.0%
    1 sft_1               576     7.78 ± 0.25     7.17 ± 0.25     5.2    100.0%
    2 round_02/policy     576     8.34 ± 0.23     7.68 ± 0.23     5.3    100.0%
    3 round_03/policy     576     8.49 ± 0.22     7.82 ± 0.22     5.2    100.0%
    4 round_04/policy     576     8.62 ± 0.21     7.94 ± 0.22     5.3    100.0%
    5 round_05/policy     576     8.78 ± 0.20     8.07 ± 0.21     5.3    100.0%
    6 round_06/policy     576     8.89 ± 0.19     8.21 ± 0.20     5.3    100.0%
    7 round_07/policy     576     9.02 ± 0.18     8.31 ± 0.19     5.3    100.0%
    8 round_08/policy     576     9.10 ± 0.17     8.37 ± 0.18     5.3    100.0%
    9 round_09/policy     576     9.11 ± 0.17     8.37 ± 0.19     5.3    100.0%
   10 round_10/policy     576     9.20 ± 0.16     8.47 ± 0.18     5.3    100.0%
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) != 2, reason="the order of sums depends on the number of cores")
def test_the_default_run_gives_its_table_and_the_readmes_to_the_digit(tmp_path):
  flags = [sys.executable, "-m", "alma_jax.main", "--config=configs/alma.py:mini", f"--workdir={tmp_path / 'run'}"]
  done = subprocess.run(
    flags, cwd=small_run.ROOT, env=small_run.optimised(), text=True, timeout=900, capture_output=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert TABLE in done.stdout
  rows = {line.split()[0]: line for line in TABLE.splitlines()[1:]}
  shown = re.findall(r"^\| (\d+) \|.*?\| ([\d.]+ ± [\d.]+) \| ([\d.]+ ± [\d.]+) \|$", README, re.M)
  assert len(shown) >= 3 and all(
    f"{score} " in rows[round] and f"{judge} " in rows[round] for round, score, judge in shown
  )
