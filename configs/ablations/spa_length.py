"""A control for length, SPA (arXiv 2406.04412) on the miniature world: pairs of any lengths, or of like lengths.

  python launch/sweep.py --config=configs/ablations/spa_length.py --workdir=runs/spa_length

Sums of log-ratios can favour long or short responses. With length_ratio 1.1 the longer response of a pair has at most
1.1 times the tokens of the shorter one, so that no pair teaches a length; 3 seeds, two iterations each.
Not measured: lengths do not drift on this world, by one character in 28 at most.
"""

from collections.abc import Callable

from configs import spa
from configs.common import Config


def get_config() -> Config:
  return spa.mini()


def sweep(add: Callable[..., None]) -> None:
  for seed in range(3):
    for ratio in (0.0, 1.1):
      add(seed=seed, trainset=dict(length_ratio=ratio))
