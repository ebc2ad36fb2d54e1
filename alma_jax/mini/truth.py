"""The miniature world's oracle as an evaluator: what a response is really worth. The pipeline never sees it."""

from collections.abc import Mapping, Sequence
from typing import Any

from alma_jax.judges.contract import Answered, Scale, Verdict
from alma_jax.mini import world
from alma_jax.runtime.host import Host


def category(row: Mapping[str, Any]) -> str | None:
  """What a prompt asks about; None for a text that is no prompt of this world."""
  task = world.parse(row["messages"][-1]["content"])
  return task.relation if task else None


class Truth:
  identity = "miniature world, guideline"
  scale: Scale = (0.0, 10.0)

  def __init__(self, runtime: Host, options: object) -> None:
    del runtime, options  # it needs neither a model nor values

  def scores(self, pairs: Sequence[Answered]) -> list[Verdict]:
    return [
      Verdict(world.truth(messages, response, finished))
      for (messages, response), finished in ((pair, pair.finished) for pair in pairs)
    ]
