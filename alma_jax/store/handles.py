"""What stages give each other, beside plain `Artefact`s of records."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from alma_jax.errors import RunError
from alma_jax.store import shards
from alma_jax.store.data import SeedRow
from alma_jax.store.records import Example, Graded, Pair, Prompt
from alma_jax.store.runs import Artefact, Stage

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """Evaluation prompts; `digest` is that of their file."""

  name: str
  rows: list[SeedRow]
  digest: str
  fields: Sequence[Mapping[str, Any]] = ()  # of each row, as they stand in the file, for judges that read them

  def fits(self, judge: object) -> bool:
    """True if every row has the fields that this judge reads; most judges read none."""
    needs = getattr(judge, "needs", ())
    return not needs or (bool(self.fields) and all(x.get(name) is not None for x in self.fields for name in needs))


@dataclasses.dataclass(frozen=True)
class Data:
  """The human data, and the digests of its files for fingerprints."""

  sft: list[SeedRow]
  judge: list[SeedRow]
  eval: list[SeedRow]
  digests: Mapping[str, str]
  held_out: Sequence[SeedRow] = ()  # the prompts of the other evaluation sets that were named when the run began
  preferences: Sequence[SeedRow] = ()  # pairs of answers
  prompts: Sequence[SeedRow] = ()  # without an answer
  validation: Sequence[SeedRow] = ()  # demonstrations of which only the loss is measured


@dataclasses.dataclass(frozen=True)
class Pool:
  """Prompts, and the cluster of each; prompts that are added later go to the clusters of the first pool."""

  prompts: Artefact[Prompt]
  projection: Stage
  clusters: Stage


@dataclasses.dataclass(frozen=True)
class Trainset(Artefact[Example | Pair | Graded]):
  """A round's training data, a part for each share of the prompts; `order.npy` puts them in the prompts' order."""

  def in_order(self, kind: type[T]) -> list[T]:
    """All records, which must be of this class, in the order of the round's prompts."""
    if self.kind is not kind:
      raise RunError(
        f"{self.name} holds {self.kind.__name__} records, and a training that follows learns from {kind.__name__}"
        " records: set its `history` to 'latest', or keep trainset.method over the rounds"
      )
    return Artefact(self.stage, kind).rows(shards.load_array(self.dir / "order.npy"))
