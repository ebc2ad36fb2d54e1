"""How fast is training? Side by side with its peers on one core, from the same weights, in one run.

  pip install -e '.[bench]'
  python -m benchmarks.training [--vocab=4096] [--examples=128] [--pairs=48] [--batch=16] [--repeats=2]

A random Llama in fp32 (256 wide, 4 layers, 8 / 4 heads; 5.2M parameters with that vocabulary, 11.5M with 16,384) is
saved once and read by all. The script pins itself to one core and one thread; the programs take turns, and the least
process time of each counts. The comparisons:

  SFT step     4 rows of 256 tokens without padding, whose first 40 % are not learnt, and the same with four times the
               vocabulary: forward and backward pass, clipped gradient, AdamW. The compiled step of `train.fit` against
               transformers' LlamaForCausalLM with its default attention and torch's fused AdamW
  SFT, ragged  one epoch over examples of lognormal lengths, at most 512: a prompt of 42 and a response of 60 tokens on
               average, --batch to a step. `train.fit` against TRL's SFTTrainer with its defaults, which pads the
               examples of a step to the longest; with padding_free=True and a quarter of the examples in a pass, which
               computes the same; and with packing=True into rows of 512, one to a pass and four to a step
  DPO, ragged  one epoch over pairs of such responses to such prompts. `train.fit` with the reference's log-probs stored
               against TRL's DPOTrainer with precompute_ref_log_probs=True, once with its defaults and once with a
               quarter of the pairs in a pass

Rates of ragged data count the tokens of prompts and responses; the prompt of a pair counts for each of its sides. The
clock runs while `train.fit` packs, trains and reports every loss, and during all of `Trainer.train`: sampler, collator,
metrics, log. It excludes reading models, mapping, tokenising or packing data sets, the reference, and compiling, whose
time is printed. TRL runs without gradient checkpointing and mixed precision.

What to expect: about three minutes on an idle core; ratios that differ by a tenth from run to run, more beside other
work. The script ends with an AssertionError if the loss of any step differs by more than 1e-4 of itself (DPO: 1e-3),
if the first loss of DPO differs from ln 2 by more than 1e-5, or if the final weights differ by more than a hundredth
of the way that they have moved. packing=True takes other examples for a step, so only its first loss is compared.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.sampling import ONE_THREAD, Row, saved_model, table

QUIET = {
  "HF_HUB_OFFLINE": "1",
  "TQDM_DISABLE": "1",
  "TRANSFORMERS_VERBOSITY": "error",
  "PYTHONWARNINGS": "ignore::FutureWarning",
}
RATE, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
BETA = 0.1  # of DPO
LONGEST = 512
TRL = "trl==1.16.0"


def main() -> None:
  flags = argparse.ArgumentParser(description="How fast is training against its peers, on one core?")
  for name, value in dict(vocab=4096, examples=128, pairs=48, batch=16, repeats=2).items():
    flags.add_argument(f"--{name}", type=int, default=value)
  flags = flags.parse_args()
  on_one_core()
  with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as large:
    saved_model(directory, vocab_size=flags.vocab)
    saved_model(large, vocab_size=4 * flags.vocab)
    rows = []
    for compare in (
      functools.partial(equal_rows, large, 4 * flags.vocab, 4, 256, 5, 1 + flags.repeats),
      functools.partial(equal_rows, directory, flags.vocab, 4, 256, 5, 1 + flags.repeats),
      functools.partial(ragged, directory, flags.vocab, flags.examples, flags.batch, flags.repeats),
      functools.partial(preferences, directory, flags.vocab, flags.pairs, flags.batch, flags.repeats),
    ):
      rows += compare()
      print(f"  measured: {rows[-1].what}", file=sys.stderr, flush=True)
  print(table(rows))
  names = [name for name in ("jax", "torch", "transformers", "trl") if importlib.util.find_spec(name)]
  print(f"\nOne core, fp32, {', '.join(f'{name} {importlib.metadata.version(name)}' for name in names)}")


def on_one_core() -> None:
  """Restarts the interpreter with one thread on one core, unless it has them: libraries read both when they load."""
  allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
  wanted = ONE_THREAD | QUIET
  if len(allowed) == 1 and wanted.items() <= os.environ.items():
    return
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(allowed)})
  os.execve(sys.executable, [sys.executable, "-m", "benchmarks.training", *sys.argv[1:]], os.environ | wanted)


# Data

Ids = list[int]


class Learnt(NamedTuple):
  ids: Ids
  mask: Ids  # 1: the token is learnt


def drawn(n: int, vocab: int, responses: int, longest: int = LONGEST) -> list[tuple[Ids, ...]]:
  """Rows (prompt, response, ...) of token ids, at most `longest` in all. Responses end with token 1; 0 is padding."""
  rng, scale = np.random.default_rng(0), longest / LONGEST
  wanted = [(42 * scale, 3 * longest // 8), *[(60 * scale, 5 * longest // 8)] * responses]
  lengths = np.stack([lognormal(rng, mean, most, n) for mean, most in wanted], axis=1)
  ids = [[rng.integers(2, vocab, length).tolist() for length in row] for row in lengths]
  return [(prompt, *([*response[:-1], 1] for response in rest)) for prompt, *rest in ids]


def lognormal(rng: np.random.Generator, mean: float, most: int, n: int, deviation: float = 0.8) -> np.ndarray:
  found = rng.lognormal(math.log(mean) - deviation**2 / 2, deviation, n)
  return np.clip(found.round(), 2, most).astype(int)


def sequence(prompt: Ids, response: Ids) -> Learnt:
  """A prompt and its response, which alone is learnt."""
  return Learnt(prompt + response, [0] * len(prompt) + [1] * len(response))


def labels(ids: Ids, mask: Ids) -> Ids:
  """The targets in torch's form: -100 for a token that is not learnt."""
  return [token if m else -100 for token, m in zip(ids, mask, strict=True)]


