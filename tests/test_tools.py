"""The commands sample, score and export: what they write against the runtime's own functions and transformers, killed
and resumed starts, the models that --model may mean, judges and formats of a user's, and what they say of mistakes."""

import collections
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import small_run
import text_tokenizers
from orbax.checkpoint import v1 as ocp

from alma_jax import options as configs
from alma_jax.corpus.normalise import prompt_id
from alma_jax.engine import train as engine_train
from alma_jax.engine.choose import Decoding
from alma_jax.engine.sample import Request
from alma_jax.judges import contract
from alma_jax.judges.contract import Answered, Verdict
from alma_jax.judges.own import OwnJudge
from alma_jax.keys import key_of
from alma_jax.llama import model as llama
from alma_jax.llama import sharding, weights
from alma_jax.llama.config import LlamaConfig
from alma_jax.mini import CHECKPOINT, formats, world
from alma_jax.runtime import host as hosts
from alma_jax.runtime import sampling
from alma_jax.runtime.display import Display
from alma_jax.store import layout
from alma_jax.store.runs import Run
from alma_jax.text import chat
from alma_jax.text.tokenizer import TextError, load_tokenizer
from alma_jax.tools import command, export, jsonl, sample, score
from configs.alma import get_config

CITIES = ("paris", "turin", "quito", "bilbao")
PROMPTS = [f"{kind} of {city}" for city in CITIES for kind in ("country", "food", "sport")][:10]
SMALL = ("--n=2", "--max_new_tokens=8", "--slots=8", "--seed=3")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Programs for one device compile faster; the engine's own tests use all eight."""
  monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


def user(text):
  return ({"role": "user", "content": text},)


