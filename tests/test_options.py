"""Configs: that the shipped ones load and mean what they say, and that what cannot be meant is named."""

import dataclasses
import importlib
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from alma_jax import names, start
from alma_jax import options as configs
from alma_jax.errors import UserError
from alma_jax.recipes import alma as alma_recipe
from configs import alma, common, forkme

ROOT = pathlib.Path(__file__).parents[1]
ABLATIONS = sorted(p.stem for p in (ROOT / "configs" / "ablations").glob("[a-z]*.py"))
LEAVES = list(configs.leaves(alma.mini().to_dict()))


def command(module, *arguments):
  return subprocess.run([sys.executable, *module, *arguments], cwd=ROOT, capture_output=True, text=True)


def get(config, path):
  for key in path.split("."):
    config = config[key]
  return config


def nested(path, value):
  for key in reversed(path.split(".")):
    value = {key: value}
  return value


def with_rounds(rounds):
  c = alma.mini()
  c.rounds = rounds
  return c


# The shipped configs


def test_the_8b_config_has_the_papers_numbers():
  c = alma.get_config("8b")
  assert (c.draw.prompts, c.clusters.k, c.prompts.draws) == (50_000, 200_000, 2_000_000)
  assert (c.responses.n, c.feedback_rounds, len(c.sft_seeds)) == (200, 10, 2)
  assert c.responses.checkpoints == ("sft", "latest") and c.trainset.method == "best_of_n"


@pytest.mark.parametrize("size", ["mini", "8b", "70b"])
def test_sizes_have_the_same_fields(size):
  assert set(configs.leaves(alma.get_config(size).to_dict())) == set(LEAVES)
  assert alma.get_config(size).recipe == "alma"


def test_an_unknown_size_is_named():
  with pytest.raises(ValueError, match="no size '9b'; there are mini, mini_paper, 8b, 70b"):
    alma.get_config("9b")


def test_the_70b_config_changes_every_rate_and_shards_the_model():
  small, large = alma.get_config("8b"), alma.get_config("70b")
  for path in ("sft", "policy", "judge.train", "judge.distil.train"):
    assert get(large, path).learning_rate < get(small, path).learning_rate
    assert get(large, path).final_learning_rate < get(large, path).learning_rate
  assert large.mesh.tensor == 8 and large.engine.tensor == 0  # of hosts with 4 chips or 8: what has room


def test_pieces_are_not_shared_between_configs():
  a, b = alma.mini(), alma.mini()
  a.policy.epochs = 9.0
  assert b.policy.epochs != 9.0 and a.sft.epochs != 9.0


def test_a_misspelt_training_option_is_refused():
  with pytest.raises(TypeError, match="lerning_rate"):
    common.training(1e-3, 0.0, batch=1, epochs=1, row_length=8, lerning_rate=1.0)


# A round's config


def test_a_rounds_overrides_do_not_leak():
  c = with_rounds(
    {3: {"responses": {"temperature": 0.9, "n": 4}, "policy": {"epochs": 1}}, 4: {"draw": {"prompts": 7}}}
  )
  before = c.to_dict()
  plain = {r: configs.for_round(c, r).to_dict() for r in (2, 3, 4, 5)}
  assert c.to_dict() == before
  assert plain[2] == plain[5] == {k: v for k, v in alma.mini().to_dict().items() if k != "rounds"}
  changed = {r: {p for p in LEAVES if p != "rounds" and get(plain[r], p) != get(plain[2], p)} for r in (3, 4)}
  assert changed == {3: {"responses.temperature", "responses.n", "policy.epochs"}, 4: {"draw.prompts"}}
  assert (plain[3]["responses"]["temperature"], plain[4]["draw"]["prompts"]) == (0.9, 7)
  assert isinstance(plain[3]["policy"]["epochs"], float)


def test_changing_a_rounds_config_does_not_change_the_runs():
  c = with_rounds({3: {"draw": {"prompts": 7}}})
  configs.for_round(c, 3).responses.n = 999
  assert c.responses.n != 999 and configs.for_round(c, 3).responses.n != 999