# Both sides


@dataclasses.dataclass(frozen=True)
class Trained:
  seconds: float  # of process time
  losses: list[float]  # of every step
  weights: list[np.ndarray]  # in the order of our own model


def in_turns(runs: Mapping[str, Callable[[], Trained]], repeats: int) -> dict[str, Trained]:
  """The result of each run's quickest turn, by name."""
  found = {}
  for _ in range(repeats):
    for name, run in runs.items():
      trained = run()
      if name not in found or trained.seconds < found[name].seconds:
        found[name] = trained
  return found


class Ours(NamedTuple):
  run: Callable[[], Trained]
  compiling: float  # seconds of process time


def ours(directory: str, batches: Callable[[int], Any], steps: int, objective: Any) -> Ours:
  """A run of `train.fit`, compiled."""
  import jax

  from alma_jax.engine import train
  from alma_jax.llama import weights

  optimizer = train.Optimizer(RATE, RATE, 0.0, *BETAS, EPS, DECAY, CLIP, schedule="constant")
  start, mesh = time.process_time(), one_device()
  task = train.TrainingTask(optimizer, objective, mesh, steps)
  plan = train.planned(weights.load(directory).c, task, batches(0))
  compiling = time.process_time() - start

  def run() -> Trained:
    model, losses = weights.load(directory), []

    def report(step: int, metrics: Mapping[str, float]) -> None:
      losses.append(metrics["loss"])

    start = time.process_time()
    model = jax.block_until_ready(train.fit(model, batches, task, plan, train.Hooks(report=report)))
    return Trained(time.process_time() - start, losses, jax.tree.leaves(jax.device_get(model)))

  run()  # compiles the rest
  return Ours(run, compiling)


def one_device() -> Any:
  """A mesh of one device."""
  import jax

  from alma_jax.llama import sharding

  return sharding.make_mesh(1, devices=jax.devices()[:1])


