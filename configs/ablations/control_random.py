"""A control for every table, on the miniature world: the judge's choice against a random finished response.

  python launch/sweep.py --config=configs/ablations/control_random.py --workdir=runs/control

Random selection keeps everything but the judge: the prompts, the sampling, the filter on finished responses, the
training. What best-of-n gains over it is what the judge is worth. 2 methods x 3 seeds, five rounds of feedback each.

Last measured by `python -m benchmarks.effects run --parts=control`, ten seeds on each of two base models, size
mini_paper, round 6: the judge's choice +1.44 +- 0.17 above a random response, which gains +0.08 +- 0.12 over the
initial SFT.
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
    for method in ("best_of_n", "random"):
      add(seed=seed, trainset=dict(method=method))
