"""Noisy labels, SPA (arXiv 2406.04412) on the miniature world: 0 to 30 % of people's pairs are turned round.

  python launch/sweep.py --config=configs/ablations/spa_noise.py --workdir=runs/spa_noise

Two iterations with plain DPO and with self-refinement and noise detection, 4 shares of noise, 3 seeds. A larger share
holds the turned pairs of a smaller one.

Last measured by `python -m benchmarks.papers run --paper=spa`, 6, 6 and 5 seeds, 10, 20 and 30 % turned: with
refinement minus without it +0.02 +- 0.09, -0.02 +- 0.05, +0.05 +- 0.08.
"""

from collections.abc import Callable

from configs import spa
from configs.common import Config


def get_config() -> Config:
  return spa.mini()


def sweep(add: Callable[..., None]) -> None:
  for seed in range(3):
    for flipped in (0.0, 0.1, 0.2, 0.3):
      add(seed=seed, seeds=dict(flipped=flipped), policy=dict(smoothing=0.0, mix=0.0))
      add(seed=seed, seeds=dict(flipped=flipped), policy=dict(smoothing=0.1, mix=0.5))
