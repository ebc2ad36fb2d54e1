"""How fast is the sampler? Side by side with its peers on one core, with the same weights, in one run.

  pip install -e '.[bench]'
  python -m benchmarks.sampling [--quick] [--tunix_python=/path/to/another/venv/bin/python]

A random Llama of 5.2M parameters in fp32 (256 wide, 4 layers, 8 / 4 heads, vocabulary 4,096) is saved once and read by
all. The script pins itself to one core and one thread; peers take turns, and the best CPU time of each counts, so that
other work on the machine disturbs the ratios little. What is compared:

  token choice     from logits to tokens: jax.random.categorical
  equal lengths    N samples of one prompt, all of the same length: transformers' generate with the better of its two
                   caches; generate again, from a cache that was filled once and repeated by hand; and the sampler of
                   google-tunix (`pip install google-tunix "jax==0.10.2"`, best into a virtual environment of its own,
                   because it brings older releases of other packages: name its interpreter)
  prefix sharing   our own engine on as many prompts of that length as samples, so that there is nothing to share
  heavy tails      ALMA's workload: N samples of each of many prompts whose lengths are lognormal, in the shape of chat
                   answers (mean 394, median 289, cap 2,048 tokens) at a tenth of the size; generate runs batches as
                   wide as our slots until the longest row of each ends. Useful tokens count. Slot efficiency is
                   their share of slots times decode steps; it grows with the requests per slot

What to expect: about seven minutes; ratios that differ by a tenth from run to run, more beside other work. A benchmark
that computes something else measures nothing, so it ends with an AssertionError unless greedy tokens are those of every
peer, the log-probabilities of what was sampled are those of a transformers forward, every request has the length that
it should have, and the chosen tokens pass a chi-square test.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # libraries are loaded by the process that has one core
  from jax import Array

  from alma_jax.engine.sample import Sampled
  from alma_jax.llama.model import Llama

Prompt = tuple[int, ...]
ROOT = pathlib.Path(__file__).parents[1]
ONE_THREAD = {
  "OMP_NUM_THREADS": "1",
  "MKL_NUM_THREADS": "1",
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
  "JAX_PLATFORMS": "cpu",
}
MODEL = dict(
  vocab_size=4096,
  hidden_size=256,
  intermediate_size=768,
  num_hidden_layers=4,
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=32,
  max_position_embeddings=4096,
  rope_theta=1e6,  # tunix rotates with this whatever its config says
  rms_norm_eps=1e-5,
  tie_word_embeddings=False,
)
TEMPERATURE = 0.8
MEAN, MEDIAN, CAP = 394, 289, 2048  # lengths of chat answers in tokens


class Equal(NamedTuple):
  samples: int
  length: int  # of the prompt
  new: int  # tokens


class Heavy(NamedTuple):
  slots: int  # and samples per prompt
  length: int  # of the prompts
  prompts: int
  batches: int  # that generate is timed on
  scale: float  # of the lengths of answers


@dataclasses.dataclass(frozen=True)
class Amounts:
  equal: tuple[Equal, ...]
  heavy: Heavy
  choice: tuple[tuple[int, int], ...]  # (rows, vocabulary)
  draws: int  # for the chi-square test
  repeats: int


FULL = Amounts(
  equal=(Equal(64, 128, 32), Equal(16, 512, 24)),
  heavy=Heavy(64, 128, 40, 3, 0.1),
  choice=((2000, 1000), (64, 4096), (256, 128256)),
  draws=400_000,
  repeats=4,
)
QUICK = Amounts(
  equal=(Equal(8, 32, 8),), heavy=Heavy(8, 32, 4, 1, 0.04), choice=((200, 1000),), draws=40_000, repeats=1
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
  what: str
  ours: str
  peer: str
  ratio: float | None = None
  target: float | None = None


def main() -> None:
  flags = argparse.ArgumentParser(description="How fast is the sampler against its peers, on one core?")
  flags.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
  flags.add_argument("--tunix_python", default=sys.executable, help="an interpreter that has google-tunix")
  flags.add_argument("--serve_tunix", help=argparse.SUPPRESS)
  flags = flags.parse_args()
  on_one_core()
  if flags.serve_tunix:
    return serve_tunix(flags.serve_tunix)
  sizes = QUICK if flags.quick else FULL
  with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
    hf = saved_model(directory)
    model = our_model(directory)
    tunix = stack.enter_context(Tunix(flags.tunix_python, directory))
    rows = []
    for measure in (
      *(functools.partial(token_choice, *shape, sizes.draws, sizes.repeats) for shape in sizes.choice),
      *(functools.partial(equal_lengths, model, hf, tunix, shape, sizes.repeats) for shape in sizes.equal),
      functools.partial(heavy_tails, model, hf, sizes.heavy, 1 + sizes.repeats // 4),
    ):
      rows += measure()
      print(f"  measured: {rows[-1].what}", file=sys.stderr, flush=True)
    if flags.quick:
      rows = [dataclasses.replace(row, target=None) for row in rows]
    print(table(rows))
    print(versions(tunix))


def on_one_core() -> None:
  """Starts the interpreter anew, unless it runs already as it should: threads are counted when libraries load."""
  allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
  if len(allowed) == 1 and ONE_THREAD.items() <= os.environ.items():
    return
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(allowed)})
  os.execve(
    sys.executable, [sys.executable, "-m", "benchmarks.sampling", *sys.argv[1:]], os.environ | ONE_THREAD
  )  # fmt: skip


# Both sides


def saved_model(directory: str | os.PathLike[str], **changes: Any) -> Any:
  """A random transformers Llama, saved for the others. Its logits have a deviation of 2: few tokens are likely."""
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  torch.manual_seed(0)
  sizes: dict[str, Any] = MODEL | changes
  ids: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
  config = transformers.LlamaConfig(**sizes, **ids, initializer_range=sizes["hidden_size"] ** -0.5)
  hf = transformers.LlamaForCausalLM(config).eval()
  with torch.no_grad():
    hf.lm_head.weight.mul_(2)
  hf.save_pretrained(directory)
  return hf


def our_model(directory: str | os.PathLike[str]) -> "Llama":
  import jax

  from alma_jax.llama import model as llama
  from alma_jax.llama import weights

  return jax.jit(llama.unrolled)(weights.load(directory))


def random_prompts(n: int, length: int, vocab: int, seed: int = 0) -> list[Prompt]:
  return [tuple(row) for row in np.random.default_rng(seed).integers(1, vocab, (n, length)).tolist()]


def cpu(f: Callable[[], object]) -> Callable[[], float]:
  """A piece of work as `best` takes it, timed in this process."""

  def seconds() -> float:
    start = time.process_time()
    f()
    return time.process_time() - start

  return seconds


def best(pieces: Mapping[Any, Callable[[], float]], repeats: int) -> dict[Any, float]:
  """The least CPU seconds of each piece. They take turns, once more than `repeats`, because the first turn compiles."""
  found = [{name: piece() for name, piece in pieces.items()} for _ in range(repeats + 1)]
  return {name: min(times[name] for times in found) for name in pieces}


def sampled(
  model: "Llama", prompts: Sequence[Prompt], each: int, new: int, slots: int, temperature: float = TEMPERATURE,
  ends: Callable[..., int | None] | None = None,
) -> "list[Sampled]":  # fmt: skip
  from alma_jax.engine.sample import Decoding, Limits, Request, SamplingHooks, sample

  requests = [Request(prompt, (i, j)) for i, prompt in enumerate(prompts) for j in range(each)]
  decoding, hooks = Decoding(max_new_tokens=new, temperature=temperature), SamplingHooks(ends=ends)
  return sample(model, requests, decoding, Limits(slots), hooks=hooks)


def generated(
  hf: Any, prompts: Sequence[Prompt], new: int, temperature: float = TEMPERATURE, cache: str = "dynamic",
  lengths: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
  """transformers' generate: new tokens [rows, new]; with `lengths` it runs until every row has its own."""
  import torch

  ids = torch.tensor(prompts)
  how: dict[str, Any] = dict(do_sample=False)
  if temperature:
    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
  if cache == "static":
    how["cache_implementation"] = "static"
  if lengths is not None:
    wanted = torch.tensor(lengths)
    # A criterion marks the rows that are done; `generate` goes on until all are.
    how["stopping_criteria"] = [lambda tokens, _: tokens.shape[1] - ids.shape[1] >= wanted]
  out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **how)
  return out[:, ids.shape[1] :].numpy()


