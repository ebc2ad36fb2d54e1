"""ISARA (arXiv 2401.06785): questions and answers by in-context learning from fewer than a hundred human pairs.

  python -m alma_jax.main --config=configs/isara.py:mini --workdir=runs/isara     a laptop, a minute
  python -m alma_jax.main --config=configs/isara.py:7b --workdir=runs/isara_7b \\
    --config.model.path=/models/llama-7b --config.data.sft=seeds.jsonl --config.data.eval=questions.jsonl \\
    --config.eval.judges="('harm=reward:/models/harm',)" --config.categories.judge=harm

Where the paper names no number the value is ours, and its comment says so. --config.categories.seeds="('country',)"
takes D_0 from one category and shows how the others are answered. configs/ablations/isara_*.py are its sweeps.
"""

from typing import Any

from configs.common import Config, sampling, section, training


def get_config(size: str = "mini") -> Config:
  sizes = {"mini": mini, "mini_safety": mini_safety, "7b": llama_7b}
  if size not in sizes:
    raise ValueError(f"configs/isara.py has no size {size!r}; there are {', '.join(sizes)}")
  return sizes[size]()


def llama_7b() -> Config:
  """The size of the paper's largest model, with 64 human pairs."""
  c = section()
  c.recipe = "isara"
  c.seed = 0
  c.track = ""  # "trackio" or "wandb": metrics, stages and scores go there, too
  c.feedback_rounds = 6  # the most iterations (ours), rounds 2 .. 7; round 1 is SFT on the human pairs alone
  c.rounds = section()  # overrides, e.g. {3: dict(responses=dict(temperature=0.5))}
  c.shards = 16  # parts per stage: the unit of resuming and of splitting over hosts

  c.model = section()
  c.model.path = ""  # a Hugging Face directory of a base model
  c.model.chat = "llama2"  # llama3, llama2, plain, mini
  c.model.dtype = "auto"  # of sampling and forward passes; auto: bfloat16, on CPUs float32
  c.model.save_dtype = "bfloat16"  # of the weights of every trained checkpoint

  c.data = section()  # JSONL, Parquet or "tfds:NAME:SPLIT"
  c.data.sft = ""  # the human pairs: messages, or prompt and response; `category` may stand beside
  c.data.eval = ""  # evaluation prompts; empty: some pairs are held out
  c.data.held_out = 20  # how many, if data.eval is empty
  c.data.pairs = 64  # D_0: so many of them, drawn by the seed; 0: all, which may be 100

  c.categories = section()
  c.categories.by = "field"  # the rows' own field `category`; or "my_rows:NAME", a function of the row; mini
  c.categories.seeds = ()  # D_0 is of these categories alone; (): of all
  c.categories.judge = ""  # the one of eval.judges by whose scores an answer is harmful; "": none
  c.categories.harmful = "above"  # it is if its score is above the bound; "below"
  c.categories.bound = 0.0

  c.mesh = section(data=1, fsdp=-1, tensor=1)  # of training, over all hosts; -1: all devices that are left
  c.engine = section()
  c.engine.tensor = 0  # devices that share one copy of the model in sampling; 0: as few as have room for many sequences
  c.engine.slots = 0  # sequences that decode together, per copy; 0: as many as fit, at most 512
  c.engine.rows = 32  # rows per embedding call, per copy

  c.writer = "latest"  # who writes questions and answers; "base"
  c.start = "base"  # who is the latest in the first iteration; "sft_1": the model after D_0 alone
  # Questions, after random ones of all pairs so far
  c.prompts = sampling(0.7, 0.9, max_new_tokens=256, max_prompt_tokens=1792)  # ours
  c.prompts.draws = 512  # N, generated per iteration (ours)
  c.prompts.shots = (5, 5)  # C (ours)
  c.prompts.template = "questions"  # a word of names.LISTS
  c.prompts.words = (4, 150)  # of a question (self-instruct's)
  c.prompts.max_characters = 4000
  c.prompts.similarity = 0.7  # ROUGE-L to an earlier question from which one is dropped (self-instruct's)
  c.prompts.ngram = 8  # shared words in a row that count as contamination of an evaluation prompt, in the report

  # Answers, after the nearest pairs of all so far
  c.neighbours = section()
  c.neighbours.method = "knn"  # "random": the ablation
  c.neighbours.shots = 5  # C (ours)
  c.neighbours.layers = 0  # of the base model, whose hidden states are the embeddings; 0: all
  c.neighbours.pooling = "mean"  # "last": the last token's state
  c.neighbours.centred = True  # minus the pool's mean, over its deviations
  c.responses = sampling(0.3, 1.0, max_new_tokens=512, max_prompt_tokens=1536)  # ours
  c.responses.template = "answers"  # a word of names.DIALOGUES
  c.pairs = section()
  c.pairs.tokens = (5, 512)  # of an answer (ours)
  c.pairs.similarity = 0.7  # ROUGE-L to a kept answer from which one is dropped (ours); 0: if equal
  c.pairs.repeats = False  # keep answers that repeat others, as refusals do
  c.alpha = 0.1  # the run ends before an iteration that keeps less of what it generates (ours)

  # Training
  c.sft = training(2e-5, 0.0, batch=16, epochs=3, row_length=2048, warmup=0.03, weight_decay=0.0)  # ours
  c.policy_seed = 100
  c.policy = training(2e-5, 0.0, batch=32, epochs=3, row_length=2048, warmup=0.03, weight_decay=0.0)  # ours
  c.policy.init_from = "base"  # "latest"
  c.policy.gamma = 0.5  # the weight of D_0 in the loss, 1 - gamma that of the generated pairs (ours)

  # Evaluation after every round
  c.eval = sampling(0.0, 1.0, max_new_tokens=512, max_prompt_tokens=1536)
  c.eval.judges = ()  # "NAME=WHAT", WHAT a word of names.EVALUATORS or "package.module:NAME"; at least one
  c.eval.sets = ()  # more evaluation prompts: "NAME=FILE.jsonl"
  c.eval.patience = 0
  c.eval.few_shot = "answers"  # how the base model is shown its examples
  c.eval.shots = 5

  # Alarms, on the screen and in the report. They decide no result
  c.alarms = section(cut_off=0.95, selected=0.5, alike=0.9)
  return c


