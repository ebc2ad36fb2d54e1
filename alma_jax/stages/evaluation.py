"""How good a checkpoint is: its answers to the evaluation prompts, scored by the judge and, if there is one, by an
evaluator that the pipeline never sees. One row of progress.csv per round."""

import dataclasses
import math

from alma_jax.corpus.normalise import prompt_id
from alma_jax.evals.evaluators import evaluator_by_name
from alma_jax.judges.own import verdicts
from alma_jax.keys import key_of
from alma_jax.runtime.sampling import drafts
from alma_jax.store.records import Evaluation
from alma_jax.text import chat, fewshot


def build(session, round, checkpoint, judge, data, c, shots=0):
  """The finished stage `round_RR/eval`; the prompts are `data.eval`. With `shots` the checkpoint is a base model that
  answers after that many of the demonstrations."""
  rows, shots = data.eval, data.sft[:shots]
  template = fewshot.few_shot_by_name(fewshot.DIALOGUES, c.eval.few_shot) if shots else None
  fields = {
    "config": {"seed": c.seed, "eval": c.eval.to_dict(), "shards": c.shards, "dtype": session.dtype},
    "checkpoint": checkpoint.content,
    "judge": judge.identity,
    "data": {"eval": data.digests["eval"]} | ({"sft": data.digests["sft"]} if shots else {}),
    "text": session.describe_text() | {"few_shot": dataclasses.asdict(template) if template else None},
  }
  stage = session.run.stage(f"round_{round:02d}/eval", fields)
  if not stage.done:
    missing = stage.mine(c.shards)
    with session.bar(f"{stage.name}", sum(len(rows[i :: c.shards]) for i in missing), "answers") as bar:
      for part in missing:
        records = _evaluated(session, round, checkpoint, judge, rows[part :: c.shards], template, shots, c, bar)
        stage.write_part(part, c.shards, records, Evaluation, _sums(records))
    stage.finish()
    session.say(in_words(round, checkpoint.name, summarised(stage.manifest["counts"])))
  summary = summarised(stage.manifest["counts"])
  session.run.progress({"round": round, "checkpoint": checkpoint.name, **summary})
  return summary


def _evaluated(session, round, checkpoint, judge, rows, template, shots, c, bar):
  tok = session.tokenizer
  if template:
    shown = [{"prompt": fewshot.last_user_turn(s.messages), "response": s.response} for s in shots]
    ask = lambda row: fewshot.few_shot_ids(tok, template, shown, fewshot.last_user_turn(row.messages))
  else:
    ask = lambda row: tuple(chat.encode_prompt(tok, session.chat, row.messages))
  stops, strings = chat.stop_ids(tok, session.chat), (template.stop,) if template else ()
  prompts = [ask(row) for row in rows]
  fit = [i for i, ids in enumerate(prompts) if len(ids) <= c.eval.max_prompt_tokens]
  keys = [key_of(c.seed, round, "eval", prompt_id(rows[i].messages)) for i in fit]
  written = dict(zip(fit, drafts(session, checkpoint, [prompts[i] for i in fit], keys, stops, c.eval, bar, strings)))
  answers = []
  for i, row in enumerate(rows):
    draft = written.get(i)
    text, finished = (draft.text, draft.finished) if draft else ("", False)  # no room for the prompt: no answer
    answers.append((row.messages, text, finished, len(draft.tokens) if draft else 0))
  scored = verdicts(session, judge, [(messages, text) for messages, text, _, _ in answers])
  truth = evaluator_by_name(c.eval.evaluator)
  return [
    Evaluation(prompt_id(m), m, text, tokens, finished, v.score, truth(m, text, finished) if truth else None)
    for (m, text, finished, tokens), v in zip(answers, scored)
  ]


def _sums(records):
  graded = [r.score for r in records if r.score is not None]
  return {
    "n": len(records),
    "graded": len(graded),
    "score": float(sum(graded)),
    "score_squared": float(sum(x * x for x in graded)),
    "judge_score": float(sum(r.judge_score for r in records)),
    "judge_score_squared": float(sum(r.judge_score**2 for r in records)),
    "finished": sum(r.finished for r in records),
    "tokens": sum(r.tokens for r in records),
  }


def in_words(round, name, summary):
  scores = [
    f"{label} {summary[key]:.2f} +- {summary[f'{key}_ci95']:.2f}"
    for key, label in (("score", "score"), ("judge_score", "judge"))
    if key in summary
  ]
  return f"round {round}, {name}: {', '.join(scores)} ({summary['n']} prompts)"


def summarised(s):
  """Means with 95 % intervals from a manifest's sums."""
  n = s["n"]
  out = {"n": n}
  for name, count in (("score", s["graded"]), ("judge_score", n)):
    if count:
      mean = s[name] / count
      variance = max(0.0, s[f"{name}_squared"] / count - mean**2) * count / max(1, count - 1)
      out |= {name: round(mean, 4), f"{name}_ci95": round(1.96 * math.sqrt(variance / count), 4)}
  return out | {"finished": round(s["finished"] / n, 4), "tokens": round(s["tokens"] / n, 2)}
