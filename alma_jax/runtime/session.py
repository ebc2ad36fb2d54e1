"""What every stage has at hand: the run directory, the meshes, the tokenizer and chat format, models on devices.

One `Session` per process. Training uses `mesh`, which spans all hosts; sampling, scoring and embedding use
`local_mesh`, which spans this host's devices only, so that no host waits for another inside a stage.
"""

import dataclasses
import json

from ml_collections import ConfigDict

from alma_jax import options as configs
from alma_jax.engine.choose import DecodingError
from alma_jax.runtime import sampling, training
from alma_jax.runtime.host import Checkpoint, Host, content_of
from alma_jax.store import shards


class Session(Host):
  def __init__(self, run, config, mesh, local_mesh):
    configs.check(config, 1 + config.feedback_rounds)
    if not config.model.path:
      raise configs.ConfigError("config.model.path is empty: give the directory of a base model in Hugging Face format")
    super().__init__(config, local_mesh, speaks=run.process == 0)
    self.run, self.mesh = run, mesh
    for round in (0, *self.feedback_rounds()):
      resolved = configs.for_round(config, round)
      _check_sampling(resolved, "config")
      _check_training(resolved, f"config in round {round}" if round else "config", self.dtype)
    self.base = Checkpoint("base", self.directory, content_of(self.directory))

  def feedback_rounds(self):
    """2, 3, ...: round 1 is the initial SFT."""
    return range(2, 2 + self.config.feedback_rounds)

  def config_for(self, round):
    """The config with the round's overrides; also written to the run directory."""
    resolved = configs.for_round(self.config, round)
    if self.run.process == 0:
      directory = self.run.dir / f"round_{round:02d}"
      directory.mkdir(exist_ok=True)
      shards.write_json(directory / "config.json", json.loads(json.dumps(resolved.to_dict(), default=str)))
    return resolved

  def describe_text(self):
    """The part of every fingerprint that says how text becomes tokens."""
    return {"tokenizer": self.tokenizer.fingerprint, "chat": dataclasses.asdict(self.chat)}


def _check_sampling(section, where):
  """A way of sampling that there is not is found now, not after hours of training."""
  if "max_new_tokens" in section:
    try:
      sampling.decoding_of(section)
    except DecodingError as error:
      raise configs.ConfigError(f"{where}.{error}") from None
  for name, value in section.items():
    if isinstance(value, ConfigDict):
      _check_sampling(value, f"{where}.{name}")


def _check_training(section, where, dtype):
  """Nor a training that there is not; `where` is the section's name."""
  if "epochs" in section:
    try:
      training.check(section, dtype)
    except ValueError as error:
      raise configs.ConfigError(f"{where}: {error}") from None
  for name, value in section.items():
    if isinstance(value, ConfigDict):
      _check_training(value, f"{where}.{name}", dtype)
