"""Implicit rewards against the log-probs of transformers, one response at a time."""

import jax
import numpy as np
import pytest
import text_tokenizers

torch = pytest.importorskip("torch")
from reward_models import LONGER, SIZES, judge, plain_pairs, user, written
from transformers import LlamaConfig, LlamaForCausalLM

from alma_jax.errors import UserError
from alma_jax.judges.contract import Answered
from alma_jax.llama import sharding
from alma_jax.runtime.host import EngineOptions, Host, ModelOptions
from alma_jax.text import chat


@pytest.fixture(scope="module")
def host():
  return Host(ModelOptions("mini", "mini"), EngineOptions(rows=8), sharding.make_mesh(devices=jax.local_devices()[:1]))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  """[(directory, torch model)] of a policy and a reference."""
  models = [LlamaForCausalLM(LlamaConfig(**SIZES)).eval() for _ in range(2)]
  made = [(tmp_path_factory.mktemp("checkpoint"), model) for model in models]
  for number, (directory, model) in enumerate(made):
    written(directory, model, **{f"seed_{i}": i for i in range(number)})
  return made


@torch.inference_mode()
def logprobs(model, prompt, response):
  """float64 [response] by transformers."""
  logits = model(torch.tensor([prompt + response])).logits[0].double()
  at = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
  return logits.log_softmax(-1)[at, torch.tensor(response)].numpy()


def test_differences_of_the_log_probs_of_transformers(host, checkpoints):
  (ours, policy), (theirs, reference) = checkpoints
  pairs = [*plain_pairs(), Answered(user("Hello there"), "Good answer.", False), Answered(LONGER, "", False)]
  found = judge(host, f"implicit:{ours},{theirs},chat=llama3").scores(pairs)
  means = judge(host, f"implicit:{ours},{theirs},chat=llama3,per=token").scores(pairs)
  tok = text_tokenizers.byte_bpe(True)
  for pair, verdict, mean in zip(pairs, found, means, strict=True):
    prompt = chat.encode_prompt(tok, chat.LLAMA3, pair[0])
    response = chat.encode_example(tok, chat.LLAMA3, *pair)[0][len(prompt) :]
    response = response if pair.finished else response[:-1]  # a cut response has no stop token
    a, b = (logprobs(model, prompt, response) if response else np.zeros(0) for model in (policy, reference))
    assert verdict.score == pytest.approx(a.sum() - b.sum(), abs=1e-4)
    assert verdict.details["logprob"] == pytest.approx(a.sum(), abs=1e-4)
    assert verdict.details["tokens"] == len(response)
    assert mean.score == pytest.approx((a - b).mean() if response else 0.0, abs=1e-4)
  assert np.std([v.score for v in found]) > 1
  same = judge(host, f"implicit:{ours},{ours},chat=llama3").scores(pairs)
  assert [v.score for v in same] == [0.0] * len(pairs)


def test_the_template_gives_the_tokens_that_are_drawn(host, checkpoints):
  of = judge(host, f"implicit:{checkpoints[0][0]},{checkpoints[1][0]}").written
  tok = text_tokenizers.byte_bpe(True)
  assert of.drawn("Good.", True) == [*tok.encode("Good."), tok.token_id("<|eot_id|>")]
  assert of.drawn("Good.", False) == tok.encode("Good.")


def test_two_tokenizers_and_other_mistakes_are_refused(host, checkpoints):
  ours = checkpoints[0][0]
  for said, message in (
    (f"{ours},mini", "tokens of .* have other ids in .*: the two checkpoints must have one tokenizer"),
    (f"{ours}", "must be 'implicit:DIR,REF', and may go on with per=..., chat=..."),
    (f"{ours},{ours},per=word", "per may be sequence or token"),
    (f"{ours},{ours}/none", "config.json: no such file"),
  ):
    with pytest.raises(UserError, match=message):
      judge(host, f"implicit:{said}")
