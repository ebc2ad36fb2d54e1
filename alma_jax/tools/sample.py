"""Samples responses to the prompts of a JSONL file.

  python -m alma_jax.tools.sample --model=runs/mini --input=prompts.jsonl --output=out.jsonl --n=8 --temperature=0.8

A row of the input has `messages`, a list of {"role", "content"} that ends with the user's turn, or `prompt`, a text
that becomes one user's turn (with --raw: that the model sees unchanged, after the BOS token). `id` is optional; without
one a row is known by a hash of its prompt. A line of the output is one prompt, in the order of the input:

  {"id", "messages" or "prompt", "responses": [{"sample_id", "text", "tokens", "logprobs", "finished"}, ...]}

`text` ends before a --stop string and, but for --raw, has no white space around it; `tokens` are as they were drawn.
`logprobs` are the model's own, whatever the temperature, one for each of `tokens`; where a stop token ended the
response there is one more, that token's own, which is not among the tokens. `finished`: a stop token or a --stop string
ended it, not the length. A sample depends on seed, id and sample_id alone: it is the same in another file, at another
place, with other prompts around it.

FILE appears when it is whole; until then its parts are in FILE.parts, and the same command goes on where a killed one
stopped. On the same devices and with the same --slots the file then has the bytes of one that was never killed; other
slots change the order of sums and thereby the last digits. Delete both to have the file made again.
"""

import array
import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from alma_jax.engine.choose import Decoding
from alma_jax.engine.sample import Request
from alma_jax.engine.slots import MOST_SLOTS
from alma_jax.keys import key_of
from alma_jax.options import fingerprint, option, spread
from alma_jax.runtime import sampling
from alma_jax.runtime.display import Bar
from alma_jax.runtime.host import Host
from alma_jax.runtime.sampling import Draft
from alma_jax.store import layout
from alma_jax.store.data import DataError
from alma_jax.tools import command, jsonl

PART = 1024  # samples in a part
FILLINGS = 16  # requests per slot that are computed together: slots stand idle while their last ones end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Shared):
  n: int = option(8, least=1, doc="samples per prompt")
  decoding: Decoding = spread(Decoding)
  stop: tuple[str, ...] = option((), doc="end a response where this text begins; may be given several times")
  raw: bool = option(False, doc="no chat format: the prompt's text after the BOS token")


