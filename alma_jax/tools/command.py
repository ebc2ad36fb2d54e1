"""What the commands share: flags that name the nearest one, the model that --model means, errors without a traceback.

`model_of("runs/mini", newest_policy)` is the Hugging Face directory of a run's stage, together with the chat format and
judge template of the run; in such a directory given by itself the chat format is recognised by its chat template, if it
is one of those that this package writes.
"""

import argparse
import dataclasses
import difflib
import json
import pathlib

import absl.logging
import jax
from ml_collections import ConfigDict

from alma_jax import start
from alma_jax.engine.slots import SlotsError
from alma_jax.errors import RunError
from alma_jax.llama import sharding
from alma_jax.llama.config import ModelError, read_config
from alma_jax.runtime.host import MINI_CHECKPOINT, Checkpoint, Host, content_of
from alma_jax.store import shards
from alma_jax.store.runs import load_manifest
from alma_jax.text import chat
from alma_jax.text.tokenizer import TextError, load_tokenizer
from alma_jax.tools import jsonl

MODEL = """a Hugging Face directory, a run directory ({stage}), a finished stage of a run such as
runs/mini/round_03/policy, or mini: the base model that comes with the package"""


MEMORY = "Lower --slots (sampling) or --rows (scoring), or share the model among devices: --tensor."


class Flags(argparse.ArgumentParser):
  """argparse with one line per mistake, and no abbreviations: a script must not change its meaning with a new flag."""

  def __init__(self, module, doc, required="--model=DIR --input=FILE --output=FILE"):
    kind = argparse.RawDescriptionHelpFormatter
    usage = f"python -m {module} {required} [--flag=value ...]"
    super().__init__(usage=usage, description=doc, formatter_class=kind, allow_abbrev=False)

  def error(self, message):
    self.exit(2, f"error: {message} (--help lists the flags)\n")

  def values(self, arguments):
    flags, unknown = self.parse_known_args(arguments)
    if unknown:
      name = unknown[0].partition("=")[0]
      near = difflib.get_close_matches(name, self._option_string_actions, n=1)
      self.error(f"there is no flag {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return flags


def word(*words):
  """The type of a flag that is one of these words."""

  def parse(value):
    if value in words:
      return value
    near = difflib.get_close_matches(value, words, n=1, cutoff=0.0)[0]
    raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(words)}; did you mean {near!r}?")

  return parse


def number(kind, meaning, allowed):
  """The type of a flag that is a number for which `allowed` holds; `meaning` says so in words."""

  def parse(value):
    try:
      x = kind(value)
    except ValueError:
      x = None
    if x is None or not allowed(x):
      raise argparse.ArgumentTypeError(f"{value!r} is not {meaning}")
    return x

  return parse


COUNT = number(int, "a whole number of at least 1", lambda x: x >= 1)
NATURAL = number(int, "a whole number of at least 0", lambda x: x >= 0)
CHAT = word(*(fmt.name for fmt in chat.FORMATS))


def status(work):
  """The exit status of `work()`, whose mistakes of the user's are printed as one message."""
  absl.logging.set_verbosity(absl.logging.WARNING)
  start.cache_compilations()
  translation = "Here engine.slots is --slots and engine.tensor is --tensor."
  return start.status(work, MEMORY, lambda error: translation if isinstance(error, SlotsError) else None)


@dataclasses.dataclass(frozen=True)
class Model:
  """A model directory and what the run that made it says about it; None: nothing is known."""

  directory: pathlib.Path
  chat: str | None = None
  template: str | None = None
  dtype: str = "auto"


def model_of(name, stage_of):
  """The Model that --model means; `stage_of(run directory)` picks the stage of a run."""
  if name == "mini":
    return Model(MINI_CHECKPOINT, "mini", "mini")
  directory = pathlib.Path(name).expanduser()
  if not directory.is_dir():
    what = "is a file; give the directory it lies in" if directory.exists() else "does not exist"
    raise ModelError(f"--model: the directory {name} {what} (nothing is fetched from the Hugging Face hub)")
  if config := _run_config(directory):
    if "rounds" not in config:
      raise RunError(f"{directory} is one round of a run; give its policy, {directory / 'policy'}, or the whole run")
    return _model_of_stage(stage_of(directory))
  if any((directory / file).exists() for file in ("manifest.json", "fingerprint.json")):
    return _model_of_stage(directory)
  read_config(directory)  # the clearest error first
  return Model(directory, _recognised(directory))


