"""Table 5 of ALMA (arXiv 2412.04305) on the miniature world: which checkpoints write the responses.

  python launch/sweep.py --config=configs/ablations/table5_checkpoints.py --workdir=runs/table5

One initial SFT model, both of them, the last round's model, or all three (the paper's choice), with the same number of
responses in all; 3 seeds, five rounds of feedback each.

Last measured by `python -m benchmarks.effects run --parts=checkpoints`, ten seeds, size mini_paper, round 6: all three
minus the latest +0.01 +- 0.04, minus both initial models +0.03 +- 0.04, minus one of them +0.04 +- 0.05.
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
    for checkpoints in (("sft_1",), ("sft",), ("latest",), ("sft", "latest")):
      add(seed=seed, responses=dict(checkpoints=checkpoints))
