"""Judging against transformers: rates and ratios on one core, with equal scores asserted in the same run.

  python -m benchmarks.judging [--prefixes=4] [--responses=16] [--prefix=160] [--response=64] [--repeats=7]

The random Llama of benchmarks/sampling.py (5.2M parameters, fp32) reads the log-probabilities of eleven tokens after
every response. The script pins itself to one core and one thread; everyone takes
turns, with several batch sizes, and the best process time of each counts:

  full forward    transformers on prompt and response as one row, logits_to_keep=1
  prefix cache    transformers on every prompt once, then on the responses with its cache repeated for them
  alma_jax        engine.score.next_logprobs, with all that it does on the host
  reward, full    transformers' LlamaForSequenceClassification on prompt and response as one row
  reward          the same head in alma_jax: engine.score.last_states and llama.heads

What to expect: wall-clock time depends on what else the machine does, process time and the ratios hardly do. It ends
with an AssertionError where a log-probability differs by more than 1e-4.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

os.environ |= {
  "OMP_NUM_THREADS": "1",
  "MKL_NUM_THREADS": "1",
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
if hasattr(os, "sched_setaffinity"):
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import numpy as np
import torch
import transformers

from alma_jax.engine import score
from alma_jax.llama import heads, weights
from benchmarks import sampling

COLUMNS = list(range(100, 111))  # where eleven scores might be
BATCHES = (8, 16, 32, 64)  # rows per call
FULL, CACHED, OURS = "transformers, full forward", "transformers, prefix cache", "alma_jax"
REWARD_FULL, REWARD = "transformers, reward model", "alma_jax, reward model"
TARGETS = {FULL: 3.5, CACHED: 1.2, REWARD_FULL: 3.0}
OF = {FULL: OURS, CACHED: OURS, OURS: OURS, REWARD_FULL: REWARD, REWARD: REWARD}  # what each is compared with


def main() -> None:
  flags = argparse.ArgumentParser(description="How fast is the judge against its peers, on one core?")
  for name, value in dict(prefixes=4, responses=16, prefix=160, response=64, repeats=7).items():
    flags.add_argument(f"--{name}", type=int, default=value)
  flags = flags.parse_args()
  torch.set_num_threads(1)
  with tempfile.TemporaryDirectory() as directory:
    hf, model = sampling.saved_model(directory), weights.load(directory)
  with tempfile.TemporaryDirectory() as directory:
    classifier = reward_model(hf, directory)
    head = heads.read(directory)
    assert isinstance(head, heads.Scalar)
    trunk = heads.trunk(directory, head, None, {}, "float32")

  def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(1, hf.config.vocab_size, shape)

  prefixes, responses = draw(flags.prefixes, flags.prefix), draw(flags.prefixes, flags.responses, flags.response)
  rows = [(tuple(p.tolist()), tuple(r.tolist())) for p, mine in zip(prefixes, responses, strict=True) for r in mine]
  peers = {
    FULL: lambda batch: full_forward(hf, prefixes, responses, batch),
    CACHED: lambda batch: prefix_cache(hf, prefixes, responses, batch),
    OURS: lambda batch: score.next_logprobs(model, rows, COLUMNS, 1, score.Setup(batch))[:, 0],
    REWARD_FULL: lambda batch: classified(classifier, prefixes, responses, batch),
    REWARD: lambda batch: head.values(score.last_states(trunk, rows, score.Setup(batch))),
  }
  found = {}

  def piece(name: str, batch: int) -> Callable[[], float]:
    return sampling.cpu(lambda: found.update({(name, batch): peers[name](batch)}))

  seconds = sampling.best({(name, batch): piece(name, batch) for name in peers for batch in BATCHES}, flags.repeats)
  theirs = {OURS: FULL, REWARD: REWARD_FULL}
  worst = {
    (name, batch): float(np.abs(x - found[theirs[OF[name]], BATCHES[0]]).max()) for (name, batch), x in found.items()
  }
  assert max(worst.values()) < 1e-4, f"the scores differ: {worst}"
  best = {name: min(BATCHES, key=lambda batch: seconds[name, batch]) for name in peers}
  print(f"{len(rows)} responses of {flags.response} tokens, {flags.responses} to each prefix of {flags.prefix}")
  print(f"{'':28} {'responses/s':>11} {'batch':>6} {'alma_jax':>9} {'target':>7} {'differs by':>11}")
  for name, batch in best.items():
    ratio, target = seconds[name, batch] / seconds[OF[name], best[OF[name]]], TARGETS.get(name)
    print(
      f"{name:28} {len(rows) / seconds[name, batch]:11.1f} {batch:6d} {ratio:8.2f}x"
      f" {f'{target}x' if target else '':>7} {worst[name, batch]:11.1e}"
    )
  print(f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}; fp32, one core")


def reward_model(hf: Any, directory: str) -> Any:
  """The transformer below a random head with one value, saved for the others."""
  config = transformers.LlamaConfig(**{**hf.config.to_dict(), "num_labels": 1})
  classifier = transformers.LlamaForSequenceClassification(config).eval()
  classifier.model.load_state_dict(hf.model.state_dict())
  classifier.save_pretrained(directory)
  return classifier


def whole_rows(prefixes: np.ndarray, responses: np.ndarray, batch: int) -> Sequence[torch.Tensor]:
  rows = np.concatenate([np.repeat(prefixes[:, None], responses.shape[1], axis=1), responses], axis=2)
  return torch.from_numpy(rows.reshape(-1, rows.shape[2])).split(batch)


@torch.inference_mode()
def full_forward(hf: Any, prefixes: np.ndarray, responses: np.ndarray, batch: int) -> np.ndarray:
  parts = whole_rows(prefixes, responses, batch)
  return scores([hf(part, logits_to_keep=1, use_cache=False).logits for part in parts])


@torch.inference_mode()
def classified(hf: Any, prefixes: np.ndarray, responses: np.ndarray, batch: int) -> np.ndarray:
  parts = whole_rows(prefixes, responses, batch)
  return torch.cat([hf(part, use_cache=False).logits for part in parts]).numpy()


@torch.inference_mode()
def prefix_cache(hf: Any, prefixes: np.ndarray, responses: np.ndarray, batch: int) -> np.ndarray:
  n, found = responses.shape[1], []
  at_once = max(1, batch // n)
  for start in range(0, len(prefixes), at_once):
    mine = torch.from_numpy(responses[start : start + at_once])
    cache = hf(torch.from_numpy(prefixes[start : start + at_once]), logits_to_keep=1, use_cache=True).past_key_values
    cache.batch_repeat_interleave(n)
    found.append(hf(mine.flatten(0, 1), past_key_values=cache, logits_to_keep=1, use_cache=True).logits)
  return scores(found)


def scores(logits: list[torch.Tensor]) -> np.ndarray:
  return torch.cat(logits)[:, -1].log_softmax(dim=-1)[:, COLUMNS].numpy()


if __name__ == "__main__":
  main()
