"""The share of a training's places that hold tokens, and how long it takes to choose the shapes.

  python -m benchmarks.padding                # three epochs on one device and on eight ways, as docs/speed.md has them
  python -m benchmarks.padding --time         # process time for up to 500,000 examples an epoch

Lengths are drawn evenly from 20 to 399, or log-normal (median 290, sigma 0.8, cut at 2,048). The number of a training's
shapes stands in brackets. With several ways each of them has a row at least: `most` is what would be filled if every
step had a shape of its own, in which a way's row is as long as the longest example, or takes its part of the tokens.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from alma_jax.runtime.batches import Batches, Examples, Sizes

CELLS = [("20 to 399", 8, 2048), ("20 to 399", 16, 512), ("20 to 399", 32, 512), ("20 to 399", 32, 2048)]
CELLS += [("log-normal", batch, 2048) for batch in (8, 16, 32)]
COUNTS = 60, 1000, 5000
LARGE = [(5_000, 8), (50_000, 32), (50_000, 128), (500_000, 32)]


def main(arguments: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--time", action="store_true", help="measure how long the choice takes")
  for line in times() if parser.parse_args(arguments).time else shares(COUNTS):
    print(line, flush=True)


def drawn(kind: str, count: int) -> Examples:
  rng = np.random.default_rng(count)
  if kind == "log-normal":
    lengths = np.clip(rng.lognormal(np.log(290), 0.8, count), 20, 2048).astype(int)
  else:
    lengths = rng.integers(20, 400, count)
  return Examples([(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths.tolist()], range(count))


def shares(counts: Sequence[int]) -> Iterator[str]:
  for ways in (1, 8):
    on = "one device" if ways == 1 else f"{ways} ways"
    yield f"\n| lengths, {on} | examples of a step, `row_length` | {' | '.join(f'{n:,}' for n in counts)} |"
    yield "|---|---" + "|---" * len(counts) + "|"
    for kind, batch, row_length in CELLS:
      cells = []
      for count in counts:
        made = Batches(drawn(kind, count), Sizes(batch=batch, epochs=3.0, row_length=row_length), 5, ways)
        most = f", most {_most(made, ways):.2f}" if ways > 1 else ""
        cells.append(f"{made.useful:.2f} ({len(set(made.shapes))}){most}".replace("0.", "."))
      yield f"| {kind} | {batch}, {row_length:,} | {' | '.join(cells)} |"


def _most(batches: Batches, ways: int) -> float:
  steps = [batches.lengths(step) for step in range(batches.steps)]
  return sum(map(sum, steps)) / sum(max(sum(lengths), ways * max(lengths)) for lengths in steps)


def times() -> Iterator[str]:
  for count, batch in LARGE:
    data, options = drawn("log-normal", count), Sizes(batch=batch, epochs=3.0, row_length=2048)
    begin = time.process_time()
    made = Batches(data, options, 5, 1)
    yield f"{count:,} examples, {batch} of a step, {made.steps:,} steps: {time.process_time() - begin:.2f} s"


if __name__ == "__main__":
  main(sys.argv[1:])
