"""Judgments: the judge's score of every response of a round."""

from alma_jax.judges.own import verdicts
from alma_jax.store.records import Judgment, Prompt, Response


def build(session, round, prompts, responses, judge, c):
  """The finished stage `round_RR/judgments`, a part per share of the prompts."""
  fields = {"judge": judge.identity, "text": session.describe_text(), "dtype": session.dtype, "shards": c.shards}
  inputs = {"prompts": prompts, "responses": responses}
  stage = session.run.stage(f"round_{round:02d}/judgments", fields, inputs)
  if stage.done:
    return stage
  messages = {p.id: p.messages for p in prompts.read(Prompt)}
  missing = stage.mine(c.shards)
  parts_of = lambda share: range(share, responses.parts, c.shards)
  total = sum(responses.manifest["parts"][i]["rows"] for share in missing for i in parts_of(share))
  with session.bar(stage.name, total, "responses") as bar:
    for share in missing:
      written = [r for i in parts_of(share) for r in responses.read(Response, i)]
      found = verdicts(session, judge, [(messages[r.prompt_id], r.text) for r in written], bar)
      records = [Judgment(r.prompt_id, r.sample_id, v.score, v.probs, v.mass) for r, v in zip(written, found)]
      counts = {
        "judged": len(records),
        "score_sum": sum(v.score for v in found),
        "mass_sum": sum(v.mass for v in found),
        "histogram": {f"{s:02d}": sum(int(v.score + 0.5) == s for v in found) for s in range(11)},
      }
      stage.write_part(share, c.shards, records, Judgment, counts)
  stage.finish()
  return stage
