"""What a plan assumes: how long texts are, how many there are, and which share of the peak each kind of work reaches.

found = assumptions(Given(response_tokens=400), run=None)
for line in found.lines(): ...      # what is printed, each with where the number is from
"""

import dataclasses
import math
import pathlib
import statistics
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from alma_jax.errors import RunError
from alma_jax.llama.config import LlamaConfig
from alma_jax.runtime import metrics
from alma_jax.store import layout

DATA = {  # the source of each number of rows
  "demonstrations": "sft",
  "annotations": "judge",
  "preferences": "preferences",
  "validation": "validation",
  "eval_prompts": "eval",
}
ANY = types.MappingProxyType(dict.fromkeys(DATA, 0) | {"usable": 1.0, "kept": 1.0})
# The defaults, and what each rests on. Shares are of the data sheets' peaks.
PROMPT, RESPONSE, EXAMPLE = 200, 350, 500
TRAINING = 0.50, "of what a step executes; MaxText, Llama-2-7B on 8 H100, reports 49.7 % MFU"
PRODUCTS = (
  0.56,
  "of the peak in prefill, judging, embedding and k-means: 70 % of the 80 % of it that large products reach",
)
DECODING = (
  0.60,
  "of the memory's peak in decoding; TensorRT-LLM reaches 59 to 80 % of such a roofline on H200",
)
SLOTS = 0.90, "of the slots are at work: simulated with refills every 16 to 32 tokens, lognormal lengths"
LINKS = 0.70, "of the links' peak in collectives, which overlap with arithmetic in training"
LENGTHS = 0.60, "is the deviation of the logarithm of texts' lengths, which are drawn and packed as a run packs them"


@dataclasses.dataclass(frozen=True)
class Given:
  """What the user gives; None: by the run, else the default."""

  prompt_tokens: int | None = None
  response_tokens: int | None = None
  example_tokens: int | None = None
  demonstrations: int | None = None
  annotations: int | None = None
  preferences: int | None = None
  eval_prompts: int | None = None


@dataclasses.dataclass(frozen=True)
class Assumptions:
  prompt: float  # tokens of a prompt
  response: float  # of a response
  example: float  # of a training example: prompt, response and the chat format's tokens
  demonstrations: int  # rows of data.sft, as the next four of other data; 0: the recipe has none
  annotations: int
  preferences: int
  validation: int
  eval_prompts: int
  usable: float  # the share of drafts that enter the pool
  kept: float  # of answers that enter a trainset without a judge (ISARA)
  training: float  # the share of the peak that training reaches, with what it executes
  mfu: float | None  # or, measured, with useful arithmetic alone
  response_bytes: float  # on disk, of each response's record
  where: dict[str, str]  # by field: what its value rests on

  def lines(self) -> Iterator[str]:
    """What is assumed, as it is printed."""
    words = {
      "prompt": "tokens of a prompt",
      "response": "tokens of a response",
      "example": "tokens of an example",
      **{name: f"rows of data.{data}" for name, data in DATA.items()},
      "usable": "of the drafts are usable",
      "kept": "of the answers are kept",
      "response_bytes": "bytes on disk of a response",
      "training": "of the peak in training",
      "mfu": "of the peak in training, useful arithmetic alone",
    }
    for field, of in words.items():
      value = getattr(self, field)
      if field not in self.where or value is None or (field == "training" and self.mfu is not None):
        continue
      yield f"{value:,.2f} {of} ({self.where[field]})" if value <= 1 else f"{value:,.0f} {of} ({self.where[field]})"
    for share, of in (PRODUCTS, DECODING, SLOTS, LINKS, LENGTHS):
      yield f"{share:.2f} {of}"


def assumptions(given: Given, run: pathlib.Path | None = None, of_recipe: Mapping[str, float] = ANY) -> Assumptions:
  """What is given, else what the finished stages of `run` say, else the defaults; `of_recipe` has those that only some
  recipes ask for."""
  found = measured(run) if run else {}
  where: dict[str, str] = {}

  def value(name: str, of: float | None, default: float, why: str = "assumed") -> float:
    if of is not None:
      where[name] = "given"
      return of
    where[name] = f"measured in {run}" if name in found else why
    return found.get(name, default)

  def own(name: str, why: str = "assumed") -> float:
    return value(name, getattr(given, name, None), of_recipe[name], why) if name in of_recipe else ANY[name]

  response = value("response", given.response_tokens, RESPONSE)
  example = value("example", given.example_tokens, EXAMPLE)
  prompt = value("prompt", given.prompt_tokens, PROMPT)
  return Assumptions(
    prompt=prompt,
    response=response,
    example=example,
    **{name: int(own(name)) for name in DATA},
    usable=own("usable", "assumed: every draft is"),
    kept=own("kept", "assumed: every answer is"),
    training=value("training", None, TRAINING[0], f"assumed: {TRAINING[1]}"),
    mfu=value("mfu", None, 0.0) or None,
    response_bytes=value("response_bytes", None, 64 + 6 * response, "assumed: 6 bytes a token and 64 more"),
    where=where,
  )


