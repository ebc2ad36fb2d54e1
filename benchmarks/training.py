"""How fast is training? Side by side with its peers on one core, from the same weights, in one run.

  pip install -e '.[bench]'
  python -m benchmarks.training [--vocab=4096] [--examples=128] [--pairs=48] [--batch=16] [--repeats=2]

A random Llama in fp32 (256 wide, 4 layers, 8 / 4 heads; 5.2M parameters with that vocabulary, 11.5M with 16,384) is
saved once and read by all. The script pins itself to one core and one thread; everyone takes turns, and the least
process time of each counts. What is compared:

  SFT step     4 rows of 256 tokens without padding, the first 40 % of each not learnt, and once more with four times
               the vocabulary: forward and backward pass, clipped gradient, AdamW. transformers' LlamaForCausalLM with
               its default attention and torch's fused AdamW against the compiled step of `engine.fit`
  SFT, ragged  one epoch over examples of lognormal lengths, at most 512: a prompt of 42 and a response of 60 tokens on
               average, --batch to a step. `engine.fit` against TRL's SFTTrainer as it comes, which pads a step's
               examples to the longest; with padding_free=True and a quarter of the examples in a pass, which computes
               the same; and with packing=True into rows of 512, one to a pass and four to a step
  DPO, ragged  one epoch over pairs of such responses to such prompts. `engine.fit` with the reference's log-probs
               stored against TRL's DPOTrainer with precompute_ref_log_probs=True, as it comes, and with a quarter of
               the pairs in a pass

Ragged data are rated in tokens of prompts and responses; the prompt of a pair counts for each of its sides. The clock
runs while `engine.fit` packs, trains and reports every loss, and while `Trainer.train` does all that it does: sampler,
collator, metrics, log. It does not run for models that are read, data sets that are mapped, tokenised or packed ahead,
the reference, and compiling, which is printed. TRL runs without gradient checkpointing and mixed precision.

What to expect: about three minutes on an idle core; ratios that differ by a tenth from run to run, more beside other
work. It ends with an AssertionError where the loss of any step differs by more than 1e-4 of itself (DPO: 1e-3), the
first one of DPO from ln 2 by more than 1e-5, or where the weights end up apart by more than a hundredth of the way that
they have gone. Of packing=True, which takes other examples for a step, the first loss alone is compared.
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
import types

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


def main():
  flags = argparse.ArgumentParser(description="How fast is training against its peers, on one core?")
  for name, value in dict(vocab=4096, examples=128, pairs=48, batch=16, repeats=2).items():
    flags.add_argument(f"--{name}", type=int, default=value)
  flags = flags.parse_args()
  on_one_core()
  with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as large:
    saved_model(directory, vocab_size=flags.vocab)
    saved_model(large, vocab_size=4 * flags.vocab)
    rows = []
    for found in (
      functools.partial(equal_rows, large, 4 * flags.vocab, 4, 256, 5, 1 + flags.repeats),
      functools.partial(equal_rows, directory, flags.vocab, 4, 256, 5, 1 + flags.repeats),
      functools.partial(ragged, directory, flags.vocab, flags.examples, flags.batch, flags.repeats),
      functools.partial(preferences, directory, flags.vocab, flags.pairs, flags.batch, flags.repeats),
    ):
      rows += found()
      print(f"  measured: {rows[-1].what}", file=sys.stderr, flush=True)
  print(table(rows))
  names = [name for name in ("jax", "torch", "transformers", "trl") if importlib.util.find_spec(name)]
  print(f"\nOne core, fp32, {', '.join(f'{name} {importlib.metadata.version(name)}' for name in names)}")


def on_one_core():
  """Starts the interpreter anew, unless it runs already as it should: threads are counted when libraries load."""
  allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
  wanted = ONE_THREAD | QUIET
  if len(allowed) == 1 and wanted.items() <= os.environ.items():
    return
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(allowed)})
  os.execve(sys.executable, [sys.executable, "-m", "benchmarks.training", *sys.argv[1:]], os.environ | wanted)


# Data


def drawn(n, vocab, responses, longest=LONGEST):
  """[(prompt, response, ...)] of token ids, at most `longest` for both. Responses end with token 1; 0 is padding's."""
  rng, scale = np.random.default_rng(0), longest / LONGEST
  wanted = [(42 * scale, 3 * longest // 8), *[(60 * scale, 5 * longest // 8)] * responses]
  lengths = np.stack([lognormal(rng, mean, most, n) for mean, most in wanted], axis=1)
  ids = [[rng.integers(2, vocab, length).tolist() for length in row] for row in lengths]
  return [(prompt, *([*response[:-1], 1] for response in rest)) for prompt, *rest in ids]


def lognormal(rng, mean, most, n, deviation=0.8):
  found = rng.lognormal(math.log(mean) - deviation**2 / 2, deviation, n)
  return np.clip(found.round(), 2, most).astype(int)


def sequence(prompt, response):
  """(tokens, which of them are learnt)"""
  return prompt + response, [0] * len(prompt) + [1] * len(response)


def labels(ids, mask):
  """What is learnt, as torch's losses are told."""
  return [token if m else -100 for token, m in zip(ids, mask)]


# Both sides


@dataclasses.dataclass(frozen=True)
class Trained:
  seconds: float  # of process time
  losses: list  # of every step
  weights: list  # arrays, in the order in which we have them


def in_turns(runs, repeats):
  """{name: what `run()` gave, of its quickest turn}."""
  found = {}
  for _ in range(repeats):
    for name, run in runs.items():
      trained = run()
      if name not in found or trained.seconds < found[name].seconds:
        found[name] = trained
  return found


def ours(directory, batches, steps, objective):
  """(a run of `engine.fit`, seconds of process time that compiling took)."""
  import jax

  from alma_jax.engine import train
  from alma_jax.llama import weights

  optimizer = train.Optimizer(RATE, RATE, 0.0, *BETAS, EPS, DECAY, CLIP, schedule="constant")
  start, mesh = time.process_time(), one_device()
  plan = train.planned(weights.load(directory).c, mesh, optimizer, objective, batches(0))
  compiling = time.process_time() - start

  def run():
    model, losses = weights.load(directory), []
    report = lambda step, metrics: losses.append(metrics["loss"])
    start = time.process_time()
    model = jax.block_until_ready(train.fit(model, batches, steps, optimizer, objective, mesh, plan, report=report))
    return Trained(time.process_time() - start, losses, jax.tree.leaves(jax.device_get(model)))

  run()  # what else there is to compile
  return run, compiling


def one_device():
  import jax

  from alma_jax.llama import sharding

  return sharding.make_mesh(1, devices=jax.devices()[:1])


def in_order(data, batch, row_length):
  from alma_jax.runtime.batches import Batches

  return Batches(data, types.SimpleNamespace(batch=batch, row_length=row_length), seed=None, unit=1)


def read(directory):
  import transformers

  return transformers.LlamaForCausalLM.from_pretrained(directory, dtype="float32")


def leaves(hf):
  """The weights of transformers' model as we have them."""
  import jax

  from alma_jax.llama import weights

  with tempfile.TemporaryDirectory() as directory:
    hf.save_pretrained(directory)
    return jax.tree.leaves(jax.device_get(weights.load(directory)))


def check(what, found, peer, start, most):
  """Both have trained in the same way from the weights `start`."""
  worst = max(abs(x - y) / abs(y) for x, y in zip(found.losses, peer.losses, strict=True))
  assert worst <= most, f"{what}: the loss of a step differs by {worst:.1e} of itself"
  distance = lambda xs, ys: math.sqrt(sum(float(np.square(x - y, dtype=np.float64).sum()) for x, y in zip(xs, ys)))
  apart = distance(found.weights, peer.weights) / distance(peer.weights, start)
  assert apart <= 0.01, f"{what}: the weights end up apart by {apart:.1e} of the way that they have gone"


# transformers


def equal_rows(directory, vocab, rows, length, steps, repeats):
  from alma_jax.engine import train
  from alma_jax.runtime.batches import Examples

  ids, first = np.random.default_rng(0).integers(2, vocab, (rows, length)).tolist(), 2 * length // 5
  examples = [sequence(row[:first], row[first:]) for row in ids]
  batch = in_order(Examples(examples, range(rows)), rows, length)(0)
  run, compiling = ours(directory, lambda step: batch, steps, train.Objective("sft"))
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


def steps_of_transformers(directory, examples, steps):
  """Training as one writes it by hand, on one batch that is learnt by heart."""
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


def ragged(directory, vocab, n, batch, repeats, longest=LONGEST):
  from alma_jax.engine import train
  from alma_jax.runtime.batches import Examples

  examples = [sequence(*parts) for parts in drawn(n, vocab, 1, longest)]
  batches = in_order(Examples(examples, range(n)), batch, longest)
  mine = ours(directory, batches, batches.steps, train.Objective("sft"))
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


def preferences(directory, vocab, n, batch, repeats, longest=LONGEST):
  from alma_jax.engine import losses, train
  from alma_jax.runtime.batches import Examples, Pairs

  parts = drawn(n, vocab, 2, longest)
  sides = [(sequence(prompt, chosen), sequence(prompt, rejected)) for prompt, chosen, rejected in parts]
  both = [side for pair in sides for side in pair]
  reference = logprobs(directory, in_order(Examples(both, range(2 * n)), 2 * batch, longest)).reshape(n, 2)
  batches = in_order(Pairs(sides, range(n), reference), batch, longest)
  mine = ours(directory, batches, batches.steps, train.Objective("preference", losses.Preference("dpo", BETA)))
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


def rated(what, tokens, target, mine, peers, repeats):
  """(rows for the table, {name: Trained}); the target is for the first peer."""
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


def trained_by(make):
  trainer = make()
  start = time.process_time()
  trainer.train()
  seconds = time.process_time() - start
  return Trained(seconds, [log["loss"] for log in trainer.state.log_history if "loss" in log], leaves(trainer.model))


def sft_trainer(directory, vocab, examples, in_pass, in_step, max_length=None, **changes):
  import datasets
  import trl

  data = datasets.Dataset.from_list([dict(input_ids=ids, labels=labels(ids, mask)) for ids, mask in examples])
  config = trl.SFTConfig(**settings(directory, in_pass, in_step), max_length=max_length, **changes)
  return quiet(trl.SFTTrainer(read(directory), config, train_dataset=data, processing_class=tokenizer(vocab)))


def dpo_trainer(directory, vocab, parts, in_pass, in_step):
  import datasets
  import trl

  text = lambda ids: "".join(f" {word}" for word in ids)
  names = ("prompt", "chosen", "rejected")
  data = [dict(zip(names, map(text, (p, c[:-1], r[:-1])))) for p, c, r in parts]  # TRL adds the last token
  config = trl.DPOConfig(
    **settings(directory, in_pass, in_step), beta=BETA, max_length=None, precompute_ref_log_probs=True
  )
  data = datasets.Dataset.from_list(data)
  return quiet(trl.DPOTrainer(read(directory), args=config, train_dataset=data, processing_class=tokenizer(vocab)))


def settings(directory, in_pass, in_step):
  return dict(
    output_dir=os.path.join(directory, "trl"), per_device_train_batch_size=in_pass,
    gradient_accumulation_steps=in_step // in_pass, num_train_epochs=1, train_sampling_strategy="sequential",
    learning_rate=RATE, lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS,
    weight_decay=DECAY, max_grad_norm=CLIP, bf16=False, gradient_checkpointing=False, use_cpu=True, logging_steps=1,
    save_strategy="no", report_to="none", disable_tqdm=True,
  )  # fmt: skip


def quiet(trainer):
  import transformers

  trainer.remove_callback(transformers.PrinterCallback)
  return trainer


def tokenizer(vocab):
  """Numbers are its words."""
  import tokenizers
  import transformers

  words = {"<pad>": 0, "<end>": 1} | {str(i): i for i in range(2, vocab)}
  found = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
  found.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<end>", pad_token="<pad>")


def same_packed_loss(directory, packed, loss, longest):
  """The first step of TRL's packing, four rows, has the loss that we find for its examples."""
  from alma_jax.runtime.batches import Examples

  examples = []
  for row in packed.select(range(min(4, len(packed)))):
    cuts = np.cumsum(row["seq_lengths"])[:-1]
    examples += zip(*(np.split(np.array(row[name]), cuts) for name in ("input_ids", "labels")))
  examples = [(ids.tolist(), (learnt >= 0).astype(int).tolist()) for ids, learnt in examples]
  found = logprobs(directory, in_order(Examples(examples, range(len(examples))), len(examples), longest))
  found = -found.sum() / sum(sum(mask[1:]) for _, mask in examples)
  assert abs(found / loss - 1) <= 1e-4, f"packing: the first loss is {loss:.6g}, ours {found:.6g}"


def logprobs(directory, batches):
  """Of all sequences of the batches, under the model as it was saved."""
  from alma_jax.engine import train
  from alma_jax.llama import weights

  made = map(batches, range(batches.steps))
  found = train.sequence_logprobs(weights.load(directory), made, batches.batch, "float32", one_device())
  return np.concatenate(list(found))[: batches.count]


if __name__ == "__main__":
  main()