def write_rows(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def read_rows(path):
  return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def started(tool, tmp_path, rows, *flags, model="mini", output="out.jsonl"):
  """The exit status of the tool on an input file of these rows."""
  source = write_rows(tmp_path / "in.jsonl", rows)
  return tool.main([f"--model={model}", f"--input={source}", f"--output={tmp_path / output}", *flags])


def made(tool, tmp_path, rows, *flags, **more):
  assert started(tool, tmp_path, rows, *flags, **more) == 0
  return read_rows(tmp_path / more.get("output", "out.jsonl"))


def bench_of(directory="mini", fmt="mini", slots=8, rows=8):
  options, engine = hosts.ModelOptions(str(directory), fmt), hosts.EngineOptions(slots=slots, rows=rows)
  host = hosts.Host(options, engine, sharding.make_mesh(devices=jax.devices()[:1]))
  return host, hosts.Checkpoint("it", host.directory, hosts.content_of(host.directory))


def drafts(host, checkpoint, requests, stops, **decoding):
  """What the runtime samples for these requests."""
  options = sampling.Options(decoding=Decoding(**decoding), max_prompt_tokens=16)
  bar = Display(speaks=False).bar("", len(requests), "samples")
  return sampling.drafts(host, checkpoint, requests, options, sampling.Stops(stops), bar)


def save_mini(directory, scale=1.0, more_stops=()):
  """The embedded base model as a chat model in Hugging Face format, its logits scaled."""
  model, tokenizer = weights.load(CHECKPOINT), load_tokenizer(CHECKPOINT)
  model.head = model.head.replace(model.head[...] * scale)
  text = weights.TextSide(
    tokenizer=tokenizer, chat_template=chat.jinja(formats.CHAT), bos_id=tokenizer.bos_id,
    stop_ids=(*chat.stop_ids(tokenizer, formats.CHAT), *map(tokenizer.token_id, more_stops)),
  )  # fmt: skip
  weights.save(directory, model, text)
  return directory


# Sampling


def test_output_is_what_drafts_gives_for_keys_of_seed_id_and_sample(tmp_path):
  rows = [{"prompt": PROMPTS[0]}, {"messages": list(user(PROMPTS[1])), "id": "a b", "note": 1}, {"prompt": "ü ?"}]
  lines = made(sample, tmp_path, rows, *SMALL, "--temperature=1.5", "--top_k=40", "--top_p=0.9")
  ids = [prompt_id(user(PROMPTS[0])), "a b", prompt_id(user("ü ?"))]
  assert [line["id"] for line in lines] == ids
  assert [set(line) for line in lines] == [{"id", k, "responses"} for k in ("prompt", "messages", "prompt")]
  host, checkpoint = bench_of()
  texts = [PROMPTS[0], PROMPTS[1], "ü ?"]
  prompts = [chat.encode_prompt(host.tokenizer, host.chat, user(t)) for t in texts for _ in range(2)]
  keys = [key_of(3, "sample", i, s) for i in ids for s in range(2)]
  requests = [Request(tuple(ids), key) for ids, key in zip(prompts, keys, strict=True)]
  stops = chat.stop_ids(host.tokenizer, host.chat)
  expected = drafts(host, checkpoint, requests, stops, temperature=1.5, top_k=40, top_p=0.9, max_new_tokens=8)
  found = [(r["sample_id"], r["text"], tuple(r["tokens"]), r["finished"]) for x in lines for r in x["responses"]]
  assert found == [(i % 2, d.text, d.tokens, d.finished) for i, d in enumerate(expected)]
  assert len(set(found)) > 3
  logprobs = [x for line in lines for r in line["responses"] for x in r["logprobs"]]
  np.testing.assert_allclose(logprobs, [x for d in expected for x in d.logprobs], rtol=1e-5, atol=1e-5)


def test_greedy_answers_and_logprobs_equal_transformers(tmp_path):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  pytest.importorskip("jinja2")
  # The chat format is recognised by the template; one of the stop tokens stands in generation_config.json alone.
  save_mini(tmp_path / "model", more_stops=["."])
  rows = [{"prompt": prompt} for prompt in PROMPTS]
  flags = ("--n=1", "--temperature=0", "--max_new_tokens=12", "--slots=8")
  lines = made(sample, tmp_path, rows, *flags, model=tmp_path / "model")
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
  ended = collections.Counter()
  for line in lines:
    ids = tokenizer.apply_chat_template(list(user(line["prompt"])), add_generation_prompt=True, return_tensors="pt")
    ids = ids if torch.is_tensor(ids) else ids["input_ids"]
    out = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
    drawn, [response] = out.sequences[0, ids.shape[1] :], line["responses"]
    stopped = int(drawn[-1]) in model.generation_config.eos_token_id
    ended[stopped] += 1
    assert response["tokens"] == drawn[: len(drawn) - stopped].tolist() and response["finished"] == stopped
    assert response["text"] == tokenizer.decode(drawn[: len(drawn) - stopped], skip_special_tokens=True).strip()
    logprobs = torch.log_softmax(torch.stack(out.logits)[:, 0].double(), -1)  # the stop token's own is there, too
    np.testing.assert_allclose(response["logprobs"], logprobs[range(len(drawn)), drawn], rtol=0, atol=1e-4)
  assert ended[True] and ended[False]
  cut = made(sample, tmp_path, rows, *flags, "--stop=Q:", model=tmp_path / "model", output="cut")
  texts = [[line["responses"][0]["text"] for line in x] for x in (cut, lines)]
  assert texts[0] == [text.partition("Q:")[0].strip() for text in texts[1]] != texts[1]


def test_a_sample_depends_on_seed_id_and_sample_id_alone(tmp_path):
  rows = [{"prompt": prompt, "id": i} for i, prompt in enumerate(PROMPTS)]

  def told(lines):
    return {(x["id"], r["sample_id"]): r["text"] for x in lines for r in x["responses"]}

  whole = told(made(sample, tmp_path, rows, *SMALL, output="whole"))
  other = told(made(sample, tmp_path, [{"prompt": "sport"}, *rows[::-2]], *SMALL, "--n=3", "--slots=4", output="other"))
  common = whole.keys() & other.keys()
  assert len(common) == 10 and all(whole[key] == other[key] for key in common)
  seed = told(made(sample, tmp_path, rows, *SMALL, "--seed=4", output="seed"))
  assert sum(whole[key] != seed[key] for key in whole) > 5
  renamed = [{**row, "id": f"x{row['id']}"} for row in rows]
  assert list(told(made(sample, tmp_path, renamed, *SMALL, output="id")).values()) != list(whole.values())


def test_raw_text_stands_behind_the_bos_token_and_needs_no_chat_format(tmp_path):
  model = save_mini(tmp_path / "model")
  for path in (model / "chat_template.jinja", model / "generation_config.json"):
    path.unlink()
  settings = json.loads((model / "tokenizer_config.json").read_text()) | {"chat_template": None}
  (model / "tokenizer_config.json").write_text(json.dumps(settings))
  flags = ("--n=1", "--temperature=0", "--max_new_tokens=8", "--slots=8", "--raw")
  text = "Q: country of paris \n A:"
  [line] = made(sample, tmp_path, [{"prompt": text}], *flags, model=model)
  host, checkpoint = bench_of()
  request = Request((host.tokenizer.bos_id, *host.tokenizer.encode(text)), (0, 0))
  stops = (host.tokenizer.eos_id,)
  [expected] = drafts(host, checkpoint, [request], stops, temperature=0.0, max_new_tokens=8)
  assert line["responses"][0]["tokens"] == list(expected.tokens)
  assert started(sample, tmp_path, [{"prompt": text}], *flags[:-1], model=model, output="chat") == 1


def test_sampling_stops_where_the_models_own_files_say(tmp_path):
  """An exported Llama-3 names <|eot_id|> its EOS; where documents end is known from generation_config.json alone."""
  tokenizer = load_tokenizer(text_tokenizers.byte_bpe_dir(True))
  c = LlamaConfig(
    vocab=tokenizer.size, width=16, depth=1, heads=2, kv_heads=1, head_dim=8, ffn=16, norm_eps=1e-5, rope_base=1e4,
    rope_scaling=None, tied=False, max_positions=64,
  )  # fmt: skip
  stops = chat.stop_ids(tokenizer, chat.LLAMA3)
  text = weights.TextSide(
    tokenizer=tokenizer, chat_template=chat.jinja(chat.LLAMA3),
    eos_token="<|eot_id|>", stop_ids=stops, bos_id=tokenizer.bos_id,
  )  # fmt: skip
  weights.save(tmp_path / "model", llama.init(c, 0), text)
  assert command.model_of(str(tmp_path / "model"), None).chat == "llama3"
  host, _ = bench_of(tmp_path / "model", "llama3")
  assert len(chat.stop_ids(host.tokenizer, host.chat)) < len(stops) == 2
  assert set(command.stop_ids(host)) == set(stops)


# Killed and resumed


def parts_dir(tmp_path, output="out.jsonl"):
  return tmp_path / f"{output}.parts" / "lines"


def content(directory):
  return {p.name: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file() and p.name != "manifest.json"}


@pytest.mark.parametrize("tool", [sample, score])
def test_output_cut_anywhere_is_continued_to_the_same_bytes(tool, tmp_path, monkeypatch):
  monkeypatch.setattr(tool, "FILLINGS", 1)
  monkeypatch.setattr(tool, "PART", 8 if tool is sample else 4)  # four rows
  rows = [{"prompt": prompt, "response": prompt[::-1]} for prompt in PROMPTS]
  flags = SMALL if tool is sample else ("--rows=4", "--mode=sampled")
  computed = []
  module, inner = (sample, "_sampled") if tool is sample else (contract, "scores")
  function = getattr(module, inner)

  def counted(*args, **more):
    return computed.append(next(len(x) for x in args if isinstance(x, list))) or function(*args, **more)

  monkeypatch.setattr(module, inner, counted)
  made(tool, tmp_path, rows, *flags)
  assert computed == [4, 4, 2]
  out, parts = tmp_path / "out.jsonl", parts_dir(tmp_path)
  data, whole = out.read_bytes(), content(parts)
  assert data == b"".join(text for name, text in whole.items() if name.endswith(".jsonl")) and len(whole) == 7

  def name(i):
    return parts / f"part-{i:05d}-of-00003.jsonl"

  manifest = parts / "manifest.json"
  for gone, left in (  # what a kill left unwritten, and the rows that are then computed
    ([], []),
    ([out], []),
    ([out, manifest], []),
    ([out, manifest, name(2)], [2]),
    ([out, manifest, name(2).with_suffix(".json")], [2]),
    ([out, manifest, name(1), name(2), name(2).with_suffix(".json")], [4, 2]),
    ([out, manifest, name(0), name(1), name(2)], [4, 4, 2]),
  ):
    for path in gone:
      path.unlink()
    (parts.parent / ".out.jsonl.x.tmp").write_text("cut")
    computed.clear()
    made(tool, tmp_path, rows, *flags)
    assert out.read_bytes() == data and computed == left, gone
    assert content(parts) == whole and not list(parts.parent.glob(".*.tmp"))
  # Parts that are computed together are computed together again, and those that are there stay.
  monkeypatch.setattr(tool, "FILLINGS", 2)
  for path in (out, manifest):
    path.unlink()
  name(1).write_bytes(name(1).read_bytes()[:-3])
  kept = name(0).stat().st_mtime_ns
  computed.clear()
  again = made(tool, tmp_path, rows, *flags)
  assert computed == [8] and name(0).stat().st_mtime_ns == kept
  assert [line["id"] for line in again] == [line["id"] for line in map(json.loads, data.splitlines())]


def test_killed_and_stopped_processes_leave_what_the_same_command_completes(tmp_path):
  rows = [{"prompt": f"{a} {b} {c}"} for a in PROMPTS for b in CITIES for c in CITIES[:3]]
  source = write_rows(tmp_path / "in.jsonl", rows)

  def start(output):
    return subprocess.Popen(
      [
        sys.executable, "-m", "alma_jax.tools.sample", "--model=mini", f"--input={source}", f"--output={output}",
        "--n=64", "--max_new_tokens=16", "--slots=64",
      ],
      cwd=small_run.ROOT, env=small_run.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

  whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"

  def written(path):
    return len(list(parts_dir(tmp_path, path.name).glob("part-*.json")))

  process = start(whole)
  said = process.communicate(timeout=240)[1]
  assert process.returncode == 0 and written(whole) == 8, said
  for kill, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
    process = start(cut)
    before, deadline = written(cut), time.monotonic() + 120
    while written(cut) == before and time.monotonic() < deadline:
      time.sleep(0.002)
    process.send_signal(kill)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == status and "Traceback" not in said
    assert before < written(cut) < 8 and not cut.exists()
  process = start(cut)
  process.communicate(timeout=240)
  assert process.returncode == 0
  assert cut.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
  "change",
  [
    {"temperature": 0.7}, {"top_p": 0.5}, {"top_k": 3}, {"repetition_penalty": 1.5}, {"penalize_prompt": "false"},
    {"max_new_tokens": 9}, {"min_new_tokens": 1}, {"stop": "x"}, {"seed": 4}, {"n": 3}, {"raw": None}, {"model": None},
    {"input": None},
  ],
  ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_start_with_another_value_is_refused_by_the_name_of_the_value(change, tmp_path, capsys):
  rows = [{"prompt": prompt} for prompt in PROMPTS]
  out, [(name, value)] = tmp_path / "out.jsonl", change.items()
  flags = {"input": write_rows(tmp_path / "in.jsonl", rows), "model": "mini", "output": out}
  flags |= dict(flag[2:].split("=") for flag in SMALL)

  def written(flags):
    return [f"--{k}" if v is None else f"--{k}={v}" for k, v in flags.items()]

  parsed = sample.FLAGS.values(written(flags))
  with jsonl.stage_of(out, parsed, sample.decides(parsed, command.open_model(parsed, None))) as stage:
    jsonl.Parts(stage, [20], 1).write(0, [{"id": 1}], {})
  before = content(parts_dir(tmp_path))
  if name == "model":
    value = save_mini(tmp_path / "model", scale=0.5)
  if name == "input":
    value = write_rows(tmp_path / "in.jsonl", rows[1:])
  assert sample.main(written(flags | {name: value})) == 1
  said = capsys.readouterr().err
  assert f"  {'chat' if name == 'raw' else name}: " in said and " -> " in said and "another --output" in said
  assert f"delete {out} and {out}.parts" in said
  assert said.count(" -> ") == (2 if name == "raw" else 1), said  # and no other
  assert name not in ("model", "input") or f"({value})" in said
  assert content(parts_dir(tmp_path)) == before and not out.exists()


def test_slots_devices_and_paths_do_not_decide(tmp_path):
  rows = [{"prompt": prompt} for prompt in PROMPTS[:2]]
  before = made(sample, tmp_path, rows, *SMALL)
  shutil.copytree(CHECKPOINT, tmp_path / "copy")
  assert made(sample, tmp_path, rows, *SMALL, "--slots=5", "--chat=mini", model=tmp_path / "copy") == before


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (lambda out, parts: shutil.rmtree(parts), "no out.jsonl.parts beside it says how it was made"),
    (lambda out, parts: (parts / "lines" / "manifest.json").write_text("{"), "manifest.json is damaged"),
    (lambda out, parts: (parts / "lines" / "manifest.json").unlink(), "differs from its parts"),
    (lambda out, parts: out.write_bytes(out.read_bytes() * 2), "differs from its parts"),
    (lambda out, parts: next(parts.rglob("part-*.jsonl")).unlink(), "part-00000-of-00001.jsonl is missing"),
    (lambda out, parts: out.unlink() or out.mkdir(), "out.jsonl is a directory"),
  ],
)
def test_an_output_that_is_not_ones_own_is_left_alone(spoil, message, tmp_path, capsys):
  out, rows = tmp_path / "out.jsonl", [{"prompt": "ü"}]
  made(sample, tmp_path, rows, *SMALL)
  spoil(out, tmp_path / "out.jsonl.parts")
  before = out.read_bytes() if out.is_file() else None
  capsys.readouterr()
  assert started(sample, tmp_path, rows, *SMALL) == 1
  assert_said(capsys, message)
  assert before == (out.read_bytes() if out.is_file() else None)


