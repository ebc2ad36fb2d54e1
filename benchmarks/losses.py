"""The log-prob core against materialised logits: temporaries and time of forward and backward passes, on one core.

  python -m benchmarks.losses [--rows=4] [--time=512] [--width=256] [--vocab=128256] [--repeats=3]

Hidden states of rows * time places, fp32, are multiplied by the head of a large vocabulary. The benchmark measures the
weighted sum of the targets' log-probabilities and its gradients for the head and the hidden states. The script pins
itself to one core and one thread; the programs take turns, and the best process time of each counts:

  materialised    all logits, then the derivative of log-softmax
  per token       crossentropy.token_logprobs, as preferences use it: the backward pass computes every tile again
  summed          crossentropy.weighted_logprobs, as SFT uses it: the forward pass computes the gradients

once with all places supervised, and once with only the last third of every row, as in packed rows of prompts and
responses.

What to expect: temporaries are those of XLA's memory_analysis of the compiled program; tiles need one tile and one
gradient of the head, however many places there are. Materialised logits pay for memory that the system hands out anew
in every call, which counts as process time; with --time=128 this cost is small, the saving is 0.4x, and computing tiles
again costs 1.1x to 1.2x. The script ends with an AssertionError if the sum or a gradient differs by more than 1e-5 of
its largest entry, or if bfloat16 inputs miss a log-prob by more than 1e-4.
"""

import argparse
import os
import time
import types

os.environ |= {
  "OMP_NUM_THREADS": "1",
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
if hasattr(os, "sched_setaffinity"):
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from alma_jax.engine import crossentropy

MEMORY, TIME = 1 / 4, 1.05  # targets, as shares of what materialised logits take
DENSE, PER_TOKEN, SUMMED = "materialised", "per token", "summed"


class Case(NamedTuple):
  """What a program computes with; the first two are differentiated."""

  head: Any  # [D, V]
  hidden: Any  # [B, T, D]
  targets: Any  # [B, T]
  weights: Any  # [B, T]


class Cost(NamedTuple):
  mib: float  # of temporaries
  seconds: float  # the least process time
  worst: float  # largest difference to materialised logits, as a share of the largest entry


def main() -> None:
  flags = argparse.ArgumentParser(description="What does the log-prob core save, and what does it cost?")
  for name, value in dict(rows=4, time=512, width=256, vocab=128_256, repeats=3).items():
    flags.add_argument(f"--{name}", type=int, default=value)
  flags = flags.parse_args()
  case = random_case(flags.rows, flags.time, flags.width, flags.vocab)
  print(f"{flags.rows} x {flags.time} places, {flags.width} wide, {flags.vocab:,} tokens; logits take", end=" ")
  print(f"{4 * flags.rows * flags.time * flags.vocab / 2**20:,.0f} MiB; targets: memory 0.25x, time 1.05x")
  for share, first in (("all places", 0), ("the last third", -(-2 * flags.time // 3))):
    weights = case.weights * (np.arange(flags.time) >= first)
    print(f"\n{share + ' supervised':26} {'MiB':>8} {'':>7} {'seconds':>8} {'':>7} {'differs by':>11}")
    costs = measured(case._replace(weights=weights), flags.repeats)
    for name, (mib, seconds, worst) in costs.items():
      memory, slower = mib / costs[DENSE].mib, seconds / costs[DENSE].seconds
      met = "" if name == DENSE else "met" if memory <= MEMORY and slower <= TIME else "not met"
      print(f"{name:26} {mib:8,.0f} {memory:6.2f}x {seconds:8.3f} {slower:6.2f}x {worst:11.1e}  {met}")
  print(f"\nbfloat16 inputs: log-probs off by {bfloat16_error(case):.1e}; target 1e-4")
  print(f"jax {jax.__version__}; fp32, one core")


def random_case(rows: int, length: int, width: int, vocab: int) -> Case:
  """A case whose logits have a standard deviation of about 2."""
  rng = np.random.default_rng(0)
  head = rng.standard_normal((width, vocab), np.float32) * np.float32(2 / width**0.5)
  hidden = rng.standard_normal((rows, length, width), np.float32)
  return Case(head, hidden, rng.integers(0, vocab, (rows, length)), np.ones((rows, length), np.float32))


def model(head: Array) -> Any:
  """A stand-in with the attributes of a Llama that the core reads."""
  return types.SimpleNamespace(c=types.SimpleNamespace(vocab=head.shape[1], tied=False), head=head)


def materialised(head: Array, hidden: Array, targets: Array, weights: Array) -> Array:
  z = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
  logprobs = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(z, axis=-1)
  return (logprobs * weights).sum()


def per_token(head: Array, hidden: Array, targets: Array, weights: Array) -> Array:
  return (crossentropy.token_logprobs(model(head), hidden, targets, weights > 0) * weights).sum()


def summed(head: Array, hidden: Array, targets: Array, weights: Array) -> Array:
  return crossentropy.weighted_logprobs(model(head), hidden, targets, weights)


def measured(case: Case, repeats: int) -> dict[str, Cost]:
  """The cost of each program, by name."""
  case = jax.device_put(case)
  programs, best, worst = {}, {}, {}
  for name, f in ((DENSE, materialised), (PER_TOKEN, per_token), (SUMMED, summed)):
    programs[name] = jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(*case).compile()
  wanted = None
  for _ in range(repeats):
    for name, program in programs.items():
      start = time.process_time()
      found = jax.block_until_ready(program(*case))
      best[name] = min(best.get(name, float("inf")), time.process_time() - start)
      wanted = jax.device_get(found) if wanted is None else wanted
      worst[name] = difference(found, wanted)
      assert worst[name] <= 1e-5, f"{name} differs from materialised logits by {worst[name]:.1e}"
  memory = {name: program.memory_analysis().temp_size_in_bytes / 2**20 for name, program in programs.items()}
  return {name: Cost(memory[name], best[name], worst[name]) for name in programs}


def difference(found: Any, wanted: Any) -> float:
  """The largest difference between the arrays of two results, as a share of the largest entry."""
  pairs = zip(jax.tree.leaves(jax.device_get(found)), jax.tree.leaves(wanted), strict=True)
  return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def bfloat16_error(case: Case, places: int = 256) -> float:
  """The largest error of log-probs of bfloat16 inputs, against float64 on the same inputs."""
  head, hidden = jnp.asarray(case.head, jnp.bfloat16), jnp.asarray(case.hidden[:1, :places], jnp.bfloat16)
  targets = case.targets[:1, :places]
  found = np.asarray(jax.jit(lambda h, x: crossentropy.token_logprobs(model(h), x, targets))(head, hidden))[0]
  z = np.asarray(hidden[0], np.float64) @ np.asarray(head, np.float64)
  most = z.max(axis=-1)
  wanted = z[np.arange(len(z)), targets[0]] - most - np.log(np.exp(z - most[:, None]).sum(axis=-1))
  worst = float(np.abs(found - wanted).max())
  assert worst <= 1e-4, f"bfloat16 log-probs are off by {worst:.1e}"
  return worst


if __name__ == "__main__":
  main()
