"""Samples responses to the prompts of a JSONL file.

  python -m alma_jax.tools.sample --model=runs/mini --input=prompts.jsonl --output=out.jsonl --n=8 --temperature=0.8

A row of the input has `messages`, a list of {"role", "content"} that ends with the user's turn, or `prompt`, a text
that becomes one user's turn (with --raw: that the model sees as it is, after the BOS token). `id` is optional; without
one a row is known by a hash of its prompt. A line of the output is one prompt, in the order of the input:

  {"id", "messages" or "prompt", "responses": [{"sample_id", "text", "tokens", "logprobs", "finished"}, ...]}

`text` ends before a --stop string and, but for --raw, has no white space around it; `tokens` are as they were drawn.
`logprobs` are the model's own, whatever the temperature, one for each of `tokens`; where a stop token ended the
response there is one more, that token's own, which is not among the tokens. `finished`: a stop token or a --stop string
ended it, not the length. A sample depends on seed, id and sample_id alone: it is the same in another file, at another
place, with other prompts around it.

The same command goes on where a killed one stopped. On the same devices and with the same --slots the file then has the
bytes of one that was never killed; other slots change the order of sums and thereby the last digits.
"""

import array
import dataclasses
import hashlib
import sys
import time

import numpy as np
from ml_collections import ConfigDict

from alma_jax.corpus.normalise import prompt_id
from alma_jax.engine.slots import MOST_SLOTS
from alma_jax.keys import key_of
from alma_jax.llama.config import read_config
from alma_jax.runtime.sampling import drafts
from alma_jax.store import data
from alma_jax.store.data import DataError
from alma_jax.text import chat
from alma_jax.text.tokenizer import TextError
from alma_jax.tools import command, jsonl

FILLINGS = 16  # requests per slot in a chunk: slots stand idle while its last ones end, and a kill costs a chunk


def main(arguments):
  """The exit status."""
  flags = _flags().values(arguments)
  if flags.min_new_tokens > flags.max_new_tokens:
    _flags().error(f"--min_new_tokens={flags.min_new_tokens} is more than --max_new_tokens={flags.max_new_tokens}")
  return command.status(lambda: run(flags))


def _flags():
  flags = command.Flags("alma_jax.tools.sample", __doc__)
  add, number = flags.add_argument, command.number
  at_least_0 = number(float, "a number of at least 0", lambda x: 0 <= x < float("inf"))
  share = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
  factor = number(float, "a number above 0", lambda x: 0 < x < float("inf"))
  model = command.MODEL.format(stage="its newest policy")
  add("--model", required=True, metavar="DIR", help=model)
  add("--input", required=True, metavar="FILE", help="JSONL")
  add("--output", required=True, metavar="FILE", help="JSONL; FILE.meta.json beside it says how it was made")
  add("--n", type=command.COUNT, default=8, help="samples per prompt (8)")
  add("--temperature", type=at_least_0, default=0.8, help="0: the likeliest token (0.8)")
  add("--top_p", type=share, default=0.95, help="sample from the likeliest tokens of this mass (0.95)")
  add("--top_k", type=command.NATURAL, default=0, help="sample from the k likeliest tokens; 0: from all (0)")
  add("--repetition_penalty", type=factor, default=1.0, help="above 1: tokens that were there are less likely (1.0)")
  add(
    "--penalize_prompt", type=command.word("true", "false"), nargs="?", const="true", default="true",
    help="whether the penalty also counts the prompt's tokens (true)",
  )  # fmt: skip
  add("--max_new_tokens", type=command.COUNT, default=1024, help="length limit of a response (1024)")
  add("--min_new_tokens", type=command.NATURAL, default=0, help="no stop token before that many (0)")
  add("--stop", action="append", default=[], metavar="STRING", help="end a response where STRING begins; repeatable")
  add("--seed", type=command.NATURAL, default=0, help="another seed, other samples (0)")
  add("--raw", action="store_true", help="no chat format: the prompt's text after the BOS token")
  add("--chat", type=command.CHAT, help="chat format, where the model's files do not tell")
  add(
    "--slots", type=command.NATURAL, default=0, help="responses written together, per copy of the model; 0: what fits"
  )
  add("--tensor", type=command.COUNT, default=1, help="devices that share one copy of the model (1)")
  return flags