@pytest.mark.parametrize(
  "rounds, message",
  [
    (
      {3: {"responses": {"temprature": 0.9}}},
      r"rounds\[3\].*'responses.temprature'; did you mean 'responses.temperature'",
    ),
    ({3: {"respones": {"temperature": 0.9}}}, r"no field 'respones'; did you mean 'responses'"),
    ({3: {"temperature": 0.9}}, r"no field 'temperature'; did you mean '\w+(\.\w+)*\.temperature'"),
    ({3: {"responses": 4}}, "responses is a section; give it a dict, not 4"),
    ({3: {"seed": {"a": 1}}}, "seed is a value, not a section"),
    ({3: {"responses": {"n": "many"}}}, "responses.n is of type int, 'many' is not"),
    ({1: {"seed": 1}}, "entry for round 1; the feedback rounds are 2 .. 10"),
    ({11: {"seed": 1}}, "entry for round 11; the feedback rounds are 2 .. 10"),
    ({"three": {"seed": 1}}, "entry for round 'three'"),
    (
      {99: {"draw": {"promts": 1}}},
      r"entry for round 99;.* 2 \.\. 10\. Also: .*'draw.promts'; did you mean 'draw.prompts'",
    ),
    ({3: 4}, r"config\.rounds\[3\] is 4; give it a dict"),
  ],
)
def test_what_a_round_cannot_mean_is_named(rounds, message):
  with pytest.raises(configs.ConfigError, match=message):
    start.checked_options(with_rounds(rounds))


@pytest.mark.parametrize("path", [p for p in LEAVES if p != "rounds"])
def test_every_field_of_a_round_is_checked_by_type(path):
  value = get(alma.mini(), path)
  wrong = 3 if isinstance(value, str) else "three"
  with pytest.raises(configs.ConfigError, match=f"{path} is of type {type(value).__name__}, {wrong!r} is not"):
    start.checked_options(with_rounds({2: nested(path, wrong)}))
  resolved = configs.for_round(with_rounds({2: nested(path, value)}), 2)
  assert get(resolved, path) == value


@pytest.mark.parametrize("path", [p for p in LEAVES if len(p.rpartition(".")[2]) >= 5])
def test_nearest_finds_a_name_with_two_letters_swapped(path):
  section, dot, leaf = path.rpartition(".")
  typo = f"{section}{dot}{leaf[:2]}{leaf[3]}{leaf[2]}{leaf[4:]}"
  assert typo == path or f"did you mean {path!r}?" in configs.nearest(alma.mini(), typo)


# Known words


def test_a_word_with_an_argument_hands_it_on(tmp_path, monkeypatch):
  (tmp_path / "graders_of_mine.py").write_text("def make(host, options, argument): return (host, options, argument)\n")
  monkeypatch.chdir(tmp_path)
  table = names.Names("a judge", {"none": "", "reward:DIR": "graders_of_mine:make", "plain": "graders_of_mine:make"})
  names.check(table, "reward:nowhere", "judge.kind")
  assert names.resolve(table, "reward:a:b@http://c", "judge.kind")(1, 2) == (1, 2, "a:b@http://c")
  assert names.source_of(table, "reward:x") is None and names.source_of(table, "graders_of_mine:make")
  with pytest.raises(TypeError, match="argument"):
    names.resolve(table, "plain", "judge.kind")(1, 2)


@pytest.mark.parametrize(
  "name, message",
  [
    ("reward:", "judge.kind is 'reward:'; the text after the colon is missing: 'reward:DIR'"),
    ("reward", r"it may be 'reward:DIR' or .*did you mean 'reward:DIR'\?"),
    ("rewards:DIR", "there is no module 'rewards'"),
  ],
)
def test_a_word_without_its_argument_is_named(name, message):
  with pytest.raises(UserError, match=message):
    names.check(names.Names("a judge", {"reward:DIR": "alma_jax.nowhere:make"}), name, "judge.kind")


