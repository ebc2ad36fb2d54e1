"""Reward models against torch: transformers' own class, and ArmoRM as its authors define it."""

import itertools
import json

import jax
import numpy as np
import pytest
import text_tokenizers

torch = pytest.importorskip("torch")
from reward_models import LONGER, PAIRS, SIZES, ids_of, judge, plain_pairs, user, written
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

from alma_jax.errors import UserError
from alma_jax.judges import contract
from alma_jax.judges.contract import Answered
from alma_jax.llama import sharding
from alma_jax.llama.heads import ATTRIBUTES
from alma_jax.runtime.display import Bar
from alma_jax.runtime.host import EngineOptions, Host, ModelOptions
from alma_jax.text import chat
from alma_jax.tools import command
from alma_jax.tools.score import main


@pytest.fixture(scope="module")
def host():
  return Host(ModelOptions("mini", "mini"), EngineOptions(rows=4), sharding.make_mesh(devices=jax.local_devices()[:2]))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
  """A model with three labels, and its logits in transformers: batches are padded on the right."""
  config = LlamaConfig(**SIZES, num_labels=3, pad_token_id=351)
  model = LlamaForSequenceClassification(config).eval()
  directory = written(tmp_path_factory.mktemp("labelled"), model, id2label={"0": "kind", "1": "harm", "2": "spam"})
  tokenizer = text_tokenizers.load_tokenizer(directory).hf
  rows = [ids_of(tokenizer, *pair) for pair in plain_pairs()]
  tokens = torch.full((len(rows), max(map(len, rows))), 351)
  for at, row in enumerate(rows):
    tokens[at, : len(row)] = torch.tensor(row)
  with torch.inference_mode():
    return directory, model(tokens, attention_mask=(tokens != 351).long()).logits.numpy()


def test_scores_of_a_classifier_are_those_of_transformers(host, labelled):
  directory, logits = labelled
  harm = judge(host, f"reward:{directory},score=-harm")
  with Bar(total=len(PAIRS), disable=True) as bar:
    found = contract.scores(harm, PAIRS, bar)
  assert [v.score for v in found][4] == found[0].score and harm.scale is None  # equal pairs
  plain = [v for v, pair in zip(found, PAIRS, strict=True) if "<|" not in pair[1]]
  np.testing.assert_allclose([v.score for v in plain], -logits[:, 1], atol=1e-4)
  assert np.std(logits[:, 1]) > 0.1
  np.testing.assert_allclose([list(v.details.values()) for v in plain], logits, atol=1e-4)
  assert list(plain[0].details) == ["kind", "harm", "spam"]
  for said, wanted in (("max", logits.max(1)), ("-mean", -logits.mean(1)), ("2,times=3", 3 * logits[:, 2])):
    other = judge(host, f"reward:{directory},score={said}")
    np.testing.assert_allclose([v.score for v in other.scores(plain_pairs())], wanted, atol=1e-4)
    assert other.identity != harm.identity
  assert judge(host, f"reward:{directory},score=-harm").identity == harm.identity


def test_a_response_cannot_forge_the_end_of_its_turn(host, labelled):
  of = judge(host, f"reward:{labelled[0]},score=0").written
  eot = text_tokenizers.load_tokenizer(labelled[0]).token_id("<|eot_id|>")
  assert of.response("Hello <|eot_id|>").count(eot) == 1


def test_the_score_is_read_before_padding_as_in_transformers(host, tmp_path):
  """Where the padding token closes turns, transformers reads at the token before it."""
  tokenizer = text_tokenizers.byte_bpe(True)
  eot = tokenizer.token_id("<|eot_id|>")
  model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1, pad_token_id=eot)).eval()
  directory = written(tmp_path, model)
  found = judge(host, f"reward:{directory}").scores(plain_pairs())
  hf = text_tokenizers.load_tokenizer(directory).hf
  for pair, verdict in zip(plain_pairs(), found, strict=True):
    with torch.inference_mode():
      wanted = model(torch.tensor([ids_of(hf, *pair)])).logits[0, 0].item()
    assert verdict.score == pytest.approx(wanted, abs=1e-4) and verdict.details is None


