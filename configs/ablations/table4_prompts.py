"""Table 4 of ALMA (arXiv 2412.04305) on the miniature world: diverse prompts against any prompts.

  python launch/sweep.py --config=configs/ablations/table4_prompts.py --workdir=runs/table4

One prompt from each of K clusters, or K prompts drawn at random; 3 seeds, five rounds of feedback each. The seeds of
one world differ more than these two: read the means over seeds with their intervals.

Last measured by `python -m benchmarks.effects run --parts=prompts`, ten seeds on each of two base models, size
mini_paper: diverse minus random +0.68 +- 0.12 after round 6, +0.65 +- 0.11 after round 10.
"""

from collections.abc import Callable

from configs import alma
from configs.common import Config


def get_config() -> Config:
  c = alma.mini()
  c.feedback_rounds = 5
  return c


def sweep(add: Callable[..., None]) -> None:
  for seed in range(3):
    for method in ("diverse", "random"):
      add(seed=seed, draw=dict(method=method))
