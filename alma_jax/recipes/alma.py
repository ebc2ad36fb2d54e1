"""ALMA: alignment with minimal annotation (arXiv 2412.04305, section 3).

From a base model, a few thousand demonstrations and a few thousand annotated responses; no other model anywhere.

  python -m alma_jax.main --config=configs/alma.py:mini --workdir=runs/mini

Every line below is a stage of the run directory; a finished one is read, not made again. Ablations are config values:
draw.method, responses.checkpoints, judge.kind / mode / distil, trainset.method, and any of them per round.
"""

from alma_jax.stages import clusters, drafts, draw, evaluation, judge, judgments, policy, prompts, responses, trainset
from alma_jax.stages import data as data_stage


def run(session):
  c = session.config
  base = session.base  # M_0
  data = data_stage.build(session, c)  # D_1, the annotations, the evaluation prompts

  # Initial SFT: base on D_1, once per seed                                    M_1^(1), M_1^(2)
  sft = [policy.sft(session, f"sft_{i}", base, data, [], c.sft, seed) for i, seed in enumerate(c.sft_seeds, start=1)]

  # Prompts (3.1): few-shot synthesis, each once, clustered                    P
  pools = [clusters.build(session, prompts.build(session, data, drafts.build(session, data, c), c), c)]

  draws, drawn = c.prompts.draws, []

  # Judge (3.3): fine-tuned on the annotations, distilled on its own scores    J
  if c.judge.kind == "few_shot":
    judge_ = judge.few_shot(session, data, c)
  else:
    judge_ = judge.finetune(session, data, c)
    if c.judge.distil.prompts:
      c_1 = judge.practice(c)
      asked = draw.build(session, 1, pools, [], c_1)
      drawn.append(asked)
      sampled = responses.build(session, 1, asked, sft, c_1)
      scored = judgments.build(session, 1, asked, sampled, judge.real_valued(judge_), c_1)
      judge_ = judge.distil(session, judge_, data, asked, sampled, scored, c)

  evaluation.build(session, 0, base, judge_, data, c, shots=c.eval.shots)
  evaluation.build(session, 1, sft[0], judge_, data, c)

  # Learning from feedback (3.4), rounds 2, 3, ...
  latest, trainsets = None, []
  for r in session.feedback_rounds():
    c_r = session.config_for(r)  # the config with this round's overrides
    if c_r.prompts.draws > draws:  # more prompts from this round on
      drafted = drafts.build(session, data, c_r, f"pool_{r:02d}", draws)
      more = prompts.build(session, data, drafted, c_r, [pool.prompts for pool in pools])
      pools.append(clusters.added(session, more, pools[0], c_r))
      draws = c_r.prompts.draws
    drawn.append(draw.build(session, r, pools, drawn, c_r))  # K unused prompts
    checkpoints = _checkpoints(sft, latest, c_r.responses.checkpoints)  # M_1^(i), and M_{r-1} if r >= 3
    sampled = responses.build(session, r, drawn[-1], checkpoints, c_r)  # N responses per prompt
    scored = judgments.build(session, r, drawn[-1], sampled, judge_, c_r)  # J
    trainsets.append(trainset.build(session, r, drawn[-1], sampled, scored, c_r))  # D_r
    name, seed = f"round_{r:02d}/policy", c_r.policy_seed + r
    method = c_r.trainset.method
    options = c_r[{"dpo": "dpo", "grpo": "grpo"}.get(method, "policy")]
    models = {"base": base, "latest": latest or sft[0], **{m.name: m for m in sft}}
    init = models[options.init_from]
    if method == "grpo":
      reference = models[options.ref_from]
      latest = policy.grpo(session, name, init, reference, trainsets[-1], options, seed)  # on D_r, which it wrote
    else:
      learnt = trainsets if options.history == "all" else trainsets[-1:]
      if method == "dpo":
        reference = init if options.ref_from == "init" else models[options.ref_from]
        latest = policy.dpo(session, name, init, reference, learnt, options, seed)  # from M_1, on D_2 .. D_r
      else:
        latest = policy.sft(session, name, init, data, learnt, options, seed)  # from M_0, on D_1 .. D_r
    evaluation.build(session, r, latest, judge_, data, c_r)  # M_r


def _checkpoints(sft, latest, names):
  """The models that write a round's responses: "sft" is all initial SFT models, "sft_1" one of them, "latest" the last
  round's. Before there is a last round, an initial model stands in for it."""
  chosen = []
  for name in names:
    if name == "latest":
      chosen += [latest] if latest else []
    else:
      chosen += [m for m in sft if name in ("sft", m.name)]
  return chosen or sft[:1]
