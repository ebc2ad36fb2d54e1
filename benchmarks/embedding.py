"""Embedding prompts against transformers: rates and ratios on one core, with equal vectors asserted in the same run.

  python -m benchmarks.embedding [--rows=256] [--length=32] [--ragged=2048] [--repeats=3]

A random Llama gives each row of tokens the mean of its last hidden states, BOS left out, in fp32: that of
benchmarks/sampling.py (5.2M parameters), and one of the size of the miniature world's base (0.2M). The script pins
itself to one core and one thread; everyone takes turns, with several batch sizes, and the best process time of each
counts. Two kinds of rows:

  equal    all of --length tokens: transformers' LlamaModel against engine.embed, nothing is padded; the ratio is given
           for each size of batch, and for the best of both
  ragged   prompts as people write them: lognormal, 20 words on average; transformers pads a batch to its longest row,
           in the order in which they come, and so does "padded", our model without the buckets of engine.embed

What to expect: wall-clock time depends on what else the machine does, process time and the ratios hardly do. On equal
rows the larger model does little else than products of matrices, and those of torch are up to a tenth quicker than
XLA's. Of ragged ones the buckets' last batches are not full, which costs less the more rows there are. It ends with an
AssertionError where a vector differs by more than 1e-4.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

os.environ |= {
  "OMP_NUM_THREADS": "1",
  "MKL_NUM_THREADS": "1",
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}

import jax
import numpy as np
import torch
import transformers

from alma_jax.engine import buckets, embed
from alma_jax.llama.config import to_hf
from alma_jax.llama.model import Llama
from alma_jax.mini import pretrain
from benchmarks import sampling

BATCHES = (8, 16, 32)  # rows per call
WORDS, SPREAD = 20, 0.8  # of ragged rows: the mean, and the deviation of the logarithm
THEIRS, PADDED, OURS = "transformers", "alma_jax, padded", "alma_jax"
TARGETS: dict[str, dict[str, float]] = {"equal": {THEIRS: 1.2}, "ragged": {THEIRS: 2.0, PADDED: 2.0}}


def main() -> None:
  flags = argparse.ArgumentParser(description="How fast are embeddings against their peers, on one core?")
  for name, value in dict(rows=256, length=32, ragged=2048, repeats=3).items():
    flags.add_argument(f"--{name}", type=int, default=value)
  flags = flags.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  torch.set_num_threads(1)
  kinds = {"equal": [flags.length] * flags.rows, "ragged": lengths(flags.ragged)}
  print(f"{'':28} {'rows/s':>9} {'batch':>6} {'alma_jax':>9} {'target':>7} {'differs by':>11}")
  small = {name: x for name, x in to_hf(pretrain.config()).items() if name in sampling.MODEL}
  for kind, sizes in (("equal", {}), ("equal", small), ("ragged", {})):
    with tempfile.TemporaryDirectory() as directory:
      hf, model = sampling.saved_model(directory, **sizes), sampling.our_model(directory)
    wanted = kinds[kind]
    about = f"the longest {max(wanted)}; {model.c.parameters / 1e6:.1f}M parameters"
    print(f"{kind}: {len(wanted)} rows of {np.mean(wanted):.1f} tokens, {about}")
    for line in compared(kind, hf, model, rows_of(wanted, hf.config.vocab_size), flags.repeats):
      print(line, flush=True)
  print(f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}; fp32, one core")


def lengths(n: int) -> list[int]:
  """Tokens of ragged rows with BOS, a token for each word."""
  words = np.random.default_rng(0).lognormal(np.log(WORDS) - SPREAD**2 / 2, SPREAD, n)
  return (1 + np.maximum(1, words.round())).astype(int).tolist()


def rows_of(lengths: Sequence[int], vocabulary: int) -> list[tuple[int, ...]]:
  draw = np.random.default_rng(1)
  return [(1, *draw.integers(2, vocabulary, length - 1).tolist()) for length in lengths]


def compared(kind: str, hf: Any, model: Llama, rows: Sequence[tuple[int, ...]], repeats: int) -> Iterator[str]:
  """The lines of one kind of rows."""
  peers = {
    THEIRS: lambda batch: theirs(hf, rows, batch),
    PADDED: lambda batch: padded(model, rows, batch),
    OURS: lambda batch: embed.embeddings(model, rows, batch),
  }
  peers = {name: run for name, run in peers.items() if name in (*TARGETS[kind], OURS)}
  found = {}

  def piece(name: str, batch: int) -> Any:
    return sampling.cpu(lambda: found.update({(name, batch): peers[name](batch)}))

  seconds = sampling.best({(name, batch): piece(name, batch) for name in peers for batch in BATCHES}, repeats)
  worst = {key: float(np.abs(x - found[THEIRS, BATCHES[0]]).max()) for key, x in found.items()}
  assert max(worst.values()) < 1e-4, f"the vectors differ: {worst}"
  if kind == "equal":
    for batch in BATCHES:
      ratio = seconds[THEIRS, batch] / seconds[OURS, batch]
      yield f"  {f'both {batch} rows at a time':26} {'':>9} {batch:6d} {ratio:8.2f}x"
  best = {name: min(BATCHES, key=lambda batch: seconds[name, batch]) for name in peers}
  for name, batch in best.items():
    ratio, target = seconds[name, batch] / seconds[OURS, best[OURS]], TARGETS[kind].get(name)
    yield (
      f"  {name:26} {len(rows) / seconds[name, batch]:9.1f} {batch:6d} {ratio:8.2f}x"
      f" {f'{target}x' if target else '':>7} {worst[name, batch]:11.1e}"
    )


@torch.inference_mode()
def theirs(hf: Any, rows: Sequence[tuple[int, ...]], batch: int) -> np.ndarray:
  found = []
  for tokens, sizes in batches(rows, batch):
    inside = torch.from_numpy(np.arange(tokens.shape[1]) < sizes[:, None])
    mask = None if inside.all() else inside.long()
    hidden = hf.model(torch.from_numpy(tokens).long(), attention_mask=mask, use_cache=False).last_hidden_state
    inside[:, 0] = False
    found.append((hidden * inside[..., None]).sum(dim=1) / inside.sum(dim=1, keepdim=True))
  return torch.cat(found).numpy()


def padded(model: Llama, rows: Sequence[tuple[int, ...]], batch: int) -> np.ndarray:
  """Our model with batches as they come, of as few widths as our buckets have: each other one would be compiled."""
  found = []
  for tokens, sizes in batches(rows, batch):
    cut = [row[:n] for row, n in zip(tokens.tolist(), sizes, strict=True)]
    wide, sizes = buckets.padded(cut, buckets.rounded(tokens.shape[1]))
    found.append(embed._pooled(model, None, wide, sizes, mesh=None, layers=None, pooling="mean"))
  return np.concatenate([np.asarray(x) for x in found])


def batches(rows: Sequence[tuple[int, ...]], batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields tokens and lengths of rows in their order, as wide as the longest."""
  for start in range(0, len(rows), batch):
    part = rows[start : start + batch]
    yield buckets.padded(part, max(map(len, part)))


if __name__ == "__main__":
  main()
