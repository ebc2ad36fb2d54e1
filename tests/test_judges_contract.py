"""What holds of every judge: a missing score is counted, never guessed, and never selects."""

import dataclasses

import pytest

from alma_jax.judges import contract
from alma_jax.judges.contract import Answered, Verdict

PAIRS = [Answered([{"role": "user", "content": "?"}], text) for text in ("4", "", "7")]


@dataclasses.dataclass(frozen=True)
class Reads:
  """Gives the number that a response holds."""

  identity: str = "reads"
  scale: contract.Scale = (0.0, 10.0)

  def scores(self, pairs):
    return [Verdict(float(text) if text else None) for _, text in pairs]


def test_a_missing_score_stays_missing_for_an_evaluator():
  assert [v.score for v in contract.scores(Reads(), PAIRS, missing=True)] == [4, None, 7]


def test_a_judge_that_selects_must_score_every_response():
  with pytest.raises(contract.MissingScores, match=r"'reads' gave 1 of 3 responses no score .* must score every"):
    contract.scores(Reads(), PAIRS)
  assert [v.number for v in contract.scores(Reads(), PAIRS[::2])] == [4, 7]


def test_more_than_2_in_100_missing_fail():
  contract.check_missing("reads", 2, 100)
  contract.check_missing("reads", 0, 0)
  with pytest.raises(contract.MissingScores, match="gave 3 of 100 responses no score that can be read, more than 2%"):
    contract.check_missing("reads", 3, 100)