def generated_from_repeated_cache(hf: Any, prompt: Prompt, each: int, new: int) -> Any:
  """What a careful user of transformers writes for samples of one prompt: its keys once, then copied to every row."""
  import torch
  import transformers

  cache, ids = transformers.DynamicCache(config=hf.config), torch.tensor([prompt])
  with torch.no_grad():
    hf(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
  cache.batch_repeat_interleave(each)
  rows = ids.repeat(each, 1)
  return hf.generate(
    rows, attention_mask=torch.ones_like(rows), past_key_values=cache, max_new_tokens=new, do_sample=True,
    temperature=TEMPERATURE, top_k=0, top_p=1.0,
  )  # fmt: skip


# What is measured


def equal_lengths(model: "Llama", hf: Any, tunix: "Tunix | None", sizes: Equal, repeats: int) -> list[Row]:
  samples, length, new = sizes
  shape = f"N={samples}, prompt {length}, {new} new"
  prompts = random_prompts(samples, length, model.c.vocab)
  same_greedy_tokens(model, hf, tunix, prompts[:8], new)
  one, kept = prompts[0], []
  pieces = {
    "ours": cpu(lambda: kept.append(sampled(model, [one], samples, new, samples))),
    "dynamic cache": cpu(lambda: generated(hf, [one] * samples, new)),
    "static cache": cpu(lambda: generated(hf, [one] * samples, new, cache="static")),
    "repeated cache": cpu(lambda: generated_from_repeated_cache(hf, one, samples, new)),
    "unshared": cpu(lambda: sampled(model, prompts, 1, new, samples)),
  }
  if tunix:
    pieces["tunix"] = lambda: tunix.generate([one] * samples, new, TEMPERATURE)[1]
  seconds = best(pieces, repeats)
  assert all(len(result.tokens) == new for results in kept for result in results), "not all of the length asked for"
  same_logprobs(hf, one, kept[0])
  rate = {name: samples * new / s for name, s in seconds.items()}
  cache = max("dynamic cache", "static cache", key=rate.__getitem__)

  def row(what: str, peer: str, name: str, target: float | None = None) -> Row:
    theirs = f"{rate[name]:,.0f} {peer}"
    return Row(f"{what}, {shape}", f"{rate['ours']:,.0f} tok/s", theirs, rate["ours"] / rate[name], target)

  return [
    row("sampling", f"generate, {cache}", cache, 3.0),
    row("sampling", "generate from one prompt's cache, repeated by hand", "repeated cache"),
    row("sampling", "tunix", "tunix", 2.0)
    if tunix
    else Row(f"sampling, {shape}", f"{rate['ours']:,.0f} tok/s", "tunix: not installed", target=2.0),
    row("prefix sharing", "ours, every sample with a prompt of its own", "unshared"),
  ]


def same_greedy_tokens(model: "Llama", hf: Any, tunix: "Tunix | None", prompts: Sequence[Prompt], new: int) -> None:
  ours = [result.tokens for result in sampled(model, prompts, 1, new, len(prompts), temperature=0.0)]
  theirs = {cache: generated(hf, prompts, new, 0.0, cache).tolist() for cache in ("dynamic", "static")}
  if tunix:
    theirs["tunix"] = tunix.generate(prompts, new, 0.0)[0]
  for name, rows in theirs.items():
    assert [tuple(row) for row in rows] == ours, f"greedy tokens differ from those of {name}"


def same_logprobs(hf: Any, prompt: Prompt, results: "Sequence[Sampled]") -> None:
  """Every sampled token's log-probability, as a forward over the whole of each row gives it (in `hf`, then float64)."""
  import torch

  longest = max(len(result.tokens) for result in results)
  rows = torch.tensor([[*prompt, *result.tokens, *[0] * (longest - len(result.tokens))] for result in results])
  with torch.no_grad():
    logprobs = torch.log_softmax(hf(rows).logits[:, len(prompt) - 1 : -1].double(), dim=-1)
  expected = logprobs.gather(2, rows[:, len(prompt) :, None])[..., 0].numpy()
  worst = max(np.abs(np.array(r.logprobs) - e[: len(r.logprobs)]).max() for r, e in zip(results, expected, strict=True))
  assert worst < 1e-4, f"log-probabilities of sampled tokens are off by {worst:.2g}"


def heavy_tails(model: "Llama", hf: Any, sizes: Heavy, repeats: int) -> list[Row]:
  """Every request has a length of its own, drawn before. `generate` is told by a stopping criterion, ours by `ends`,
  which the host asks about every slot after every segment: a stop token is noticed then, too, and costs less."""
  slots, length, prompts, batches, scale = sizes
  asked, new = random_prompts(prompts, length, model.c.vocab), round(CAP * scale)
  lengths, kept, steps = drawn_lengths(prompts, slots, scale), [], []

  def ends(request: Any, tokens: Prompt, _: int) -> int | None:
    wanted = int(lengths[request.key])
    return wanted if len(tokens) >= wanted else None

  def ours() -> None:
    with steps_counted() as count:
      kept.append(sampled(model, asked, slots, new, slots, ends=ends))
    steps.append(sum(count))

  def theirs(batch: int) -> None:
    out = generated(hf, [asked[batch]] * slots, new, lengths=lengths[batch])
    assert out.shape[1] == lengths[batch].max(), "a batch of generate did not run until its longest row"

  pieces = {"ours": cpu(ours)} | {batch: cpu(functools.partial(theirs, batch)) for batch in range(batches)}
  seconds = best(pieces, repeats)
  assert all(results == kept[0] for results in kept), "the same requests gave other tokens"
  assert [len(result.tokens) for result in kept[0]] == lengths.ravel().tolist(), "a request has not its length"
  same_logprobs(hf, asked[0], kept[0][:slots])
  # Batches differ in useful tokens by chance, in the cost of a step hardly: a step's cost counts for all batches.
  longest, timed = lengths.max(axis=1), sum(seconds[i] for i in range(batches))
  rate, fixed_rate = lengths.sum() / seconds["ours"], lengths.sum() / (timed * longest.sum() / longest[:batches].sum())
  efficiency, fixed = (lengths.sum() / slots / n for n in (steps[0], longest.sum()))
  return [
    Row(
      f"heavy tails, {prompts} prompts x N={slots}, prompt {length}, mean {lengths.mean():.0f}, cap {new}",
      f"{rate:,.0f} tok/s",
      f"{fixed_rate:,.0f} generate, batches of {slots} ({batches} timed)",
      rate / fixed_rate,
      8.0,
    ),
    Row(
      f"slot efficiency, {slots} slots, {prompts} requests for each",
      f"{efficiency:.3f}",
      f"{fixed:.3f} fixed batches",
      efficiency,
      0.9,
    ),
  ]


def drawn_lengths(prompts: int, each: int, scale: float) -> np.ndarray:
  """Lognormal [prompts, each]."""
  deviation = math.sqrt(2 * math.log(MEAN / MEDIAN))
  drawn = np.random.default_rng(0).lognormal(math.log(MEDIAN * scale), deviation, (prompts, each))
  return np.clip(drawn.round(), 1, round(CAP * scale)).astype(int)


@contextlib.contextmanager
def steps_counted() -> Iterator[list[int]]:
  """A list that grows by the number of decode steps of every compiled segment that the engine runs."""
  from alma_jax.engine import sample

  count, segment = [], sample._segment

  def counting(*arguments: Any, **more: Any) -> Any:
    count.append(more["steps"])
    return segment(*arguments, **more)

  sample._segment = counting
  try:
    yield count
  finally:
    sample._segment = segment


def token_choice(rows: int, vocab: int, draws: int, repeats: int) -> list[Row]:
  """Ours with the uniform numbers that it needs, and with the log-probability that it gives beside the token."""
  import jax

  logits, draw = 2 * jax.random.normal(jax.random.key(0), (rows, vocab)), chooser()
  categorical = jax.jit(lambda logits, key: jax.random.categorical(key, logits / TEMPERATURE))
  ours = logits, np.arange(2 * rows, dtype=np.uint32).reshape(rows, 2), np.zeros(rows, np.int32)
  theirs = logits, jax.random.key(1)

  def turn(f: Callable[..., Any], x: tuple[Any, ...]) -> float:
    """Calls in a row for half a second: the first ones find memory and caches as the other has left them."""
    call, found = cpu(lambda: jax.block_until_ready(f(*x))), []
    while sum(found) < 0.5:
      found.append(call())
    return min(found)

  pieces = {"ours": functools.partial(turn, draw, ours), "theirs": functools.partial(turn, categorical, theirs)}
  seconds = best(pieces, repeats)
  if vocab <= 4096:
    fits(draw, 2 * np.random.default_rng(1).standard_normal(vocab).astype(np.float32), rows, draws)
  shown = {name: f"{s * 1e3:,.2f} ms" for name, s in seconds.items()}
  return [
    Row(
      f"token choice, {rows:,} x {vocab:,}",
      shown["ours"],
      f"{shown['theirs']} jax.random.categorical",
      seconds["theirs"] / seconds["ours"],
      10.0,
    )
  ]


def chooser() -> "Callable[..., tuple[Array, Array]]":
  """Tokens and log-probabilities for logits [B, V], keys [B, 2] and positions [B], as the engine draws them."""
  import jax

  from alma_jax.engine.choose import Decoding, choose

  @jax.jit
  def draw(logits: "Array", keys: "Array", counts: "Array") -> "tuple[Array, Array]":
    def one(key: "Array", count: "Array") -> "Array":
      return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), count))

    return choose(logits, jax.vmap(one)(keys, counts), Decoding(max_new_tokens=1, temperature=TEMPERATURE))

  return draw


