"""ALMA (arXiv 2412.04305): prompts, responses, judgments and training, round after round, from one base model.

  python -m alma_jax.main --config=configs/alma.py:mini --workdir=runs/mini     a laptop, a few minutes
  python -m alma_jax.main --config=configs/alma.py:8b --workdir=runs/alma_8b \\
    --config.model.path=/models/Meta-Llama-3-8B \\
    --config.data.sft=sft_5k.jsonl --config.data.judge=judge_4k.jsonl          the paper's numbers

The word after the colon picks the size; every leaf can be set on the command line (--config.responses.n=64), and any
round can differ: --config.rounds="{3: {'responses': {'temperature': 0.9}}}". To start from your own data and model,
copy configs/forkme.py.
"""

from typing import Any

from configs.common import Config, policy, policy_gradients, preferences, sampling, section, training


def get_config(size: str = "mini") -> Config:
  sizes = {"mini": mini, "mini_paper": mini_paper, "8b": llama_8b, "70b": llama_70b}
  if size not in sizes:
    raise ValueError(f"configs/alma.py has no size {size!r}; there are {', '.join(sizes)}")
  return sizes[size]()


def llama_8b() -> Config:
  """The paper's run: K = 50k prompts, N = 200 responses, ten rounds of feedback."""
  c = section()
  c.recipe = "alma"
  c.seed = 0
  c.track = ""  # "trackio" or "wandb": metrics, stages and scores go there, too
  c.feedback_rounds = 10  # rounds 2 .. 11; round 1 is the initial SFT
  c.rounds = section()  # overrides, e.g. {3: dict(responses=dict(temperature=0.9))}
  c.shards = 64  # parts per stage: the unit of resuming and of splitting over hosts

  c.model = section()
  c.model.path = ""  # a Hugging Face directory of a base model
  c.model.chat = "llama3"  # llama3, llama2, plain, mini
  c.model.dtype = "auto"  # of sampling, scoring and forward passes; auto: bfloat16, on CPUs float32
  c.model.save_dtype = "bfloat16"  # of the weights of every trained checkpoint

  c.data = section()  # JSONL, Parquet or "tfds:NAME:SPLIT"
  c.data.sft = ""  # demonstrations: messages, or prompt and response
  c.data.judge = ""  # annotations: the same with a score 0..10
  c.data.eval = ""  # evaluation prompts; empty: some demonstrations are held out
  c.data.held_out = 200  # how many, if data.eval is empty

  c.mesh = section(data=1, fsdp=-1, tensor=1)  # of training, over all hosts; -1: all devices that are left
  c.engine = section()
  # devices that share one copy of the model in sampling and scoring; 0: as few as have room for many sequences
  c.engine.tensor = 0
  c.engine.slots = 0  # sequences that decode together, per copy; 0: as many as fit and are asked for, at most 512
  c.engine.rows = 32  # rows per scoring or embedding call, per copy

  # Initial SFT: two models that differ in the order of the data
  c.sft_seeds = (1, 2)
  c.sft = training(5.5e-6, 1.1e-6, batch=32, epochs=3, row_length=2048)

  # Prompt synthesis: show a few seeds, keep the next item
  c.prompts = sampling(1.0, 0.95, max_new_tokens=256, max_prompt_tokens=2048)
  c.prompts.draws = 2_000_000  # four times what ten rounds use; the paper keeps 100M
  c.prompts.shots = (3, 5)
  c.prompts.template = "requests"  # a word of names.LISTS
  c.prompts.max_characters = 4000
  c.prompts.similarity = 0.7  # ROUGE-L from which two prompts count as one; 0: only equal ones do
  c.prompts.ngram = 8  # shared words in a row that count as contamination of an evaluation prompt, in the report
  c.embeddings = section()  # of the pool, for the clusters
  c.embeddings.layers = 0  # of the base model; 0: all
  c.embeddings.pooling = "mean"  # "last": the last token's state
  c.embeddings.dims = 1024  # principal dimensions to keep
  c.embeddings.sample = 131_072  # prompts to compute them from
  c.clusters = section(k=200_000, iterations=10)
  c.clusters.spherical = False
  c.clusters.per_centroid = 0  # prompts per cluster that k-means trains on; 0: all
  c.draw = section()
  c.draw.prompts = 50_000  # K
  c.draw.method = "diverse"  # one prompt from each of K clusters; "random": any (Table 4); "proportional": by size
  c.draw.coverage = "round"  # every round draws from all clusters; "fresh": clusters that gave least come first

  # Responses
  c.responses = sampling(0.8, 0.95, max_new_tokens=1024, max_prompt_tokens=1024)
  c.responses.n = 200  # N per prompt, over all checkpoints
  c.responses.checkpoints = ("sft", "latest")  # "sft": both initial models; "sft_1"; "latest" (Table 5)

  # The judge
  c.judge = section()
  c.judge.kind = "finetuned"  # "few_shot": the base model with three examples (Table 3)
  c.judge.mode = "expected"  # "integer": the likeliest score (Table 3); "sampled": the mean of draws (3.3.2)
  c.judge.samples = 8  # draws of "sampled"; reasonings of a template that reasons first
  c.judge.template = "a2"  # a1, a2 (the paper's appendix), a2_reasoned, mini
  c.judge.held_out = 0.05  # of the annotated prompts, to measure the judge and to accept or refuse the distilled one
  c.judge.train = training(5e-6, 5e-7, batch=64, epochs=2, row_length=2048, warmup=0.05)
  c.judge.distil = section()
  c.judge.distil.prompts = 10_000  # synthetic prompts, answered by the initial models; 0: no distillation
  c.judge.distil.target = "two_hot"  # "rounded"
  c.judge.distil.least_rows = 50  # held-out annotations; with fewer the distilled judge is not taken
  c.judge.distil.least_pairs = 200  # pairs of them with different scores, likewise
  c.judge.distil.sample = sampling(0.8, 0.95, n=2, max_new_tokens=1024, max_prompt_tokens=1024)
  c.judge.distil.train = training(2.5e-6, 2.5e-7, batch=64, epochs=1, row_length=2048)

  # Selection and training
  c.trainset = section()
  c.trainset.method = "best_of_n"  # "dpo": best against another (Table 7); "random": no judge; "grpo": all
  c.trainset.min_margin = 0.0  # dpo: least difference of the two scores, which is never 0
  c.trainset.pairs = "best_random"  # dpo: "best_worst", "ordered_random" (5.3)
  c.policy_seed = 100
  c.policy = policy(5.5e-6, 1.1e-6, batch=128, epochs=2, row_length=2048)
  c.dpo = preferences(5e-7, 5e-8, batch=128, epochs=1, row_length=2048, warmup=0.1, weight_decay=0.0)
  c.grpo = policy_gradients(1e-6, 1e-6, batch=512, epochs=1, row_length=2048, schedule="constant", weight_decay=0.0)

  # Evaluation after every round
  c.eval = sampling(0.0, 1.0, max_new_tokens=1024, max_prompt_tokens=2048)
  # Judges that grade beside the run's own and select nothing: "NAME=WHAT", WHAT a word of names.EVALUATORS or
  # "package.module:NAME", such as "armo=reward:/models/ArmoRM"; "truth=mini" is the miniature world's ground truth.
  c.eval.judges = ()
  c.eval.sets = ()  # more evaluation prompts: "NAME=FILE.jsonl"
  c.eval.patience = 0  # stop after so many rounds without a better score by the first of eval.judges; 0: make all
  c.eval.few_shot = "dialogue"  # how the base model is shown its examples
  c.eval.shots = 3

  # Alarms, on the screen and in the report. They decide no result
  c.alarms = section()
  c.alarms.spread = 0.1  # least standard deviation of a judge's scores, of 0 .. 10
  c.alarms.entropy = 0.95  # most entropy of a judge, as a share of that of the annotations' scores together
  c.alarms.length = 0.6  # most |Spearman| of a judge's scores and the responses' lengths
  c.alarms.cut_off = 0.95  # most answers that hit the length limit, as a share
  c.alarms.selected = 0.5  # least prompts that a trainset keeps, as a share
  c.alarms.alike = 0.9  # most demonstrations with one response, as a share
  return c