def run(flags):
  model, host, checkpoint = command.opened(flags, command.newest_policy, raw=flags.raw)
  prompts, longest = _survey(flags, host)
  fields, names = decides(flags, host, checkpoint)
  options = ConfigDict(_options(flags) | {"max_prompt_tokens": longest})
  slots = flags.slots or (MOST_SLOTS if host.free_bytes else 64)  # where nothing tells what fits, it is 64
  per_chunk = max(1, FILLINGS * slots * host.local_ways // flags.n)
  began, samples, tokens, finished = time.monotonic(), 0, 0, 0
  with jsonl.Output(flags.output, fields, names, prompts) as out:
    host.say(f"{model.directory}: chat format {host.chat.name if host.chat else 'none'}; {prompts:,} prompts")
    with host.bar("sampling", prompts * flags.n, "samples", done=out.done * flags.n) as bar:
      for rows in jsonl.chunks(asked(flags, host), per_chunk):
        if out.has(len(rows)):
          continue
        written = _sampled(flags, host, checkpoint, rows, options, bar)
        out.write(_line(row, found) for row, found in written)
        made = [draft for _, found in written for draft in found]
        samples, finished = samples + len(made), finished + sum(d.finished for d in made)
        tokens += sum(len(d.logprobs) for d in made)
  seconds = time.monotonic() - began
  print(f"{flags.output}: {prompts:,} prompts x {flags.n:,} samples" + ("" if samples else ", all there before"))
  if samples:
    now = f"{samples:,} samples now: {finished / samples:.1%} finished, {tokens / samples:.1f} tokens each"
    print(f"{now}; {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")


def stop_ids(host):
  """Ids at which a response ends: those of the chat format, or the tokenizer's EOS, and those that the model's own
  generation_config.json names (an exported checkpoint may stop at more than its chat format tells)."""
  tok = host.tokenizer
  ids = list(chat.stop_ids(tok, host.chat)) if host.chat else [i for i in (tok.eos_id,) if i is not None]
  named = command.json_of(host.directory / "generation_config.json").get("eos_token_id")
  ids += named if isinstance(named, list) else [] if named is None else [named]
  return tuple(dict.fromkeys(ids))


@dataclasses.dataclass(frozen=True)
class Asked:
  line: int
  id: str | int
  said: dict  # the row's `messages` or `prompt`, for the output
  ids: tuple


def asked(flags, host):
  """The rows of the input as Asked; a DataError names line and field of what cannot be one."""
  for line, item in jsonl.read(flags.input):
    where = f"{flags.input}, line {line}"
    row = data.row_of(item, (), line, where)
    turns = item.get("messages")
    if isinstance(turns, list) and turns[-1]["role"] == "assistant":
      raise DataError(f"{where}, field messages: the last turn must be the user's, found role 'assistant'; remove it")
    said = {"prompt": row.messages[0]["content"]} if turns is None else {"messages": list(row.messages)}
    given = jsonl.id_of(item, where)
    yield Asked(line, prompt_id(row.messages) if given is None else given, said, _ids(flags, host, row, said, where))


def _ids(flags, host, row, said, where):
  tok = host.tokenizer
  if flags.raw and "messages" in said:
    raise DataError(f"{where}: --raw takes a text, the field `prompt`; `messages` need a chat format")
  try:
    if flags.raw:
      ids = ([] if tok.bos_id is None else [tok.bos_id]) + tok.encode(said["prompt"])
    else:
      ids = chat.encode_prompt(tok, host.chat, row.messages)
  except TextError as error:
    raise DataError(f"{where}: {error}") from None
  text = row.messages[-1]["content"]
  if not ids or not (flags.raw or text.strip()):
    raise DataError(f"{where}: the prompt is empty")
  return tuple(ids)


def _survey(flags, host):
  """(rows, tokens of the longest prompt) of the input, all of which is checked before the first token is sampled."""
  positions = read_config(host.directory).max_positions
  room = positions - flags.max_new_tokens
  if room < 1:
    raise DataError(
      f"--max_new_tokens={flags.max_new_tokens}: ask for less, the model has {positions} positions in all"
    )
  hashes, lines, longest = array.array("Q"), array.array("Q"), 0
  for row in asked(flags, host):
    if len(row.ids) > room:
      raise DataError(
        f"{flags.input}, line {row.line}: a prompt of {len(row.ids)} tokens; the model's {positions} positions less"
        f" --max_new_tokens={flags.max_new_tokens} leave {room}: shorten it or lower --max_new_tokens"
      )
    longest = max(longest, len(row.ids))
    hashes.append(int.from_bytes(hashlib.blake2b(str(row.id).encode(), digest_size=8).digest()))
    lines.append(row.line)
  if not lines:
    raise DataError(f"{flags.input}: the file holds no rows")
  order = np.argsort(np.asarray(hashes), kind="stable")
  same = np.flatnonzero(np.diff(np.asarray(hashes)[order]) == 0)
  if len(same):
    first, second = sorted(lines[i] for i in order[same[0] : same[0] + 2])
    name = next(row.id for row in asked(flags, host) if row.line == second)
    raise DataError(
      f"{flags.input}, lines {first} and {second}: both have the id {name!r} and would get the same samples; remove"
      " one, or give each an `id` of its own"
    )
  return len(lines), longest


def decides(flags, host, checkpoint):
  """See `command.decides`."""
  fields, names = command.decides("sample", flags, host, checkpoint)
  drawn = {"seed": flags.seed, "n": flags.n, "stop": flags.stop, "stop_ids": stop_ids(host)}
  return fields | drawn | _options(flags), names


def _options(flags):
  return {
    "temperature": flags.temperature,
    "top_p": flags.top_p,
    "top_k": flags.top_k,
    "repetition_penalty": flags.repetition_penalty,
    "penalize_prompt": flags.penalize_prompt == "true",
    "max_new_tokens": flags.max_new_tokens,
    "min_new_tokens": flags.min_new_tokens,
  }


def _sampled(flags, host, checkpoint, rows, options, bar):
  """[(row, its Drafts)] of a chunk."""
  prompts = [row.ids for row in rows for _ in range(flags.n)]
  keys = [key_of(flags.seed, "sample", row.id, sample) for row in rows for sample in range(flags.n)]
  found = drafts(host, checkpoint, prompts, keys, stop_ids(host), options, bar, stop_strings=tuple(flags.stop))
  return [(row, found[at * flags.n : (at + 1) * flags.n]) for at, row in enumerate(rows)]


def _line(row, found):
  responses = [
    {"sample_id": i, "text": d.text, "tokens": d.tokens, "logprobs": d.logprobs, "finished": d.finished}
    for i, d in enumerate(found)
  ]
  return {"id": row.id, **row.said, "responses": responses}


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
