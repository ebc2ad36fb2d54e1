r"""Can a base model of one million weights carry ALMA in English? A prototype: pretraining and probes.

  python -m benchmarks.english_world --out=runs/english              # trains and probes; again: probes what is there
  python -m benchmarks.english_world --out=runs/english --steps=20   # whether everything runs
  python -m benchmarks.english_world --out=runs/english --steps=0    # no model: the corpus, and the world's own prompts

What the model reads is in `english_corpus.py`, and what was found in docs/english.md. The script pins itself to one
core; times are CPU times of the process. A run that is killed leaves its last model in `--out`, which is then probed.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from alma_jax.corpus import contamination
from alma_jax.corpus.duplicates import near_duplicates
from alma_jax.corpus.normalise import normalised
from alma_jax.engine.choose import Decoding
from alma_jax.engine.sample import Limits, Request, sample
from alma_jax.keys import key_of
from alma_jax.llama import model as llama
from alma_jax.llama.config import LlamaConfig
from alma_jax.llama.weights import TextSide, load, save
from alma_jax.mini import pretrain
from alma_jax.mini.pretrain import Batch
from alma_jax.mini.seeds import key
from alma_jax.store import statistics
from alma_jax.text import packing
from benchmarks import english_corpus as corpus
from benchmarks.english_corpus import Task, ask

VOCABULARY, LENGTH, ROWS, STEPS, PEAK, WARMUP = 1024, 128, 16, 550, 3e-3, 50
RATING_WEIGHT, VERDICT_WEIGHT = 6.0, 6.0  # of the loss of ratings, yes and no: the judge is made of them
EVERY = 100  # steps between two looks
SHOTS, DEMONSTRATIONS, EPOCHS, INVENTED, N = 2, 500, 4, 1000, 8
JUDGED = 96  # tokens of a text and a clause: room for the longest answer
PAD, EOS = "<pad>", "<eos>"

# Shares of the documents up to a step. To compare words is learned abruptly, and soon where nothing else is asked.
CURRICULUM: tuple[tuple[float, corpus.Shares], ...] = (
  (100, {"roll": 1.0}),
  (350, {"check": 0.85, "roll": 0.15}),
  (math.inf, corpus.WEB),
)


class Base(NamedTuple):
  model: llama.Llama  # unrolled
  tokenizer: Tokenizer

  def id(self, token: str) -> int:
    found = self.tokenizer.token_to_id(token)
    assert found is not None, f"{token!r} is no token"
    return found

  def ids(self, text: str) -> list[int]:
    return [self.id(EOS), *self.tokenizer.encode(text).ids]

  @property
  def marks(self) -> list[int]:
    """The tokens of the ratings from 0 to 10."""
    return [self.id(f"Ġ{mark}") for mark in range(11)]


# Training -----------------------------------------------------------------------------------------------------------


def fresh(seed: int, train: Sequence[str]) -> Base:
  """A random model and a tokenizer. A judge compares words of a prompt with words of a response, so each word of the
  templates must be one token in both."""
  docs, t = corpus.documents(seed, train, corpus.evaluation()[1], corpus.WEB), Tokenizer(models.BPE())
  t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=VOCABULARY,
    special_tokens=[PAD, EOS],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  whole = [*map(str, range(11)), *itertools.chain(*corpus.WORDS.values()), *" ".join(corpus.ENDS).split()]
  often = ["".join(f" {word}" for word in whole)] * 500
  t.train_from_iterator([*train, *(text for _, text in itertools.islice(docs, 4000)), *often], trainer)
  c = LlamaConfig(
    vocab=VOCABULARY, width=128, depth=3, heads=4, kv_heads=4, head_dim=32, ffn=384, norm_eps=1e-5, rope_base=1e4,
    rope_scaling=None, tied=False, max_positions=512,
  )  # fmt: skip
  model = llama.init(c, seed)
  # Verifying is comparing words. In half of the heads queries and keys begin equal, so that a token looks for its like,
  # and embeddings begin large, so that what the layers add does not drown the words.
  blocks: Any = model.blocks
  blocks.k[...] = blocks.k[...].at[:, :, :2].set(blocks.q[...][:, :, :2])
  model.embed[...] *= 25
  return Base(jax.jit(llama.unrolled)(model), t)


def batches(examples: Sequence[packing.Encoded], rng: np.random.Generator) -> Iterator[Batch]:
  """Full batches [ROWS, LENGTH] of the packed examples, in random order."""
  packed = packing.pack([len(ids) for ids, _ in examples], LENGTH)
  rng.shuffle(packed)  # packing sorts by length
  for i in range(0, len(packed) - ROWS + 1, ROWS):
    yield batch_of(examples, packed[i : i + ROWS])


def batch_of(examples: Sequence[packing.Encoded], packed: Sequence[Sequence[int]]) -> Batch:
  b: dict[str, Any] = packing.rows(examples, packed, LENGTH, len(packed), pad_id=0)
  return Batch(*(b[name] for name in Batch._fields))


def verdict_places(base: Base, batch: Batch) -> np.ndarray:
  """bool [B, T]: where yes or no is predicted."""
  return np.isin(batch.targets, [base.id("Ġyes"), base.id("Ġno")])


def rating_places(base: Base, batch: Batch) -> np.ndarray:
  """bool [B, T]: where a rating is predicted."""
  return np.isin(batch.targets, base.marks) & (np.asarray(batch.tokens) == base.id(":"))


def curriculum(base: Base, seed: int, train: Sequence[str]) -> Iterator[Batch]:
  """Yields the batches of CURRICULUM."""
  before = 0.0
  for until, shares in CURRICULUM:
    count = None if math.isinf(until) else int(until - before)
    yield from itertools.islice(mixed_batches(base, seed, train, shares), count)
    before = until


def mixed_batches(base: Base, seed: int, train: Sequence[str], shares: corpus.Shares) -> Iterator[Batch]:
  """Yields packed documents for ever; ratings weigh more."""
  rng, docs = np.random.default_rng(seed), corpus.documents(seed, train, corpus.evaluation()[1], shares)
  while True:
    encoded = [[*base.ids(text), base.id(EOS)][:LENGTH] for _, text in itertools.islice(docs, 512)]
    for batch in batches([(ids, [1] * len(ids)) for ids in encoded], rng):
      weights = np.where(rating_places(base, batch), RATING_WEIGHT, 1.0) * np.asarray(batch.weights)
      weights = np.where(verdict_places(base, batch), VERDICT_WEIGHT, weights)
      yield batch._replace(weights=weights.astype(np.float32))


def pretrained(base: Base, steps: int, seed: int, train: Sequence[str], out: pathlib.Path) -> None:
  """Trains the base and writes it to `out`, now and then."""
  rate = optax.warmup_cosine_decay_schedule(0.0, PEAK, min(WARMUP, steps // 4), steps, 0.02 * PEAK)
  adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=0.01))
  weights: Any = base.model  # optax takes any pytree, and its types know only those of arrays
  state, start, seen, loss_of = adam.init(weights), time.process_time(), 0, jax.jit(pretrain.loss)
  others = list(itertools.islice(mixed_batches(base, seed + 1, train, corpus.WEB), 6))
  for i, batch in zip(range(1, steps + 1), curriculum(base, seed, train), strict=False):
    model, state, loss = pretrain.step(base.model, state, batch, adam)
    base, seen = base._replace(model=model), seen + int((batch.segments > 0).sum())
    if i % EVERY == 0 or i == steps:
      spent = time.process_time() - start
      nats = []
      for places in (rating_places, verdict_places):
        looked = [batch._replace(weights=places(base, batch).astype(np.float32)) for batch in others]
        nats.append(np.mean([float(loss_of(base.model, batch)) for batch in looked if batch.weights.any()]))
      right = "  ".join(f"{kind} {good}/{n}" for kind, (good, n) in judge_accuracy(base, 8).items())
      losses = f"loss {float(loss):.3f}, of ratings {nats[0]:.3f}, of yes and no {nats[1]:.3f}"
      print(f"step {i}/{steps}  {losses}  {seen / 1e6:.2f}M tokens")
      print(f"  {spent / 60:.1f} CPU min  {seen / spent:.0f} tokens/CPU s; pairs in order: {right}", flush=True)
      written(base, out)


def written(base: Base, out: pathlib.Path) -> None:
  save(out, pretrain.stacked(base.model), TextSide(stop_ids=[base.id(EOS)], bos_id=base.id(EOS), pad_id=base.id(PAD)))
  base.tokenizer.save(str(out / "tokenizer.json"))
  about = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=EOS, eos_token=EOS, pad_token=PAD)
  (out / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def loaded(out: pathlib.Path) -> Base:
  return Base(load(out, unrolled=True), Tokenizer.from_file(str(out / "tokenizer.json")))


def tuned(base: Base, examples: Sequence[Task], rng: random.Random) -> Base:
  """The base after a short SFT on demonstrations, whose writer keeps 19 of 20 constraints."""
  encoded = []
  for task in examples:
    asked, whole = base.ids(ask(task)), [*base.ids(f"{ask(task)} {corpus.careful(rng, task, 0.95)}"), base.id(EOS)]
    encoded.append((whole, [0] * len(asked) + [1] * (len(whole) - len(asked))))
  adam, model, shuffled = optax.adamw(5e-4, b2=0.98), jax.tree.map(jnp.array, base.model), np.random.default_rng(0)
  state = adam.init(model)
  for _ in range(EPOCHS):
    for batch in batches(encoded, shuffled):
      model, state, _ = pretrain.step(model, state, batch, adam)  # takes its arguments' memory
  return base._replace(model=model)


# Probes -------------------------------------------------------------------------------------------------------------


def continued(base: Base, texts: Sequence[str], name: str, temperature: float, top_p: float) -> list[str]:
  """The first line that the model writes after each text."""
  stops = tuple(i for token, i in base.tokenizer.get_vocab().items() if token.startswith("Ċ") or token == EOS)
  requests = [Request(tuple(base.ids(text)), key_of(name, i)) for i, text in enumerate(texts)]
  decoding = Decoding(max_new_tokens=64, stop_ids=stops, temperature=temperature, top_p=top_p)
  drawn = sample(base.model, requests, decoding, Limits(slots=64))
  return [base.tokenizer.decode(list(one.tokens)).strip() for one in drawn]


def share(right: int, n: int) -> str:
  """The share with Wilson's 95 % interval."""
  z, p = statistics.Z95, right / n
  middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  low, high = (max(0.0, middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
  return f"{p:.3f} [{low:.3f}, {high:.3f}] n={n}"


def mean(values: Sequence[float] | np.ndarray) -> str:
  """The mean with a 95 % bootstrap interval over the values."""
  found = statistics.bootstrap(np.asarray(values), np.mean)
  return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}] n={len(values)}"


