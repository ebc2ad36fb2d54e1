"""Base models in the formats of the real ones, in small: from the directory through SFT, sampling and judging to the
export, with the tokens that the chat format adds or that the base model never trained."""

import dataclasses
import json

import numpy as np
import pytest
import text_tokenizers
from ml_collections import ConfigDict

from alma_jax import start
from alma_jax.corpus.normalise import prompt_id
from alma_jax.judges.contract import Answered
from alma_jax.judges.own import OwnJudge
from alma_jax.llama import model as llama
from alma_jax.llama import weights
from alma_jax.llama.config import LlamaConfig, ModelError
from alma_jax.options import ConfigError
from alma_jax.runtime.host import fitting_chats
from alma_jax.stages import data as data_stage
from alma_jax.stages import policy, responses
from alma_jax.store import records
from alma_jax.store.runs import Artefact
from alma_jax.text import chat
from alma_jax.text import judge as templates
from alma_jax.text.tokenizer import TextError, load_tokenizer
from configs.alma import get_config

KINDS = {"llama2": text_tokenizers.sentencepiece_dir, "llama3": lambda: text_tokenizers.byte_bpe_dir(True)}


def write_base(directory, kind):
  """A random base model with the tokenizer of its kind; Llama-3's chat markers have all-zero rows."""
  tokenizer = load_tokenizer(KINDS[kind]())
  c = LlamaConfig(
    vocab=tokenizer.size, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, ffn=64, norm_eps=1e-5,
    rope_base=1e4, rope_scaling=None, tied=False, max_positions=512,
  )  # fmt: skip
  model = llama.init(c, 0)
  if kind == "llama3":
    markers = np.array(chat.special_ids(tokenizer, chat.LLAMA3))
    model.embed = model.embed.replace(model.embed[...].at[markers].set(0.0))
    model.head = model.head.replace(model.head[...].at[:, markers].set(0.0))
  text = weights.TextSide(tokenizer=tokenizer, bos_id=tokenizer.bos_id, stop_ids=(tokenizer.eos_id,))
  weights.save(directory, model, text)
  return tokenizer


def config_for(directory, kind, data):
  config = get_config("mini")
  config.model.update(dict(path=str(directory), chat=kind))
  config.data.update(dict(sft=str(data), judge=str(data), eval=""))
  config.judge.template = "a2"
  config.judge.train.row_length = config.judge.distil.train.row_length = 512  # the template has over 300 tokens here
  config.sft.update(dict(row_length=128, epochs=1.0, batch=8))
  config.responses.update(dict(max_prompt_tokens=96, max_new_tokens=8, n=2))
  config.engine.update(dict(slots=8, rows=8))
  config.mesh.update(dict(data=2, fsdp=4, tensor=1))
  return config


@pytest.mark.parametrize("kind", ["llama2", "llama3"])
def test_sft_sampling_and_judging_with_added_and_untrained_tokens(kind, tmp_path):
  data = tmp_path / "data.jsonl"
  rows = [{"prompt": f"Say {i}", "response": f"Here is {i}.", "score": i % 11} for i in range(24)]
  data.write_text("".join(json.dumps(row) + "\n" for row in rows))
  plain = write_base(tmp_path / "base", kind)
  added = 1 if kind == "llama2" else 0
  config = config_for(tmp_path / "base", kind, data)
  with start.open_session(config, tmp_path / "run") as session:
    assert session.host.tokenizer.size == plain.size + added
    options = session.options
    data = data_stage.build(session, options.data)
    trained = policy.sft(session, policy.Job("sft_1", session.base, options.sft, 1), data)
    counts = json.loads((tmp_path / "run" / "sft_1" / "manifest.json").read_text())["counts"]
    assert counts["untrained_tokens_reset"] == (3 if kind == "llama3" else 0)
    asked = session.run.stage("round_02/prompts", {})
    prompt = [{"role": "user", "content": "Say something"}]
    asked.write_part(0, 1, [records.Prompt(prompt_id(prompt), tuple(prompt), "test")], records.Prompt)
    asked.finish()
    asked = Artefact(asked, records.Prompt)
    sampled = responses.build(session.at(2), asked, [session.base, trained], options.responses.sampling).read()
    assert len(sampled) == 2 and all(len(r.tokens) <= 8 for r in sampled)
    judge = OwnJudge(session.host, session.base, templates.A2)
    verdict = judge.scores([Answered(prompt, text) for text in ("Hello.", "Hello.", "No.")])
    assert verdict[0] == verdict[1] and 0 <= verdict[2].score <= 10
    stops = chat.stop_ids(session.host.tokenizer, session.host.chat)
  exported = trained.directory
  assert json.loads((exported / "config.json").read_text())["vocab_size"] == plain.size + added
  assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == list(stops)
  back = load_tokenizer(exported)
  assert (back.size, back.token_id(session.host.chat.stop)) == (plain.size + added, stops[0])
  model = weights.load(exported)
  for row in (model.embed[...][stops[0]], model.head[...][:, stops[0]]):
    assert float(np.abs(row).max()) > 0  # the mean of random rows is small, yet no row of zeros


