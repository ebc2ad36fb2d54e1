"""What a real GPU or TPU makes of the engine's programs: rates, shares of the peak, memory against the plan.

  python -m benchmarks.device                        one GPU or TPU host: Llama-3-8B's shape, random weights
  python -m benchmarks.device --model=1b --parts=decode,judge --json=device.json --table=device.md
  JAX_PLATFORMS=cpu python -m benchmarks.device --model=tiny      a rehearsal without an accelerator

It needs jax, flax, optax and numpy beside the package. Every part runs in a process of its own on the first device, so
that its peak of memory is its own and its failure costs no other. A row is printed and written to --json and --table as
soon as it is there, because a machine may be lent for a time; a part that takes longer than --limit is ended, and the
rows that it has found stay. Parts, in their order:

  check    the attention back ends against the reference, and the model in fp32 against the host's CPU
  decode   responses to a few prompts, many samples each, lengths as lognormal as those of chat
  judge    scores of such responses: rows that share their prompts
  embed    prompts' hidden states
  sft      training steps; where the whole model does not fit, with as many of its layers as do, and with fewer where
           the compiler or the device refuses that
  dpo      the same with pairs
  kmeans   Lloyd iterations at d = 1024, k = 65,536

What to expect: six minutes on an H100, most of them compiling. Rates leave compiling out. Shares of the peak count
useful operations (nothing that is computed again), by the data sheet's bf16 rate without sparsity. "planned" is what
the package's planners allow for, "peak" what the device's allocator says afterwards.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from alma_jax.engine import choose, embed, kmeans, sample, score, slots, train
from alma_jax.engine.losses import Preference
from alma_jax.engine.optimizer import Optimizer
from alma_jax.llama import attention, attention_reference, decoder, sharding
from alma_jax.llama import model as llama
from alma_jax.llama.config import LlamaConfig
from alma_jax.plan.memory import training_bytes
from alma_jax.text import packing

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ("check", "decode", "judge", "embed", "sft", "dpo", "kmeans")
# bf16 operations and bytes of memory per second, by a part of the device's name; NVIDIA's and Google's data sheets
PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "TPU v5 lite": (197e12, 0.819e12),
         "TPU v5": (459e12, 2.77e12), "TPU v6 lite": (918e12, 1.64e12)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Amounts:
  """The model and how much of each work there is."""

  model: LlamaConfig
  prompts: int  # that are answered
  samples: int  # of each
  prompt: int  # tokens
  response: int  # tokens, the mean
  longest: int  # tokens of a response, at most
  embedded: int  # prompts
  rows: int  # of a training step
  row_length: int
  example: int  # tokens
  steps: int
  points: int
  dims: int
  k: int


_8B = LlamaConfig(
  vocab=128_256, width=4096, depth=32, heads=32, kv_heads=8, head_dim=128, ffn=14_336, norm_eps=1e-5,
  rope_base=500_000.0, rope_scaling=None, tied=False, max_positions=8192,
)  # fmt: skip
_1B = dataclasses.replace(_8B, width=2048, depth=16, head_dim=64, ffn=8192, tied=True)
_TINY = dataclasses.replace(_8B, vocab=512, width=64, depth=2, heads=4, kv_heads=2, head_dim=16, ffn=128)
_LARGE = Amounts(
  _8B, prompts=4, samples=128, prompt=200, response=350, longest=1024, embedded=1024, rows=8, row_length=2048,
  example=500, steps=6, points=1 << 19, dims=1024, k=65_536,
)  # fmt: skip
SIZES = {
  "8b": _LARGE,
  "1b": dataclasses.replace(_LARGE, model=_1B),
  "tiny": Amounts(
    _TINY, prompts=2, samples=4, prompt=12, response=8, longest=16, embedded=8, rows=2, row_length=64, example=20,
    steps=2, points=512, dims=32, k=16,
  ),
}  # fmt: skip

Row = dict[str, Any]  # part, what, and some of: rate, seconds, share, peak_gib, planned_gib, note


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", choices=SIZES, default="8b")
  parser.add_argument("--parts", default=",".join(PARTS), help="some of them, separated by commas")
  parser.add_argument("--json", type=pathlib.Path, help="where the rows go, too")
  parser.add_argument("--table", type=pathlib.Path, help="where they go as a Markdown table")
  parser.add_argument("--limit", type=float, default=240, help="seconds that a part may take")
  parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.part:
    for found in ({"about": versions()}, *MAKERS[flags.part](SIZES[flags.model])):
      print(json.dumps(found), flush=True)
    return
  parts = flags.parts.split(",")
  if unknown := set(parts) - set(PARTS):
    sys.exit(f"error: --parts={flags.parts}: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
  rows, about, began = [], {"model": flags.model}, time.monotonic()
  for part in parts:
    for found in in_own_process(part, flags.model, flags.limit):
      about |= found.pop("about", {})
      if found:
        rows.append({"part": part} | found)
        print(line(rows[-1]), flush=True)
      if flags.json:
        flags.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
      if flags.table:
        flags.table.write_text("\n".join(table(about, rows)) + "\n")
  print("; ".join(f"{name} {value}" for name, value in about.items()))
  print(f"{time.monotonic() - began:.0f} s")
  if any("failed" in row for row in rows):
    sys.exit(1)


def in_own_process(part: str, model: str, limit: float) -> Iterator[Row]:
  """What a process of its own finds in this part, as it comes: versions, rows, and one that says how long it took, or
  why it failed."""
  command, began = [sys.executable, "-m", "benchmarks.device", f"--part={part}", f"--model={model}"], time.monotonic()
  with tempfile.TemporaryFile("w+") as errors:
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    timer = threading.Timer(limit, process.kill)
    timer.start()
    try:
      for text in process.stdout or ():
        if text.startswith("{"):
          yield json.loads(text)
        else:  # of a library
          print(text, end="", file=sys.stderr)
      status = process.wait()
    finally:
      timer.cancel()
      process.kill()
    errors.seek(0)
    said = [text for text in errors.read().splitlines() if text.strip()]
  took = time.monotonic() - began
  if status == 0:
    yield {"what": "in all", "whole_seconds": took}
    return
  print("\n".join(said[-25:]), file=sys.stderr)
  why = said[-1] if said else f"status {status}"
  yield {"what": "failed", "failed": f"took longer than {limit:g} s" if took >= limit else why, "whole_seconds": took}


def table(about: Row, rows: list[Row]) -> Iterator[str]:
  """The rows in Markdown, as `benchmarks/RESULTS.md` has them."""
  yield "; ".join(f"{name} {value}" for name, value in about.items())
  yield "\n| part | what | rate | share of the peak | peak memory | planned | |\n|---|---|---|---|---|---|---|"
  for row in rows:
    seconds = f"{row['seconds']:.4g} s" if "seconds" in row else ""
    cells = [row["part"], row["what"].strip(), ", ".join(filter(None, [row.get("rate", ""), seconds]))]
    cells.append(f"{row['share']:.1%}" if "share" in row else "")
    cells += [f"{row[name]:.1f} GiB" if name in row else "" for name in ("peak_gib", "planned_gib")]
    rest = [
      row.get("note", ""),
      f"{row['whole_seconds']:.0f} s" if "whole_seconds" in row else "",
      row.get("failed", ""),
    ]
    yield " | ".join(["", *cells, "; ".join(filter(None, rest)), ""]).strip()


def line(row: Row) -> str:
  words = [f"{row['part']:7} {row['what']:42}"]
  for name, text in {
    "rate": "{}",
    "seconds": "{:.4g} s",
    "share": "{:.1%} of the peak",
    "peak_gib": "peak {:.2f} GiB",
    "planned_gib": "planned {:.2f} GiB",
    "note": "{}",
    "failed": "FAILED: {}",
    "whole_seconds": "[{:.0f} s]",
  }.items():
    if name in row:
      words.append(text.format(row[name]))
  return "  ".join(words)


def versions() -> dict[str, str]:
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "platform": getattr(device.client, "platform_version", "").split("\n")[0][:60],
    "jax": jax.__version__,
    "flax": flax.__version__,
    "optax": optax.__version__,
    "date": time.strftime("%Y-%m-%d"),
  }


# What the parts share


def device() -> Any:
  return jax.devices()[0]


def one_device() -> Any:
  return sharding.make_mesh(1, 1, 1, devices=[device()])


def peaks() -> tuple[float, float] | None:
  """The device's operations and bytes per second; None where they are not known."""
  return next((rates for name, rates in PEAKS.items() if name in device().device_kind), None)


