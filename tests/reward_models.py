"""Tiny random reward models in directories as they are published, what is asked of them, and the ids of that."""

import json

import text_tokenizers
import torch

from alma_jax import names
from alma_jax.judges import contract
from alma_jax.judges.contract import Answered

# A template in the manner of Llama-3.1's: a system header with a date, which nobody asked for.
TEMPLATE = (
  "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
  "{{- bos_token }}{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '\n\n' }}"
  "{{- '<|eot_id|>' }}"
  "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
  "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
  "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
SIZES = dict(
  vocab_size=352,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=160,
)


def user(text):
  return ({"role": "user", "content": text},)


LONGER = (*user("Hello"), {"role": "assistant", "content": "Good."}, {"role": "user", "content": " What is it?\n"})
RESPONSES = ("Good answer.", "", "10", "  Hello there, user!\n", "Good answer.", "Hello <|eot_id|>")
PAIRS = [Answered(m, r) for m in (user("Hello there"), LONGER) for r in RESPONSES] + [
  Answered(user("Hello there"), "9")
]


def written(directory, model, template=TEMPLATE, **config):
  """The directory of a torch model with wide random weights, a tokenizer and a chat template."""
  torch.manual_seed(len(config))
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if "norm" not in name and "matrix" not in name and "scale" not in name:
        weight.normal_(std=1.0 if "embed" in name else weight.shape[-1] ** -0.5)
  model.save_pretrained(directory)
  for file in text_tokenizers.byte_bpe_dir(True).iterdir():
    (directory / file.name).write_bytes(file.read_bytes())
  if template:
    (directory / "chat_template.jinja").write_text(template)
  path = directory / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | config))
  return directory


def ids_of(tokenizer, messages, response):
  """What the model's users give it. Texts here hold no special tokens, which apply_chat_template would read."""
  turns = [*messages, {"role": "assistant", "content": response}]
  text = tokenizer.apply_chat_template(turns, tokenize=False, date_string="26 Jul 2024")
  return tokenizer.encode(text, add_special_tokens=False)


def plain_pairs():
  return [pair for pair in PAIRS if "<|" not in pair[1]]


def judge(host, name):
  return contract.by_name(names.EVALUATORS, name, host, None, "eval.judges")
