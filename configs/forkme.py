"""Your own data and base model. Copy this file, change what is marked, and start it:

  cp configs/forkme.py configs/mine.py
  python -m alma_jax.main --config=configs/mine.py --workdir=runs/mine

An invalid value stops the run with a message that says what to change and where. Some that people meet first:
  sft.jsonl, line 7: `response` is missing or null; ...     a row of your data: mend the row
  config has no field 'polcy.epochs'; did you mean ...      a misspelt name, here, in `rounds` or on the command line
  stage round_02/responses was made with other values ...   the run directory holds results of another config: start in
                                                            another --workdir, or delete that stage
RESOURCE_EXHAUSTED means that a device has too little memory: set engine.slots (sampling; 0 takes what should fit),
lower engine.rows (scoring), or raise mesh.fsdp or engine.tensor (more devices per copy of the model). These four change
results only by rounding.
"""

from configs import alma
from configs.common import Config


def get_config() -> Config:
  c = alma.llama_8b()  # the paper's values, also of fields not named below; configs/alma.py explains all

  # The base model: a Hugging Face directory of a Llama 2, 3, 3.1 or 3.2: config.json, *.safetensors, the tokenizer.
  c.model.path = "/models/Meta-Llama-3-8B"  # CHANGE
  c.model.chat = "llama3"  # llama3, llama2, chatml, plain (no chat tokens), template (its own), "package.module:NAME"

  # Your data. JSONL (one object per line), .json (one array), .parquet, or "tfds:NAME[/CONFIG]:SPLIT". A row has
  # `messages`, a list of {"role", "content"} that ends with the assistant's turn, or `prompt` and `response`.
  c.data.sft = "data/demonstrations.jsonl"  # CHANGE: {"prompt": "...", "response": "..."}; the paper has 5000
  c.data.judge = "data/annotations.jsonl"  # CHANGE: the same with "score", 0 to 10; the paper has 4000
  c.data.eval = ""  # prompts to evaluate on, no responses needed; empty: some demonstrations are held out,
  c.data.held_out = 200  # this many, but at most a tenth

  # The size of the run. The values are a first try for a day on one machine with 8 GPUs; the comments give the paper's.
  c.feedback_rounds = 3  # 10
  c.prompts.draws = 40_000  # 2_000_000 synthetic prompts, before duplicates are left out
  c.clusters.k = 8_000  # 200_000; at most the number of prompts without duplicates
  c.draw.prompts = 2_000  # 50_000 prompts per round; rounds x this <= the pool
  c.responses.n = 16  # 200 responses per prompt: the cost of the run is rounds x prompts x n
  c.judge.distil.prompts = 2_000  # 10_000; 0: the judge is not distilled

  # The length of texts in tokens. Longer ones are left out or cut, and counted in the manifests.
  c.responses.max_prompt_tokens = 1024
  c.responses.max_new_tokens = 1024
  c.policy.row_length = 2048  # prompt and response together

  # Training. The rates are for 8B; larger models want smaller ones (llama_70b in configs/alma.py).
  c.sft.learning_rate, c.sft.final_learning_rate = 5.5e-6, 1.1e-6
  c.policy.learning_rate, c.policy.final_learning_rate = 5.5e-6, 1.1e-6
  c.policy.batch = 128  # examples per step

  # The devices. fsdp=-1 spreads training over all of them. A model that is too large for one device in sampling is
  # spread over engine.tensor = 2, 4 or 8 of them; 0 chooses.
  c.mesh.update(dict(data=1, fsdp=-1, tensor=1))
  c.engine.tensor = 0

  # A round can differ from the others: {3: dict(responses=dict(temperature=0.9))} makes round 3 bolder.
  c.rounds = {}
  return c