def test_two_processes_do_not_write_one_output(tmp_path, capsys):
  with Run(tmp_path / "out.jsonl.parts"):
    assert started(sample, tmp_path, [{"prompt": "a"}], *SMALL) == 1
    assert_said(capsys, r"out.jsonl: another process is writing there \(.*out.jsonl.parts/.lock says which\)")
  made(sample, tmp_path, [{"prompt": "a"}], *SMALL)


# Scoring


PAIRS = [{"prompt": p, "response": r, "id": f"{p}/{r}"} for p in PROMPTS[:3] for r in ("france", "pie .", "")]


def test_scores_equal_verdicts_and_modes_read_the_same_probabilities(tmp_path):
  runs = {mode: made(score, tmp_path, PAIRS, "--rows=8", f"--mode={mode}", output=mode) for mode in
          ("expected", "argmax", "sampled")}  # fmt: skip
  host, checkpoint = bench_of()
  judge = OwnJudge(host, checkpoint, formats.JUDGE)
  expected = judge.scores([Answered(user(row["prompt"]), row["response"]) for row in PAIRS])
  lines = runs["expected"]
  assert [line["id"] for line in lines] == [row["id"] for row in PAIRS]
  assert all(set(line) == {"id", "score", "probs", "mass"} and len(line["probs"]) == 11 for line in lines)
  for name in ("score", "probs", "mass"):
    np.testing.assert_allclose([x[name] for x in lines], [getattr(v, name) for v in expected], rtol=1e-4, atol=1e-9)
  for mode in ("argmax", "sampled"):
    assert [(x["probs"], x["mass"]) for x in runs[mode]] == [(x["probs"], x["mass"]) for x in lines]
  assert [x["score"] for x in runs["argmax"]] == [float(np.argmax(x["probs"])) for x in lines]


