"""`alma export --hub`: what would be pushed, with its card, and that GGUF converters and vLLM find what they read."""

import json
import re

import pyarrow.parquet as pq
import pytest
import report_run
import yaml
from safetensors import safe_open

from alma_jax.llama import weights
from alma_jax.mini import CHECKPOINT, formats
from alma_jax.report import judges
from alma_jax.store import layout
from alma_jax.text import chat
from alma_jax.text.tokenizer import load_tokenizer
from alma_jax.tools import export


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  directory = tmp_path_factory.mktemp("hub") / "run"
  report_run.make(directory)
  (directory / "round_02" / "policy" / "model").mkdir()
  (directory / "round_02" / "policy" / "model" / "config.json").write_text("{}")
  return directory


def front(card):
  return yaml.safe_load(card.split("---")[1])


def test_a_model_is_written_with_a_card_of_the_runs_own_numbers(run, tmp_path, capsys):
  stage, output = run / "round_02" / "policy", tmp_path / "model"
  assert export.main([f"--stage={stage}", "--hub=me/alma-r2", f"--output={output}", "--dry_run=true"]) == 0
  assert capsys.readouterr().out == f"{output}: model of {stage}, with its card\n"
  assert sorted(path.name for path in output.iterdir()) == ["README.md", "config.json"]
  card = (output / "README.md").read_text()
  assert front(card)["library_name"] == "transformers" and "# alma-r2" in card
  [row] = [row for row in layout.progress(run) if row["round"] == "2"]
  for name in ("truth", "judge"):  # mean, interval, n, and who graded
    mean, ci95 = float(row[name]), float(row[f"{name}_ci95"])
    assert re.search(rf"\| the evaluation prompts \| .*{name}.* \| {mean:.2f} ± {ci95:.2f} \| 40 \|", card)
  [quality] = judges.qualities(layout.stages(run))
  assert judges.in_words(quality) in card
  rows = layout.load_manifest(run / "round_02" / "trainset")["rows"]
  assert f"- training examples of round 2: {rows:,}" in card and "round 3:" not in card
  made = layout.load_manifest(stage).get("made_with", {})
  assert all(f"{name} {value}" in card for name, value in made.items() if name != "devices" and value)
  assert '"feedback_rounds": 2' in card


@pytest.mark.parametrize("name", ["round_02/trainset", "pool/prompts"])
def test_records_are_written_as_a_data_set(run, tmp_path, name):
  assert export.main([f"--stage={run / name}", "--hub=me/d2", f"--output={tmp_path / 'd'}", "--dry_run=true"]) == 0
  card = (tmp_path / "d" / "README.md").read_text()
  manifest = layout.load_manifest(run / name)
  assert front(card)["configs"] == [{"config_name": "default", "data_files": "data/*.parquet"}]
  assert f"{manifest['rows']:,} rows of the stage `{name}`" in card
  read = sum(pq.read_table(path).num_rows for path in (tmp_path / "d" / "data").glob("*.parquet"))
  assert read == manifest["rows"]


def test_a_push_calls_the_hub_and_its_failure_is_one_line(run, tmp_path, capsys, monkeypatch):
  calls = []

  class Api:
    def create_repo(self, name, **how):
      calls.append((name, how))
      return f"https://huggingface.co/{name}"

    def upload_folder(self, **how):
      calls.append(how)
      if len(calls) > 2:
        raise ConnectionError("no network\nhere")

  monkeypatch.setattr("huggingface_hub.HfApi", Api)
  words = [f"--stage={run / 'round_02' / 'trainset'}", "--hub=me/d2"]
  assert export.main([*words, f"--output={tmp_path / 'one'}"]) == 0
  assert capsys.readouterr().out.endswith("https://huggingface.co/me/d2\n")
  assert calls[0] == ("me/d2", {"repo_type": "dataset", "private": True, "exist_ok": True})
  assert calls[1]["folder_path"] == str(tmp_path / "one") and calls[1]["repo_type"] == "dataset"
  assert export.main([*words, f"--output={tmp_path / 'two'}"]) == 1
  said = capsys.readouterr().err
  assert "me/d2 cannot be pushed (ConnectionError: no network)" in said and str(tmp_path / "two") in said
  assert len(said.splitlines()) == 1 and (tmp_path / "two" / "README.md").exists()


def test_gguf_converters_and_vllm_find_what_they_read(tmp_path):
  """The fields, files and tensors that llama.cpp's convert_hf_to_gguf.py and vLLM's Llama read of a directory."""
  model, tokenizer = weights.load(CHECKPOINT), load_tokenizer(CHECKPOINT)
  stops = chat.stop_ids(tokenizer, formats.CHAT)
  text = weights.TextSide(
    tokenizer=tokenizer, chat_template=chat.jinja(formats.CHAT), bos_id=tokenizer.bos_id, stop_ids=stops
  )
  weights.save(tmp_path, model, text)
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
  numbers = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
  assert all(isinstance(config[name], int) for name in (*numbers, "max_position_embeddings", "vocab_size"))
  assert config["rms_norm_eps"] > 0 and ("rope_theta" in config or "rope_parameters" in config)
  parts = ["input_layernorm", "post_attention_layernorm"]
  parts += [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
  layers = range(config["num_hidden_layers"])
  wanted = {f"model.layers.{i}.{part}.weight" for i in layers for part in parts}
  wanted |= {"model.embed_tokens.weight", "model.norm.weight"}
  wanted |= set() if config.get("tie_word_embeddings") else {"lm_head.weight"}
  found = {}
  for path in tmp_path.glob("*.safetensors"):
    with safe_open(path, "numpy") as file:
      found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
  assert set(found) == wanted
  assert found["model.embed_tokens.weight"] == [config["vocab_size"], config["hidden_size"]]
  assert config["vocab_size"] >= len(tokenizer.hf) and (tmp_path / "tokenizer.json").exists()
  about = json.loads((tmp_path / "tokenizer_config.json").read_text())
  generation = json.loads((tmp_path / "generation_config.json").read_text())
  assert "chat_template" in about or (tmp_path / "chat_template.jinja").exists()
  ends = generation["eos_token_id"]
  assert set(stops) <= set(ends if isinstance(ends, list) else [ends])
