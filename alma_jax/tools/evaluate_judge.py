"""Tests a judge: how often it scores the right answer above the wrong ones.

  python -m alma_jax.tools.evaluate judge --data=filtered.parquet --kind=rewardbench \\
      --with=reward:models/Skywork-Reward-Llama-3.1-8B --output=tests/skywork

--kind is the form of the data, which is yours (.jsonl, .json or .parquet):

  rewardbench    RewardBench 1: prompt, chosen, rejected, subset; four sections and their mean
  rewardbench2   RewardBench 2: prompt, chosen [..], rejected [..], num_correct, subset, id
  pairs          prompt or messages, chosen, rejected; category, and people's chosen_score and rejected_score if any

Ties count as the benchmark has it, or as --ties says: wrong, half, or share (one over the number of best answers).
--counts=pre-2024-09 takes RewardBench 1's counts of xstest as they were, swapped, which the papers of 2024 used.

--output is a directory: grades.jsonl has a line per case, {"id", "subset", "scores", "outcome"}, summary.json the
accuracies with n and 95 % interval, by subset, by margin, and where the right answer is the shorter one. The scores
alone are in scores.jsonl. A killed command goes on where it stopped; other --ties or --counts ask the judge nothing.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from alma_jax import names
from alma_jax.errors import RunError
from alma_jax.evals import preferences
from alma_jax.judges import contract
from alma_jax.options import option, spread
from alma_jax.store import shards
from alma_jax.tools import command, jsonl

PART = 128  # cases in a part: what a killed command does again at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Shared):
  data: str = option(doc="the cases")
  kind: preferences.Kind = option(doc="rewardbench, rewardbench2, pairs")
  with_: str = option(doc="the judge: own:DIR, " + ", ".join(names.EVALUATORS.words))
  ties: Literal["", "wrong", "half", "share"] = option("", doc="wrong, half or share; else as the benchmark has it")
  counts: Literal["current", "pre-2024-09"] = option("current", doc="of RewardBench 1's xstest: current, pre-2024-09")
  own: command.OwnOptions = spread(command.OwnOptions)
  model: str = option("", doc="a model, for judges that need one")

  def __post_init__(self) -> None:
    super().__post_init__()
    command.check_judge(self.with_, self.own, "with_")


FLAGS = command.Flags("evaluate judge", __doc__, Options, ("slots", "tensor", "input"), input="")


def main(arguments: Sequence[str]) -> int:
  """The exit status."""
  options = FLAGS.values(arguments)
  return command.status(lambda: run(options))


def run(options: Options) -> None:
  cases = preferences.read(options.data, options.kind)
  directory = pathlib.Path(options.output)
  command.check_place(directory)
  if directory.is_file():
    raise RunError(f"--output: {directory} is a file; name a directory")
  host, judge = command.opened_judge(options, options.with_, options.own)
  directory.mkdir(exist_ok=True)
  decides = {"judge": judge.identity, "kind": options.kind, "made_of": {"data": shards.digest(options.data)[:16]}}
  command.check_held(directory, decides)
  shares = [cases[begin : begin + PART] for begin in range(0, len(cases), PART)]
  sizes = [sum(len(case.answers) for case in share) for share in shares]
  output, asked = directory / "scores.jsonl", dataclasses.replace(options, input=options.data)
  jsonl.check_output(output)
  with jsonl.stage_of(output, asked, {"tool": "evaluate judge", **decides}) as stage:
    parts = jsonl.Parts(stage, sizes, 1)
    with host.display.bar("judging", parts.total, "answers", done=parts.done) as bar:
      for numbers, groups in parts.missing(shares):
        for number, share in zip(numbers, groups, strict=True):
          pairs = [
            contract.Answered(messages, answer, name=f"case {case.id}, answer {at}")
            for case in share
            for at, (messages, answer) in enumerate(zip(case.asked, case.answers, strict=True), 1)
          ]
          verdicts = iter(contract.scores(judge, pairs, bar, missing=True))
          lines = [{"id": case.id, "scores": [next(verdicts).score for _ in case.answers]} for case in share]
          parts.write(number, lines, {})
    jsonl.finish(stage, output)
  scores = [json.loads(line)["scores"] for line in output.read_text(encoding="utf-8").splitlines()]

  ties = options.ties or preferences.TIES[options.kind]
  lines = [
    {"id": case.id, "subset": case.subset, "scores": of, "outcome": preferences.outcome(case, of, ties)}
    for case, of in zip(cases, scores, strict=True)
  ]
  missing = sum(score is None for of in scores for score in of)
  found: dict[str, preferences.Accuracy] = {}
  margins: list[tuple[float, preferences.Accuracy]] = []
  if any(line["outcome"] is not None for line in lines):
    counts = preferences.SWAPPED if options.counts == "pre-2024-09" else {}
    found = preferences.numbers(cases, scores, options.kind, ties, counts) | preferences.with_people(cases, scores)
    margins = preferences.by_margin(cases, scores)
  summary: dict[str, Any] = {"cases": len(cases), "missing": missing, "of": sum(sizes), "ties": ties}
  summary |= {"counts": options.counts, "scale": judge.scale}
  summary["numbers"] = {name: dataclasses.asdict(number) for name, number in found.items()}
  summary["by margin"] = [{"up to": most, **dataclasses.asdict(number)} for most, number in margins]
  command.write_grades(directory, decides, lines, summary)

  print(f"{directory / 'grades.jsonl'}: {len(cases):,} cases, {missing:,} of {sum(sizes):,} scores missing")
  print(f"  by {judge.identity}; ties: {ties}")
  for name, number in found.items():
    print(_line(name, number))
  for most, number in margins:
    print(_line(f"margin up to {most:.3g}", number))
  contract.check_missing(judge.identity, missing, sum(sizes))


def _line(name: str, number: preferences.Accuracy) -> str:
  interval = "" if number.ci95 is None else f" +- {number.ci95:.3f}"
  return f"  {name:28} {number.value:.3f}{interval}  n={number.n:,}"
