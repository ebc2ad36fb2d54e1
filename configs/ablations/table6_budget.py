"""Table 6 of ALMA (arXiv 2412.04305) on the miniature world: responses N, prompts K and rounds R at equal N x K x R.

  python launch/sweep.py --config=configs/ablations/table6_budget.py --workdir=runs/table6

N = 12, K = 24, R = 8; twice and half of N against K, as in the left table of the paper; twice and two thirds of N
against R, as in the right one; 3 seeds. Equal numbers of responses are not equal times: the sweep's table has the
measured device-seconds beside the score. The paper (N, K, R = 200, 50k, 10): 7.89 against 7.88 and 7.80, then 8.34
against 8.17 and 8.13.

Last measured by `python -m benchmarks.effects run --parts=budget`, ten seeds, size mini_paper, five rounds: twice N at
half K -0.48 +- 0.08, half N at twice K +0.42 +- 0.13, two rounds with 2.5 x K -0.03 +- 0.14.
"""

from collections.abc import Callable

from configs import alma
from configs.common import Config


def get_config() -> Config:
  c = alma.mini()
  c.feedback_rounds = 8
  return c


def sweep(add: Callable[..., None]) -> None:
  for seed in range(3):
    for n, k, rounds in ((12, 24, 8), (24, 12, 8), (6, 48, 8), (24, 24, 4), (8, 24, 12)):
      add(seed=seed, responses=dict(n=n), draw=dict(prompts=k), feedback_rounds=rounds)
