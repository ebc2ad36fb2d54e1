"""SPA (arXiv 2406.04412): a policy judges its own responses, from an SFT model and a few thousand human pairs.

  python -m alma_jax.main --config=configs/spa.py:mini --workdir=runs/spa     a laptop, two minutes
  python -m alma_jax.main --config=configs/spa.py:7b --workdir=runs/spa_7b \\
    --config.model.path=/models/Mistral-7B-v0.1 --config.sft_model=/models/zephyr-7b-sft-full \\
    --config.data.preferences=ultrafeedback_2k.jsonl --config.data.prompts=ultrafeedback_58k.jsonl \\
    --config.data.eval=alpaca_eval.jsonl

Its paper's code runs two iterations (the main rows are of three: --config.feedback_rounds=3). "No seeds" (paper 5.3) is
--config.sft_model=INSTRUCT --config.data.preferences="" --config.judge.reference=base. configs/ablations/spa_*.py are
its tables.
"""

from typing import Any

from configs.common import Config, preferences, sampling, section, training


def get_config(size: str = "mini") -> Config:
  sizes = {"mini": mini, "7b": mistral_7b, "8b": llama_8b}
  if size not in sizes:
    raise ValueError(f"configs/spa.py has no size {size!r}; there are {', '.join(sizes)}")
  return sizes[size]()


def refined(learning_rate: float, final_learning_rate: float, batch: int, row_length: int, **changes: Any) -> Config:
  """The training of an iteration: DPO with self-refinement and de-coupled noise detection; `batch` counts pairs."""
  c = preferences(learning_rate, final_learning_rate, batch, 1, row_length, warmup=0.1, weight_decay=0.0)
  c.update(
    init_from="latest",  # the policy before; "sft_1", "base"
    ref_from="init",  # DPO's reference: "init" is the one in init_from; "sft_1" holds it near the SFT model
    history="latest",  # this round's pairs alone; "all": those of people and of all rounds so far
    smoothing=0.1,  # alpha: the pairs that are not believed count as wrong with this probability; 0: plain DPO
    believing=0.2,  # in this first share of the steps every pair is believed
    mix=0.5,  # lambda: noise is looked for under logits l + lambda (l - l_ref); halves from iteration to iteration
    window=50,  # tau is found in the margins of so many steps
    quantile=0.1,  # and is this quantile of them: pairs below are not believed
  )
  c.update(changes)
  return c