def fits(draw: Callable[..., Any], logits: np.ndarray, rows: int, draws: int) -> None:
  """Chi-square test of many draws from one distribution; tokens that are expected less than 5 times count as one."""
  import scipy.stats

  p = np.exp((logits.astype(np.float64) - logits.max()) / TEMPERATURE)
  p /= p.sum()
  keys = np.stack([np.arange(rows, dtype=np.uint32), np.full(rows, 7, np.uint32)], axis=1)
  same, found = np.broadcast_to(logits, (rows, len(logits))), np.zeros(len(logits))
  calls = -(-draws // rows)
  for call in range(calls):
    found += np.bincount(np.asarray(draw(same, keys, np.full(rows, call, np.int32))[0]), minlength=len(logits))
  expected = p * rows * calls
  rare = expected < 5
  observed, wanted = (np.append(x[~rare], [x[rare].sum()] if rare.any() else []) for x in (found, expected))
  chance = scipy.stats.chisquare(observed, wanted).pvalue
  assert chance > 1e-4, f"the chosen tokens do not follow the distribution: chi-square p = {chance:.2g}"


# google-tunix, which may need an environment of its own


class Tunix:
  """Its sampler in a process of its own, that waits for work on its standard input; false if it is not installed."""

  def __init__(self, python: str, directory: str) -> None:
    self.process = subprocess.Popen(
      [python, "-m", "benchmarks.sampling", f"--serve_tunix={directory}"],
      cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert self.process.stdin and self.process.stdout
    self.asked, self.answers = self.process.stdin, self.process.stdout
    self.versions = self.answer()

  def __bool__(self) -> bool:
    return self.versions is not None

  def __enter__(self) -> "Tunix":
    return self

  def __exit__(self, *_: object) -> None:
    self.asked.close()
    self.process.wait()

  def answer(self) -> Any:
    line = self.answers.readline()
    return json.loads(line) if line else None

  def generate(self, prompts: Sequence[Prompt], new: int, temperature: float) -> tuple[list[list[int]], float]:
    """The tokens of every row, and CPU seconds."""
    print(json.dumps(dict(prompts=prompts, new=new, temperature=temperature)), file=self.asked, flush=True)
    found = self.answer()
    assert found, "the process that runs tunix has died; its last words are above"
    return found["tokens"], found["seconds"]


def serve_tunix(directory: str) -> None:
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # whatever a library prints does not come between
  try:
    from tunix.generate import sampler  # pyright: ignore[reportMissingImports]  # of an environment of its own
  except ImportError as missing:
    print(f"tunix: {missing}", file=sys.stderr)
    return
  generate = tunix_generate(directory, sampler)
  names = ("google-tunix", "jax", "flax")
  print(json.dumps({name: importlib.metadata.version(name) for name in names}), file=answers, flush=True)
  for line in sys.stdin:
    work = json.loads(line)
    start = time.process_time()
    tokens = generate(**work)
    print(json.dumps(dict(seconds=time.process_time() - start, tokens=tokens)), file=answers, flush=True)


class Ids:
  """The "tokenizer" that tunix asks for: prompts are written as numbers; padding and end are no tokens of the model."""

  encode = staticmethod(lambda text: [int(word) for word in text.split()])
  decode = staticmethod(lambda ids: "")
  bos_id = staticmethod(lambda: 0)
  eos_id = staticmethod(lambda: 2**30)
  pad_id = staticmethod(lambda: 2**30 + 1)


def tunix_generate(directory: str, sampler: Any) -> Callable[..., list[list[int]]]:
  import jax.numpy as jnp
  from tunix.models.llama3 import model, params  # pyright: ignore[reportMissingImports]

  hf = json.loads((pathlib.Path(directory) / "config.json").read_text())
  c = model.ModelConfig(
    num_layers=hf["num_hidden_layers"],
    vocab_size=hf["vocab_size"],
    embed_dim=hf["hidden_size"],
    hidden_dim=hf["intermediate_size"],
    num_heads=hf["num_attention_heads"],
    head_dim=hf["head_dim"],
    num_kv_heads=hf["num_key_value_heads"],
    rope_theta=MODEL["rope_theta"],
    norm_eps=hf["rms_norm_eps"],
  )
  llama = params.create_model_from_safe_tensors(directory, c, dtype=jnp.float32)

  @functools.cache
  def sampler_for(capacity: int) -> Any:
    return sampler.Sampler(llama, Ids(), sampler.CacheConfig(capacity, c.num_layers, c.num_kv_heads, c.head_dim))

  def generate(prompts: list[list[int]], new: int, temperature: float) -> list[list[int]]:
    length = len(prompts[0])
    warm = dict(temperature=temperature, top_p=1.0) if temperature else {}
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    out = sampler_for(length + new)(texts, new, max_prompt_length=length, **warm)
    return [np.asarray(tokens).tolist() for tokens in out.tokens]

  return generate


# What is printed


def table(rows: Sequence[Row]) -> str:
  cells = [("what", "ours", "peer", "ratio", "target", "")]
  for row in rows:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    target = "" if row.target is None else f">= {row.target:g}"
    met = "" if row.ratio is None or row.target is None else "met" if row.ratio >= row.target else "not met"
    cells.append((row.what, row.ours, row.peer, ratio, target, met))
  widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
  return "\n" + "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def versions(tunix: "Tunix") -> str:
  names = ("jax", "flax", "torch", "transformers", "numpy")
  ours = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
  beside = ", ".join(f"{name} {version}" for name, version in tunix.versions.items()) if tunix else "not installed"
  python = ".".join(map(str, sys.version_info[:3]))
  return f"\nOne core, fp32, Python {python}, {ours}\nThe process of tunix: {beside}"


if __name__ == "__main__":
  main()