def test_sampled_scores_follow_the_probabilities_and_the_words_alone():
  probs = (0.0, 0.1, 0.2, 0.0, 0.05, 0.3, 0.0, 0.0, 0.15, 0.2, 0.0)
  verdict = Verdict(5.0, probs, 1.0)
  drawn = [score._score("sampled", verdict, (0, "score", i, None, "text")) for i in range(8000)]
  assert drawn == [score._score("sampled", verdict, (0, "score", i, None, "text")) for i in range(8000)]
  for s, p in enumerate(probs):
    assert abs(drawn.count(s) / 8000 - p) <= 5 * (p * (1 - p) / 8000) ** 0.5
  many = score._score("sampled", verdict, (0, "score", 0, None, "text"), samples=4000)
  deviation = (sum(p * (s - 5.2) ** 2 for s, p in enumerate(probs))) ** 0.5  # 5.2 is the mean under `probs`
  assert abs(many - 5.2) < 5 * deviation / 4000**0.5


def test_rows_of_the_sampler_messages_and_pairs_are_scored_alike(tmp_path):
  answers = ("france", "pie .")
  sampled = [{"id": p, "prompt": p, "responses": [{"sample_id": 7 + i, "text": a} for i, a in enumerate(answers)]}
             for p in PROMPTS[:3]]  # fmt: skip
  pairs = [{"prompt": p, "response": a} for p in PROMPTS[:3] for a in answers]
  ended = [{"messages": [*user(p), {"role": "assistant", "content": a}]} for p in PROMPTS[:3] for a in answers]
  found = [made(score, tmp_path, rows, "--rows=8", output=str(i)) for i, rows in enumerate((sampled, pairs, ended))]
  assert [(x["id"], x["sample_id"]) for x in found[0]] == [(p, 7 + i) for p in PROMPTS[:3] for i in range(2)]
  assert [x["id"] for x in found[1]] == [prompt_id(user(p)) for p in PROMPTS[:3] for _ in answers]
  assert found[1] == found[2]
  for name in ("score", "probs", "mass"):
    assert [x[name] for x in found[0]] == [x[name] for x in found[1]]


