"""Figure 3 of ALMA (arXiv 2412.04305) on the miniature world: the number of responses per prompt, N.

  python launch/sweep.py --config=configs/ablations/figure3_n.py --workdir=runs/figure3

N = 1, 4, 16, 64, 128 x 3 seeds, three rounds of feedback each. N = 1 trains on whatever the models wrote. The paper
goes to 400: with configs/alma.py:8b a run for each --config.responses.n=1 .. 400.

Last measured by `python -m benchmarks.effects run --parts=samples`, ten seeds on each of two base models, one round:
the judge's choice among 1, 16 and 128 samples 7.13, 9.77 and 9.76 (top-p 0.9); 6.56, 9.63 and 9.00 (top-p 1).
"""

from collections.abc import Callable

from configs import alma
from configs.common import Config


def get_config() -> Config:
  c = alma.mini()
  c.feedback_rounds = 3
  return c


def sweep(add: Callable[..., None]) -> None:
  for seed in range(3):
    for n in (1, 4, 16, 64, 128):
      add(seed=seed, responses=dict(n=n))
