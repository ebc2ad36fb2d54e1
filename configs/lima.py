"""LIMA (arXiv 2305.11206): one SFT on a thousand demonstrations, an epoch chosen by what it writes.

  python -m alma_jax.main --config=configs/lima.py:mini --workdir=runs/lima     a laptop, a minute
  python -m alma_jax.main --config=configs/lima.py:65b --workdir=runs/lima_65b \\
    --config.model.path=/models/llama-65b --config.data.sft=lima_1k.jsonl --config.data.eval=dev_50.jsonl \\
    --config.eval.sets="('test=test_300.jsonl', 'safety=safety_30.jsonl')" --config.data.validation=held_out.jsonl

By default a person chooses: the run writes a form, ends with status 75 and goes on, by the same command, when it is
filled in. `alma curate` makes sets of demonstrations like LIMA's from a dump of question-and-answer sites.
"""

from typing import Any

from configs import alma
from configs.common import Config, sampling, section, training


def get_config(size: str = "mini") -> Config:
  sizes = {"mini": mini, "7b": llama_7b, "65b": llama_65b}
  if size not in sizes:
    raise ValueError(f"configs/lima.py has no size {size!r}; there are {', '.join(sizes)}")
  return sizes[size]()


def llama_65b() -> Config:
  """The paper's run."""
  like = alma.llama_70b()
  c = section()
  c.recipe = "lima"
  c.seed = 0
  c.track = ""  # "trackio" or "wandb": metrics, stages and scores go there, too
  c.shards = 16
  c.model = like.model
  c.model.chat = "lima"  # a new token ends every utterance; for Llama-3 "llama3", whose <|eot_id|> does
  c.model.vocab_multiple = 8  # the new token's row and seven more, so that mesh.tensor divides the vocabulary
  c.mesh = like.mesh
  c.engine = like.engine

  c.data = section()
  c.data.sft = ""  # 1,000 demonstrations; 30 dialogues among them are rows with more turns
  c.data.judge = ""  # annotated responses, for choice.judge "own"
  c.data.eval = ""  # dev prompts; empty: some demonstrations are held out
  c.data.held_out = 50
  c.data.validation = ""  # demonstrations whose loss is measured beside the grades
  c.data.validation_held_out = 0  # or so many held-out ones

  c.sft_seed = 1
  # Section 3: no warm-up. Smaller models may want batch=64 and dropout=0.2
  c.sft = training(1e-5, 1e-6, batch=32, epochs=15, row_length=2048, schedule="linear", dropout=0.3, keep_epochs=1)
  c.judge = like.judge
  c.judge.distil.prompts = 0

  c.choice = section()
  c.choice.judge = "human"  # "own", or as eval.judges: "api:MODEL@URL#lima_1_6", "api:MODEL@URL#lima_pairwise"
  c.choice.pairwise = False  # compare each epoch with the one before instead of grading it
  c.choice.margin = 0.0
  c.choice.first = 5
  c.choice.last = 10
  c.choice.prompts = 0  # of data.eval, set apart to choose by; the others are then the set "test"; 0: all of them

  # Section 4: every answer is sampled once; the ablations take n=5
  c.eval = sampling(0.7, 0.9, max_new_tokens=1536, max_prompt_tokens=512)  # 2,048 in all, the model's positions
  c.eval.repetition_penalty = 1.2
  c.eval.n = 1
  c.eval.judges = ()  # graders of the chosen model beside the one that chose it: "gpt4=api:MODEL@URL#lima_1_6"
  c.eval.sets = ()  # "test=FILE", "safety=FILE", ...
  c.eval.patience = 0
  c.eval.few_shot = "dialogue"
  c.eval.shots = 0

  c.compare = section()  # won, tied and lost against other models' answers
  c.compare.against = ()  # "alpaca=alpaca_answers.jsonl"
  c.compare.asked = "test"
  c.compare.judges = ("human",)  # and "gpt4=api:MODEL@URL#lima_pairwise"
  c.compare.raters = 1  # people; with two or more the report has their agreement
  c.compare.margin = 0.0  # of judges of single answers: scores this near are a tie
  c.audit = section(judge="human", asked="test", prompts=50, levels=("fail", "pass", "excellent"), bounds=())
  c.safety = section(judge="human", asked="safety", prompts=0, levels=("unsafe", "safe"), bounds=())
  c.alarms = like.alarms
  return c


def llama_7b() -> Config:
  """The size of the paper's ablations: graded 1 to 6, five answers to each prompt."""
  c = llama_65b()
  c.engine.tensor = 0  # devices that share one copy of the model; 0: as few as have room for many sequences
  c.mesh = section(data=1, fsdp=-1, tensor=1)
  c.model.vocab_multiple = 1
  c.eval.n = 5
  c.audit.judge = c.safety.judge = ""
  return c


def mini() -> Config:
  """The miniature world; its oracle stands for the person."""
  c, like = llama_65b(), alma.mini()
  c.shards = like.shards
  c.model, c.engine, c.mesh = like.model, like.engine, like.mesh
  c.model.vocab_multiple = 1
  c.data.update(dict(sft="mini", judge="mini", eval="mini", validation_held_out=16))
  tiny: dict[str, Any] = dict(fit_rows=False, batch=16, row_length=96, weight_decay=0.0, beta2=0.98)
  c.sft = training(1e-3, 1e-4, epochs=15, schedule="linear", dropout=0.1, keep_epochs=5, **tiny)
  c.judge = like.judge
  c.judge.distil.prompts = 0
  c.choice.update(dict(judge="mini", prompts=96))
  c.eval.update(sampling(0.7, 0.9, max_new_tokens=24, max_prompt_tokens=40))
  c.eval.judges = ("truth=mini",)
  c.audit.update(dict(judge="mini", bounds=(3.0, 8.0)))
  c.safety.judge = ""
  return c
