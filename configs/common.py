"""Sections that configs share. Each function returns a section whose fields may be changed afterwards:

c.sft = training(5.5e-6, 1.1e-6, batch=32, epochs=3, row_length=2048, warmup=0.1)
c.sft.clip = 0.5
"""

from typing import Any

from ml_collections import ConfigDict

Config = Any  # a ConfigDict: its fields are known when it has been made, too late for a type checker


def section(**fields: Any) -> Config:
  """A config, or a section of one, that holds these fields; assigning a new name adds a field."""
  return ConfigDict(fields)


def training(
  learning_rate: float, final_learning_rate: float, batch: int, epochs: float, row_length: int, **changes: Any
) -> Config:
  """One training stage. `batch` counts examples; a step packs them into rows of `row_length` tokens."""
  c = section(
    learning_rate=learning_rate,
    final_learning_rate=final_learning_rate,  # the schedule ends here
    schedule="cosine",  # linear, constant
    warmup=0.0,  # fraction of all steps
    batch=batch,  # examples per step
    epochs=float(epochs),
    row_length=row_length,  # tokens; longer examples are cut and counted
    average="tokens",  # every supervised token counts alike; "examples": every example does
    dropout=0.0,  # in the last layer; it rises evenly from 0 in the first (LIMA: 0.3)
    beta1=0.9,  # AdamW
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip=1.0,  # the largest global gradient norm
    moments="float32",  # of AdamW; "bfloat16" saves 4 bytes per weight
    # The rest changes the result only by rounding. A run that has begun accepts new values.
    fit_rows=True,  # rows as many and as long as the data needs; False: of row_length each, in multiples of 4
    remat="auto",  # "none", "products", "full": less and less memory, more and more time; auto: the first that fits
    passes=1,  # parts that a step's batch is taken in: more need less memory; at least so many, where remat is "auto"
    checkpoint_every=200,  # steps between checkpoints inside a stage; the last two are kept
    checkpoint_keep=0,  # checkpoints at multiples of this many steps stay for good; 0: none
    keep_epochs=0,  # the models of this epoch and of all later ones stay (LIMA: 1); 0: only the last one does
  )
  return _changed("training", c, changes)


def policy(
  learning_rate: float, final_learning_rate: float, batch: int, epochs: float, row_length: int, **changes: Any
) -> Config:
  """The training of a round by SFT."""
  c = training(learning_rate, final_learning_rate, batch, epochs, row_length)
  c.update(
    init_from="base",  # the model that is trained: "base", "sft_1", ..., "latest"
    history="all",  # train on the trainsets of all rounds so far; "latest": of this round
  )
  return _changed("policy", c, changes)


def preferences(
  learning_rate: float, final_learning_rate: float, batch: int, epochs: float, row_length: int, **changes: Any
) -> Config:
  """The training of a round on preference pairs; `batch` counts pairs. engine/losses.py explains every loss."""
  c = policy(learning_rate, final_learning_rate, batch, epochs, row_length)
  c.update(
    init_from="sft_1",
    ref_from="init",  # the reference model: "init" is the one in init_from; or a name as there
    loss="dpo",  # cdpo, rdpo, ipo, ipo_sum, dpo_norm, simpo, hinge, kto
    beta=0.1,  # how sharply a difference counts; losses per token want more (dpo_norm 5, simpo 2 .. 10)
    label_smoothing=0.0,  # cdpo, rdpo, simpo: share of pairs whose order is wrong
    gamma_beta_ratio=0.0,  # simpo: margin by which the chosen response must lead, in nats per token (0.3 .. 0.5)
    nll_weight=0.0,  # weight of the chosen responses' NLL per token, added to any loss
  )
  return _changed("preferences", c, changes)


def policy_gradients(
  learning_rate: float, final_learning_rate: float, batch: int, epochs: float, row_length: int, **changes: Any
) -> Config:
  """The training of a round on all its responses by GRPO; `batch` counts responses.

  The model must learn from its own responses: set responses.checkpoints to the model in `init_from`.
  """
  c = training(learning_rate, final_learning_rate, batch, epochs, row_length)
  c.update(
    init_from="latest",
    ref_from="sft_1",  # the model that the policy is held near
    clip_ratio=0.2,  # how far a token's probability may move before the token stops counting
    kl=0.02,  # weight of the divergence from the reference
  )
  return _changed("policy_gradients", c, changes)


def sampling(temperature: float, top_p: float, max_new_tokens: int, max_prompt_tokens: int, **more: Any) -> Config:
  """How responses are sampled. Prompts longer than `max_prompt_tokens` are left out and counted."""
  return section(
    temperature=float(temperature),  # 0: greedy
    top_p=float(top_p),
    top_k=0,  # 0: all tokens
    repetition_penalty=1.0,  # as in transformers: above 1, tokens that were used become less likely
    max_new_tokens=max_new_tokens,
    max_prompt_tokens=max_prompt_tokens,
    **more,
  )


def _changed(name: str, c: Config, changes: dict[str, Any]) -> Config:
  if unknown := changes.keys() - c.keys():
    raise TypeError(f"{name}() has no {', '.join(sorted(unknown))}")
  c.update(changes)
  return c