# The command line


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config=configs/alma.py:mini", "--config.policy.epocs=2"], "'policy.epocs'; did you mean 'policy.epochs'?"),
    (["--config=configs/alma.py:mini", "what"], "what is 'what'?"),
    (["--config=configs/alma.py:9b"], "error: configs/alma.py has no size '9b'; there are mini, mini_paper, 8b, 70b\n"),
    (["--conifg.seed=1"], "error: there is no flag --conifg.seed; did you mean --config?\n"),
    ([], "error: --config is missing: give a config file"),
  ],
)
def test_a_mistake_on_the_command_line_is_answered_before_anything_starts(arguments, message, tmp_path):
  done = command(["-m", "alma_jax.main"], f"--workdir={tmp_path}/run", *arguments)
  assert done.returncode and message in done.stdout + done.stderr
  assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_starting_imports_neither_torch_nor_tensorflow_nor_tokenizers():
  code = """
import sys
import alma_jax.main
assert "jax" not in sys.modules, "the door must answer mistakes before it imports jax"
import alma_jax.start
heavy = {"torch", "tensorflow", "tensorflow_datasets", "transformers", "matplotlib", "sklearn"}
print(sorted(heavy & set(sys.modules)))
"""
  done = command(["-c", code])
  assert done.stdout.strip() == "[]", done.stderr


# Configs to copy, and sweeps


def test_forkme_names_only_fields_that_exist_and_gives_every_path():
  c = forkme.get_config()
  assert set(configs.leaves(c.to_dict())) == set(LEAVES)
  assert c.model.path and c.data.sft and c.data.judge
  start.checked_options(c)
  assert c.feedback_rounds * c.draw.prompts <= c.clusters.k <= c.prompts.draws


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_sweep_changes_one_thing_per_seed(name):
  module = importlib.import_module(f"configs.ablations.{name}")
  assert f"--config=configs/ablations/{name}.py" in module.__doc__
  config, units = module.get_config(), []
  module.sweep(lambda **overrides: units.append(overrides))
  assert isinstance(config, ConfigDict) and config.model.path == "mini"
  for unit in units:
    c = module.get_config()
    if hasattr(c, "rounds"):
      c.rounds = {2: unit}  # the same syntax, the same check
    else:
      c.update(unit)
    start.checked_options(c)
  variants = [{k: v for k, v in unit.items() if k != "seed"} for unit in units]
  distinct = [v for i, v in enumerate(variants) if v not in variants[:i]]
  assert len(distinct) > 1 and {unit["seed"] for unit in units} == {0, 1, 2}
  assert all(sum(v == d for v in variants) == 3 for d in distinct)
  assert len({next(iter(v)) for v in variants}) == 1  # one section


def test_there_is_a_sweep_for_each_table():
  assert ABLATIONS == [
    "control_random", "figure3_n", "isara_oneshot", "isara_retrieval", "isara_transfer",
    "lima_dialogue", "lima_quality", "spa_length", "spa_noise", "spa_table6", "spa_table7",
    "table3_judge", "table4_prompts", "table5_checkpoints", "table6_budget", "table7_dpo", "table7_pairs",
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("path", "value"),
  [("trainset.method", "bestofn"), ("judge.mode", "int"), ("draw.method", "all"), ("model.chat", "llama4")],
)
def test_unknown_word_is_named_with_the_known_ones(path, value):
  config = alma.get_config("mini")
  with config.unlocked():
    config.update_from_flattened_dict({path: value})
  with pytest.raises(configs.ConfigError, match=f"config.{path} is '{value}'; it may be '"):
    start.checked_options(config)


