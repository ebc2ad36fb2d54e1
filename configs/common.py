"""Pieces that configs share: plain functions that return a section, whose leaves you may change afterwards."""

from ml_collections import ConfigDict


def training(learning_rate, final_learning_rate, batch, epochs, row_length, **changes):
  """One training stage. `batch` counts examples; a step packs them into rows of `row_length` tokens."""
  section = ConfigDict(
    dict(
      learning_rate=learning_rate,
      final_learning_rate=final_learning_rate,  # the schedule ends here
      schedule="cosine",  # linear, constant
      warmup=0.0,  # fraction of all steps
      batch=batch,
      epochs=float(epochs),
      row_length=row_length,  # tokens; longer examples are cut and counted
      average="tokens",  # every supervised token counts alike; "examples": every example does
      dropout=0.0,  # of what the last layer adds; it rises evenly from 0 in the first (LIMA: 0.3)
      beta1=0.9,
      beta2=0.95,
      eps=1e-8,
      weight_decay=0.1,
      clip=1.0,  # of the global gradient norm
      moments="float32",  # "bfloat16": 4 bytes less for each weight
      # These leave the result as it is and may be changed in a run that has begun:
      remat="auto",  # "none", "products", "full": less and less memory, more and more time; auto: the first that fits
      passes=1,  # through the model for a step: more of them take less memory
      checkpoint_every=200,  # steps between checkpoints inside a stage, of which the last two are kept
      checkpoint_keep=0,  # one in so many steps stays for good; 0: none
    )
  )
  return _changed("training", section, changes)


def policy(learning_rate, final_learning_rate, batch, epochs, row_length, **changes):
  """The training of a round by SFT."""
  section = training(learning_rate, final_learning_rate, batch, epochs, row_length)
  section.update(
    init_from="base",  # what is trained: "base", "sft_1", ..., "latest"
    history="all",  # on the trainsets of all rounds so far; "latest": on this round's
  )
  return _changed("policy", section, changes)


def preferences(learning_rate, final_learning_rate, batch, epochs, row_length, **changes):
  """A training stage on pairs, of which `batch` go into a step; `loss` is explained in engine/losses.py, Preference."""
  section = policy(learning_rate, final_learning_rate, batch, epochs, row_length)
  section.update(
    init_from="sft_1",
    ref_from="init",  # the reference: "init", or as init_from
    loss="dpo",  # cdpo, rdpo, ipo, ipo_sum, dpo_norm, simpo, hinge, kto
    beta=0.1,  # how sharply a difference counts; log-probs per token want more (dpo_norm 5, simpo 2 .. 10)
    label_smoothing=0.0,  # cdpo, rdpo, simpo: share of pairs that are the wrong way round
    gamma_beta_ratio=0.0,  # simpo: what the chosen response must lead by, in nats per token (0.3 .. 0.5)
    nll_weight=0.0,  # of the chosen responses' NLL per token, added to any loss
  )
  return _changed("preferences", section, changes)


def policy_gradients(learning_rate, final_learning_rate, batch, epochs, row_length, **changes):
  """A training stage on all responses of a round, of which `batch` go into a step; set responses.checkpoints to the
  model that is trained, so that it learns from its own."""
  section = training(learning_rate, final_learning_rate, batch, epochs, row_length)
  section.update(
    init_from="latest",
    ref_from="sft_1",  # what it is held near
    clip_ratio=0.2,  # how far a token's probability may move before it stops counting
    kl=0.02,  # weight of the divergence from the reference
  )
  return _changed("policy_gradients", section, changes)


def _changed(name, section, changes):
  unknown = changes.keys() - section.keys()
  if unknown:
    raise TypeError(f"{name}() has no {', '.join(sorted(unknown))}")
  section.update(changes)
  return section


def sampling(temperature, top_p, max_new_tokens, max_prompt_tokens, **more):
  """How responses are drawn; prompts longer than `max_prompt_tokens` are left out and counted."""
  return ConfigDict(
    dict(
      temperature=float(temperature),  # 0: greedy
      top_p=float(top_p),
      top_k=0,  # 0: all tokens
      repetition_penalty=1.0,  # as in transformers: above 1, what was said before becomes less likely
      max_new_tokens=max_new_tokens,
      max_prompt_tokens=max_prompt_tokens,
      **more,
    )
  )
