"""What the commands share: flags made of Options, the model that --model means, the run that an output is.

  FLAGS = Flags("sample", __doc__, Options, hidden=("rows",), temperature=0.8)   # a default of this command's own
  options = FLAGS.values(arguments)                         # an Options; a mistake is one line, and exit status 2
  opened = open_model(options, layout.newest_policy)        # the model, and its chat format and template
  with run_of(output, directory, options, mend) as run:     # resumed, locked, or refused if a value has changed

In a Hugging Face directory the chat format is recognised by its chat template, if it is one that this package writes.
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import pathlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NoReturn, TypeVar

import absl.logging

from alma_jax import names, start
from alma_jax.engine.slots import SlotsError
from alma_jax.errors import RunError, UserError
from alma_jax.judges import contract
from alma_jax.judges.contract import Judge
from alma_jax.judges.own import Mode, OwnJudge
from alma_jax.llama.config import ModelError, read_config
from alma_jax.options import Checked, ConfigError, build, fields_of, option, refuse, spread
from alma_jax.runtime.display import Display
from alma_jax.runtime.host import (
  Checkpoint,
  EngineOptions,
  Host,
  ModelOptions,
  content_of,
  fitting_chats,
  local_mesh,
  model_directory,
)
from alma_jax.store import data, digests, layout, shards
from alma_jax.store.data import DataError
from alma_jax.store.lock import LockedError
from alma_jax.store.runs import ChangedError, Run
from alma_jax.text import chat
from alma_jax.text import judge as templates
from alma_jax.text.judge import Shot
from alma_jax.text.tokenizer import TextError, load_tokenizer

MEMORY = "Lower --slots (sampling) or --rows (scoring), or share the model among devices: --tensor."
T = TypeVar("T")

# Flags

HELP = {  # of fields of the engine and of stages
  "temperature": "0: the likeliest token",
  "top_p": "sample from the likeliest tokens of this mass",
  "top_k": "sample from the k likeliest tokens; 0: from all",
  "repetition_penalty": "above 1: tokens that were there are less likely",
  "penalize_prompt": "the penalty also counts the prompt's tokens",
  "max_new_tokens": "length limit of a response; without it at most half of the model's positions",
  "min_new_tokens": "no stop token before that many",
  "tensor": "devices that share one copy of the model; 0: as few as leave room for sequences",
  "slots": "responses written together, per copy of the model; 0: what fits",
  "rows": "texts per call, per copy of the model",
  "k": "clusters",
  "iterations": "at most; fewer where nothing changes any more",
  "spherical": "vectors and centroids of length 1",
  "per_centroid": "train on so many rows for each cluster; 0: on all",
}
METAVARS: dict[Any, str] = {"model": "DIR", "stage": "DIR", "input": "FILE", "output": "PATH", int: "N", float: "X"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared(Checked):
  """The flags of all commands that ask a model about the rows of a file."""

  model: str = option(
    doc="a Hugging Face directory, a run directory, a finished stage of a run such as runs/mini/round_03/policy, or a"
    " model that comes with the package: " + ", ".join(names.MODELS.words)
  )
  input: str = option(doc="JSONL")
  output: str = option(doc="JSONL; what it was made of and with stays in FILE.parts beside it")
  chat: str | None = option(None, names=names.CHAT_FORMATS, doc="the chat format, where the model's files do not tell")
  seed: int = option(0, least=0, doc="another seed, another result")
  engine: EngineOptions = spread(EngineOptions)


class Flags(argparse.ArgumentParser, Generic[T]):
  """A flag for every field of Options, without abbreviations: a script must not change its meaning with a new flag."""

  def __init__(self, tool: str, doc: str | None, kind: type[T], hidden: Sequence[str] = (), **defaults: Any) -> None:
    """`hidden` are fields without a flag, `defaults` those that differ from the fields' own."""
    super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    self.kind, self.defaults, needed = kind, defaults, []
    self.kinds = {name: _plain(field.type) for name, field in fields_of(kind).items() if name not in hidden}
    for name, of in self.kinds.items():
      field, metavar = fields_of(kind)[name], METAVARS.get(name, METAVARS.get(of, "NAME"))
      default, said = defaults.get(name, field.default), field.metadata.get("doc") or HELP[name]
      flag = f"--{name.rstrip('_')}"  # `with_`: `with` is no name of a field
      if default is dataclasses.MISSING:
        needed.append(f"{flag}={metavar}")
      elif default not in (None, "", ()):
        said += f" ({default})"
      how: dict[str, Any] = {"action": "append"} if typing.get_origin(of) is tuple else {}
      how |= {"nargs": "?", "const": "true", "metavar": "true|false"} if of is bool else {"metavar": metavar}
      required = default is dataclasses.MISSING
      self.add_argument(flag, dest=name, required=required, default=argparse.SUPPRESS, help=said, **how)
    self.usage = f"python -m alma_jax.tools.{tool} {' '.join(needed)} [--flag=value ...]"

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"error: {message} (--help lists the flags)\n")
    raise AssertionError  # `exit` does not return

  def values(self, arguments: Sequence[str]) -> T:
    """The Options that these arguments give."""
    given, unknown = self.parse_known_args(arguments)
    if unknown:
      name = unknown[0].partition("=")[0]
      near = difflib.get_close_matches(name, self._option_string_actions, n=1)
      self.error(f"there is no flag {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    values = self.defaults | {name: self._value(name, text) for name, text in vars(given).items()}
    try:
      return build(self.kind, values, "flags")
    except ConfigError as error:
      self.error(str(error).replace("flags.", "--", 1).replace("_ is ", " is ", 1))

  def given(self, arguments: Sequence[str]) -> frozenset[str]:
    """The flags that these arguments set."""
    return frozenset(vars(self.parse_known_args(arguments)[0]))

  def _value(self, name: str, text: Any) -> Any:
    of = self.kinds[name]
    if of is bool and text in ("true", "false"):
      return text == "true"
    if of in (bool, int, float):
      with contextlib.suppress(ValueError):
        if of is not bool and math.isfinite(number := of(text)):
          return number
      words = {bool: "true or false", int: "a whole number", float: "a number"}
      self.error(f"--{name} is {text!r}; it must be {words[of]}")
    return tuple(text) if isinstance(text, list) else text


def _plain(hint: Any) -> Any:
  """The type of a flag's value: str for `str | None` and for a Literal."""
  if isinstance(hint, types.UnionType):
    hint = next(one for one in typing.get_args(hint) if one is not types.NoneType)
  return str if typing.get_origin(hint) is typing.Literal else hint


def one_flag_each(arguments: Sequence[str]) -> list[str]:
  """`--input A B` as `--input=A --input=B`."""
  found, inside = [], False
  for argument in arguments:
    if argument == "--input":
      inside = True
    elif inside and not argument.startswith("--"):
      found.append(f"--input={argument}")
    else:
      inside = False
      found.append(argument)
  return found


def status(work: Callable[[], None]) -> int:
  """The exit status of `work()`. A UserError is printed as one message."""

  def more(error: UserError) -> str | None:
    return "Here engine.slots is --slots and engine.tensor is --tensor." if isinstance(error, SlotsError) else None

  absl.logging.set_verbosity(absl.logging.WARNING)
  start.cache_compilations()
  return start.status(work, MEMORY, more)


# The model


@dataclasses.dataclass(frozen=True)
class Model:
  """A model directory and what the run that made it says about it; None: nothing is known."""

  directory: pathlib.Path
  chat: str | None = None
  template: str | None = None
  dtype: str = "auto"


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model on this host's devices."""

  model: Model
  host: Host
  checkpoint: Checkpoint


def open_model(options: Shared, stage_of: Callable[[pathlib.Path], pathlib.Path], raw: bool = False) -> Opened:
  """The model of the flags; `stage_of(run directory)` picks the stage of a run, `raw` leaves out the chat format."""
  model = model_of(options.model, stage_of)
  fmt = options.chat or model.chat
  if not raw and fmt is None:
    raise TextError(_which_chat(model.directory))
  values = {"path": str(model.directory), "dtype": model.dtype} | ({} if fmt is None else {"chat": fmt})
  given = build(ModelOptions, values, "--model")
  host = Host(given, options.engine, local_mesh(given, options.engine), raw=raw)
  if options.output:  # a command that writes no file has none
    for directory in (pathlib.Path(options.output), parts_of(pathlib.Path(options.output))):
      digests.recall(directory / layout.DIGESTS)  # before the model is read for its content
  return Opened(model, host, Checkpoint(options.model, host.directory, content_of(host.directory)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnOptions(Checked):
  """How the judge own:DIR is asked."""

  template: str | None = option(None, names=names.JUDGE_TEMPLATES, doc="of own:DIR (that of its run, else a2)")
  mode: Mode = option("expected", doc="own:DIR's score is the mean (expected), the likeliest one (integer), or sampled")
  samples: int = option(8, least=1, doc="draws of --mode=sampled; reasonings of a template that reasons first")
  shots: str | None = option(None, doc="a file of annotations that own:DIR, a base model, is shown as examples")

  def read_shots(self) -> tuple[Shot, ...]:
    """The worked examples of the file."""
    if self.shots is None:
      return ()
    rows, _ = data.load_examples(self.shots, ("response", "score"))
    for row in rows:
      if row.score not in templates.SCORES:
        raise DataError(f"{self.shots}, line {row.line}: an example's score is a whole number from 0 to 10")
    return tuple(Shot(row.messages, row.response or "", round(row.score or 0.0), row.reason or "") for row in rows)


class WithoutModel(Host):
  """This host's devices, for a judge that needs no model; `flag` named it."""

  def __init__(self, options: Shared, flag: str) -> None:
    self.engine, self.local_mesh, self.display, self.flag = (
      options.engine,
      local_mesh(ModelOptions(), options.engine),
      Display(),
      flag,
    )
    self.options, self._held = ModelOptions(), {}

  @property
  def models_kept(self) -> int:
    return 2  # an implicit reward has two

  def __getattr__(self, name: str) -> NoReturn:
    if name in ("directory", "config", "tokenizer", "_chat"):
      raise ConfigError(f"{self.flag} names a judge that asks for a model (its {name.strip('_')}): give --model, too")
    raise AttributeError(name)


def own_judge(opened: Opened, own: OwnOptions, seed: int = 0) -> OwnJudge:
  """The model as a judge; a template that is not given is that of the model's run."""
  word = own.template or opened.model.template or "a2"
  asked = names.resolve(names.JUDGE_TEMPLATES, word, "--template")
  templates.check_writable(opened.host.tokenizer, asked)
  return OwnJudge(opened.host, opened.checkpoint, asked, own.mode, own.read_shots(), own.samples, seed)


def stop_ids(host: Host) -> tuple[int, ...]:
  """Ids at which a response ends: those of the chat format, or the tokenizer's EOS, and those that the model's own
  generation_config.json names (an exported checkpoint may stop at more than its chat format tells)."""
  tok = host.tokenizer
  ids = [i for i in (tok.eos_id,) if i is not None] if host.raw else list(chat.stop_ids(tok, host.chat))
  named = json_of(host.directory / "generation_config.json").get("eos_token_id")
  ids += named if isinstance(named, list) else [] if named is None else [named]
  return tuple(dict.fromkeys(ids))


def own_of(judge: str) -> str | None:
  """The run, stage or directory of a judge "own:DIR"; None for another one."""
  word, _, where = judge.partition(":")
  return where if word == "own" and where else None


def check_judge(judge: str, own: OwnOptions, field: str) -> None:
  """Raise where there is no such judge, or where `own` is for another one."""
  if own_of(judge) is not None:
    return
  names.check(names.EVALUATORS, judge, field)
  for given in dataclasses.fields(own):
    if getattr(own, given.name) != given.default:
      refuse(given.name, getattr(own, given.name), f"is for a judge own:DIR, and {field.rstrip('_')} is {judge!r}")


def opened_judge(options: Shared, judge: str, own: OwnOptions) -> tuple[Host, Judge]:
  """The judge of --with and its host; --model is for judges that need one, and `own` for own:DIR."""
  if place := own_of(judge):
    # What examples are shown to is a base model, which has no chat format.
    opened = open_model(dataclasses.replace(options, model=place), layout.judge_of, raw=own.shots is not None)
    return opened.host, own_judge(opened, own, options.seed)  # pyright: ignore[reportReturnType]  # cached_property
  opened = open_model(options, layout.judge_of) if options.model else None
  host = opened.host if opened else WithoutModel(options, "--with")
  return host, contract.by_name(names.EVALUATORS, judge, host, options, "--with")


def check_held(directory: pathlib.Path, decides: Mapping[str, Any]) -> None:
  """Raise if the directory holds grades by which something else `decides`."""
  path = directory / "summary.json"
  if not path.exists():
    return
  held = layout.read_json(path)
  if changed := [name for name, value in decides.items() if held.get(name) != value]:
    raise RunError(
      f"{directory} holds grades of another {' and '.join(changed)}: {held.get(changed[0])} -> {decides[changed[0]]}."
      f" Give another --output, or delete {directory}"
    )


def write_grades(
  directory: pathlib.Path,
  decides: Mapping[str, Any],
  lines: Sequence[Mapping[str, Any]] | None,
  summary: Mapping[str, Any],
) -> None:
  """Write summary.json and, where `lines` are given, grades.jsonl."""
  check_held(directory, decides)
  if lines is not None:
    with shards.atomic(directory / "grades.jsonl") as file:
      file.write(shards.json_lines(lines))
  shards.write_json(directory / "summary.json", {**decides, **summary})


def model_of(name: str, stage_of: Callable[[pathlib.Path], pathlib.Path]) -> Model:
  """The Model that --model means; `stage_of(run directory)` picks the stage of a run."""
  if name in names.MODELS.words:  # one that comes with the package has its chat format and template under its own name
    fmt, template = (name if name in of.words else None for of in (names.CHAT_FORMATS, names.JUDGE_TEMPLATES))
    return Model(model_directory(name), fmt, template)
  directory = pathlib.Path(name).expanduser()
  if ":" in name and not directory.exists():
    directory = pathlib.Path(names.resolve(names.MODELS, name, "--model"))
  if not directory.is_dir():
    what = "is a file; give the directory it lies in" if directory.exists() else "does not exist"
    raise ModelError(f"--model: the directory {name} {what} (nothing is fetched from the Hugging Face hub)")
  if config := layout.config_in(directory):
    if layout.is_round(config):
      policy = directory / layout.POLICY
      raise RunError(f"{directory} is one round of a run; give its policy, {policy}, or the whole run")
    return _model_of_stage(stage_of(directory))
  if any((directory / file).exists() for file in (layout.MANIFEST, layout.FINGERPRINT)):
    return _model_of_stage(directory)
  read_config(directory)  # the clearest error first
  return Model(directory, _recognised(directory))


def _model_of_stage(stage: pathlib.Path) -> Model:
  layout.load_manifest(stage)  # a RunError where it is not finished
  if not (stage / layout.MODEL / "config.json").exists():
    those = f"{layout.sft_name(1)}, {layout.JUDGE}, round_RR/{layout.POLICY}"
    raise RunError(f"{stage}: this stage holds no model; those that do: {those}")
  architectures = layout.read_json(stage / layout.MODEL / "config.json").get("architectures") or ()
  if "LlamaForSequenceClassification" in architectures:
    raise RunError(f"{stage} is a reward model, which writes no text: use it as --judge=reward:{stage / layout.MODEL}")
  config = layout.config_of(stage)
  settings = config["model"]
  return Model(stage / layout.MODEL, settings["chat"], config.get("judge", {}).get("template"), settings["dtype"])


def _recognised(directory: pathlib.Path) -> str | None:
  """The chat format whose chat template the directory holds."""
  template = json_of(directory / "tokenizer_config.json").get("chat_template")
  if (directory / "chat_template.jinja").is_file():
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
  for word in names.CHAT_FORMATS.words:
    fmt = names.resolve(names.CHAT_FORMATS, word, "--chat")
    if not isinstance(fmt, chat.ChatFormat):  # made of a tokenizer
      continue
    if template in (chat.jinja(fmt), chat.jinja(dataclasses.replace(fmt, begin=""))):  # without BOS: see chat.suited
      return word
  return None


def _which_chat(directory: pathlib.Path) -> str:
  """What to say of a model whose chat format is not known: those that its tokenizer can write."""
  fitting = fitting_chats(load_tokenizer(directory))
  return (
    f"{directory}: its chat template is none of those that this package writes, so the chat format is not known: give"
    f" --chat. Its tokenizer can write {' and '.join(fitting) or 'none of the known ones'}; one of your own is named as"
    " package.module:NAME"
  )


def json_of(path: pathlib.Path) -> dict[str, Any]:
  """The object in a model's file; an empty one where there is no file."""
  if not path.is_file():
    return {}
  try:
    return dict(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, TypeError) as error:
    raise ModelError(f"{path} is damaged ({error}); fetch or make it again") from None


# The output

PLACES = ("model", "input", "output", "chat", "tensor", "slots", "rows")  # that do not decide by their own words


def decides(tool: str, options: Shared, opened: Opened | None) -> dict[str, Any]:
  """What decides the output of every command, for `Run.stage`."""
  fields: dict[str, Any] = {"tool": tool, "input": shards.digest(options.input)[:16]}
  if opened:
    fmt = None if opened.host.raw else opened.host.chat
    fields |= {"model": opened.checkpoint.content[:16], "dtype": opened.host.dtype, "chat": fmt and fmt.name}
    fields["chat text"] = fmt and short_digest(dataclasses.asdict(fmt))
  return fields


def short_digest(value: Any) -> str:
  """A digest of a JSON value that would be too long to show."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def chat_name(host: Host) -> str:
  return "none" if host.raw else host.chat.name


@contextlib.contextmanager
def run_of(output: pathlib.Path, directory: pathlib.Path, options: Shared, mend: str) -> Iterator[Run]:
  """The Run in `directory`, whose errors speak of --output; `mend` is what to do instead of giving the old values."""
  try:
    with Run(directory, made_with=start.made_with()) as run:
      yield run
  except LockedError:
    raise RunError(
      f"{output}: another process is writing there ({directory / layout.LOCK} says which); wait for it or give another"
      " --output"
    ) from None
  except ChangedError as error:
    called = {"model": f" ({options.model})", "input": f" ({options.input})"}  # their values are digests
    lines = "\n".join(f"  {key}: {change}{called.get(key, '')}" for key, change in error.changed.items())
    raise RunError(
      f"{output} was made with other values than this start asks for:\n{lines}\n"
      f"Put the old value back, or {mend} to have it made again."
    ) from None
  except OSError as error:
    where = error.filename or output
    raise RunError(f"cannot write {where}: {error.strerror or error}; the same command goes on from here") from None


def parts_of(output: pathlib.Path) -> pathlib.Path:
  """The run directory of an output that is a file."""
  return output.with_name(f"{output.name}.parts")


def check_place(output: pathlib.Path) -> None:
  """Raise unless the output may stand where --output says."""
  if not output.absolute().parent.is_dir():
    raise RunError(f"--output: there is no directory {output.parent}; make it first")