def in_order(data: Any, batch: int, row_length: int) -> Any:
  """The batches of one epoch in the order of the data."""
  from alma_jax.runtime.batches import Batches, Sizes

  return Batches(data, Sizes(batch=batch, epochs=1, row_length=row_length), seed=None, unit=1)


def read(directory: str) -> Any:
  import transformers

  return transformers.LlamaForCausalLM.from_pretrained(directory, dtype="float32")


def leaves(hf: Any) -> list[np.ndarray]:
  """The weights of a transformers model in the order of our own."""
  import jax

  from alma_jax.llama import weights

  with tempfile.TemporaryDirectory() as directory:
    hf.save_pretrained(directory)
    return jax.tree.leaves(jax.device_get(weights.load(directory)))


def check(what: str, found: Trained, peer: Trained, start: Sequence[np.ndarray], most: float) -> None:
  """Asserts that both have trained in the same way from the weights `start`: losses within `most` of themselves."""
  worst = max(abs(x - y) / abs(y) for x, y in zip(found.losses, peer.losses, strict=True))
  assert worst <= most, f"{what}: the loss of a step differs by {worst:.1e} of itself"

  def distance(xs: Iterable[np.ndarray], ys: Iterable[np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(x - y, dtype=np.float64).sum()) for x, y in zip(xs, ys, strict=True)))

  apart = distance(found.weights, peer.weights) / distance(peer.weights, start)
  assert apart <= 0.01, f"{what}: the final weights differ by {apart:.1e} of the way that they have moved"


# transformers


def equal_rows(directory: str, vocab: int, rows: int, length: int, steps: int, repeats: int) -> list[Row]:
  from alma_jax.engine import train
  from alma_jax.runtime.batches import Examples

  ids, first = np.random.default_rng(0).integers(2, vocab, (rows, length)).tolist(), 2 * length // 5
  examples = [sequence(row[:first], row[first:]) for row in ids]
  batch = in_order(Examples(examples, list(range(rows))), rows, length)(0)
  run, compiling = ours(directory, lambda step: batch, steps, train.Objective())
  found = in_turns({"ours": run, "theirs": lambda: steps_of_transformers(directory, examples, steps)}, repeats)
  check("SFT step", found["ours"], found["theirs"], leaves(read(directory)), 1e-4)
  mine, theirs = (found[name].seconds / steps for name in ("ours", "theirs"))
  return [
    Row(
      f"SFT step, {rows} x {length} tokens, V = {vocab:,}; compiled in {compiling:.0f} s",
      f"{mine * 1e3:,.0f} ms",
      f"{theirs * 1e3:,.0f} ms transformers",
      theirs / mine,
      1.2,
    )
  ]