@pytest.mark.parametrize("value", [("sft_3",), ("sft_1,latest",), "latest", ()])
def test_unknown_checkpoint_is_named(value):
  config = alma.get_config("mini")
  config.rounds = {3: {"responses": {"checkpoints": value}}}
  with pytest.raises(configs.ConfigError, match=r"responses\.checkpoints is"):
    start.checked_options(config)


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("responses.n", 0, r"config\.responses\.n is 0; it must be at least 1"),
    ("clusters.k", 0, r"config\.clusters\.k is 0; it must be at least 1"),
    ("shards", 0, r"config\.shards is 0; it must be at least 1"),
    ("feedback_rounds", -1, r"config\.feedback_rounds is -1; it must be at least 0"),
    ("judge.held_out", 0.9, r"config\.judge\.held_out is 0\.9; it must be at most 0\.5"),
    ("trainset.min_margin", -0.5, r"config\.trainset\.min_margin is -0\.5; it must be at least 0"),
    ("prompts.shots", (5, 3), r"config\.prompts\.shots is \(5, 3\)"),
    ("prompts.template", "request", r"config\.prompts\.template is 'request'; .* \(did you mean 'requests'\?\)"),
    ("eval.few_shot", "dialog", r"config\.eval\.few_shot is 'dialog'; .* \(did you mean 'dialogue'\?\)"),
    ("judge.template", "a3", r"config\.judge\.template is 'a3'; it may be 'a1', 'a2', 'a2_reasoned', 'mini' or"),
    ("judge.kind", "tuned", r"config\.judge\.kind is 'tuned'; .* \(did you mean 'finetuned'\?\)"),
    ("eval.judges", ("x=minni",), r"config\.eval\.judges is 'minni'; .* \(did you mean 'mini'\?\)"),
    ("eval.judges", ("no_such_module:It",), r"there is no module 'no_such_module' in"),
    ("model.chat", "alma_jax.text.chat:LLAMA9", r"the module 'alma_jax\.text\.chat' has no 'LLAMA9'"),
    ("draw.prompts", 1000, r"config\.draw\.prompts is 1000: up to round 3 2,384 prompts .* makes 1,536 at most"),
    ("recipe", "alme", r"config\.recipe is 'alme'; it may be .*\(did you mean 'alma'\?\)"),
    ("seed", -1, r"config\.seed is -1; it must be at least 0"),
    ("sft_seeds", (1, -2), r"config\.sft_seeds is \(1, -2\); it must be at least 0"),
    ("prompts.similarity", 7.0, r"config\.prompts\.similarity is 7\.0; it must be at most 1"),
    ("policy.beta2", 1.0, r"config\.policy\.beta2 is 1\.0; it must be below 1"),
    ("policy.weight_decay", -0.1, r"config\.policy\.weight_decay is -0\.1; it must be at least 0"),
    ("policy.learning_rate", float("inf"), r"config\.policy\.learning_rate is inf; it must be a finite number"),
    ("policy.eps", float("nan"), r"config\.policy\.eps is nan; it must be a finite number"),
    ("mesh.fsdp", 0, r"config\.mesh\.fsdp is 0; it must be at least 1, or -1"),
  ],
)
def test_a_wrong_value_is_one_line_with_field_value_and_what_is_allowed(path, value, message):
  config = alma.get_config("mini")
  config.update_from_flattened_dict({path: value})
  with pytest.raises(UserError, match=message) as error:
    start.checked_options(config)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", [p for p in LEAVES if type(get(alma.mini(), p)) in (int, float) and p[:4] != "mesh"])
def test_no_number_may_be_negative(path):
  config = alma.get_config("mini")
  config.update_from_flattened_dict({path: type(get(config, path))(-1)})
  with pytest.raises(UserError, match=rf"config\.{path.replace('.', '[.]')} is -1"):
    start.checked_options(config)


def test_an_infinite_clip_is_allowed():
  config = alma.get_config("mini")
  config.policy.clip = float("inf")
  assert start.checked_options(config)[2].policy.optimizer.clip == float("inf")


