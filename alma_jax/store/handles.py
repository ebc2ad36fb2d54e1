"""What stages give each other, beside plain `Artefact`s of records."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from alma_jax.errors import RunError
from alma_jax.store import layout, shards
from alma_jax.store.data import SeedRow, load_examples
from alma_jax.store.records import Example, Graded, Pair, Prompt
from alma_jax.store.runs import Artefact, Stage

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """Evaluation prompts; `digest` is that of their file."""

  name: str
  rows: list[SeedRow]
  digest: str


@dataclasses.dataclass(frozen=True)
class Data:
  """The human data, and the digests of its files for fingerprints."""

  sft: list[SeedRow]
  judge: list[SeedRow]
  eval: list[SeedRow]
  digests: Mapping[str, str]
  held_out: Sequence[SeedRow] = ()  # the prompts of the other evaluation sets that were named when the run began

  def sets(self, files: Mapping[str, str]) -> list[PromptSet]:
    """The evaluation prompts, and the sets in these files by name."""
    main = PromptSet(layout.MAIN_SET, self.eval, self.digests["eval"])
    return [main, *(PromptSet(name, load_examples(file, ())[0], shards.digest(file)) for name, file in files.items())]


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