def steps_of_transformers(directory: str, examples: Sequence[Learnt], steps: int) -> Trained:
  """A training loop written by hand, whose steps all take the same batch."""
  import torch

  hf = read(directory).train()
  groups = [
    dict(params=[p for name, p in hf.named_parameters() if ("norm" in name) == norm], weight_decay=decay)
    for norm, decay in ((False, DECAY), (True, 0.0))
  ]
  adamw = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS, fused=True)
  ids, learnt = torch.tensor([ids for ids, _ in examples]), torch.tensor([labels(*example) for example in examples])
  start, losses = time.process_time(), []
  for _ in range(steps):
    loss = hf(input_ids=ids, labels=learnt, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(hf.parameters(), CLIP)
    adamw.step()
    adamw.zero_grad()
    losses.append(loss.item())
  return Trained(time.process_time() - start, losses, leaves(hf))


# TRL


def ragged(directory: str, vocab: int, n: int, batch: int, repeats: int, longest: int = LONGEST) -> list[Row]:
  from alma_jax.engine import train
  from alma_jax.runtime.batches import Examples

  examples = [sequence(*parts) for parts in drawn(n, vocab, 1, longest)]
  batches = in_order(Examples(examples, list(range(n))), batch, longest)
  mine = ours(directory, batches, batches.steps, train.Objective())
  few, peers = max(1, batch // 4), {}
  if importlib.util.find_spec("trl"):
    packed = functools.partial(sft_trainer, directory, vocab, examples, 1, 4, packing=True, max_length=longest)
    peers = {
      "TRL": functools.partial(sft_trainer, directory, vocab, examples, batch, batch),
      f"TRL, padding-free by {few}": functools.partial(
        sft_trainer, directory, vocab, examples, few, batch, padding_free=True
      ),
      "TRL, packing": packed,
    }
  what = f"SFT, {n} ragged examples, {batch} to a step"
  tokens = sum(len(ids) for ids, _ in examples)
  rows, found = rated(what, tokens, 2.0, mine, peers, repeats)
  for name in list(peers)[:2]:
    check(f"SFT, {name}", found["ours"], found[name], leaves(read(directory)), 1e-4)
  if peers:
    same_packed_loss(directory, packed().train_dataset, found["TRL, packing"].losses[0], longest)
  return rows


def preferences(directory: str, vocab: int, n: int, batch: int, repeats: int, longest: int = LONGEST) -> list[Row]:
  from alma_jax.engine import losses, train
  from alma_jax.runtime.batches import Examples, Pairs

  parts = drawn(n, vocab, 2, longest)
  sides = [(sequence(prompt, chosen), sequence(prompt, rejected)) for prompt, chosen, rejected in parts]
  both = [side for pair in sides for side in pair]
  reference = logprobs(directory, in_order(Examples(both, list(range(2 * n))), 2 * batch, longest)).reshape(n, 2)
  batches = in_order(Pairs(sides, list(range(n)), reference), batch, longest)
  mine = ours(directory, batches, batches.steps, train.Objective(losses.Preference("dpo", BETA)))
  few, peers = max(1, batch // 4), {}
  if importlib.util.find_spec("trl"):
    peers = {
      name: functools.partial(dpo_trainer, directory, vocab, parts, in_pass, batch)
      for name, in_pass in {"TRL": batch, f"TRL, by {few}": few}.items()
    }
  what, tokens = f"DPO, {n} ragged pairs, {batch} to a step", sum(len(ids) for ids, _ in both)
  rows, found = rated(what, tokens, 1.5, mine, peers, repeats)
  for name in peers:
    check(f"DPO, {name}", found["ours"], found[name], leaves(read(directory)), 1e-3)
  for name, trained in found.items():
    first = trained.losses[0]
    assert abs(first - math.log(2)) <= 1e-5, f"DPO, {name}: the first loss is {first}, not ln 2"
  return rows


def rated(
  what: str, tokens: int, target: float, mine: Ours, peers: Mapping[str, Callable[[], Any]], repeats: int
) -> tuple[list[Row], dict[str, Trained]]:
  """The rows for the table and what each has trained, by name; the target is for the first peer."""
  run, compiling = mine
  runs = {name: functools.partial(trained_by, make) for name, make in peers.items()}
  found = in_turns({"ours": run} | runs, repeats)
  rate = {name: tokens / trained.seconds for name, trained in found.items()}
  what, here = f"{what}, {tokens:,} tokens; compiled in {compiling:.0f} s", f"{rate['ours']:,.0f} tok/s"
  if not peers:
    return [Row(what, here, f"TRL: not installed (pip install {TRL})", target=target)], found
  targets = dict.fromkeys(list(peers)[:1], target)
  return [
    Row(what, here, f"{rate[name]:,.0f} {name}", rate["ours"] / rate[name], targets.get(name)) for name in peers
  ], found


def trained_by(make: Callable[[], Any]) -> Trained:
  """What a TRL trainer trains."""
  trainer = make()
  start = time.process_time()
  trainer.train()
  seconds = time.process_time() - start
  return Trained(seconds, [log["loss"] for log in trainer.state.log_history if "loss" in log], leaves(trainer.model))


def sft_trainer(
  directory: str, vocab: int, examples: Sequence[Learnt], in_pass: int, in_step: int, **changes: Any
) -> Any:
  import datasets  # pyright: ignore[reportMissingImports]  # of the extra `bench`
  import trl  # pyright: ignore[reportMissingImports]

  data = datasets.Dataset.from_list([dict(input_ids=ids, labels=labels(ids, mask)) for ids, mask in examples])
  config = trl.SFTConfig(**settings(directory, in_pass, in_step), **{"max_length": None, **changes})
  return quiet(trl.SFTTrainer(read(directory), config, train_dataset=data, processing_class=tokenizer(vocab)))


def dpo_trainer(directory: str, vocab: int, parts: Sequence[tuple[Ids, ...]], in_pass: int, in_step: int) -> Any:
  import datasets  # pyright: ignore[reportMissingImports]  # of the extra `bench`
  import trl  # pyright: ignore[reportMissingImports]

  def text(ids: Ids) -> str:
    return "".join(f" {word}" for word in ids)

  # TRL adds the last token of a response itself.
  data = [dict(prompt=text(p), chosen=text(c[:-1]), rejected=text(r[:-1])) for p, c, r in parts]
  config = trl.DPOConfig(
    **settings(directory, in_pass, in_step), beta=BETA, max_length=None, precompute_ref_log_probs=True
  )
  data = datasets.Dataset.from_list(data)
  return quiet(trl.DPOTrainer(read(directory), args=config, train_dataset=data, processing_class=tokenizer(vocab)))


def settings(directory: str, in_pass: int, in_step: int) -> dict[str, Any]:
  return dict(
    output_dir=os.path.join(directory, "trl"), per_device_train_batch_size=in_pass,
    gradient_accumulation_steps=in_step // in_pass, num_train_epochs=1, train_sampling_strategy="sequential",
    learning_rate=RATE, lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS,
    weight_decay=DECAY, max_grad_norm=CLIP, bf16=False, gradient_checkpointing=False, use_cpu=True, logging_steps=1,
    save_strategy="no", report_to="none", disable_tqdm=True,
  )  # fmt: skip


def quiet(trainer: Any) -> Any:
  """The trainer without its printed log."""
  import transformers

  trainer.remove_callback(transformers.PrinterCallback)
  return trainer


def tokenizer(vocab: int) -> Any:
  """A tokenizer whose words are numbers: the token's own ids."""
  import tokenizers
  import transformers

  words = {"<pad>": 0, "<end>": 1} | {str(i): i for i in range(2, vocab)}
  found = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
  found.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<end>", pad_token="<pad>")


def same_packed_loss(directory: str, packed: Any, loss: float, longest: int) -> None:
  """Asserts that the first step of TRL's packing, four rows, has the loss that we compute for its examples."""
  from alma_jax.runtime.batches import Examples

  examples = []
  for row in packed.select(range(min(4, len(packed)))):
    cuts = np.cumsum(row["seq_lengths"])[:-1]
    examples += zip(*(np.split(np.array(row[name]), cuts) for name in ("input_ids", "labels")), strict=True)
  examples = [Learnt(ids.tolist(), (learnt >= 0).astype(int).tolist()) for ids, learnt in examples]
  found = logprobs(directory, in_order(Examples(examples, list(range(len(examples)))), len(examples), longest))
  found = -found.sum() / sum(sum(mask[1:]) for _, mask in examples)
  assert abs(found / loss - 1) <= 1e-4, f"packing: the first loss is {loss:.6g}, ours {found:.6g}"


def logprobs(directory: str, batches: Any) -> np.ndarray:
  """The log-prob of every sequence under the saved model."""
  from alma_jax.engine import train
  from alma_jax.llama import weights

  made = map(batches, range(batches.steps))
  found = train.sequence_logprobs(weights.load(directory), made, batches.batch, "float32", one_device())
  return np.concatenate(list(found))[: batches.count]


if __name__ == "__main__":
  main()