@jax.jit
def last_logits(model: llama.Llama, tokens: Array, lengths: Array) -> Array:
  """[B, V] logits after right-padded rows [B, T] of these lengths."""
  places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden = llama.hidden_states(model, tokens, places, (places < lengths[:, None]).astype(jnp.int32))
  return llama.logits(model, jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0])


def ratings(base: Base, rows: Sequence[tuple[Task, str]]) -> np.ndarray:
  """float [n]: the rating that the base gives each text: ten times the mean probability of yes over the clauses of its
  task, each read alone behind the text."""
  asked = [f"Answer: {text}\nCheck: {c.clause.removesuffix('.')}" for task, text in rows for c in task.constraints]
  chances, said = [], jnp.asarray([base.id("Ġyes"), base.id("Ġno")])
  for start in range(0, len(asked), 64):  # one shape, compiled once
    tokens, lengths = np.zeros((64, JUDGED), np.int32), np.ones(64, np.int32)
    for i, text in enumerate(asked[start : start + 64]):
      ids = base.ids(text)[:JUDGED]
      tokens[i, : len(ids)], lengths[i] = ids, len(ids)
    logits = last_logits(base.model, jnp.asarray(tokens), jnp.asarray(lengths))[:, said]
    chances += np.asarray(jax.nn.softmax(logits))[:, 0].tolist()
  each = iter(chances)
  return np.array([10 * np.mean([next(each) for _ in task.constraints]) for task, _ in rows])