def mini() -> Config:
  """The miniature world: a base model of a few hundred thousand weights that comes with the package."""
  c = llama_7b()
  c.feedback_rounds = 3
  c.start = "sft_1"  # the world's base model answers, but does not take over the manner of its examples
  c.shards = 2
  c.model.update(dict(path="mini", chat="mini", save_dtype="float32"))
  c.data.update(dict(sft="mini", eval="mini", pairs=16))
  c.categories.by = "mini"
  c.engine.update(dict(slots=128, rows=128))
  c.prompts.update(sampling(0.9, 1.0, max_new_tokens=24, max_prompt_tokens=160))
  c.prompts.update(dict(draws=512, template="mini", words=(2, 40), similarity=0.0))  # every word of a prompt counts
  c.responses.update(sampling(0.3, 1.0, max_new_tokens=16, max_prompt_tokens=160))
  c.responses.template = "mini"
  c.pairs.update(dict(tokens=(3, 16), similarity=0.0))
  c.alpha = 0.05  # most questions are of one kind, and few answers to them are new
  tiny: dict[str, Any] = dict(fit_rows=False, batch=32, row_length=64, warmup=0.1, weight_decay=0.0, beta2=0.98)
  c.sft = training(1e-3, 0.0, epochs=6, **tiny)
  mixed = dict(init_from=c.policy.init_from, gamma=c.policy.gamma)
  c.policy = training(1e-3, 0.0, epochs=4, **tiny)
  c.policy.update(mixed)
  c.eval.update(sampling(0.0, 1.0, max_new_tokens=16, max_prompt_tokens=160))
  c.eval.update(dict(judges=("truth=mini",), few_shot="mini"))
  return c


def mini_safety() -> Config:
  """The same on requests that are to be refused: human refusals of one kind, both kinds evaluated."""
  c = mini()
  c.data.update(dict(sft="mini_safety", eval="mini_safety"))
  c.categories.update(
    dict(by="field", judge="truth", harmful="below", bound=0.5)
  )  # an answer that tells a secret has 0
  c.pairs.repeats = True  # good answers are alike
  return c
