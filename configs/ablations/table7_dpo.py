"""Table 7 of ALMA (arXiv 2412.04305) on the miniature world: training on the best response, or on pairs with DPO.

  python launch/sweep.py --config=configs/ablations/table7_dpo.py --workdir=runs/table7

2 methods x 3 seeds, five rounds of feedback each. The paper compares them round by round: each run's progress.csv has
a row per round, the table of the sweep shows the last.

Last measured by `python -m benchmarks.effects run --parts=dpo`, ten seeds on each of two base models, size mini_paper,
round 6: DPO minus best of n +0.03 +- 0.06; without its NLL term it gains +0.84 +- 0.28 over the initial SFT, with it
+1.54 +- 0.18.
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
    for method in ("best_of_n", "dpo"):
      add(seed=seed, trainset=dict(method=method))