def judge_accuracy(base: Base, each: int) -> dict[str, tuple[int, int]]:
  """How many pairs are rated in the right order, by the kind of the constraint that the worse text alone breaks."""
  rng, goods, bads = random.Random("pairs"), defaultdict[str, list[Any]](list), defaultdict[str, list[Any]](list)
  while sum(map(len, goods.values())) < each * len(corpus.KINDS):
    task = corpus.draw_task(rng, even=True)
    kind = rng.choice(task.constraints).kind
    good, bad = corpus.answer(rng, task, set()), corpus.answer(rng, task, {kind})
    faults = [c.kind for c in task.constraints if not c.kept(bad)]
    if all(task.kept(good)) and faults == [kind] and len(goods[kind]) < each:
      goods[kind].append((task, good))
      bads[kind].append((task, bad))
  better = [ratings(base, goods[kind]) > ratings(base, bads[kind]) for kind in corpus.KINDS]
  found = {kind: (int(right.sum()), each) for kind, right in zip(corpus.KINDS, better, strict=True)}
  return found | {"all": (int(np.sum(better)), np.size(better))}


def probe_english(base: Base, train: Sequence[str], held: Sequence[str]) -> Iterator[str]:
  """Bits per byte and perplexity of held-out English, beside those of token frequencies."""
  counts = Counter(i for text in train for i in base.tokenizer.encode(text).ids)
  loss, rows, total = jax.jit(pretrain.loss), [], counts.total() + VOCABULARY
  for text in held:
    ids = base.ids(text)[:LENGTH]
    batch = batch_of([(ids, [1] * len(ids))], [[0]])
    nll = float(loss(base.model, batch)) * (len(ids) - 1)
    alone = -sum(math.log((counts[i] + 1) / total) for i in ids[1:])
    rows.append((nll, alone, len(ids) - 1, len(base.tokenizer.decode(ids[1:]).encode()) * math.log(2)))
  for column, name in enumerate(("model", "token frequencies")):
    bits = statistics.bootstrap(np.asarray(rows), lambda x: float(x[:, column].sum() / x[:, 3].sum()))
    perplexity = statistics.bootstrap(np.asarray(rows), lambda x: math.exp(x[:, column].sum() / x[:, 2].sum()))
    yield f"english: {name}: {bits.value:.2f} [{bits.low:.2f}, {bits.high:.2f}] bits per byte; perplexity per token"
    yield f"english:   {perplexity.value:.1f} [{perplexity.low:.1f}, {perplexity.high:.1f}]; {len(rows)} texts"


