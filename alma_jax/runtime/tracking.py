"""Metrics, stages and scores of a run to trackio or Weights & Biases: `config.track = "trackio" | "wandb"`.

A thread of its own talks to the tracker. A training hands it values and goes on: a service that is down, slow or broken
costs a line on the screen, never a step. A restart goes on with the same tracked run, whose name is kept in the run
directory. What is tracked:

  sft_1/loss ...         every step of every training, against sft_1/step
  stages/done, seconds   when a stage is finished, and how long each took
  eval/truth ...         the scores of a round with their intervals, against eval/round; and the table of all rounds

TensorBoard's files of the trainings are written in any case.
"""

import importlib.util
import json
import os
import pathlib
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from alma_jax.options import ConfigError
from alma_jax.store import layout, shards
from alma_jax.store.layout import Manifest

Kind = Literal["", "trackio", "wandb"]
Say = Callable[[str], None]
WAITING = 100_000  # values that may wait for a service; later ones are dropped and counted
PAUSE = 60.0  # seconds between two tries to reach a service
FAREWELL = 30.0  # how long the end of a run waits for the last values


class Service(Protocol):
  """What is asked of a tracker's run."""

  def log(self, values: dict[str, Any]) -> None: ...
  def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None: ...
  def finish(self) -> None: ...


class Wandb:
  def __init__(self, directory: pathlib.Path, name: str, config: Mapping[str, Any]) -> None:
    import wandb  # pyright: ignore[reportMissingImports]

    self.wandb: Any = wandb
    project = os.environ.get("WANDB_PROJECT", "alma_jax")
    self.run = wandb.init(
      project=project, id=name, name=name, resume="allow", config=dict(config), dir=str(directory), reinit="create_new"
    )
    self.known: set[str] = set()

  def log(self, values: dict[str, Any]) -> None:
    for name in values:
      if (section := name.partition("/")[0]) not in self.known:
        self.known.add(section)  # each training counts its own steps
        self.run.define_metric(f"{section}/*", step_metric=f"{section}/{'round' if section == 'eval' else 'step'}")
    self.run.log(values)

  def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
    self.run.log({name: self.wandb.Table(columns=columns, data=rows)})

  def finish(self) -> None:
    self.run.finish()


class Trackio:
  """Its records stay here, in TRACKIO_DIR, unless TRACKIO_SPACE_ID names a Space; `trackio show` opens them."""

  def __init__(self, directory: pathlib.Path, name: str, config: Mapping[str, Any]) -> None:
    import trackio  # pyright: ignore[reportMissingImports]

    self.trackio: Any = trackio
    project, space = os.environ.get("TRACKIO_PROJECT", "alma_jax"), os.environ.get("TRACKIO_SPACE_ID")
    self.run = trackio.init(
      project=project, name=name, config=dict(config), resume="allow", space_id=space, embed=False, auto_log_gpu=False
    )

  def log(self, values: dict[str, Any]) -> None:
    self.run.log(values)

  def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
    self.run.log({name: self.trackio.Table(columns=columns, data=rows)})

  def finish(self) -> None:
    self.run.finish()


SERVICES: dict[str, Callable[..., Service]] = {"trackio": Trackio, "wandb": Wandb}


def check(kind: Kind) -> None:
  """Raise a ConfigError if the tracker's package is not here."""
  if kind and importlib.util.find_spec(kind) is None:
    raise ConfigError(f"config.track is {kind!r} and the package is not installed: pip install 'alma_jax[{kind}]'")


class Tracker:
  """A Watcher of a run that hands everything to a service, in a thread of its own."""

  def __init__(self, kind: Kind, run: pathlib.Path, config: Mapping[str, Any], say: Say) -> None:
    self.kind, self.run, self.config, self.say = kind, run, config, say
    self.name = name_of(run)
    self.queue: queue.Queue[Callable[[Service], None] | None] = queue.Queue(WAITING)
    self.dropped, self.warned = 0, False
    self.done: set[str] = set()  # stages
    self.over = threading.Event()  # nobody waits for the service any more
    self.thread = threading.Thread(target=self._work, daemon=True, name=f"track {kind}")
    self.thread.start()

  def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
    section = stage.replace("/", ".")
    told = {f"{section}/{name}": value for name, value in {"step": step, **values}.items()}
    self._put(lambda service: service.log(told))

  def begun(self, name: str) -> None:
    pass

  def finished(self, name: str, manifest: Manifest) -> None:
    self.done.add(name)
    done = len(self.done)
    values = {"stages/step": done, "stages/done": done, f"stages/{name.replace('/', '.')}": manifest["seconds"]}
    self._put(lambda service: service.log(values))

  def there(self, name: str, manifest: Manifest) -> None:
    self.done.add(name)

  def evaluated(self, row: Mapping[str, Any]) -> None:
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    self._put(lambda service: service.log({f"eval/{name}": value for name, value in numbers.items()}))
    rows = layout.progress(self.run)
    columns = list(dict.fromkeys(name for one in rows for name in one))
    self._put(lambda service: service.table("rounds", columns, [[one.get(c, "") for c in columns] for one in rows]))

  def close(self) -> None:
    """Hand over what waits, for at most FAREWELL seconds."""
    self._put(None)
    self.thread.join(FAREWELL)
    self.over.set()
    if self.thread.is_alive() or self.dropped:
      left = f"{self.queue.qsize() + self.dropped:,}"
      self.say(f"{self.kind}: {left} entries were not taken; the run's own files hold them all")

  def _put(self, what: Callable[[Service], None] | None) -> None:
    try:
      self.queue.put_nowait(what)
    except queue.Full:
      self.dropped += 1

  def _work(self) -> None:
    service: Service | None = None
    while (what := self.queue.get()) is not None:
      while service is None:
        service = self._tried(lambda: SERVICES[self.kind](self.run, self.name, self.config))
        if service is None and self.over.wait(PAUSE):
          return
      self._tried(lambda what=what, service=service: what(service))
    if service:
      self._tried(service.finish)

  def _tried(self, call: Callable[[], Any]) -> Any:
    """What the call returns, None if it fails; the first failure is said."""
    try:
      return call()
    except Exception as error:  # whatever a tracker raises must not end a training
      if not self.warned:
        self.warned = True
        why = str(error).splitlines()[0][:200] if str(error) else ""
        self.say(f"{self.kind} takes nothing ({type(error).__name__}: {why}); the run goes on without it")
      return None


def name_of(run: pathlib.Path) -> str:
  """The name of the tracked run, the same after every restart: the directory's with a few random letters."""
  path = run / layout.TRACKED
  if path.exists():
    return layout.read_json(path)["name"]
  name = f"{run.resolve().name}-{uuid.uuid4().hex[:6]}"
  shards.write_json(path, {"name": name})
  return name


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
  """A config as a tracker takes it."""
  return json.loads(json.dumps(config, default=str))
