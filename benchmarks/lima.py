"""Does LIMA show on the miniature world? Its claims over several pipeline seeds, paired, with intervals.

  python -m benchmarks.lima --workdir=runs/lima_effects [--seeds=10] [--parts=epochs,quality,dialogue]

  epochs    from the first epoch to choose from to the last one: the loss, the grade; the epoch that the answers choose
            against the one that the loss chooses, on other prompts                                       (figure 9)
  quality   the best 48 annotated answers, 48 and 192 of any quality as demonstrations                    (section 5)
  dialogue  demonstrations with and without dialogues, on prompts after a turn of history                 (section 6)

Every seed changes the demonstrations, the order of training and everything drawn. All scores are the ground truth.
Each line has the mean over seeds with Student's 95 % interval and the difference that so many seeds would have shown
with a probability of 80 %. Runs are ordinary run directories and resume.
"""

import argparse
import contextlib
import io
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from alma_jax import start
from alma_jax.recipes import lima as recipe
from alma_jax.runtime import training
from alma_jax.stages import data as human
from alma_jax.stages import evaluation, policy
from alma_jax.store import layout, statistics
from configs import lima
from configs.ablations import lima_dialogue, lima_quality

Numbers = dict[str, float]


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--seeds", type=int, default=10)
  parser.add_argument("--parts", default="epochs,quality,dialogue")
  flags = parser.parse_args()
  workdir, seeds, parts = pathlib.Path(flags.workdir), range(flags.seeds), flags.parts.split(",")
  if "epochs" in parts:
    found = [epochs(workdir / f"epochs_{seed}", seed) for seed in seeds]
    for name in found[0]:
      say(name, [numbers[name] for numbers in found])
  if "quality" in parts:
    by = variants(workdir, lima_quality.get_config, ("mini_filtered", "mini_unfiltered", "mini_quantity"), seeds)
    compare(by, "mini_filtered", "mini_unfiltered")
    compare(by, "mini_filtered", "mini_quantity")
    compare(by, "mini_quantity", "mini_unfiltered")
  if "dialogue" in parts:
    by = variants(workdir, lima_dialogue.get_config, ("mini", "mini_dialogue"), seeds)
    compare(by, "mini_dialogue", "mini")


def epochs(workdir: pathlib.Path, seed: int) -> Numbers:
  """One run: what changes over the epochs, and the ground truth of the two choices on the test prompts."""
  c = lima.get_config("mini")
  c.seed = seed
  choice = run(c, workdir)
  rows, chosen, lowest = choice["epochs"], choice["epoch"], choice["by_loss"]
  if lowest != chosen:
    with contextlib.redirect_stderr(io.StringIO()), start.open_session(c, workdir) as s:
      o, data = s.options, human.build(s, s.options.data)
      models = training.by_epoch(policy.sft(s, policy.Job(layout.sft_name(1), s.base, o.sft, o.sft_seed), data))
      tests = recipe.prompt_sets(data, o)[1:]
      evaluation.build(s.at(lowest, o), models[lowest], recipe.made_chooser(s, data, o), data, o.eval, sets=tests)
  first, last = rows[0], rows[-1]
  return {
    f"loss, epoch {last['epoch']} - epoch {first['epoch']}": last["loss"] - first["loss"],
    f"grade, epoch {last['epoch']} - epoch {first['epoch']}": last["mean"] - first["mean"],
    "test, chosen by answers": test_truth(workdir, chosen),
    "test, by answers - by loss": test_truth(workdir, chosen) - test_truth(workdir, lowest),
  }


def variants(
  workdir: pathlib.Path, config: Callable[[], Any], words: tuple[str, ...], seeds: range
) -> dict[str, list[float]]:
  """The ground truth on the test prompts by the word of data.sft, a value for each seed."""
  found: dict[str, list[float]] = {word: [] for word in words}
  for seed in seeds:
    for word in words:
      c = config()
      c.seed, c.data.sft = seed, word
      at = workdir / f"{word}_{c.data.eval}_{seed}"
      found[word].append(test_truth(at, run(c, at)["epoch"]))
  for word, values in found.items():
    say(f"test, {word}", values)
  return found


def run(c: Any, workdir: pathlib.Path) -> dict[str, Any]:
  """The manifest of the run's choice."""
  if not layout.finished(workdir):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      status = start.run(c, str(workdir))
    if status:
      raise SystemExit(f"{workdir}: the run ended with status {status}")
  return layout.load_manifest(workdir / layout.CHOICE)


def test_truth(workdir: pathlib.Path, epoch: int) -> float:
  answers = layout.stage_name(epoch, layout.answers_name(layout.TEST_SET))
  counts = layout.load_manifest(workdir / layout.grades_name(answers))["counts"]
  return counts["score"] / counts["graded"]


def compare(by: dict[str, list[float]], one: str, other: str) -> None:
  say(f"{one} - {other}", [a - b for a, b in zip(by[one], by[other], strict=True)])


def say(name: str, values: list[float]) -> None:
  mean = statistics.student(values)
  assert mean
  line = f"{name:<40} {mean.value:8.3f} +- {mean.ci95 or 0.0:.3f}  n = {mean.n} seeds"
  if len(values) > 1:
    spread = float(np.std(values, ddof=1))
    line += f"  p {statistics.p_value(values):.3f}  detectable {statistics.detectable(spread, len(values)):.3f}"
  print(line, flush=True)


if __name__ == "__main__":
  main()