def test_exported_chat_model_stops_in_transformers_by_its_own_files(tmp_path):
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torch")
  pytest.importorskip("jinja2")
  tokenizer = write_base(tmp_path / "base", "llama3")
  model = weights.load(tmp_path / "base")
  stop = tokenizer.token_id("<|eot_id|>")
  model.head = model.head.replace(model.head[...].at[:, stop].set(0.0))
  model.norm = model.norm.replace(model.norm[...] * 0.0)  # all logits equal: greedy takes the lowest id, never a stop
  text = weights.TextSide(
    tokenizer=tokenizer, chat_template=chat.jinja(chat.LLAMA3), eos_token="<|eot_id|>",
    stop_ids=chat.stop_ids(tokenizer, chat.LLAMA3), bos_id=tokenizer.bos_id,
  )  # fmt: skip
  weights.save(tmp_path / "chat", model, text)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "chat")
  assert theirs.eos_token == "<|eot_id|>"
  config = transformers.GenerationConfig.from_pretrained(tmp_path / "chat")
  assert config.eos_token_id == list(chat.stop_ids(tokenizer, chat.LLAMA3))
  ids = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
  ids = ids if isinstance(ids, list) else ids["input_ids"]
  assert list(ids) == chat.encode_prompt(tokenizer, chat.LLAMA3, [{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
  ("make", "fitting"),
  [  # never the miniature world's for another tokenizer, though nearly all can write it
    (text_tokenizers.byte_bpe, ["llama3", "plain", "lima", "llama2", "chatml"]),
    (text_tokenizers.sentencepieces, ["plain", "lima", "llama2", "chatml"]),  # they add no token, one and two
    (text_tokenizers.word, ["mini"]),
  ],
)
def test_the_chat_formats_that_a_tokenizer_can_write(make, fitting):
  assert fitting_chats(make()) == fitting


def session_error(tmp_path, **changes):
  config = get_config("mini")
  config.model.update(changes)
  with start.open_session(config, tmp_path / "run"):
    pass


def test_missing_model_directory_is_named(tmp_path):
  with pytest.raises(ModelError, match=r"nowhere/config\.json: no such file"):
    session_error(tmp_path, path=str(tmp_path / "nowhere"))


def test_missing_tokenizer_is_named(tmp_path):
  write_base(tmp_path / "base", "llama3")
  for path in (tmp_path / "base").glob("*token*"):
    path.unlink()
  with pytest.raises(TextError, match=r"base.*tokenizer\.json"):
    session_error(tmp_path, path=str(tmp_path / "base"))


def test_chat_format_of_another_model_is_refused(tmp_path):
  write_base(tmp_path / "base", "llama2")
  with pytest.raises(TextError, match=r"no token '<\|.*This tokenizer can write 'plain' or 'lima' or 'llama2'"):
    session_error(tmp_path, path=str(tmp_path / "base"), chat="llama3")


def test_config_dict_is_not_changed_by_a_session(tmp_path):
  config = get_config("mini")
  before = config.to_dict()
  with start.open_session(config, tmp_path / "run") as session:
    list(session.rounds())
  assert isinstance(config, ConfigDict) and config.to_dict() == before


@pytest.mark.parametrize(
  "values, message",
  [
    ({"responses.top_p": 1.5}, r"config\.responses\.top_p is 1\.5; it must be from 0"),
    ({"judge.distil.sample.temperature": -1.0}, r"config\.judge\.distil\.sample\.temperature is -1\.0"),
    ({"rounds": {3: {"eval": {"top_k": -2}}}}, r"config\.eval\.top_k is -2"),
  ],
)
def test_a_way_of_sampling_that_there_is_not_is_found_at_the_start(tmp_path, values, message):
  config = get_config("mini")
  config.update_from_flattened_dict({k: v for k, v in values.items() if k != "rounds"})
  config.rounds = values.get("rounds", {})
  with pytest.raises(ConfigError, match=message), start.open_session(config, tmp_path / "run"):
    pass


def test_the_checkpoints_of_a_round_stay_on_the_devices(tmp_path, monkeypatch):
  loaded = []
  with start.open_session(get_config("mini"), tmp_path / "run") as session:
    host = session.host
    load = host.load
    monkeypatch.setattr(
      host, "load", lambda checkpoint, *rest: loaded.append(checkpoint.name) or load(checkpoint, *rest)
    )
    a, b, c, d = (dataclasses.replace(session.base, name=name, content=name) for name in "abcd")
    for checkpoint in (a, b, c, a, b, c, d, c, a):
      host.model(checkpoint, "unrolled")
    assert "".join(loaded) == "abcda"  # d took the place of the one that was asked for longest ago
    monkeypatch.setattr(host, "device_bytes", 5 * host.model_bytes)
    loaded.clear()
    for checkpoint in (a, b, a):
      host.model(checkpoint, "unrolled")
    assert "".join(loaded) == "ba" and len(host._held) == 1  # three would leave too little for sequences