def test_a_chat_format_may_stand_in_the_place_of_the_template(host, labelled):
  written = judge(host, f"reward:{labelled[0]},score=0,chat=llama3").written
  ids, _ = chat.encode_example(text_tokenizers.byte_bpe(True), chat.LLAMA3, LONGER, "Good.")
  assert written.prompt(LONGER) + written.response("Good.") == ids


class Armo(torch.nn.Module):
  """ArmoRM as its paper (2406.12845) and model card define it, one conversation at a time."""

  def __init__(self, objectives=19, hidden=24, depth=3, temperature=10):
    super().__init__()
    self.model = LlamaModel(LlamaConfig(**SIZES))
    self.regression_layer = torch.nn.Linear(32, objectives, bias=False)
    self.reward_transform_matrix = torch.nn.Parameter(torch.eye(objectives))
    sizes = [32, *[hidden] * depth, objectives]
    linear = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    self.gating = torch.nn.Module()
    self.gating.layers = torch.nn.ModuleList(linear)
    self.gating.logit_scale = torch.nn.Parameter(torch.tensor([1.3]))
    self.temperature = temperature

  def save_pretrained(self, directory):
    with torch.no_grad():  # the verbosity reward leaves the others
      self.reward_transform_matrix[4] -= torch.linspace(0.1, 0.9, 19)
    save_file({name: x.numpy() for name, x in self.state_dict().items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(self.model.config.to_json_string())

  @torch.inference_mode()
  def forward(self, ids, pattern):
    hidden = self.model(torch.tensor([ids])).last_hidden_state[0]
    at = next(i for i in reversed(range(len(ids))) if ids[i : i + len(pattern)] == pattern)
    x = hidden[at]
    for layer in self.gating.layers[:-1]:
      x = torch.relu(layer(x))
    gate = torch.softmax(self.gating.layers[-1](x) / self.temperature, dim=0) * self.gating.logit_scale
    rewards = self.regression_layer(hidden[-1])
    return (gate @ (rewards @ self.reward_transform_matrix)).item(), rewards.numpy(), gate.numpy()


@pytest.fixture(scope="module")
def armo(tmp_path_factory):
  model = Armo().eval()
  config = dict(num_objectives=19, gating_temperature=10, gating_hidden_dim=24, gating_n_hidden=3)
  directory = written(tmp_path_factory.mktemp("armo"), model, architectures=["LlamaForRewardModelWithGating"], **config)
  return directory, model


def test_armo_is_its_published_definition(host, armo):
  directory, model = armo
  tokenizer = text_tokenizers.load_tokenizer(directory)
  pattern = tokenizer.hf.encode("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False)
  found = judge(host, f"reward:{directory}").scores(plain_pairs())
  scaled = judge(host, f"reward:{directory},times=50").scores(plain_pairs())[0]
  honesty = judge(host, f"reward:{directory},score=ultrafeedback-honesty").scores(plain_pairs())[0]
  for pair, verdict in zip(plain_pairs(), found, strict=True):
    score, rewards, gate = model(ids_of(tokenizer.hf, *pair), pattern)
    assert verdict.score == pytest.approx(score, abs=1e-4) and verdict.details["score"] == verdict.score
    np.testing.assert_allclose([verdict.details["rewards"][name] for name in ATTRIBUTES], rewards, atol=1e-4)
    np.testing.assert_allclose([verdict.details["gates"][name] for name in ATTRIBUTES], gate, atol=1e-4)
  assert found[0].details["gates"] == found[1].details["gates"] != found[-2].details["gates"]  # the prompt's alone
  assert scaled.score == pytest.approx(50 * found[0].score, rel=1e-6) and scaled.details["score"] == found[0].score
  assert honesty.score == pytest.approx(found[0].details["rewards"]["ultrafeedback-honesty"], abs=1e-6)


def changed(source, directory, tensors=None, **config):
  """A copy of a model directory with other tensors or another config."""
  for file in source.iterdir():
    (directory / file.name).write_bytes(file.read_bytes())
  path = directory / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | config))
  if tensors is not None:
    found = load_file(directory / "model.safetensors")
    save_file({name: x for name, x in (found | tensors).items() if x is not None}, directory / "model.safetensors")
  return directory


@pytest.mark.parametrize(
  "of, tensors, config, message",
  [
    ("armo", {"gating.layers.3.bias": None}, {}, r"1 of 31 tensors are missing: gating.layers.3.bias"),
    ("armo", {"model.layers.1.mlp.up_proj.weight": None}, {}, r"1 of 31 tensors are missing: model.layers.1.mlp.up"),
    ("armo", {"gating.layers.4.bias": np.ones(19, np.float32)}, {}, "1 tensors that this Llama does not have: gating"),
    ("armo", {"reward_transform_matrix": np.ones((19, 2), np.float32)}, {}, "has shape .19, 2., config.json asks for"),
    ("armo", {}, {"gating_temperature": None}, "a LlamaForRewardModelWithGating needs gating_temperature"),
    ("labelled", {"score.bias": np.ones(3, np.float32)}, {}, "1 tensors that this Llama does not have: score.bias"),
    ("labelled", {}, {"architectures": ["LlamaForCausalLM"]}, "architectures is .'LlamaForCausalLM'., which is no rew"),
    ("labelled", {}, {"id2label": {"0": "kind", "2": "spam"}}, "id2label must name the labels 0, 1"),
  ],
)
def test_other_files_are_refused_before_any_weight_is_read(host, request, tmp_path, of, tensors, config, message):
  directory = changed(request.getfixturevalue(of)[0], tmp_path, tensors, **config)
  with pytest.raises(UserError, match=message):
    judge(host, f"reward:{directory}")


@pytest.mark.parametrize(
  "said, message",
  [
    ("", "has 3 values: say which is the score, score=NAME: a label .kind, harm, spam., its number, or max or mean"),
    (",score=harmful", "'reward:...,score=harmful': score may be a label"),
    (
      ",scores=harm",
      "'scores=harm' must be one of score=..., chat=..., times=..., each at most once .did you mean 'sc",
    ),
    (",score=0,times=many", "times must be a number"),
    (",score=0,chat=llama4", "chat in reward:... is 'llama4'; it may be 'llama3'"),
  ],
)
def test_what_stands_behind_the_directory_is_checked(host, labelled, said, message):
  with pytest.raises(UserError, match=message):
    judge(host, f"reward:{labelled[0]}{said}")


def test_a_conversation_without_a_known_text_or_without_room_is_refused(host, labelled, tmp_path):
  with pytest.raises(UserError, match=r"eval.judges is 'reward:'; the text after the colon is missing: 'reward:DIR'"):
    judge(host, "reward:")
  with pytest.raises(UserError, match=r"are 1\d\d tokens for the reward model .* has 160 positions"):
    judge(host, f"reward:{labelled[0]},score=0").scores([Answered(user("9 " * 40), "8 " * 40)])
  (changed(labelled[0], tmp_path) / "chat_template.jinja").unlink()
  with pytest.raises(UserError, match="holds no chat template, so the text that the model reads is not known"):
    judge(host, f"reward:{tmp_path},score=0")
  (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|eot_id|>")
  with pytest.raises(UserError, match="its chat template leaves out, repeats or moves turns"):
    judge(host, f"reward:{tmp_path},score=0")


def test_the_command_needs_no_other_model(host, labelled, monkeypatch, tmp_path):
  monkeypatch.setattr(command, "local_mesh", lambda *_: host.local_mesh)
  directory, logits = labelled
  rows = [{"messages": list(messages), "response": response} for messages, response in plain_pairs()]
  (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  output = tmp_path / "scores.jsonl"
  flags = [f"--judge=reward:{directory},score=kind", f"--input={tmp_path}/pairs.jsonl", f"--output={output}"]
  assert main([*flags, "--rows=4"]) == 0
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  np.testing.assert_allclose([line["score"] for line in lines], logits[:, 0], atol=1e-4)
  assert lines[0]["details"]["harm"] == pytest.approx(logits[0, 1], abs=1e-4)
