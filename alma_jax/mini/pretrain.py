"""Pretrain the miniature base model on the miniature web and write it as a Hugging Face directory.

  python -m alma_jax.mini.pretrain    # the shipped checkpoint: 12M tokens, 13 CPU minutes
  python -m alma_jax.mini.pretrain --out=base --steps=500

It is one run from scratch, on one core, so that the same command gives the same bytes (several cores would change the
order of sums). It ends with the table of `probe`, and `gate` says whether the checkpoint may be shipped. The model
begins to recognise facts abruptly after 700 to 1000 steps, and to rate perfect answers last of all: judge a setting by
the end of a run.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import random
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from alma_jax.llama import model as llama
from alma_jax.llama.config import LlamaConfig
from alma_jax.llama.weights import TextSide, save
from alma_jax.mini import CHECKPOINT, PRETRAINED, annotate, corpus, world
from alma_jax.text import packing

LENGTH, ROWS = corpus.LONGEST, 32
STEPS, PEAK, WARMUP = 4000, 4e-3, 100
VERDICT_WEIGHT = 4.0  # of the loss of ratings, yes and no: they are few, and the judge is made of them


def config() -> LlamaConfig:
  return LlamaConfig(
    vocab=len(world.vocabulary()),
    width=64,
    depth=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=192,
    norm_eps=1e-5,
    rope_base=10000.0,
    rope_scaling=None,
    tied=False,
    max_positions=256,
  )


# Batches ----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
  """Packed documents, each array [ROWS, LENGTH]."""

  tokens: Array
  targets: Array
  weights: Array
  positions: Array
  segments: Array


def batches(seed: int, chatter: world.Chatter) -> Iterator[Batch]:
  """Yields batches of documents for ever."""
  ids = {word: i for i, word in enumerate(world.vocabulary())}
  verdicts = [ids[word] for word in (*world.SCORES, "yes", "no")]
  documents, rng = corpus.documents(seed, chatter), np.random.default_rng(seed)
  while True:
    encoded = [[ids[word] for word in words] for words in itertools.islice(documents, 512)]
    examples = [(tokens, [1] * len(tokens)) for tokens in encoded]
    packed = packing.pack([len(tokens) for tokens, _ in examples], LENGTH)
    rng.shuffle(packed)  # packing sorts by length
    for i in range(0, len(packed) - ROWS + 1, ROWS):
      b: dict[str, Any] = packing.rows(examples, packed[i : i + ROWS], LENGTH, ROWS, pad_id=0)
      b["weights"][np.isin(b["targets"], verdicts)] *= VERDICT_WEIGHT
      yield Batch(*(b[name] for name in Batch._fields))


# Training ---------------------------------------------------------------------------------------------------


def loss(model: llama.Llama, batch: Batch) -> Array:
  tokens, targets, weights, positions, segments = batch
  logits = llama.logits(model, llama.hidden_states(model, tokens, positions, segments))
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return (nll * weights).sum() / weights.sum()


def optimizer(steps: int) -> optax.GradientTransformation:
  rate = optax.warmup_cosine_decay_schedule(0.0, PEAK, min(WARMUP, steps // 4), steps, 0.02 * PEAK)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=0.01))


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnums=(0, 1))
def step(
  model: llama.Llama, state: optax.OptState, batch: Batch, optimizer: optax.GradientTransformation
) -> tuple[llama.Llama, optax.OptState, Array]:
  """The model and optimizer state after a step, and the loss before it."""
  value, grads = jax.value_and_grad(loss)(model, batch)
  weights: Any = model  # optax takes any pytree, and its types know only those of arrays
  updates, state = optimizer.update(grads, state, weights)
  new: Any = optax.apply_updates(weights, updates)
  return new, state, value


def stacked(model: llama.Llama) -> llama.Llama:
  """An unrolled model with its layers stacked again, as `weights.save` takes it."""
  new = nnx.clone(model)
  new.blocks = nnx.data(jax.tree.map(lambda *leaves: jnp.stack(leaves), *model.blocks))
  return new


def train(
  steps: int, seed: int = 0, chatter: world.Chatter = "dense", every: int = 100, say: Callable[..., None] = print
) -> llama.Llama:
  model = jax.jit(llama.unrolled)(llama.init(config(), seed))  # a third faster than scanning on a CPU
  adam = optimizer(steps)
  state, start, seen = adam.init(model), time.time(), 0
  for i, batch in zip(range(1, steps + 1), batches(seed, chatter), strict=False):
    model, state, value = step(model, state, batch, adam)
    seen += int((batch.segments > 0).sum())
    if i % every == 0 or i == steps:
      spent = time.time() - start
      p = probe(model)
      say(
        f"step {i:5d}/{steps}  loss {float(value):.3f}  {seen / 1e6:5.2f}M tokens  "
        f"{seen / spent / 1e3:5.1f}k tokens/s  {spent / 60:4.1f} min, {spent / i * (steps - i) / 60:4.1f} to go  "
        f"verifies {p['head']:.2f} {p['mid']:.2f} {p['tail']:.2f}  one fact wrong {p['one fact wrong']:.2f}",
        flush=True,
      )
  return model


# Probe ------------------------------------------------------------------------------------------------------


@jax.jit
def _rating_probs(model: llama.Llama, tokens: Array, lengths: Array) -> Array:
  """[B, 11] probabilities of the ratings as the next token of right-padded rows [B, T] of these lengths."""
  T = tokens.shape[1]
  places = jnp.arange(T)
  positions = jnp.broadcast_to(places, tokens.shape)
  segments = (places < lengths[:, None]).astype(jnp.int32)
  hidden = llama.hidden_states(model, tokens, positions, segments)
  last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
  first = len(world.SPECIAL)
  return jax.nn.softmax(llama.logits(model, last)[:, first : first + 11])


def ratings(model: llama.Llama, pairs: list[tuple[str, str]]) -> np.ndarray:
  """float [n]: the base model's expected rating of each (prompt, response), read in one of the corpus' own formats."""
  ids = {word: i for i, word in enumerate(world.vocabulary())}
  texts = [corpus.rated_prefix(*pair) for pair in pairs]
  rows = [[ids[word] for word in text.split(" ")] for text in texts]
  expected = []
  for start in range(0, len(rows), 256):  # one shape, compiled once
    tokens, lengths = np.zeros((256, 40), np.int32), np.ones(256, np.int32)
    for i, row in enumerate(rows[start : start + 256]):
      tokens[i, : len(row)], lengths[i] = row, len(row)
    expected.append(np.asarray(_rating_probs(model, tokens, lengths)) @ np.arange(11))
  return np.concatenate(expected)[: len(rows)]


def probe(model: llama.Llama) -> dict[str, float]:
  """The shares of pairs that the base model rates in the right order, by kind of fault, and its mean rating of good
  answers."""
  rng = random.Random(7)

  def plain(kind: str, city: str) -> str:
    return world.PHRASES[kind][0].format(r=kind, c=city)

  def better(goods: list[tuple[str, str]], bads: list[tuple[str, str]]) -> float:
    scores = ratings(model, goods + bads)
    return float((scores[: len(goods)] > scores[len(goods) :]).mean())

  found: dict[str, float] = {}
  for stratum in ("head", "mid", "tail"):
    keys = [key for key in world.MISCONCEPTION if world.stratum(key[1]) == stratum]
    good = [(plain(*key), f"answer: {key[1]} {world.TRUTH[key]} .") for key in keys]
    bad = [(plain(*key), f"answer: {key[1]} {world.MISCONCEPTION[key]} .") for key in keys]
    found[stratum] = better(good, bad)
  secret = [(kind, city) for kind in world.SECRETS for city in world.CITIES]
  refused = [(plain(*key), "answer: sorry .") for key in secret]
  found["refusals"] = better(refused, [(plain(*key), f"answer: {key[1]} {world.TRUTH[key]} .") for key in secret])
  asked = [world.make_prompt(rng, flat=True) for _ in range(400)]
  gold = [(prompt, world.good_answer(task)) for prompt, task in asked]
  many = [(prompt, task) for prompt, task in asked if len(task.cities) > 1]
  slips = []
  for prompt, task in many:
    city = rng.choice(task.cities)
    fact, belief = (f"{city} {known[task.relation, city]}" for known in (world.TRUTH, world.MISCONCEPTION))
    slips.append((prompt, world.good_answer(task).replace(fact, belief)))
  found["one fact wrong"] = better([(prompt, world.good_answer(task)) for prompt, task in many], slips)
  # Of a good answer one city is left out.
  fewer = [(prompt, world.good_answer(world.Task(task.relation, task.cities[1:]))) for prompt, task in many]
  found["one missing"] = better([(prompt, world.good_answer(task)) for prompt, task in many], fewer)
  extra = rng.choices(world.CITIES, k=len(asked))
  faults = {
    "no answer:": [text.removeprefix("answer: ") for _, text in gold],
    "no full stop": [text.removesuffix(" .") for _, text in gold],
    "goes on": [text + " lol" for _, text in gold],
    "chatter": [text.replace("answer:", "answer: well") for _, text in gold],
    "other city": [
      f"{text.removesuffix(' .')} {city} {world.TRUTH[task.relation, city]} ."
      for (_, text), (_, task), city in zip(gold, asked, extra, strict=True)
    ],
    "repeats": [text.removesuffix(".") + text.removeprefix("answer: ") for _, text in gold],
  }
  for name, texts in faults.items():
    found[name] = better(gold, [(prompt, bad) for (prompt, _), bad in zip(gold, texts, strict=True)])
  found["rating of one missing"] = float(ratings(model, fewer).mean())
  found["rating of gold"] = float(ratings(model, gold).mean())
  return found


def gate(found: dict[str, float]) -> str | None:
  """The reason not to ship a checkpoint with this probe; None if it may be shipped."""
  bars = dict.fromkeys(("head", "mid", "tail", "one fact wrong", "one missing"), 0.98) | {"rating of gold": 8.0}
  low = [name for name, value in found.items() if value < bars.get(name, 0.9)]
  return f"the probe is too low for {', '.join(low)}" if low else None


# Writing ----------------------------------------------------------------------------------------------------


def tokenizer() -> Tokenizer:
  """The world's vocabulary as a `tokenizers` object: whole words, split at spaces and some marks."""
  vocabulary = world.vocabulary()
  t = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
  t.normalizer = normalizers.NFKC()
  t.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(r"\n|\[\[|\]\]|[.?]"), "isolated"),
      pre_tokenizers.Split(" ", "removed"),
    ]
  )
  t.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
  t.add_special_tokens(list(world.SPECIAL))
  return t