def test_the_samplers_output_goes_into_the_scorer(tmp_path):
  lines = made(sample, tmp_path, [{"prompt": p} for p in PROMPTS[:3]], *SMALL)
  scored = made(score, tmp_path, lines, "--rows=8", output="scores")
  assert [(x["id"], x["sample_id"]) for x in scored] == [(x["id"], i) for x in lines for i in range(2)]


def test_a_judge_that_does_not_know_the_template_is_pointed_out_once(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(score, "FILLINGS", 1)
  monkeypatch.setattr(score, "PART", 3)
  unknown = dict(item="rate prompt: {prompt} response: {response}", answer_open="rating: [[", gap=" ")
  monkeypatch.setattr(formats, "JUDGE", dataclasses.replace(formats.JUDGE, **unknown))  # the base model never saw it
  made(score, tmp_path, PAIRS, "--rows=3")
  said = capsys.readouterr().err
  assert said.count("does not fit it") == 1 and "'mini'" in said and "--template" in said
  fitting = Verdict(5.0, (1.0,) * 11, 0.95)
  monkeypatch.setattr(contract, "scores", lambda judge, pairs, *_, **__: [fitting] * len(pairs))
  made(score, tmp_path, PAIRS, "--rows=3", output="fine")
  assert "does not fit" not in capsys.readouterr().err


# Judges and formats of a user's

MINE = """
import dataclasses
from alma_jax.judges.contract import Verdict
from alma_jax.mini import formats

class Short:
  identity, scale = "short", None
  def __init__(self, runtime, options):
    self.runtime, self.options = runtime, options
  def scores(self, pairs):
    return [Verdict(-float(len(p[1])), details={"finished": p.finished, "seed": self.options.seed}) for p in pairs]

class Tokens(Short):
  def scores(self, pairs):
    return [Verdict(float(len(self.runtime.tokenizer.encode(p[1])))) for p in pairs]

CHAT = dataclasses.replace(formats.CHAT, name="mine", user=dataclasses.replace(formats.CHAT.user, before="A: "))
JUDGE = dataclasses.replace(formats.JUDGE, name="mine")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
  """The name of a module in the working directory, outside the package."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / f"{tmp_path.name}_mine.py").write_text(MINE)
  return f"{tmp_path.name}_mine"


def judged(tmp_path, rows, *flags, output="out.jsonl"):
  source = write_rows(tmp_path / "in.jsonl", rows)
  return score.main([f"--input={source}", f"--output={tmp_path / output}", *flags])


def test_a_judge_in_a_users_file_scores_without_a_model(mine, tmp_path, capsys):
  answers = [{"text": "abc", "finished": False}, {"text": "de", "finished": True}, {"text": ""}]
  rows = [{"prompt": p, "responses": answers} for p in PROMPTS[:2]]
  assert judged(tmp_path, rows, f"--judge={mine}:Short", "--seed=4") == 0
  lines = read_rows(tmp_path / "out.jsonl")
  assert [(line["score"], line["details"]["finished"]) for line in lines] == [(-3, False), (-2, True), (0, True)] * 2
  assert all(line["probs"] is None and line["mass"] is None and line["details"]["seed"] == 4 for line in lines)
  manifest = json.loads((parts_dir(tmp_path) / "manifest.json").read_text())
  assert manifest["judge"]["identity"].startswith("short ") and manifest["judge"]["scale"] is None
  (tmp_path / f"{mine}.py").write_text(MINE + "\n")  # another source may give other scores
  capsys.readouterr()
  assert judged(tmp_path, rows, f"--judge={mine}:Short", "--seed=4") == 1
  assert_said(capsys, '  judge: "short .*" -> "short .*"')


def test_a_judge_in_a_users_file_may_ask_for_the_model(mine, tmp_path, capsys):
  rows = [{"prompt": "a", "response": "paris france ."}]
  assert judged(tmp_path, rows, f"--judge={mine}:Tokens") == 1
  assert "error: --judge names a judge that asks for a model (its tokenizer): give --model" in capsys.readouterr().err
  assert judged(tmp_path, rows, f"--judge={mine}:Tokens", "--model=mini") == 0
  assert read_rows(tmp_path / "out.jsonl")[0]["score"] == 3
  assert judged(tmp_path, rows, f"--judge={mine}:Short", "--mode=argmax", output="argmax") == 1
  assert re.search("error: --mode=argmax needs probabilities, and the judge 'short .*' none", capsys.readouterr().err)


def test_a_judge_by_rule_reads_the_fields_of_the_row(tmp_path, capsys):
  rows = [{"prompt": "6 * 7?", "response": "42", "reference": "42"},
          {"prompt": "2+2?", "responses": [{"text": "five"}, {"text": " 4"}], "reference": ["four", "4"]}]  # fmt: skip
  assert judged(tmp_path, rows, "--judge=rules:exact_match") == 0
  assert [x["score"] for x in read_rows(tmp_path / "out.jsonl")] == [1, 0, 1]
  assert judged(tmp_path, [{"prompt": "a", "response": "b"}], "--judge=rules:exact_match", output="lacking") == 1
  assert "rules:exact_match reads the field `reference` of a set's row" in capsys.readouterr().err


def test_an_evaluator_of_the_package_scores_without_a_model(tmp_path):
  rows = [{"prompt": "country : lyon", "response": r} for r in ("answer: lyon france .", "norway")]
  assert judged(tmp_path, rows, "--judge=mini") == 0
  assert [x["score"] for x in read_rows(tmp_path / "out.jsonl")] == [
    float(world.score(**row, finished=True)) for row in rows
  ]


def test_chat_formats_and_templates_of_a_users_file(mine, tmp_path):
  rows = [{"prompt": prompt, "response": "paris"} for prompt in PROMPTS[:3]]
  plain = made(sample, tmp_path, rows, *SMALL, output="plain")
  assert made(sample, tmp_path, rows, *SMALL, f"--chat={mine}:CHAT", output="mine") != plain
  scored = made(score, tmp_path, rows, "--rows=8", output="scored")
  assert made(score, tmp_path, rows, "--rows=8", f"--template={mine}:JUDGE", output="own") == scored


# What --model means


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run directory whose stages hold models that differ."""
  directory, config = tmp_path_factory.mktemp("run") / "run", get_config("mini")
  config.judge.template = "a1"
  with Run(directory) as run:
    run.save_config(config.to_dict())
    for i, name in enumerate(("sft_1", "round_02/policy", "round_10/policy", "round_09/policy", "judge")):
      stage = run.stage(name, {"i": i})
      save_mini(stage.dir / "model", 1 + i)
      stage.finish(files=["model/config.json"])
    run.stage("round_11/policy", {})  # begun
    run.stage("seeds", {}).finish()
    run.stage("pool/prompts", {}).finish()
  (directory / "round_02" / "config.json").write_text(json.dumps(configs.for_round(config, 2).to_dict(), default=str))
  return directory


def stage_of(run, path, pick=layout.newest_policy):
  return str(command.model_of(str(run / path), pick).directory.relative_to(run))


def test_a_run_is_its_newest_policy_or_its_judge_with_the_runs_formats(run, tmp_path):
  model = command.model_of(str(run), layout.newest_policy)
  assert (stage_of(run, ""), model.chat, model.template) == ("round_10/policy/model", "mini", "a1")
  for path in ("round_02/policy", "sft_1", "judge"):
    found = command.model_of(str(run / path), None)
    assert (found.directory, found.chat, found.template) == (run / path / "model", "mini", "a1")
  assert command.model_of(str(run / "sft_1" / "model"), None) == command.Model(run / "sft_1" / "model", "mini", None)
  assert stage_of(run, "", layout.judge_of) == "judge/model"
  copy = shutil.copytree(run, tmp_path / "run")
  for accepted, expected in ((False, "judge/model"), (True, "judge_distilled/model")):
    shutil.rmtree(copy / "judge_distilled", ignore_errors=True)
    with Run(copy) as again:
      stage = again.stage("judge_distilled", {})
      shutil.copytree(copy / "judge" / "model", stage.dir / "model")
      stage.finish(accepted=accepted)
    assert stage_of(copy, "", layout.judge_of) == expected
  for path in copy.glob("round_*"):
    shutil.rmtree(path)
  assert stage_of(copy, "") == "sft_1/model"


def test_a_run_samples_like_its_newest_policy(run, tmp_path):
  rows = [{"prompt": prompt} for prompt in PROMPTS[:3]]
  found = [
    made(sample, tmp_path, rows, *SMALL, model=model, output=str(i))
    for i, model in enumerate((run, run / "round_10" / "policy" / "model", run / "round_02" / "policy"))
  ]
  assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("round_11/policy", "holds no finished stage"),
    ("seeds", "this stage holds no model; those that do: sft_1, judge, round_RR/policy"),
    ("nowhere", "the directory .*nowhere does not exist"),
    ("config.json", "is a file; give the directory"),
    ("round_02", "one round of a run; give its policy, .*round_02/policy, or the whole run"),
    ("pool", "pool/config.json: no such file"),
  ],
)
def test_what_is_no_model_is_named(path, message, run, tmp_path, capsys):
  assert started(sample, tmp_path, [{"prompt": "a"}], *SMALL, model=run / path) == 1
  assert_said(capsys, message)


def test_a_run_without_a_finished_model_is_named(tmp_path, capsys):
  with Run(tmp_path / "run") as run:
    run.save_config(get_config("mini").to_dict())
  for tool, stage in ((sample, "sft_1"), (score, "judge")):
    assert started(tool, tmp_path, PAIRS, model=tmp_path / "run") == 1
    assert_said(capsys, f"wait for its stage {stage}")


# Checkpoints of a training


def test_a_checkpoint_in_the_layout_of_0_1_is_exported(tmp_path, capsys):
  host, checkpoint = bench_of()
  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  model = host.load(checkpoint, mesh, sharding.TRAIN, "float32")
  state = engine_train.abstract_state(host.trained_config, mesh, "float32")
  leaves = [2 * leaf for leaf in jax.tree.leaves(model)]
  leaves += [jax.numpy.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)[len(leaves) :]]
  stage, config = tmp_path / "run" / "round_02" / "policy", get_config("mini").to_dict()
  with ocp.training.Checkpointer(stage / "checkpoints") as checkpoints:  # arrays had numbers, no names
    checkpoints.save(7, {f"{i:04d}": leaf for i, leaf in enumerate(leaves)})
  config["model"]["of_another_version"] = 1
  (tmp_path / "run" / "config.json").write_text(json.dumps(config, default=str))
  (stage / "fingerprint.json").write_text('{"format": 1}')
  assert export.main([f"--stage={stage}"]) == 0 and "checkpoints after steps 7" in capsys.readouterr().out
  assert export.main([f"--stage={stage}", "--step=7", f"--output={tmp_path / 'model'}"]) == 0
  exported = weights.load(tmp_path / "model")
  for mine, base in zip(jax.tree.leaves(exported), jax.tree.leaves(weights.load(CHECKPOINT)), strict=True):
    np.testing.assert_array_equal(mine, 2 * base)
  made(sample, tmp_path, [{"prompt": PROMPTS[0]}], *SMALL, model=tmp_path / "model")
  capsys.readouterr()
  assert export.main([f"--stage={stage}", "--step=7", f"--output={tmp_path / 'model'}"]) == 1
  assert_said(capsys, "--output: .*model is not empty")


# What users are told


def assert_said(capsys, message):
  said = capsys.readouterr().err
  assert re.search(message, said), said
  assert said.startswith("error: ") and "Traceback" not in said


HELLO = '{"prompt": "country of paris"}\n'
LONG = json.dumps({"prompt": "paris " * 300, "response": "x"})


@pytest.mark.parametrize(
  ("text", "flags", "message"),
  [
    (None, [], "in.jsonl: no such file"),
    ("", [], "in.jsonl: the file holds no rows"),
    (HELLO + "\n{oops}\n", [], "in.jsonl, line 3, column 2: not valid JSON"),
    ("[\n{}]", [], "in.jsonl, line 1: a JSON array; expected one object per line"),
    (HELLO + '"text"', [], "in.jsonl, line 2: expected an object"),
    (b'{"prompt": "\xff"}', [], "in.jsonl, line 1: not UTF-8 text .byte 12"),
    ('{"promt": "a"}', [], "line 1: `prompt` or `messages` is missing .* misspell 'promt'"),
    ('{"prompt": 3}', [], "line 1, field prompt: expected a string, found a number"),
    ('{"messages": [{"role": "usr", "content": "a"}]}', [], r"messages\[0\].role: unknown role 'usr'.* mean 'user'"),
    ('{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}', [], "line 1: .*no system"),
    (
      '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
      [],
      "must be the user's",
    ),
    (
      '{"messages": [' + ", ".join(['{"role": "user", "content": "a"}'] * 2) + "]}",
      [],
      "must alternate.*found user, user",
    ),
    ('{"prompt": "a", "id": true}', [], "line 1, field id: expected a string or a whole number, found true"),
    ('{"prompt": " "}', [], "line 1: the prompt is empty"),
    (HELLO + LONG, [], r"line 2: a prompt of 30\d tokens; .* leave 240"),
    (HELLO, ["--max_new_tokens=256"], "--max_new_tokens=256: ask for less, the model has 256 positions"),
    (HELLO + '{"prompt": "x"}\n' + HELLO, [], "lines 1 and 3: both have the id '[0-9a-f]{16}'"),
    ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}', [], "lines 1 and 2: both have the id '1'"),
    ('{"messages": [{"role": "user", "content": "a"}]}', ["--raw"], "line 1: --raw takes a text"),
    (HELLO, ["--output=nowhere/out.jsonl"], "--output: there is no directory nowhere"),
    (HELLO, ["--tensor=3"], "3"),
  ],
)
def test_mistakes_in_sampling_are_named(text, flags, message, tmp_path, capsys):
  source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  if text is not None:
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
  known = ["--model=mini", f"--input={source}", f"--output={out}", "--max_new_tokens=16"]
  assert sample.main([*known, *flags]) == 1
  assert_said(capsys, message)
  assert not out.exists()


def test_the_default_length_is_at_most_half_of_the_models_positions(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sample, "_sampled", lambda options, *_: (_ for _ in ()).throw(TextError(str(options.decoding))))
  assert started(sample, tmp_path, [{"prompt": "country of paris"}]) == 1
  said = capsys.readouterr().err
  assert "--max_new_tokens=128: half of the model's 256 positions" in said and "max_new_tokens=128," in said
  assert started(sample, tmp_path, [{"prompt": "country of paris"}], "--max_new_tokens=1024") == 1
  assert_said(capsys, "--max_new_tokens=1024: ask for less, the model has 256 positions")


def test_responses_that_are_too_long_to_score_are_left_out_and_counted_where_that_is_asked_for(tmp_path, capsys):
  long = {"sample_id": 7, "text": "paris " * 300}
  rows = [
    {"prompt": "country of paris", "response": "paris france ."},
    json.loads(LONG),
    {"prompt": "food of turin", "responses": [long, {"sample_id": 8, "text": "turin pasta ."}]},
  ]
  assert started(score, tmp_path, rows) == 1
  assert_said(capsys, "line 2: prompt and response are 3.. tokens .* or give --skip to leave such rows out")
  short = made(score, tmp_path, [rows[0], rows[2] | {"responses": rows[2]["responses"][1:]}], output="short.jsonl")
  found = made(score, tmp_path, rows, "--skip")
  assert [line.get("sample_id") for line in found] == [None, 8]
  assert [line["score"] for line in found] == pytest.approx([line["score"] for line in short], abs=1e-5)
  assert "2 responses left out (50.0%): too long for the 256 positions" in capsys.readouterr().out
  manifest = json.loads((tmp_path / "out.jsonl.parts" / "lines" / "manifest.json").read_text())
  assert manifest["skipped"] == 2


@pytest.mark.parametrize(
  ("row", "flags", "message"),
  [
    ({"prompt": "a"}, [], "line 1: `response` is missing"),
    ({"prompt": "a", "response": "b", "responses": []}, [], "both `response` and `responses`"),
    ({"prompt": "a", "responses": "b"}, [], "field responses: expected a list"),
    ({"prompt": "a", "responses": [{"txt": "b"}]}, [], r"responses\[0\]: expected an object with \"text\""),
    ({"prompt": "a", "responses": [{"text": 3}]}, [], r"responses\[0\].text: expected a string"),
    ({"prompt": "a", "responses": [{"text": "b", "sample_id": None}]}, [], r"responses\[0\].sample_id"),
    (json.loads(LONG), [], r"line 1: prompt and response are 3\d\d tokens in template mini"),
    ({"prompt": "a", "response": "b"}, ["--template=a2"], "judge template 'a2': the tokenizer in .* cannot write"),
  ],
)
def test_mistakes_in_scoring_are_named(row, flags, message, tmp_path, capsys):
  assert started(score, tmp_path, [row], *flags) == 1
  assert_said(capsys, message)
  assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
  ("tool", "flag", "message"),
  [
    (sample, "--temprature=1", "no flag '--temprature'; did you mean '--temperature'?"),
    (sample, "--temp=1", "no flag '--temp'"),  # abbreviations would change their meaning with the next flag
    (sample, "--temperature=nan", "--temperature is 'nan'; it must be a number"),
    (sample, "--temperature=-1", "--temperature is -1.0; it must be 0 (greedy) or more"),
    (sample, "--top_p=1.5", "--top_p is 1.5; it must be from 0 (only the likeliest) to 1 (all)"),
    (sample, "--n=0", "--n is 0; it must be at least 1"),
    (sample, "--n=2.5", "--n is '2.5'; it must be a whole number"),
    (sample, "--slots=-1", "--slots is -1; it must be at least 0"),
    (sample, "--raw=yes", "--raw is 'yes'; it must be true or false"),
    (sample, "--min_new_tokens=2000", "--min_new_tokens is 2000; it must be from 0 to max_new_tokens"),
    (
      sample,
      "--chat=lama3",
      "--chat is 'lama3'; it may be 'llama3', 'llama2', 'lima', 'chatml', 'plain', 'template', 'mini' or",
    ),
    (sample, "--chat=lama3", "(did you mean 'llama3'?)"),
    (sample, "--chat=nowhere:CHAT", "--chat is 'nowhere:CHAT': there is no module 'nowhere' in"),
    (score, "--mode=expcted", "'expcted'; it may be 'expected', 'argmax', 'sampled' (did you mean 'expected'?)"),
    (score, "--template=a3", "--template is 'a3'; it may be 'a1', 'a2', 'a2_reasoned', 'mini' or"),
    (score, "--judge=truth:NO", "--judge is 'truth:NO': there is no module 'truth' in"),
    (score, "--model=", "--model is missing: give the model that judges, or --judge"),
    (score, "--rows=x", "--rows is 'x'; it must be a whole number"),
  ],
)
def test_mistaken_flags_are_named(tool, flag, message, capsys):
  with pytest.raises(SystemExit) as stop:
    tool.main(["--model=mini", "--input=x", "--output=y", flag])
  said = capsys.readouterr().err
  assert stop.value.code == 2 and message in said and said.count("\n") == 1 and said.startswith("error: ")


def test_a_model_whose_chat_format_is_not_known_asks_for_it(tmp_path, capsys):
  model = save_mini(tmp_path / "model")
  (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
  assert started(sample, tmp_path, [{"prompt": "a"}], *SMALL, model=model) == 1
  assert_said(capsys, "chat format is not known: give --chat. Its tokenizer can write mini; one of your own")


def test_a_damaged_file_of_a_model_is_named(tmp_path, capsys):
  model = save_mini(tmp_path / "model")
  for name in ("generation_config.json", "tokenizer_config.json", "config.json"):
    whole = (model / name).read_text()
    (model / name).write_text(whole[:-5])
    assert started(sample, tmp_path, [{"prompt": "a"}], *SMALL, model=model, output=name) == 1
    assert_said(capsys, f"{name} is damaged")
    (model / name).write_text(whole)


def test_a_model_that_gives_nan_stops_at_the_first_item(tmp_path, capsys):
  model = save_mini(tmp_path / "model", scale=float("nan"))
  capsys.readouterr()
  rows = [{"id": 7, "prompt": PROMPTS[0], "response": "paris"}]
  assert started(sample, tmp_path, rows, *SMALL, "--chat=mini", model=model) == 1
  said = capsys.readouterr().err
  assert re.search(f"error: .*in.jsonl, id 7, sample [01], model .*: the log-prob of token 1 .* is nan.*{model}", said)
  assert started(score, tmp_path, rows, "--rows=8", "--chat=mini", "--template=mini", model=model, output="scores") == 1
  assert re.search("error: .*in.jsonl, id 7, judged, model .*: a log-prob is nan", capsys.readouterr().err)
  assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "scores").exists()


def test_lines_are_counted_and_split_as_json_means_it(tmp_path):
  path = tmp_path / "in.jsonl"
  path.write_bytes(b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r\n\n  \n{"prompt": "c"}')
  assert list(jsonl.read(path)) == [(1, {"prompt": "a\u2028b"}), (4, {"prompt": "c"})]
