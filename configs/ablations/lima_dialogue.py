"""LIMA's ablation of dialogues (arXiv 2305.11206, section 6) on the miniature world.

  python launch/sweep.py --config=configs/ablations/lima_dialogue.py --workdir=runs/lima_dialogue

All demonstrations as single turns, or 24 of them as 12 dialogues of two turns; the evaluation prompts follow a turn of
history. 3 seeds.

Last measured by `python -m benchmarks.papers run --paper=lima`, ten seeds, ground truth of the chosen epochs on 480
other prompts: without dialogues 6.13 +- 0.23, with them 6.70 +- 0.17; paired +0.58 +- 0.19.
"""

from collections.abc import Callable

from configs import lima
from configs.common import Config


def get_config() -> Config:
  c = lima.mini()
  c.data.eval = "mini_dialogue"
  c.data.validation_held_out = 0
  c.eval.max_prompt_tokens = 100
  return c


def sweep(add: Callable[..., None]) -> None:
  for seed in range(3):
    for sft in ("mini", "mini_dialogue"):
      add(seed=seed, data=dict(sft=sft))
