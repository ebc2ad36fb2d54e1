"""Table 5 of ALMA (arXiv 2412.04305) on the miniature world: which checkpoints write the responses.

  python launch/sweep.py --config=configs/ablations/table5_checkpoints.py --workdir=runs/table5

One initial SFT model, both of them, the last round's model, or all three (the paper's choice), with the same number of
responses in all; 3 seeds, five rounds of feedback each.
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