def measured(run: pathlib.Path) -> dict[str, float]:
  """By field of Assumptions what a run's manifests and speed.jsonl files say; a RunError where `run` is no run."""
  if not layout.config_in(run):
    raise RunError(f"--run={run} is no run directory: there is no {layout.CONFIG} of a run in it")
  counts: dict[str, float] = {}
  shares, lengths, config = [], [], layout.config_in(run) or {}
  pools = config.get("recipe") == "isara"  # whose drafts of a round are its prompts
  for stage in layout.stages(run):
    made, kind = stage.manifest, layout.kind_of(stage.name)
    if made is None:
      continue
    told = made.get("counts") or {}
    if kind == layout.RESPONSES:
      _add(counts, samples=told.get("samples", 0), tokens=told.get("tokens", 0))
      _add(counts, bytes=sum(part.get("size", 0) for part in made["parts"]))
    if kind == layout.DRAFTS:
      _add(counts, draws=told.get("draws", 0))
    if kind == layout.PROMPTS and (pools or layout.round_of(stage.name) is None):
      _add(counts, pool=made.get("rows", 0))
    if kind == layout.TRAINSET and "asked" in told:
      _add(counts, asked=told["asked"], answers=made.get("rows", 0))
    if stage.name == layout.SEEDS:
      held = {source: of["held_out_of_sft"] for source, of in told.items() if "held_out_of_sft" in of}
      for name, source in DATA.items():
        of = told.get(source) or {}
        lost = sum(count for why, count in of.items() if why.startswith("equals_"))
        moved = sum(held.values()) if source == "sft" else 0
        _add(counts, **{name: held.get(source, of.get("kept", 0) - lost - moved)})
    speed = layout.json_lines(stage.dir / metrics.SPEED)
    shares += [line["mfu"] for line in speed[1:] if line.get("mfu")]  # the first step waits for the compiler
    if speed and (kind == "sft" or (kind == layout.POLICY and _of_examples(config))):
      lengths.append(_mean_length(made, speed))
  found: dict[str, float] = {}
  if counts.get("samples"):
    found["response"] = counts["tokens"] / counts["samples"]
    found["response_bytes"] = counts["bytes"] / counts["samples"]
  if counts.get("draws") and counts.get("pool"):
    found["usable"] = counts["pool"] / counts["draws"]
  if counts.get("asked"):
    found["kept"] = counts["answers"] / counts["asked"]
  if lengths:
    found["example"] = statistics.fmean(lengths)
  found |= {name: counts[name] for name in DATA if counts.get(name)}
  if "response" in found and found.get("example", 0) > found["response"]:
    found["prompt"] = found["example"] - found["response"]
  if shares:
    found["mfu"] = statistics.median(shares)
  return found


def _of_examples(config: dict[str, Any]) -> bool:
  """True if the policies of a run with this config learn from examples: a pair counts the tokens of both sides."""
  return config.get("trainset", {}).get("method", "best_of_n") in ("best_of_n", "random")


def _mean_length(made: layout.Manifest, speed: list[dict[str, Any]]) -> float:
  """Tokens of an example: those of all steps over the examples that they took."""
  examples, batch = made["counts"]["examples"], made["fingerprint"]["config.batch"]
  epochs = len(speed) / math.ceil(examples / batch)
  return sum(line["tokens"] for line in speed) / (examples * epochs)


def _add(counts: dict[str, float], **more: float) -> None:
  for name, value in more.items():
    counts[name] = counts.get(name, 0.0) + value


def cpu_share(run: pathlib.Path, c: LlamaConfig, flops: float) -> float | None:
  """The share of `flops` a second that a run on CPUs reached in training a model of this shape: its speed.jsonl holds
  no MFU."""
  rates = [
    metrics.operations(c, [1]) * line["tokens"] / line["seconds"]
    for stage in layout.stages(run)
    for line in layout.json_lines(stage.dir / metrics.SPEED)[1:]
  ]
  return statistics.median(rates) / flops if rates else None


def drawn_lengths(count: int, length: float, most: int, seed: int = 0) -> np.ndarray:
  """Lengths of so many texts, of this mean and at most so long."""
  z = np.random.default_rng(seed).normal(size=count)
  found = length * np.exp(LENGTHS[0] * z - LENGTHS[0] ** 2 / 2)
  return np.clip(np.rint(found), 1, most).astype(int)