def newest_policy(run):
  """The finished policy of a run's last round, else its first initial SFT model."""
  policies = [path.parent for path in sorted(run.glob("round_[0-9]*/policy/manifest.json"), key=_round)]
  first = [run / "sft_1"] if (run / "sft_1" / "manifest.json").exists() else []
  if not policies + first:
    raise RunError(f"{run}: the run has no finished policy yet; wait for its stage sft_1, or give another --model")
  return (first + policies)[-1]


def judge_of(run):
  """A run's distilled judge if it was accepted, else the fine-tuned one."""
  if not (run / "judge" / "manifest.json").exists():
    raise RunError(f"{run}: the run has no finished judge; wait for its stage judge, or give another --model")
  distilled = run / "judge_distilled"
  accepted = (distilled / "manifest.json").exists() and load_manifest(distilled)["accepted"]
  return distilled if accepted else run / "judge"


def _round(manifest):
  return int(manifest.parent.parent.name.partition("_")[2])


def _model_of_stage(stage):
  load_manifest(stage)  # a RunError where it is not finished
  if not (stage / "model" / "config.json").exists():
    raise RunError(f"{stage}: this stage holds no model; those that do: sft_1, judge, round_RR/policy")
  config = run_of(stage)
  settings = config["model"]
  return Model(stage / "model", settings["chat"], config.get("judge", {}).get("template"), settings["dtype"])


def run_of(stage):
  """The config of the run that a stage's directory lies in."""
  config = next((found for path in stage.absolute().parents if (found := _run_config(path))), None)
  if config is None:
    raise RunError(f"{stage}: no config.json of a run lies above this stage; give its model directory itself")
  return config


def _run_config(directory):
  """The config of a run directory or of a round in it, or None: models have a config.json, too."""
  config = json_of(directory / "config.json")
  return config if "recipe" in config else None


def _recognised(directory):
  """The name of the chat format whose chat template the directory holds, or None."""
  template = json_of(directory / "tokenizer_config.json").get("chat_template")
  if (directory / "chat_template.jinja").is_file():
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
  return next((fmt.name for fmt in chat.FORMATS if chat.jinja(fmt) == template), None)


def json_of(path):
  """The object in a file; an empty one where there is no file."""
  if not path.is_file():
    return {}
  try:
    return dict(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, TypeError) as error:
    raise ModelError(f"{path} is damaged ({error}); fetch or make it again") from None


def opened(flags, stage_of, raw=False):
  """(Model, Host, Checkpoint) of the flags model, chat, tensor, slots or rows; `raw`: without a chat format."""
  model = model_of(flags.model, stage_of)
  name = flags.chat or model.chat
  if not raw and name is None:
    raise TextError(_which_chat(model.directory))
  engine = {"slots": getattr(flags, "slots", None), "rows": getattr(flags, "rows", None), "tensor": flags.tensor}
  config = {"path": str(model.directory), "chat": "" if raw else name, "dtype": model.dtype}
  mesh = sharding.make_mesh(data=-1, tensor=flags.tensor, devices=jax.local_devices())
  host = Host(ConfigDict({"model": config, "engine": engine}), mesh)
  return model, host, Checkpoint(flags.model, host.directory, content_of(host.directory))


def decides(tool, flags, host, checkpoint):
  """What decides the output of every command, for `jsonl.Output`: (fields, what to call those that are digests)."""
  fields = {
    "tool": tool,
    "model": checkpoint.content[:16],
    "input": shards.digest(flags.input)[:16],
    "dtype": host.dtype,
    "chat": host.chat.name if host.chat else None,
    "chat text": jsonl.short_digest(dataclasses.asdict(host.chat)) if host.chat else None,
  }
  return fields, {"model": str(checkpoint.directory), "input": flags.input}


def _which_chat(directory):
  """What to say of a model whose chat format is not known: those that its tokenizer can write."""
  tokenizer, fit = load_tokenizer(directory), []
  for fmt in chat.FORMATS:
    try:
      fit += [] if chat.prepare(tokenizer, fmt)[1] else [fmt.name]
    except TextError:
      continue
  return (
    f"{directory}: its chat template is none of those that this package writes, so the chat format is not known:"
    f" give --chat ({', '.join(fmt.name for fmt in chat.FORMATS)}); its tokenizer has the tokens of"
    f" {' and '.join(fit) or 'none of them'}"
  )
