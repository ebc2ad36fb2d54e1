"""What every stage has at hand: the run directory, this host's devices, the mesh of all hosts, the round's Options.

A `Session` is a view of the run at one round; `s.rounds()` yields the views of the feedback rounds. Training and
k-means use `mesh`, which spans all hosts; sampling, scoring and embedding use `host`, so that no host waits for another
inside a stage.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import jax
from ml_collections import ConfigDict

from alma_jax import options as options_lib
from alma_jax.options import Checked, option, refuse
from alma_jax.runtime import alarms, tracking
from alma_jax.runtime.display import Display
from alma_jax.runtime.host import Checkpoint, EngineOptions, Host, ModelOptions
from alma_jax.store import layout, shards
from alma_jax.store.runs import Run, Stage
from alma_jax.text import chat

LOST = 0.05  # a share of rows that are cut or dropped which is worth a line on the screen


@dataclasses.dataclass(frozen=True)
class MeshOptions(Checked):
  """The mesh of training, over all hosts; -1: what the other axes leave."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ("data", "fsdp", "tensor"):
      if getattr(self, name) < 1 and getattr(self, name) != -1:
        refuse(name, getattr(self, name), "must be at least 1, or -1 for what the other axes leave")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(Checked):
  """What the Options of every recipe have."""

  recipe: str
  seed: int = option(0, least=0)
  shards: int = option(least=1)  # parts per stage: the unit of resuming and of splitting over hosts
  model: ModelOptions
  mesh: MeshOptions
  engine: EngineOptions
  alarms: alarms.Options
  track: tracking.Kind = option("", practical=True)  # "trackio" or "wandb"; beside TensorBoard's files


O = TypeVar("O", bound=RunOptions)


@dataclasses.dataclass(frozen=True)
class Session(Generic[O]):
  run: Run
  host: Host
  mesh: jax.sharding.Mesh
  by_round: Mapping[int, O]  # under 0 those of the whole run
  config: ConfigDict  # as the user gave it, to be kept with the run
  round: int = 0

  @property
  def options(self) -> O:
    """The Options of this round."""
    return self.by_round[self.round]

  @property
  def display(self) -> Display:
    return self.host.display

  @property
  def base(self) -> Checkpoint:
    return self.host.base

  def at(self, round: int, options: O | None = None) -> "Session[O]":
    """The view of a round, under other `options` where they are given."""
    by_round = self.by_round if options is None else {**self.by_round, round: options}
    return dataclasses.replace(self, round=round, by_round={round: by_round[0], **by_round})

  def rounds(self) -> Iterator["Session[O]"]:
    """The feedback rounds, whose resolved config is written to the run directory."""
    for round in sorted(self.by_round.keys() - {0}):
      if self.run.process == 0:
        resolved = options_lib.for_round(self.config, round).to_dict()
        path = self.run.dir / layout.round_name(round) / layout.CONFIG
        shards.write_json(path, json.loads(json.dumps(resolved, default=str)))
      yield self.at(round)

  def stage(self, artefact: str, fields: dict[str, Any], inputs: Mapping[str, Any] | None = None) -> Stage:
    """The stage of this round that makes `artefact`."""
    return self.run.stage(layout.stage_name(self.round, artefact), fields, inputs)

  def tell(self, name: str, counts: Mapping[str, int], total: int, lost: Mapping[str, str]) -> None:
    """Print those of the counts that are more than LOST of `total`; `lost` says what each of them means."""
    for count, meaning in lost.items():
      n = counts.get(count, 0)
      if n > LOST * total:
        self.display.say(f"{name}: {n:,} of {total:,} {meaning} ({n / total:.1%})")

  def describe_text(self) -> dict[str, Any]:
    """The part of every fingerprint that says how text becomes tokens."""
    host = self.host
    padded = {"vocab": host.vocab} if host.vocab > max(host.config.vocab, host.tokenizer.size) else {}
    return {"tokenizer": host.tokenizer.fingerprint, "chat": chat.described(host.chat)} | padded