def share(operations: float, seconds: float) -> Row:
  rates = peaks()
  return {"share": operations / seconds / rates[0]} if rates else {}


def memory() -> int | None:
  """Bytes that the device's allocator may hand out."""
  stats = device().memory_stats() if device().platform != "cpu" else None
  return stats["bytes_limit"] if stats and "bytes_limit" in stats else None


def peak() -> Row:
  stats = device().memory_stats() if device().platform != "cpu" else None
  return {"peak_gib": stats["peak_bytes_in_use"] / 2**30} if stats else {}


def planned(size: float) -> Row:
  return {"planned_gib": size / 2**30}


def dtype() -> Any:
  return jnp.float32 if device().platform == "cpu" else jnp.bfloat16


def random_model(c: LlamaConfig, layout: str, kind: Any) -> llama.Llama:
  """A model in this layout and dtype, made weight by weight, so that no two of it are ever there."""

  def shaped() -> llama.Llama:
    model = llama.cast(llama.init(c, 0), kind)
    return llama.unrolled(model) if layout == "unrolled" else model

  @functools.partial(jax.jit, static_argnums=1)
  def normal(key: Any, shape: tuple[int, ...]) -> Any:
    return (jax.random.normal(key, shape, kind) * shape[-1] ** -0.5).astype(kind)

  leaves, tree = jax.tree_util.tree_flatten_with_path(jax.eval_shape(shaped))
  keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
  made = [
    jnp.ones(x.shape, kind) if "norm" in jax.tree_util.keystr(path) else normal(key, x.shape)
    for key, (path, x) in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(tree, made)


def bytes_of(tree: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def ids(random: np.random.Generator, c: LlamaConfig, length: int) -> tuple[int, ...]:
  return tuple(random.integers(3, c.vocab, length).tolist())


def lengths(random: np.random.Generator, mean: int, longest: int, count: int) -> np.ndarray:
  """Lognormal lengths like those of chat answers, about `mean` on the average, from 1 to `longest`."""
  spread = 0.8
  return np.clip(random.lognormal(math.log(mean) - spread**2 / 2, spread, count), 1, longest).astype(int)


@contextlib.contextmanager
def clock() -> Iterator[list[float]]:
  taken, began = [], time.perf_counter()
  yield taken
  taken.append(time.perf_counter() - began)


# The parts


def check(a: Amounts) -> Iterator[Row]:
  """Each back end as `llama.attention` checks it before its first use, and how long it takes at a step's shape."""
  c, target = a.model, device().platform
  platform = sharding.platform()
  for call in ("causal", "over"):
    T = a.row_length if call == "causal" else 1
    q, apart = (a.rows, T, c.heads, c.head_dim), (a.rows, a.row_length, c.kv_heads, c.head_dim)
    k = apart if call == "causal" else (*apart[:2], *decoder.cache_heads(c, dtype()))
    name = attention.chosen(call, platform, dtype(), q, k)
    if name is None or target == "cpu":
      yield {"what": f"attention ({call})", "note": "plain XLA is chosen"}
      continue
    sizes = (T, k[2], k[3] // c.head_dim) if name == "decode_tpu" else None
    flaw = attention._flaw(name, platform, call, jnp.dtype(dtype()), c.heads // k[2], c.head_dim, sizes)
    yield {"what": f"attention ({call}), {name}", "note": flaw or "agrees with the reference"}
    back_end = getattr(attention._back_end(name), call)
    plain = attention_reference.striped_causal if call == "causal" else attention_reference.reference_over
    for what, attend in ((name, back_end), ("plain XLA", plain)):
      if not (flaw and what == name):
        seconds = timed_attention(attend, call, q, k if what == name else apart)
        yield {"what": f"  {what}{', with gradients' if call == 'causal' else ''}", "seconds": seconds}
  if target != "cpu":
    yield choosing(c.vocab, platform)
  yield {"what": "the model in fp32 against the host's CPU", "note": against_cpu()}


def choosing(vocab: int, platform: str) -> Row:
  """How long 256 slots take to choose their tokens with top-p, and whether the kernel for that is right."""
  decoding, random = choose.Decoding(max_new_tokens=1, temperature=0.8, top_p=0.95), jax.random.key(0)
  logits, uniform = 3 * jax.random.normal(random, (256, vocab)), jax.random.uniform(random, (256,))
  program = jax.jit(choose.choose, static_argnums=2)
  jax.block_until_ready(program(logits, uniform, decoding))
  with clock() as taken:
    jax.block_until_ready([program(logits, uniform, decoding) for _ in range(10)])
  flaw = choose._flaw(vocab, decoding.temperature, decoding.top_k, decoding.top_p) if platform == "tpu" else None
  note = flaw or ("agrees with the definition" if platform == "tpu" else "plain XLA is chosen")
  return {"what": "256 tokens by top-p", "seconds": taken[0] / 10, "note": note}


def timed_attention(attend: Callable[..., Any], call: str, q: tuple[int, ...], k: tuple[int, ...]) -> float:
  random = jax.random.key(0)
  x, y, z = (jax.random.normal(key, s, dtype()) for key, s in zip(jax.random.split(random, 3), (q, k, k), strict=True))
  halves = np.repeat([[1, 2]], k[1] // 2, axis=1)
  seen = jnp.asarray(np.repeat(halves, k[0], axis=0) if call == "causal" else np.full(k[0], k[1] // 2), jnp.int32)

  def out(x: Any, y: Any, z: Any) -> Any:
    return attend(x, y, z, seen)[0].astype(jnp.float32).sum()

  program = jax.jit(jax.grad(out, argnums=(0, 1, 2)) if call == "causal" else out)
  jax.block_until_ready(program(x, y, z))
  with clock() as taken:
    jax.block_until_ready([program(x, y, z) for _ in range(10)])
  return taken[0] / 10


def against_cpu() -> str:
  """The largest difference of log-probs of a small model in fp32 on the device from those on the CPU."""
  c = dataclasses.replace(_TINY, width=256, depth=4, heads=8, kv_heads=4, head_dim=32, ffn=512)
  model, random = llama.init(c, 0), np.random.default_rng(0)
  rows = [(ids(random, c, 20), ids(random, c, 40)) for _ in range(8)]

  def on(where: Any) -> np.ndarray:
    with jax.default_device(where):
      placed = jax.tree.map(lambda x: jax.device_put(x, where), model)
      return np.stack(score.token_logprobs(placed, rows, score.Setup(batch=8)))

  off = np.abs(on(device()) - on(jax.local_devices(backend="cpu")[0])).max()
  return f"log-probs differ by {off:.2g} at most"


def decode(a: Amounts) -> Iterator[Row]:
  """Sampling as in a round: the first call compiles, the second one counts."""
  c = a.model
  model = random_model(c, "unrolled", dtype())
  weights = bytes_of(model)
  decoding = choose.Decoding(max_new_tokens=a.longest, temperature=0.8, top_p=0.95)
  load = slots.Load(a.prompt, a.samples)
  free = None if (limit := memory()) is None else int(0.9 * limit) - weights
  wanted = slots.slots_that_fit(model, decoding, load, free)
  random = np.random.default_rng(0)
  prompts = [ids(random, c, a.prompt) for _ in range(max(a.prompts, 2 * wanted // a.samples))]
  requests = [sample.Request(p, (i, j)) for i, p in enumerate(prompts) for j in range(a.samples)]
  wished = dict(zip(requests, lengths(random, a.response, a.longest, len(requests)).tolist(), strict=True))

  def ends(request: sample.Request, tokens: tuple[int, ...], seen: int) -> int | None:
    return wished[request] if len(tokens) >= wished[request] else None

  def drawn() -> list[sample.Sampled]:
    hooks = sample.SamplingHooks(ends=ends)
    return sample.sample(model, requests, decoding, sample.Limits(slots=wanted), None, hooks)

  with clock() as first:
    drawn()
  with clock() as taken:
    found = drawn()
  tokens = sum(len(x.tokens) for x in found)
  rate = f"{tokens / taken[0]:,.0f} tokens/s"
  mine = {"rate": rate, "note": f"{tokens:,} tokens in {taken[0]:.1f} s, {first[0] - taken[0]:.0f} s of compiling"}
  shapes = slots.shapes_for(wanted, slots.buckets.rounded(a.prompt), a.samples)
  size = weights + slots.bytes_of(model, decoding, shapes, None)
  operations = 2 * (c.parameters - c.vocab * c.width * (not c.tied)) * tokens
  yield (
    {"what": f"{wanted} slots, {len(requests)} requests"} | mine | share(operations, taken[0]) | peak() | planned(size)
  )
  if rates := peaks():
    # The least that a step reads: the weights, and each slot's own keys and values.
    own = slots.token_bytes(model, None) * a.response * wanted
    least = (weights + own) / rates[1] * tokens / wanted
    yield {"what": "  of the rate that reading weights and caches allows", "rate": f"{least / taken[0]:.1%}"}
  again = sample.sample(model, requests[:8], decoding, sample.Limits(slots=8), None, sample.SamplingHooks(ends=ends))
  same = sum(x.tokens == y.tokens for x, y in zip(again, found, strict=False))
  yield {"what": "  answers that are the same in a batch of 8", "rate": f"{same} of {len(again)}"}


def read(c: LlamaConfig, count: int, of: str, tokens: int, seconds: float) -> Row:
  """The row of so many texts that went through all layers and not through the head."""
  layers = c.parameters - c.vocab * c.width * (1 if c.tied else 2)
  rate = f"{count / seconds:,.1f} {of}/s, {tokens / seconds:,.0f} tokens/s"
  return {"what": f"{count} {of}", "rate": rate} | share(2 * layers * tokens, seconds) | peak()


def judge(a: Amounts) -> Iterator[Row]:
  c, random = a.model, np.random.default_rng(0)
  model = random_model(c, "stacked", dtype())
  common, many = ids(random, c, a.prompt // 2), 32
  rows = []
  for _ in range(a.prompts):
    prompt = common + ids(random, c, a.prompt)
    rows += [(prompt, ids(random, c, n + 20)) for n in lengths(random, a.response, a.longest, a.samples)]

  def scored() -> np.ndarray:
    return score.next_logprobs(model, rows, range(10, 21), 1, score.Setup(batch=many, common=common))

  scored()
  with clock() as taken:
    scored()
  tokens = sum(len(suffix) for _, suffix in rows)
  size = bytes_of(model) + score.reading_bytes(c, 1, jnp.dtype(dtype()).itemsize, many, a.longest, 3 * a.prompt // 2)
  yield read(c, len(rows), "responses", tokens, taken[0]) | planned(size)


def embedding(a: Amounts) -> Iterator[Row]:
  c, random, many = a.model, np.random.default_rng(0), 32
  model = random_model(c, embed.layout(one_device()), dtype())
  rows = [ids(random, c, n + 2) for n in lengths(random, a.prompt, a.longest, a.embedded)]
  embed.embeddings(model, rows, many)
  with clock() as taken:
    embed.embeddings(model, rows, many)
  tokens = sum(map(len, rows))
  size = bytes_of(model) + score.reading_bytes(c, 1, jnp.dtype(dtype()).itemsize, many, max(map(len, rows)))
  yield read(c, len(rows), "prompts", tokens, taken[0]) | planned(size)


def sft(a: Amounts) -> Iterator[Row]:
  random = np.random.default_rng(0)

  def batch(c: LlamaConfig) -> dict[str, Any]:
    count = a.rows * a.row_length // a.example
    made = [encoded(random, c, n) for n in np.maximum(2, lengths(random, a.example, a.row_length, count))]
    rows = packing.pack([len(x[0]) for x in made], a.row_length)[: a.rows]
    kept = [i for row in rows for i in row]
    at = {old: new for new, old in enumerate(kept)}
    return packing.rows([made[i] for i in kept], [[at[i] for i in row] for row in rows], a.row_length, a.rows, 0)

  yield from trained(a, train.Objective(remat="auto", compute_dtype=jnp.dtype(dtype()).name), batch)


def dpo(a: Amounts) -> Iterator[Row]:
  random, length = np.random.default_rng(0), 2 * a.row_length

  def batch(c: LlamaConfig) -> dict[str, Any]:
    pairs = []
    for _ in range(a.rows * length // (3 * a.example)):
      prompt = encoded(random, c, a.example // 3, 0.0)
      sides = [encoded(random, c, max(2, n)) for n in lengths(random, a.response, a.example, 2)]
      pairs.append(tuple((prompt[0] + ids_, prompt[1] + mask) for ids_, mask in sides))
    sizes = [packing.forked_length(*pair) for pair in pairs]
    rows = packing.pack(sizes, length)[: a.rows // 2]
    kept = [i for row in rows for i in row]
    at = {old: new for new, old in enumerate(kept)}
    chosen = [pairs[i] for i in kept]
    made: dict[str, Any] = packing.forked_rows(chosen, [[at[i] for i in r] for r in rows], length, a.rows // 2, 0)
    return made | {
      "real": np.ones(len(chosen), np.float32),
      "reference": np.full((len(chosen), 2), -10.0, np.float32),
    }

  objective = train.Objective(Preference(), remat="auto", compute_dtype=jnp.dtype(dtype()).name)
  yield from trained(a, objective, batch)


def encoded(random: np.random.Generator, c: LlamaConfig, n: int, weight: float = 1.0) -> Any:
  return ids(random, c, int(n)), (weight,) * int(n)


def trained(a: Amounts, objective: train.Objective, batch: Callable[[LlamaConfig], dict[str, Any]]) -> Iterator[Row]:
  """Steps on one batch. The model has as many layers as the analytic plan finds room for, and a quarter fewer each time
  that the compiler or the device finds less."""
  mesh, optimizer = one_device(), Optimizer(1e-5, 1e-6, moments="bfloat16")
  c, limit, made = a.model, memory(), batch(a.model)

  def needed(c: LlamaConfig, remat: str) -> int:
    how = dataclasses.replace(objective, remat=remat)
    return training_bytes(c, mesh.abstract_mesh, device().platform, optimizer, how, made["tokens"].size, 1)

  if limit:
    shapes = (dataclasses.replace(c, depth=depth) for depth in range(c.depth, 0, -1))
    c = next(x for x in shapes if x.depth == 1 or needed(x, "full") <= 0.88 * limit)
  if c.depth < a.model.depth:  # cut to what fits in the leanest way
    objective = dataclasses.replace(objective, remat="full")
  task = train.TrainingTask(optimizer, objective, mesh, steps=a.steps)
  while True:
    try:
      with clock() as compiling:
        plan = train.planned(c, task, made, memory=None if limit is None else 0.95 * limit)
      times = steps_of(c, task, plan, made)
      break
    except (train.TrainingError, jax.errors.JaxRuntimeError) as error:
      no_room = isinstance(error, train.TrainingError) or "RESOURCE_EXHAUSTED" in str(error)
      if c.depth == 1 or not no_room:
        raise
      why = str(error).splitlines()[0][:300]
    yield {"what": f"{c.depth} of {a.model.depth} layers: refused", "note": why}
    c = dataclasses.replace(c, depth=max(1, c.depth * 3 // 4))
  seconds = (times[-1] - times[0]) / (len(times) - 1)
  sizes = np.bincount(made["example"][made["example"] >= 0].ravel()).astype(float)
  tokens = sizes.sum()
  operations = 6 * (c.parameters - c.vocab * c.width * (not c.tied)) * tokens
  operations += 6 * c.depth * c.heads * c.head_dim * (sizes**2).sum()
  what = f"{made['tokens'].shape[0]} rows of {made['tokens'].shape[1]}, {c.depth} of {a.model.depth} layers"
  note = (
    f"remat {plan.remat}, {compiling[0]:.0f} s of compiling, the compiler's peak {plan.bytes / 2**30:.2f} GiB,"
    f" {tokens / made['tokens'].size:.0%} of the places used"
  )
  yield (
    {"what": what, "rate": f"{tokens / seconds:,.0f} tokens/s", "seconds": seconds, "note": note}
    | share(operations, seconds)
    | peak()
    | planned(needed(c, plan.remat))
  )


def steps_of(c: LlamaConfig, task: train.TrainingTask, plan: train.Plan, made: dict[str, Any]) -> list[float]:
  """When each step was done."""
  times = []

  def report(step: int, metrics: dict[str, float]) -> None:
    del step
    times.append(time.perf_counter())
    if not math.isfinite(metrics["loss"]):
      raise FloatingPointError(f"the loss is {metrics['loss']}")

  train.fit(random_model(c, "stacked", jnp.float32), lambda step: made, task, plan, train.Hooks(report=report))
  return times


def clusters(a: Amounts) -> Iterator[Row]:
  """Iterations over points around random centres; the seeds are points, so that only Lloyd's part is timed."""
  random = np.random.default_rng(0)
  points = random.standard_normal((a.points, a.dims), np.float32).astype(np.float16)
  mesh, times = kmeans.mesh_for(a.k, a.dims, [device()]), []

  def progress(done: int) -> None:
    del done
    times.append(time.perf_counter())

  settings = kmeans.Settings(k=a.k, iterations=5, seeding="random", tolerance=0.0)
  found = kmeans.fit(points, settings, (0, 1), mesh, hooks=kmeans.FitHooks(progress=progress))
  seconds = (times[-1] - times[0]) / (len(times) - 1)
  some = points[:256].astype(np.float64)
  scores = (found.centroids.astype(np.float64) ** 2).sum(axis=1) / 2 - some @ found.centroids.astype(np.float64).T
  off = scores[np.arange(len(some)), found.labels[: len(some)]] - scores.min(axis=1)
  yield (
    {"what": f"{a.points} points, d = {a.dims}, k = {a.k}", "seconds": seconds}
    | {
      "rate": f"{a.points / seconds:,.0f} points/s",
      "note": f"labels' scores are at most {off.max():.2g} from the least",
    }
    | share(2.0 * a.points * a.dims * a.k, seconds)
    | peak()
  )


MAKERS: dict[str, Callable[[Amounts], Iterator[Row]]] = {
  "check": check, "decode": decode, "judge": judge, "embed": embedding, "sft": sft, "dpo": dpo, "kmeans": clusters,
}  # fmt: skip


if __name__ == "__main__":
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
  main()
