"""The loss of a checkpoint on the validation: demonstrations that nothing is trained on, by the code that trains.

It is measured beside the grades of the generations: LIMA (its Figure 9) finds that the two part.
"""

from typing import Any

import numpy as np

from alma_jax.corpus.normalise import prompt_id
from alma_jax.errors import NotFinite, RunError
from alma_jax.runtime import training
from alma_jax.runtime.batches import compact
from alma_jax.runtime.host import Checkpoint
from alma_jax.runtime.session import Session
from alma_jax.store import layout, statistics
from alma_jax.store.handles import Data
from alma_jax.store.records import Loss
from alma_jax.store.runs import Artefact
from alma_jax.store.statistics import Mean
from alma_jax.text import chat, packing


def build(s: Session[Any], checkpoint: Checkpoint, data: Data, options: training.Options) -> Mean | None:
  """The round's loss in nats per supervised token, with an interval over demonstrations; None without a validation."""
  if not data.validation:
    return None
  fields = {
    "checkpoint": checkpoint.content,
    "data": {"validation": data.digests["validation"]},
    "config": {"row_length": options.row_length},
    "text": s.describe_text(),
    "dtype": s.host.dtype,
  }
  stage = s.stage(layout.LOSS, fields)
  if not stage.done:
    rows = data.validation
    sequences = [
      compact(*chat.encode_example(s.host.tokenizer, s.host.chat, r.messages, r.response or "")) for r in rows
    ]
    clipped, counts = packing.clip(sequences, options.row_length, 1)
    kept = [(row, x) for row, of in zip(rows, clipped, strict=True) if of is not None for x in of]
    if not kept:
      raise RunError(f"no response token of the validation lies within {options.row_length} tokens (row_length)")
    try:
      logprobs = training.sequence_logprobs(s, checkpoint, [x for _, x in kept], options)
    except NotFinite as error:
      raise checkpoint.gave(error, f"validation row {error.item + 1}") from None
    records = [
      Loss(prompt_id(row.messages), int(np.sum(mask[1:] != 0)), float(logprob))
      for (row, (_, mask)), logprob in zip(kept, logprobs, strict=True)
    ]
    if stage.mine(1):
      stage.write_part(0, 1, records, Loss)
    stage.finish(counts=counts)
  return of_rows(Artefact(stage, Loss).read())


def of_rows(rows: list[Loss]) -> Mean:
  """The loss per token of all rows; the interval is that of a ratio of two sums over rows."""
  tokens = np.array([row.tokens for row in rows], np.float64)
  nats = np.array([-row.logprob for row in rows], np.float64)
  value = nats.sum() / tokens.sum()
  spread = statistics.mean((nats - value * tokens) / tokens.mean())
  return Mean(float(value), spread.ci95 if spread else None, len(rows))