@pytest.fixture(scope="module")
def mini_host():
  return start.host_of(start.checked_options(alma.get_config("mini"))[0])


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({}, None),
    # <bos> Q: a \n A: and one token; the rating of such a pair has 11, as test_mini counts them
    ({"policy.row_length": 5}, r"^config\.policy\.row_length is 5; .* one word .* take 6 tokens"),
    ({"policy.row_length": 6}, None),
    ({"judge.train.row_length": 10}, r"^config\.judge\.train\.row_length is 10; template 'mini' .* takes 11 tokens"),
    ({"judge.train.row_length": 11}, None),
    ({"sft.row_length": 257}, r"^config\.sft\.row_length is 257; it must be at most 256, the model's positions"),
    ({"dpo.row_length": 1}, None),  # no round trains on pairs
    ({"dpo.row_length": 1, "trainset.method": "dpo"}, r"^config\.dpo\.row_length is 1;"),
    ({"rounds": {4: {"policy": {"row_length": 4}}}}, r"^in round 4: config\.policy\.row_length is 4;"),
    ({"responses.max_new_tokens": 218}, r"^config\.responses: .* is 246, and .* 'mini' adds 11; .* at most 256"),
    ({"responses.max_new_tokens": 229}, None),
    ({"responses.max_new_tokens": 229}, None),  # said once, by start.check_lengths
    ({"judge.template": "a2"}, "judge template 'a2': the tokenizer in .* cannot write 'Please'"),
    ({"prompts.template": "requests"}, "few-shot template 'requests': the tokenizer in .* cannot write 'Here'"),
    ({"eval.few_shot": "dialogue"}, "few-shot template 'dialogue': .* cannot write 'Below'"),
    ({"eval.few_shot": "dialogue", "eval.shots": 0}, None),
  ],
)
def test_templates_and_lengths_must_suit_the_model(values, message, mini_host):
  config = alma.get_config("mini")
  config.update_from_flattened_dict({path: value for path, value in values.items() if path != "rounds"})
  config.rounds = values.get("rounds", {})
  said = None
  try:
    for step in alma_recipe.checks(mini_host, start.checked_options(config)):
      step()
  except UserError as error:
    said = str(error)
  assert (said is None) == (message is None) and re.search(message or "", said or ""), said


def test_options_say_what_the_config_files_set():
  config = alma.get_config("mini").to_dict()
  options = start.checked_options(alma.get_config("mini"))[0]
  for name, section in config.items():
    if isinstance(section, dict) and name != "rounds":
      known = configs.fields_of(type(getattr(options, name)))
      assert set(section) <= set(known), name
  assert configs.fingerprint(options.responses)["temperature"] == config["responses"]["temperature"]


def test_practical_values_are_left_out_of_the_fingerprint():
  config = alma.get_config("mini")
  one = configs.fingerprint(start.checked_options(config)[0].policy)
  config.policy.update(dict(remat="full", passes=2, checkpoint_every=7, checkpoint_keep=7))
  assert configs.fingerprint(start.checked_options(config)[0].policy) == one
  config.policy.epochs = 1.0
  assert configs.fingerprint(start.checked_options(config)[0].policy) != one


def test_a_prompt_and_its_response_must_fit_into_the_models_positions(tmp_path):
  config = alma.get_config("mini")
  config.responses.max_new_tokens = 100_000
  wrong = r"config\.responses: max_prompt_tokens \+ max_new_tokens is 28 \+ 100000"
  with pytest.raises(UserError, match=wrong), start.open_session(config, tmp_path / "run"):
    pass
  assert not (tmp_path / "run").exists()  # early errors come before any file


@dataclasses.dataclass(frozen=True)
class Grown(configs.Checked):
  """Options to which a field was added after runs had been made with them."""

  n: int = 1
  keep: int = configs.option(0, later=True)


def test_the_default_of_a_later_field_is_left_out_of_the_fingerprint():
  assert configs.fingerprint(Grown()) == {"n": 1}
  assert configs.fingerprint(Grown(keep=2)) == {"n": 1, "keep": 2}