def probe_policy(name: str, tasks: Sequence[Task], texts: Sequence[str]) -> Iterator[str]:
  """How many constraints a model's answers keep."""
  kept = [task.kept(text) for task, text in zip(tasks, texts, strict=True)]
  yield f"{name}: prompts with all constraints kept {share(sum(map(all, kept)), len(kept))}"
  yield f"{name}: constraints kept, mean over prompts {mean([sum(k) / len(k) for k in kept])}"
  for kind in corpus.KINDS:
    of_kind = [c.kept(text) for t, text in zip(tasks, texts, strict=True) for c in t.constraints if c.kind == kind]
    yield f"{name}:   {kind:6} {share(sum(of_kind), len(of_kind))}"


def probe_choice(base: Base, policy: Base, tasks: Sequence[Task]) -> Iterator[str]:
  """Best of N by the base's own ratings, and pairs of the policy's samples."""
  texts = continued(policy, [ask(task) for task in tasks for _ in range(N)], "choice", 1.0, 1.0)
  rows = [(tasks[i // N], text) for i, text in enumerate(texts)]
  worth, rated = np.array([t.rating(text) for t, text in rows]).reshape(-1, N), ratings(base, rows).reshape(-1, N)
  chosen = worth[np.arange(len(tasks)), rated.argmax(1)]
  yield f"choice: true rating of one sample {mean(worth[:, 0])}"
  yield f"choice: of the judge's choice among {N} {mean(chosen)}; gain {mean(chosen - worth[:, 0])}"
  yield f"choice: of the best of {N} {mean(worth.max(1))}"
  a, b = np.triu_indices(N, 1)
  differ = worth[:, a] != worth[:, b]
  right = differ & ((worth[:, a] > worth[:, b]) == (rated[:, a] > rated[:, b]))
  ordered = (right.sum(1) / np.maximum(differ.sum(1), 1))[differ.any(1)]
  yield f"choice: pairs of samples in the right order, mean over prompts {mean(ordered)}"


def probe_world() -> Iterator[str]:
  """What the world's own writers and prompts are like; no model."""
  rng, kept, one = random.Random("world"), list[bool](), list[bool]()
  for _ in range(INVENTED):
    task = corpus.draw_task(rng, even=True)
    kept.append(all(task.kept(corpus.answer(rng, task, set()))))
    kind = rng.choice(task.constraints).kind
    bad = corpus.answer(rng, task, {kind})
    one.append([c.kind for c in task.constraints if not c.kept(bad)] == [kind])
  yield f"world: answers that mean to keep every constraint and do {share(sum(kept), len(kept))}"
  yield f"world: answers that mean to break one and break that one alone {share(sum(one), len(one))}"
  yield from probe_prompts("drawn", [corpus.draw_task(rng).prompt for _ in range(INVENTED)])


def probe_prompts(name: str, prompts: Sequence[str]) -> Iterator[str]:
  """Near-duplicates and contamination among prompts."""
  index = contamination.Index({"evaluation": [normalised(task.prompt) for task in corpus.evaluation()[0]]})
  texts = {key(prompt): normalised(prompt) for prompt in prompts if prompt}
  keep, _ = near_duplicates(list(texts.values()), list(texts))
  met = contamination.shared(index, list(texts), list(texts.values()))
  words = [len(text.split()) for text in texts.values()]
  yield f"prompts: {name}, words in the mean {np.mean(words):.1f}"
  yield f"prompts: {name}, equal to another {share(len(prompts) - len(texts), len(prompts))}"
  yield f"prompts: {name}, near-duplicates (ROUGE-L of 0.7 to a kept one) {share(int((~keep).sum()), len(keep))}"
  yield f"prompts: {name}, 8 words shared with an evaluation prompt {share(len(met), len(texts))}"


def probes(base: Base, train: Sequence[str], held: Sequence[str]) -> Iterator[str]:
  rng, (evaluated, taken) = random.Random("probes"), corpus.evaluation()
  yield from probe_english(base, train, held)
  for kind, (right, n) in judge_accuracy(base, 100).items():
    yield f"judge: pairs in the right order, {kind:6} {share(right, n)}"
  demonstrations = [corpus.draw_task(rng, taken) for _ in range(DEMONSTRATIONS)]
  few = []
  for task in evaluated:
    shots = rng.sample(demonstrations, SHOTS)
    few.append("".join(f"{ask(shot)} {corpus.careful(rng, shot, 0.95)}\n\n" for shot in shots) + ask(task))
  yield from probe_policy(f"base, {SHOTS}-shot", evaluated, continued(base, few, "few-shot", 0.7, 0.9))
  policy = tuned(base, demonstrations, rng)
  yield from probe_policy("SFT", evaluated, continued(policy, [ask(task) for task in evaluated], "SFT", 0.7, 0.9))
  yield from probe_choice(base, policy, evaluated[: corpus.EVALUATED // 2])
  lists = ["\n".join(f"# {corpus.draw_task(rng).prompt}" for _ in range(SHOTS)) + "\n#" for _ in range(INVENTED)]
  yield from probe_prompts("invented", continued(base, lists, "invented", 1.0, 1.0))


def main() -> None:
  if hasattr(os, "sched_setaffinity"):  # before the first array: JAX counts the cores then
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, required=True, help="directory of the model")
  parser.add_argument("--steps", type=int, default=STEPS)
  parser.add_argument("--seed", type=int, default=0, help="of the documents and the first weights")
  flags = parser.parse_args()
  train, held = corpus.english()
  print(f"english: {len(train)} texts, {sum(map(len, train))} characters; held out: {len(held)}, {sum(map(len, held))}")
  for line in probe_world():
    print(line, flush=True)
  if not flags.steps:
    return
  if not (flags.out / "config.json").exists():
    pretrained(fresh(flags.seed, train), flags.steps, flags.seed, train, flags.out)
  base = loaded(flags.out)
  print(f"{base.model.c.parameters} weights, {(flags.out / 'model.safetensors').stat().st_size} bytes")
  for line in probes(base, train, held):
    print(line, flush=True)
  print(f"{time.process_time() / 60:.1f} CPU minutes in all")


if __name__ == "__main__":
  main()