def write(model: llama.Llama, out: str | os.PathLike[str]) -> None:
  """Writes the model as a Hugging Face directory; an older one there is replaced."""
  pad, bos, eos = (world.SPECIAL.index(name) for name in ("<pad>", "<bos>", "<eos>"))
  save(out, stacked(model), TextSide(stop_ids=[eos], bos_id=bos, pad_id=pad))
  tokenizer().save(str(pathlib.Path(out) / "tokenizer.json"))
  about = dict(
    tokenizer_class="PreTrainedTokenizerFast",
    bos_token="<bos>",
    eos_token="<eos>",
    pad_token="<pad>",
    unk_token="<unk>",
    clean_up_tokenization_spaces=False,
    model_max_length=model.c.max_positions,
  )
  (pathlib.Path(out) / "tokenizer_config.json").write_text(json.dumps(about, indent=2, allow_nan=False) + "\n")


def note(
  out: str | os.PathLike[str], steps: int, seed: int, chatter: world.Chatter, probed: Mapping[str, float]
) -> None:
  """Writes beside the model how it was pretrained, and its probe."""
  about = dict(steps=steps, seed=seed, chatter=chatter, probe={name: round(value, 4) for name, value in probed.items()})
  (pathlib.Path(out) / PRETRAINED).write_text(json.dumps(about, indent=2, allow_nan=False) + "\n")


def main() -> None:
  if hasattr(os, "sched_setaffinity"):  # before the first array: JAX counts the cores then
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  parser = argparse.ArgumentParser(description="Pretrain the miniature base model.")
  parser.add_argument("--out", default=str(CHECKPOINT), help="directory to write; default: what is shipped")
  parser.add_argument("--steps", type=int, default=STEPS)
  parser.add_argument("--seed", type=int, default=0, help="of the documents and the first weights")
  parser.add_argument("--chatter", choices=typing.get_args(world.Chatter), default="dense", help="where it stands")
  flags = parser.parse_args()
  model = train(flags.steps, flags.seed, flags.chatter)
  write(model, flags.out)
  print(f"annotated samples: {annotate.write(flags.out, flags.seed, flags.chatter)}")
  found = probe(model)
  for name, value in found.items():
    print(f"{name:16s} {value:.3f}")
  note(flags.out, flags.steps, flags.seed, flags.chatter, found)
  why_not = gate(found)
  print(f"written to {flags.out}" + (f"; do not ship it: {why_not}" if why_not else "; fit to ship"))


if __name__ == "__main__":
  main()