FLAGS = command.Flags(
  "sample", __doc__, Options, ("rows", "stop_ids"), temperature=0.8, top_p=0.95, max_new_tokens=1024
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  options, chosen = FLAGS.values(arguments), FLAGS.given(arguments)
  return command.status(lambda: run(options, fits="max_new_tokens" not in chosen))


def run(options: Options, fits: bool = False) -> None:
  """`fits`: no length was asked for, and that of the options gives way to half of the model's positions."""
  output = pathlib.Path(options.output)
  jsonl.check_output(output)
  opened = command.open_model(options, layout.newest_policy, raw=options.raw)
  host = opened.host
  if fits and options.decoding.max_new_tokens > (half := max(1, host.config.max_positions // 2)):
    options = dataclasses.replace(options, decoding=dataclasses.replace(options.decoding, max_new_tokens=half))
    host.display.say(f"--max_new_tokens={half}: half of the model's {host.config.max_positions:,} positions")
  prompts, longest = _survey(options, host)
  per_part = max(1, PART // options.n)
  sizes = [options.n * min(per_part, prompts - begin) for begin in range(0, prompts, per_part)]
  slots = options.engine.slots or (MOST_SLOTS if host.free_bytes else 64)  # where nothing tells what fits, it is 64
  together = max(1, FILLINGS * slots * host.local_ways // sizes[0])
  with jsonl.stage_of(output, options, decides(options, opened)) as stage:
    there, parts = stage.done, jsonl.Parts(stage, sizes, together)
    host.display.say(f"{host.directory}: chat format {command.chat_name(host)}; {prompts:,} prompts")
    with host.display.bar("sampling", parts.total, "samples", done=parts.done) as bar:
      for numbers, rows in parts.missing(jsonl.chunks(jsonl.prompts(options.input, host), per_part)):
        found = _sampled(options, opened, [row for part in rows for row in part], longest, bar)
        for number, part in zip(numbers, rows, strict=True):
          written = [(row, next(found)) for row in part]
          drafts = [draft for _, of in written for draft in of]
          counts = {"finished": sum(d.finished for d in drafts), "tokens": sum(len(d.logprobs) for d in drafts)}
          parts.write(number, [_line(row, of) for row, of in written], counts)
    manifest = jsonl.finish(stage, output)
  counts, seconds, samples = manifest["counts"], manifest["seconds"], parts.total
  print(f"{output}: {prompts:,} prompts x {options.n:,} samples" + (", all there before" if there else ""))
  finished, tokens = counts["finished"], counts["tokens"]
  told = f"{samples:,} samples: {finished / samples:.1%} finished, {tokens / samples:.1f} tokens each"
  print(f"{told}; {seconds:.1f} s, {tokens / max(seconds, 1e-3):,.0f} tokens/s")


def decides(options: Options, opened: command.Opened) -> dict[str, Any]:
  """The fields of the output's stage."""
  chosen = fingerprint(options, without=(*command.PLACES, "raw"))
  return command.decides("sample", options, opened) | chosen | {"stop_ids": command.stop_ids(opened.host)}


def _survey(options: Options, host: Host) -> tuple[int, int]:
  """The number of rows and the tokens of the longest prompt; all are checked before the first token is sampled."""
  positions = host.config.max_positions
  most = options.decoding.max_new_tokens
  room = positions - most
  if room < 1:
    raise DataError(f"--max_new_tokens={most}: ask for less, the model has {positions} positions in all")
  hashes, lines, longest = array.array("Q"), array.array("Q"), 0
  for row in jsonl.prompts(options.input, host):
    if len(row.ids) > room:
      raise DataError(
        f"{options.input}, line {row.line}: a prompt of {len(row.ids)} tokens; the model's {positions} positions less"
        f" --max_new_tokens={most} leave {room}: shorten it or lower --max_new_tokens"
      )
    longest = max(longest, len(row.ids))
    hashes.append(int.from_bytes(hashlib.blake2b(str(row.id).encode(), digest_size=8).digest()))
    lines.append(row.line)
  if not lines:
    raise DataError(f"{options.input}: the file holds no rows")
  order = np.argsort(np.asarray(hashes), kind="stable")
  same = np.flatnonzero(np.diff(np.asarray(hashes)[order]) == 0)
  if len(same):
    first, second = sorted(lines[i] for i in order[same[0] : same[0] + 2])
    name = next(row.id for row in jsonl.prompts(options.input, host) if row.line == second)
    raise DataError(
      f"{options.input}, lines {first} and {second}: both have the id {name!r} and would get the same samples; remove"
      " one, or give each an `id` of its own"
    )
  return len(lines), longest


def _sampled(
  options: Options, opened: command.Opened, rows: Sequence[jsonl.Asked], longest: int, bar: Bar
) -> Iterator[list[Draft]]:
  """The responses to each of the rows."""
  requests = [
    Request(row.ids, key_of(options.seed, "sample", row.id, sample), f"{options.input}, id {row.id}, sample {sample}")
    for row in rows
    for sample in range(options.n)
  ]
  drawing = sampling.Options(decoding=options.decoding, max_prompt_tokens=longest)
  stops = sampling.Stops(command.stop_ids(opened.host), options.stop)
  return jsonl.chunks(sampling.drafts(opened.host, opened.checkpoint, requests, drawing, stops, bar), options.n)


def _line(row: jsonl.Asked, found: Sequence[Draft]) -> dict[str, Any]:
  responses = [
    {"sample_id": i, "text": d.text, "tokens": d.tokens, "logprobs": d.logprobs, "finished": d.finished}
    for i, d in enumerate(found)
  ]
  return {"id": row.id, **row.said, "responses": responses}


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