def llama_70b() -> Config:
  """The same with Llama-3-70B, whose weights are spread over `tensor` in training, too."""
  c = llama_8b()
  c.mesh = section(data=1, fsdp=-1, tensor=8)
  for stage in (c.sft, c.policy):
    stage.learning_rate, stage.final_learning_rate = 2e-6, 4e-7
  c.judge.train.learning_rate, c.judge.train.final_learning_rate = 2e-6, 2e-7
  c.judge.distil.train.learning_rate, c.judge.distil.train.final_learning_rate = 1e-6, 1e-7
  return c


def mini() -> Config:
  """The miniature world: a base model of a few hundred thousand weights that comes with the package."""
  c = llama_8b()
  c.feedback_rounds = 9  # rounds 2 .. 10
  c.shards = 2
  c.model.update(dict(path="mini", chat="mini", save_dtype="float32"))
  c.data.update(dict(sft="mini", judge="mini", eval="mini"))
  c.engine.update(dict(slots=128, rows=128))

  tiny: dict[str, Any] = dict(fit_rows=False, batch=32, row_length=64, warmup=0.1, weight_decay=0.0, beta2=0.98)
  c.sft = training(1e-3, 0.0, epochs=6, **tiny)
  c.policy = policy(1e-3, 0.0, epochs=3, **tiny)
  c.dpo = preferences(3e-4, 0.0, epochs=8, **tiny)
  c.dpo.nll_weight = 1.0  # eight epochs without it unlearn the form of answers
  c.grpo = policy_gradients(3e-4, 0.0, epochs=1, **tiny)
  tiny["row_length"] = 128  # a prompt, a response and the judge's template take about 40 tokens
  c.judge.train = training(1e-3, 0.0, epochs=3, **tiny)
  c.judge.distil.train = training(5e-4, 0.0, epochs=1, **tiny)
  c.judge.template = "mini"
  c.judge.distil.prompts = 384
  c.judge.held_out = 0.1  # with fewer than 50 held-out annotations the distilled judge is not taken

  room = dict(max_new_tokens=16, max_prompt_tokens=28)
  c.prompts.update(sampling(1.0, 1.0, max_new_tokens=20, max_prompt_tokens=120))
  c.prompts.update(dict(draws=1536, template="mini"))
  c.prompts.similarity = 0.0  # prompts have few words, and each one counts
  c.embeddings.pooling = "last"  # the mean of a prompt's states hides how alike the prompts of the dense kind are
  c.clusters.k = 192
  c.draw.prompts = 24
  c.responses.update(sampling(0.7, 0.9, n=24, **room))
  c.judge.distil.sample = sampling(1.0, 0.9, n=5, **room)
  c.eval.update(sampling(0.0, 1.0, max_new_tokens=16, max_prompt_tokens=160))
  c.eval.update(dict(judges=("truth=mini",), few_shot="mini"))
  return c


def mini_paper() -> Config:
  """The miniature world with more of everything, as `benchmarks/effects.py` measures it."""
  c = mini()
  c.prompts.draws = 3072
  c.responses.n = 48
  c.judge.train.epochs = 6
  c.judge.distil.prompts = 1024  # five responses to each, five for every annotation, as in the paper
  return c