def mistral_7b() -> Config:
  """The paper's run on a Llama-shaped 7B model: 2,000 seed pairs, then 8,000 and 20,000 prompts (30,000 in a third)."""
  c = section()
  c.recipe = "spa"
  c.seed = 42
  c.feedback_rounds = 2  # iterations: rounds 2, 3; round 0 is the SFT model, round 1 DPO on people's pairs
  c.rounds = section()  # overrides, e.g. {3: dict(responses=dict(temperature=0.9))}
  c.shards = 16  # parts per stage: the unit of resuming and of splitting over hosts

  c.model = section()
  c.model.path = ""  # a Hugging Face directory of a base model
  c.model.chat = "llama2"  # llama3, llama2, plain, mini
  c.model.dtype = "auto"  # of sampling, scoring and forward passes; auto: bfloat16, on CPUs float32
  c.model.save_dtype = "bfloat16"  # of the weights of every trained checkpoint
  c.sft_model = ""  # a directory of an SFT model; empty: the base model is fine-tuned on data.sft

  c.data = section()  # JSONL, Parquet or "tfds:NAME:SPLIT"
  c.data.preferences = ""  # people's pairs: prompt or messages, chosen, rejected; empty: none (paper 5.3)
  c.data.prompts = ""  # unlabelled prompts, of which each iteration takes its own
  c.data.sft = ""  # demonstrations, if there is no sft_model: messages, or prompt and response
  c.data.eval = ""  # evaluation prompts; empty: some demonstrations are held out
  c.data.held_out = 200  # how many, if data.eval is empty

  c.mesh = section(data=1, fsdp=-1, tensor=1)  # of training, over all hosts; -1: all devices that are left
  c.engine = section()
  # devices that share one copy of the model in sampling and scoring; 0: as few as leave room for sequences beside it
  c.engine.tensor = 0
  c.engine.slots = 0  # sequences that decode together, per copy; 0: as many as fit, at most 512
  c.engine.rows = 32  # rows per scoring call, per copy

  # The SFT model, and DPO on people's pairs
  c.sft = training(2e-5, 0.0, batch=128, epochs=1, row_length=2048, warmup=0.1, weight_decay=0.0)
  c.seeds = section()
  c.seeds.held_out = 200  # prompts whose pairs are never trained on: they measure the judgement
  c.seeds.flipped = 0.0  # the share of the pairs that are turned round, to see what noise does
  c.dpo = preferences(5e-7, 0.0, batch=32, epochs=3, row_length=2048, warmup=0.1, weight_decay=0.0)

  # An iteration: responses, their direct preference judgement, pairs
  c.split = section(parts=(8_000, 20_000, 30_000))  # prompts of iterations 1, 2, 3; none occurs twice
  c.responses = sampling(0.7, 1.0, max_new_tokens=300, max_prompt_tokens=1024)
  c.responses.n = 2
  c.judge = section()
  c.judge.reference = "sft"  # log p of the policy minus log p of this; "previous", "none" (Table 7); "base" (5.3)
  c.judge.per = "sequence"  # the sum over a response's tokens; "token": their mean
  c.agreement = section()
  c.agreement.gold = ""  # a word of names.EVALUATORS whose order counts as right, to measure the judgement
  c.trainset = section()
  c.trainset.method = "dpo"
  c.trainset.pairs = "best_worst"  # best_random, ordered_random
  c.trainset.min_margin = 0.0  # the least difference of the two rewards, which is never 0
  c.trainset.truncated = True  # a response that hit the length limit may be the chosen one
  c.trainset.length_ratio = 0.0  # 1.1: pairs of like length alone, a control for length
  c.policy_seed = 100
  c.policy = refined(5e-7, 0.0, batch=32, row_length=2048)

  # Evaluation after every round
  c.eval = sampling(0.0, 1.0, max_new_tokens=1024, max_prompt_tokens=1024)
  c.eval.judges = ()  # "NAME=WHAT", WHAT a word of names.EVALUATORS or "package.module:NAME"
  c.eval.sets = ()  # more evaluation prompts: "NAME=FILE.jsonl"
  c.eval.patience = 0  # stop after so many rounds without a better score by the first of eval.judges; 0: make all

  # Alarms, on the screen and in the report. They decide no result
  c.alarms = section(spread=0.1, length=0.6, cut_off=0.95, selected=0.5, alike=0.9)
  return c


def llama_8b() -> Config:
  """The same from Llama-3-8B."""
  c = mistral_7b()
  c.model.chat = "llama3"
  return c


def mini() -> Config:
  """The miniature world: a base model of a few hundred thousand weights that comes with the package."""
  c = mistral_7b()
  c.seed = 0
  c.track = ""  # "trackio" or "wandb": metrics, stages and scores go there, too
  c.shards = 2
  c.model.update(dict(path="mini", chat="mini", save_dtype="float32"))
  c.data.update(dict(preferences="mini", prompts="mini", sft="mini", eval="mini"))
  c.engine.update(dict(slots=128, rows=128))
  tiny: dict[str, Any] = dict(fit_rows=False, batch=32, row_length=64, warmup=0.1, weight_decay=0.0, beta2=0.98)
  c.sft = training(1e-3, 0.0, epochs=6, **tiny)
  c.dpo = preferences(3e-4, 0.0, epochs=3, nll_weight=1.0, **tiny)
  c.policy = refined(1e-4, 0.0, **tiny | dict(batch=16), window=4)
  c.trainset.truncated = False
  c.split.parts = (400, 800, 1200)
  c.seeds.held_out = 100
  c.responses.update(sampling(0.7, 1.0, max_new_tokens=16, max_prompt_tokens=32))
  c.agreement.gold = "mini"
  # Sampled answers, as people see them: what the policy is surer of shows in them, and not in greedy ones
  c.eval.update(sampling(0.7, 1.0, max_new_tokens=16, max_prompt_tokens=32))
  c.eval.judges = ("truth=mini",)
  return c
