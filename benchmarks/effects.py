"""Does the paper show on the miniature world? Every effect over several pipeline seeds, with intervals.

  python -m benchmarks.effects --workdir=runs/effects [--seeds=0,1,2] [--parts=rounds,judge,best_of_n,variants]

What is compared, and with what in the paper:
  rounds      base 3-shot, initial SFT and every round                                         (Figure 2)
  judge       pairwise accuracy of five judges on pairs of sampled responses (T = 1)           (Table 3)
  best_of_n   the judge's choice among n samples, scored by the ground truth                   (Figure 3)
  variants    after round 6: random prompts, other checkpoints, DPO, no judge                  (Tables 4, 5, 7, control)

Every seed changes the seed data, the order of training and everything drawn; the base model and the evaluation prompts
stay. Runs are ordinary run directories and resume; a variant starts from the main run's finished early stages.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np

VARIANTS = {
  "default": (),
  "random prompts (T4)": ("draw.method=random",),
  "latest only (T5)": ("responses.checkpoints=('latest',)",),
  "two SFT only (T5)": ("responses.checkpoints=('sft',)",),
  "one SFT only (T5)": ("responses.checkpoints=('sft_1',)",),
  "DPO (T7)": ("trainset.method=dpo",),
  "GRPO": ("trainset.method=grpo", "responses.checkpoints=('latest',)"),
  "integer judge": ("judge.mode=integer",),
  "no judge (random response)": ("trainset.method=random",),
}
ROUND = 6  # where the variants are compared


def main():
  flags = argparse.ArgumentParser()
  flags.add_argument("--workdir", required=True)
  flags.add_argument("--seeds", default="0,1,2")
  flags.add_argument("--parts", default="rounds,judge,best_of_n,variants")
  flags = flags.parse_args()
  workdir, seeds = pathlib.Path(flags.workdir), [int(s) for s in flags.seeds.split(",")]
  mains = [run(workdir / f"seed_{seed}", f"seed={seed}") for seed in seeds]
  parts = flags.parts.split(",")
  if "rounds" in parts:
    rounds_table(mains)
  if "judge" in parts or "best_of_n" in parts:
    found = [measure(directory, seed, parts) for directory, seed in zip(mains, seeds)]
    judge_table([f["judge"] for f in found if "judge" in f])
    best_of_n_table([f["best_of_n"] for f in found if "best_of_n" in f])
  if "variants" in parts:
    variants_table(workdir, mains, seeds)


def run(directory, *values):
  """An ordinary run of the default config with these values; skipped if it is finished."""
  command = [
    sys.executable, "-m", "alma_jax.main", "--config=configs/alma.py:mini", f"--workdir={directory}",
    *(f"--config.{value}" for value in values),
  ]  # fmt: skip
  done = subprocess.run(command, env=os.environ | {"TQDM_DISABLE": "1"}, capture_output=True, text=True)
  if done.returncode:
    sys.exit(done.stdout + done.stderr)
  return directory


def scores(directory):
  """{round: evaluator's score} of a run."""
  import csv

  with open(directory / "progress.csv") as file:
    return {int(row["round"]): float(row["score"]) for row in csv.DictReader(file)}


def rounds_table(mains):
  table = [scores(directory) for directory in mains]
  late = lambda t, rounds: float(np.mean([t[r] for r in rounds]))
  print(f"\nScore by round (0..10, ground truth, {len(table)} pipeline seeds; round 0 is the base model with 3 shots)")
  for r in sorted(table[0]):
    print(
      f"  round {r:2d}   " + "  ".join(f"{t[r]:5.2f}" for t in table) + f"   mean {interval([t[r] for t in table])}"
    )
  last = max(table[0])
  for name, values in (
    ("initial SFT minus base", [t[1] - t[0] for t in table]),
    (f"round {last} minus initial SFT", [t[last] - t[1] for t in table]),
    ("mean of rounds 8-10 minus mean of 2-4", [late(t, (8, 9, 10)) - late(t, (2, 3, 4)) for t in table]),
  ):  # fmt: skip
    print(f"  {name:40} " + "  ".join(f"{v:+5.2f}" for v in values) + f"   mean {interval(values)}")


def measure(directory, seed, parts):
  """Judge accuracy and best-of-n curves of one finished run; kept in measured.json beside it."""
  path = directory / "measured.json"
  if path.exists():
    return json.loads(path.read_text())
  from alma_jax import start
  from alma_jax.judges.own import Judge
  from alma_jax.runtime.host import Checkpoint
  from alma_jax.stages import data as seed_stage
  from alma_jax.stages import judge, policy
  from configs.alma import get_config

  config = get_config("mini")
  config.seed = seed
  with start.open_session(config, directory) as session:
    c = session.config
    data = seed_stage.build(session, c)
    sft = [
      policy.sft(session, f"sft_{i}", session.base, data, [], c.sft, s) for i, s in enumerate(c.sft_seeds, start=1)
    ]
    tuned = judge.finetune(session, data, c)
    distilled = directory / "judge_distilled" / "model"  # measured whether it was accepted or not
    distilled = Judge(Checkpoint("judge_distilled", distilled, f"distilled {seed}"), tuned.template, "expected")
    judges = {
      "fine-tuned, real-valued, self-distilled": distilled,
      "fine-tuned, real-valued": tuned,
      "fine-tuned, integer": replaced(tuned, "integer"),
      "base 3-shot, real-valued": judge.few_shot(session, data, c),
      "base 3-shot, integer": replaced(judge.few_shot(session, data, c), "integer"),
    }
    found = {}
    if "judge" in parts:
      answers = sampled(session, sft, [row.messages for row in data.eval], 1, 1.0, seed)
      base = answered_by_base(session, data, seed)
      pairs = [(m, [*own, by_base]) for (m, own), by_base in zip(answers, base)]
      found["judge"] = {name: accuracy(session, j, pairs) for name, j in judges.items()}
    if "best_of_n" in parts:
      few = sampled(session, sft, [row.messages for row in data.eval[::6]], 64, c.responses.temperature, seed)
      found["best_of_n"] = best_of_n(session, next(iter(judges.values())), few)
  path.write_text(json.dumps(found))
  return found


def replaced(judge_, mode):
  import dataclasses

  return dataclasses.replace(judge_, mode=mode)


def sampled(session, checkpoints, conversations, each, temperature, seed):
  """[(messages, [(text, tokens, ground truth), ...])]: `each` samples per conversation from every checkpoint."""
  import copy

  import tqdm

  from alma_jax.keys import key_of
  from alma_jax.mini import world
  from alma_jax.runtime.sampling import drafts
  from alma_jax.text import chat

  options = copy.deepcopy(session.config.responses)
  options.temperature = temperature
  stops = chat.stop_ids(session.tokenizer, session.chat)
  rows = [tuple(chat.encode_prompt(session.tokenizer, session.chat, m)) for m in conversations for _ in range(each)]
  out = [(m, []) for m in conversations]
  for checkpoint in checkpoints:
    keys = [key_of(seed, "effects", temperature, checkpoint.name, i) for i in range(len(rows))]
    written = drafts(session, checkpoint, rows, keys, stops, options, tqdm.tqdm(disable=True))
    for i, d in enumerate(written):
      messages, answers = out[i // each]
      answers.append(
        (d.text, len(d.tokens), float(world.score(messages[-1]["content"], d.text, d.finished)), d.finished)
      )
  return out


def answered_by_base(session, data, seed):
  """One answer of the base model with three examples to every evaluation prompt, as `sampled` gives them."""
  import copy

  import tqdm

  from alma_jax.keys import key_of
  from alma_jax.mini import formats, world
  from alma_jax.runtime.sampling import drafts
  from alma_jax.text import chat, fewshot

  options, tok = copy.deepcopy(session.config.eval), session.tokenizer
  options.temperature = 1.0
  template = formats.DIALOGUE
  shots = [{"prompt": r.messages[-1]["content"], "response": r.response} for r in data.sft[: options.shots]]
  asked = [row.messages[-1]["content"] for row in data.eval]
  rows = [fewshot.few_shot_ids(tok, template, shots, prompt) for prompt in asked]
  stops, bar = chat.stop_ids(tok, session.chat), tqdm.tqdm(disable=True)
  keys = [key_of(seed, "effects", "base", i) for i in range(len(rows))]
  out = []
  for prompt, d in zip(asked, drafts(session, session.base, rows, keys, stops, options, bar, (template.stop,))):
    out.append((d.text, len(d.tokens), float(world.score(prompt, d.text, d.finished)), d.finished))
  return out


def accuracy(session, judge_, prompts):
  """Share of pairs of different worth that the judge orders rightly; ties wrong ("strict") and ties half."""
  import itertools

  from alma_jax.judges.own import verdicts

  pairs = [(m, a, b) for m, answers in prompts for a, b in itertools.combinations(answers, 2)]
  pairs = [(m, a, b) for m, a, b in pairs if a[2] != b[2] and a[0] and b[0]]
  first = verdicts(session, judge_, [(m, a[0]) for m, a, _ in pairs])
  second = verdicts(session, judge_, [(m, b[0]) for m, _, b in pairs])
  margin = np.array([(x.score - y.score) * np.sign(a[2] - b[2]) for x, y, (_, a, b) in zip(first, second, pairs)])
  return {
    "pairs": len(pairs),
    "strict": float((margin > 0).mean()),
    "half": float((margin > 0).mean() + (margin == 0).mean() / 2),
    "ties": float((margin == 0).mean()),
  }


def best_of_n(session, judge_, prompts):
  """n -> mean ground truth of the judge's choice among n samples (disjoint groups of n), and of the truly best."""
  from alma_jax.judges.own import verdicts

  size = len(prompts[0][1])
  order = np.random.default_rng(0).permutation(size)  # mixes the checkpoints
  flat = verdicts(session, judge_, [(m, text) for m, answers in prompts for text, _, _, _ in answers])
  judged = np.array([v.score for v in flat]).reshape(len(prompts), size)[:, order]
  truth = np.array([[t for _, _, t, _ in answers] for _, answers in prompts])[:, order]
  eligible = np.array([[done and bool(text) for text, _, _, done in answers] for _, answers in prompts])[:, order]
  judged = np.where(eligible, judged, -1.0)
  out = {}
  for n in (1, 2, 4, 8, 16, 32, 64, 128):
    if n <= size:
      j, t = (x[:, : size // n * n].reshape(-1, n) for x in (judged, truth))
      out[n] = [float(t[np.arange(len(t)), j.argmax(axis=1)].mean()), float(t.max(axis=1).mean())]
  return out


def judge_table(found):
  if found:
    print("\nJudge: pairs of answers of both initial models and the base in the right order (strict: a tie is wrong)")
    for name in found[0]:
      strict, half = ([f[name][key] for f in found] for key in ("strict", "half"))
      ties = np.mean([f[name]["ties"] for f in found])
      print(f"  {name:42} strict {interval(strict, 3)}   ties half {interval(half, 3)}   tied {ties:.3f}")
    print(f"  pairs per seed: {[f[name]['pairs'] for f in found]}")


def best_of_n_table(found):
  if found:
    print("\nBest of n: ground truth of the judge's choice, and of the truly best")
    for n in found[0]:
      chosen, best = ([f[n][k] for f in found] for k in (0, 1))
      print(f"  n = {int(n):3d}   judge {interval(chosen)}   truth {interval(best)}")


def variants_table(workdir, mains, seeds):
  print(f"\nVariants: score after round {ROUND}, and minus the same seed's initial SFT")
  for name, values in VARIANTS.items():
    after = []
    for directory, seed in zip(mains, seeds):
      if values:
        place = workdir / f"seed_{seed}_{name.partition(' (')[0].replace(' ', '_')}"
        if not place.exists():
          begin(directory, place)
        run(place, f"seed={seed}", f"feedback_rounds={ROUND - 1}", *values)
      else:
        place = directory
      after.append(scores(place))
    gain = [t[ROUND] - t[1] for t in after]
    print(f"  {name:28} " + "  ".join(f"{t[ROUND]:5.2f}" for t in after) + f"   gain {interval(gain)}")


def begin(source, place):
  """A run directory with the stages that come before the rounds, so that a variant makes only its rounds."""

  def not_shared(directory, names):
    if pathlib.Path(directory) == source:
      keep = ("seeds", "pool", "sft_1", "sft_2", "judge", "judge_distilled", "round_01")
      return [name for name in names if name not in keep]
    return ["eval"] if pathlib.Path(directory) == source / "round_01" else []

  shutil.copytree(source, place, ignore=not_shared)


def interval(values, digits=2):
  """mean +- half width of the 95 % interval (Student's t over the seeds)."""
  n, mean = len(values), float(np.mean(values))
  if n < 2:
    return f"{mean:.{digits}f}"
  t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(n, 2.2)
  return f"{mean:.{digits}f} +- {t * float(np.std(values, ddof=1)) / math.sqrt(n):.{digits}f}"


if __name__ == "__main__":
  main()
