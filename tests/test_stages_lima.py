"""LIMA's stages: the choice of an epoch, comparisons, audits and forms for people."""

import dataclasses
import json

import numpy as np
import pytest
from sessions import filled_in, on_two_hosts, session_in

from alma_jax import options, start
from alma_jax.corpus.normalise import prompt_id
from alma_jax.engine.optimizer import learning_rate
from alma_jax.errors import RunError, UserError, Waiting, waited
from alma_jax.evals.forms import Form, FormError, Row
from alma_jax.judges import contract, human, pairwise
from alma_jax.judges.contract import Verdict
from alma_jax.llama import model as llama
from alma_jax.llama import sharding, weights
from alma_jax.recipes import lima as recipe
from alma_jax.report import graded
from alma_jax.runtime import training
from alma_jax.runtime.host import Checkpoint, EngineOptions, Host, ModelOptions
from alma_jax.stages import audit, choice, compare, evaluation
from alma_jax.store import layout, shards
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Data, PromptSet
from alma_jax.store.records import Answer, EpochGrade, Grade
from alma_jax.store.runs import Artefact
from alma_jax.store.statistics import Mean
from alma_jax.text import chat
from configs import lima

PROMPTS = [f"country : {city}" for city in ("lyon", "oslo", "kobe", "lima")]
GRADES = {"good": 6.0, "fine": 4.0, "poor": 1.0}


@pytest.fixture
def session(tmp_path):
  with (s := session_in(tmp_path / "run", lima.get_config("mini"))).run:
    yield s


class ByWord:
  """Scores an answer by its last word."""

  identity, scale = "by word", (0.0, 10.0)

  def scores(self, pairs):
    return [Verdict(GRADES.get(response.split()[-1])) for _, response in pairs]


def answers(s, epoch, words):
  """The epoch's answer to each prompt: its number in the list and one of the words of GRADES."""
  stage = s.run.stage(f"round_{epoch:02d}/eval", {"epoch": epoch})
  asked = [({"role": "user", "content": prompt},) for prompt in PROMPTS]
  rows = [
    Answer(f"p{i}", turns, f"number {i} {word}", 3, True)
    for i, (turns, word) in enumerate(zip(asked, words, strict=True))
  ]
  return finished(stage, rows, Answer)


def finished(stage, rows, kind, **extra):
  if not stage.done:
    if stage.mine(1):
      stage.write_part(0, 1, rows, kind)
    stage.finish(**extra)
  return Artefact(stage, kind)


def grades(s, answered, epoch):
  stage = s.run.stage(f"round_{epoch:02d}/eval.judge", {"epoch": epoch})
  rows = [Grade(row.prompt_id, GRADES[row.response.split()[-1]]) for row in answered.read()]
  return finished(stage, rows, Grade, judge={"identity": "by word"})


WORDS = {  # means 2.5, 5, 5: the first of the best is epoch 6
  5: ("poor", "poor", "fine", "fine"),
  6: ("good", "fine", "fine", "good"),
  7: ("good", "good", "fine", "fine"),
}


def epochs(s, graded=False):
  made = {}
  for epoch, words in WORDS.items():
    written = answers(s, epoch, words)
    checkpoint = Checkpoint(f"epoch_{epoch}", s.host.directory, str(epoch))
    of = grades(s, written, epoch) if graded else None
    made[epoch] = choice.Epoch(checkpoint, written, of, Mean(epoch / 10, 0.1, 4))
  return made


def by_word(row):
  return f"{GRADES[row['response'].split()[-1]]:.0f}"


# The choice


def test_the_best_epoch_is_chosen_by_grades_the_earliest_of_several_and_the_loss_stands_beside(session):
  chosen = choice.build(session, epochs(session, graded=True), choice.Options(judge="rules:length", first=5, last=7))
  assert (chosen.epoch, chosen.checkpoint.name) == (6, "epoch_6")
  manifest = layout.load_manifest(session.run.dir / "choice")
  assert [(row["epoch"], row["mean"], row["loss"]) for row in manifest["epochs"]] == [
    (5, 2.5, 0.5), (6, 5.0, 0.6), (7, 5.0, 0.7)
  ]  # fmt: skip
  assert manifest["by_loss"] == 5 and manifest["by"] == "by word" and manifest["epoch"] == 6
  rows = session.run.dir / "choice" / shards.part_name(0, 1)
  assert [row.value for row in shards.read_records(rows, EpochGrade) if row.epoch == 5] == [1.0, 1.0, 4.0, 4.0]


def test_a_person_chooses_through_a_blind_form(session):
  options = choice.Options(judge="human", first=5, last=7)
  with pytest.raises(Waiting, match=r"^waiting: 8 of 8 rows of .*forms/choice\.csv have no grade \(1, 2, 3, 4, 5, 6\)"):
    choice.build(session, epochs(session), options)
  form = session.run.dir / "forms/choice.csv"
  lines = form.read_text(encoding="utf-8-sig").splitlines()
  assert lines[0] == "row,prompt,response,grade" and "epoch" not in form.read_text()
  names = [line.split(",")[0] for line in lines[1:]]
  assert names == sorted(names)  # hashes: the order says nothing of epochs or prompts
  seen = filled_in(form, by_word)
  assert len({(row["prompt"], row["response"]) for row in seen}) == 8  # 12 answers, equal ones are asked about once
  filled = form.read_bytes()
  text = filled.decode("utf-8-sig")
  third = text.splitlines()[3]
  form.write_text(text.replace(third, third[: third.rindex(";") + 1] + "7"), encoding="utf-8-sig")
  with pytest.raises(FormError, match=r"forms/choice\.csv, line 4, column grade: '7'; it may be 1, 2, 3, 4, 5, 6"):
    choice.build(session, epochs(session), options)
  form.write_text(text.replace(third, third[: third.rindex(";") + 1]), encoding="utf-8-sig")
  with pytest.raises(Waiting, match=r"^waiting: 1 of 8 rows"):
    choice.build(session, epochs(session), options)
  form.write_bytes(filled)
  assert choice.build(session, epochs(session), options).epoch == 6
  form.unlink()
  assert choice.build(session, epochs(session), options).epoch == 6  # it is done


@pytest.mark.parametrize("by", ["judge", "person"])
def test_epochs_are_compared_with_the_one_before(session, by):
  """5 -> 6: three won, one tie (1.375 ahead in sum 3 * 0.5); 6 -> 7: one won, one lost, two ties."""
  options = choice.Options(judge="human", pairwise=True, first=5, last=7)
  if by == "judge":
    chosen = choice.build(session, epochs(session), options, pairwise.ByScores(ByWord(), 0.0))
  else:
    with pytest.raises(Waiting, match=r"4 of 4 rows of .* have no better"):  # equal answers are a tie
      choice.build(session, epochs(session), options)

    def better(row):
      one, other = (GRADES[row[side].split()[-1]] for side in ("a", "b"))
      return "a" if one > other else "b" if other > one else "tie"

    filled_in(session.run.dir / "forms/choice.csv", better)
    chosen = choice.build(session, epochs(session), options)
  manifest = layout.load_manifest(session.run.dir / "choice")
  assert [row["mean"] for row in manifest["epochs"]] == [0.0, 0.375, 0.375] and chosen.epoch == 6


def test_values_that_are_wrong_together_are_refused_before_anything_runs():
  for path, value, said in (
    ("choice.last", 16, r"config\.choice\.last is 16; it must be at most sft\.epochs, which is 15"),
    ("sft.keep_epochs", 0, r"config\.sft\.keep_epochs is 0; it must be from 1 to choice\.first, which is 5"),
    ("choice.judge", "api:m@http://x/v1#lima_pairwise", r"compares two answers: set choice\.pairwise"),
    ("choice.judge", "own", r"config\.data\.judge is empty, and choice\.judge is 'own'"),
    ("audit.bounds", (8.0, 3.0), r"config\.audit\.bounds is \(8\.0, 3\.0\); a judge sorts into 3 levels"),
    ("audit.asked", "tests", r"config\.audit\.asked is 'tests'; it may be 'test'"),
    ("choice.judge", "humna", r"config\.choice\.judge|judge is 'humna'"),
    ("compare.judges", ("rules:lenth",), None),
  ):
    c = lima.get_config("mini")
    c.data.judge = "" if value == "own" else c.data.judge
    section, field = path.split(".")
    c[section][field] = value
    if said:
      with pytest.raises(UserError, match=said):
        start.checked_options(c)
    else:
      start.checked_options(c)  # the rule's name is read where the judge is made


def test_the_sizes_hold_the_papers_numbers():
  leaves = {size: set(options.leaves(lima.get_config(size).to_dict())) for size in ("mini", "7b", "65b")}
  assert leaves["mini"] == leaves["7b"] == leaves["65b"]
  c = lima.get_config("65b")
  c.data.sft, c.eval.sets = "lima.jsonl", ("test=test.jsonl", "safety=safety.jsonl")
  found = start.checked_options(c)[0]
  sft = found.sft
  assert (sft.epochs, sft.batch, sft.dropout, sft.optimizer.warmup, sft.keep_epochs) == (15, 32, 0.3, 0.0, 1)
  assert (sft.optimizer.beta1, sft.optimizer.beta2, sft.optimizer.weight_decay) == (0.9, 0.95, 0.1)
  rates = [learning_rate(sft.optimizer, step, 480) for step in (0, 120, 240, 480)]
  assert rates == pytest.approx([1e-5, 7.75e-6, 5.5e-6, 1e-6])
  decoding = found.eval.decoding
  assert (decoding.temperature, decoding.top_p, decoding.repetition_penalty, found.eval.longest) == (
    0.7,
    0.9,
    1.2,
    2048,
  )
  assert (found.choice.first, found.choice.last, found.choice.judge) == (5, 10, "human")
  assert lima.get_config("7b").eval.n == 5


def test_prompts_to_choose_by_leave_some_to_test_with():
  rows = [SeedRow(({"role": "user", "content": prompt},), None, None, i) for i, prompt in enumerate(PROMPTS)]
  data, c = Data([], [], rows, {"eval": "0"}), lima.get_config("mini")

  def found(prompts):
    c.choice.prompts = prompts
    return recipe.prompt_sets(data, start.checked_options(c)[0])

  dev, test = found(3)
  assert (len(dev.rows), len(test.rows)) == (3, 1) and sorted(map(id, dev.rows + test.rows)) == sorted(map(id, rows))
  with pytest.raises(RunError, match=r"data\.eval has 4 prompts and choice\.prompts, .* is 4: none is left"):
    found(4)
  c.audit.judge = ""
  assert [len(asked.rows) for asked in found(0)] == [4]


# Comparisons and audits


def test_answers_are_compared_with_other_models_by_judges_and_people(session, tmp_path):
  mine = answers(session, 6, WORDS[6])
  theirs = ("fine", "good", "fine", "poor")  # won, lost, a tie of equal texts, won
  file = tmp_path / "alpaca.jsonl"
  rows = [
    {"prompt": p, "response": f"number {i} {word}"} for i, (p, word) in enumerate(zip(PROMPTS, theirs, strict=True))
  ]
  file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "food : lyon", "response": "x"}]))
  s = session.at(6, session.options)
  with_ids = [dataclasses.replace(row, prompt_id=prompt_id(row.messages)) for row in mine.read()]
  answered = finished(s.run.stage("round_06/eval-test", {"of": "compare"}), with_ids, Answer)
  options = compare.Options(against=(f"alpaca={file}",), judges=("long=rules:length", "human"), raters=2)
  asked = [
    PromptSet("test", [SeedRow(({"role": "user", "content": p},), None, None, 0)], "") for p in ("x", PROMPTS[0])
  ]
  with pytest.raises(RunError, match=r"alpaca\.jsonl answers none of the 1 prompts of test"):  # before any training
    compare.check_shared(options, asked[:1])
  compare.check_shared(options, asked[1:])
  with pytest.raises(Waiting) as waiting:
    compare.build(s, answered, options)
  said = str(waiting.value).splitlines()
  assert [f"compare-alpaca.human_{i}.csv" in line for i, line in enumerate(said, 1)] == [True, True]
  assert layout.load_manifest(s.run.dir / "round_06/compare-alpaca.long")["outcomes"]["tie"]["value"] == 1.0

  def better(row):
    one, other = (GRADES[row[side].split()[-1]] for side in ("a", "b"))
    return "a" if one > other else "b" if other > one else "tie"

  def always_tie(row):
    return "tie"

  for rater, value_of in ((1, better), (2, always_tie)):
    filled_in(s.run.dir / f"forms/compare-alpaca.human_{rater}.csv", value_of)
  found = compare.build(s, answered, options)
  shares = {made.name.rpartition(".")[2]: [row.share for row in made.read()] for made in found}
  assert shares == {"long": [0.5] * 4, "human_1": [1.0, 0.0, 0.5, 1.0], "human_2": [0.5] * 4}
  manifest = layout.load_manifest(s.run.dir / "round_06/compare-alpaca.human_1")
  outcomes = {word: of["value"] for word, of in manifest["outcomes"].items()}
  assert outcomes == {"win": 0.5, "tie": 0.25, "lose": 0.25} and manifest["model"] == "alpaca"
  with pytest.raises(UserError, match=r"judges is empty, and against names answers"):
    compare.Options(against=(f"alpaca={file}",))
  bad = compare.Options(against=(f"alpaca={tmp_path / 'none.jsonl'}",), judges=("human",))
  with pytest.raises(UserError, match=r"none\.jsonl"):
    compare.check(s.host, bad)


def test_answers_are_sorted_into_levels_by_a_judges_score_or_a_person(session):
  s = session.at(6, session.options)
  answered = answers(session, 6, ("good", "fine", "poor", "poor"))
  by_judge = audit.Options(judge="rules:length", prompts=0, levels=("short", "long"), bounds=(13.0,))
  rows = audit.build(s, answered, by_judge, "length").read()
  assert [row.level for row in rows] == [1] * 4
  assert audit.build(s, answered, audit.Options(), "none") is None
  person = audit.Options(judge="human", prompts=3)
  with pytest.raises(Waiting, match=r"3 of 3 rows of .*audit-answers\.csv have no level \(fail, pass, excellent\)"):
    audit.build(s, answered, person, "answers")
  word = {"good": "Excellent", "fine": "pass", "poor": "fail"}
  seen = filled_in(s.run.dir / "forms/audit-answers.csv", lambda row: word[row["response"].split()[-1]])
  audit.build(s, answered, person, "answers")
  levels = layout.load_manifest(s.run.dir / "round_06/audit-answers")["levels"]
  told = [row["response"].split()[-1] for row in seen]
  wanted = {level: told.count(w) / 3 for w, level in (("poor", "fail"), ("fine", "pass"), ("good", "excellent"))}
  assert {level: of["value"] for level, of in levels.items()} == pytest.approx(wanted)


def test_the_judge_of_an_audit_is_made_before_the_run_begins(session):
  wrong = audit.Options(judge="rules:multiple_choice", levels=("bad", "good"), bounds=(0.5,))
  with pytest.raises(UserError, match=r"safety\.judge: the judge .* reads the fields choices, answer"):
    audit.check(session.host, wrong, "safety")
  audit.check(session.host, audit.Options(judge="human"), "audit")


def test_on_two_hosts_a_judge_is_asked_once(session, tmp_path, monkeypatch):
  """An endpoint costs money; what it says may differ from host to host."""
  asked, scores = [], contract.scores

  def counted(judge, pairs, *more, **options):
    asked.extend(pairs)
    return scores(judge, pairs, *more, **options)

  monkeypatch.setattr(contract, "scores", counted)
  file = tmp_path / "others.jsonl"
  file.write_text("".join(json.dumps({"prompt": p, "response": "number 0 fine"}) + "\n" for p in PROMPTS))
  options = choice.Options(judge="rules:length", pairwise=True, first=5, last=7)

  def work(s):
    chosen = choice.build(s, epochs(s), options, pairwise.ByScores(ByWord(), 0.0))
    rows = [dataclasses.replace(row, prompt_id=prompt_id(row.messages)) for row in answers(s, 6, WORDS[6]).read()]
    r = s.at(chosen.epoch, s.options)
    answered = finished(s.run.stage("round_06/eval-test", {}), rows, Answer)
    compare.build(r, answered, compare.Options(against=(f"others={file}",), judges=("length=rules:length",)))
    audit.build(r, answered, audit.Options(judge="rules:length", prompts=3, bounds=(1.0, 2.0)), "answers")
    done.append(chosen.epoch)

  done = []
  on_two_hosts(tmp_path / "two", session.config, work)
  assert done == [6, 6] and len(asked) == 2 * 8 + 2 * 4 + 3
  with (one := session_in(tmp_path / "one", session.config)).run:
    work(one)
  for name in ("choice", "round_06/compare-others.length", "round_06/audit-answers"):
    contents = [layout.load_manifest(tmp_path / of / name) for of in ("one", "two")]
    for key in ("content", "epochs", "outcomes", "levels"):
      assert contents[0].get(key) == contents[1].get(key)


# Forms


def form_in(tmp_path):
  return Form(tmp_path / "forms/a.csv", ("prompt", "response"), "grade", human.GRADES)


def test_a_form_comes_back_as_it_was_whatever_its_texts(tmp_path):
  form = form_in(tmp_path)
  texts = ["=1+1", "- a list\n- of two", 'say "hi", then; go\ton', "Zürich — 東京"]
  form.write([Row(f"r{i}", ("ask", text)) for i, text in enumerate(texts)])
  assert form.read([f"r{i}" for i in range(4)]) == {}
  rows = filled_in(form.path, lambda row: row["row"][1:] if row["row"] != "r0" else " 6 ")
  assert [row["response"].strip() for row in rows] == [text.strip() for text in texts]
  assert rows[0]["response"].startswith(" =")  # no spreadsheet takes it for a formula
  assert form.read([f"r{i}" for i in range(4)]) == {"r0": 6.0, "r1": 1.0, "r2": 2.0, "r3": 3.0}
  before = form.path.read_bytes()
  form.write([Row("r9", ("ask", "else"))])
  assert form.path.read_bytes() == before  # what a person has filled in is never overwritten


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("row,prompt,response,mark\nr0,a,b,1\n", r"line 1: the columns must be row,prompt,response,grade; found 'row,pro"),
    ("row,prompt,response,grade\nr0,a,\"two\nlines\",1\nr1,a,b,good\n", r"line 4, column grade: 'good'; it may be 1, "),
    ("row,prompt,response,grade\nr0,a,b,1\nr7,a,b,1\n", r"line 3, column row: 'r7' is no row of this form"),
    ("row,prompt,response,grade\nr0,a,b,1\nr0,a,b,2\n", r"line 3, column row: 'r0' stands in line 2, too"),
    ("row,prompt,response,grade\nr0,a,b,1\n", r"column row: 1 rows are missing, such as 'r1'"),
    ("row,prompt,response,grade\nr0,a,1\n", r"line 2: 3 cells instead of 4"),
    ("", r"line 1: the columns must be .*; found ''"),
  ],
)  # fmt: skip
def test_a_bad_row_of_a_form_is_named_by_file_line_and_column(tmp_path, text, said):
  form = form_in(tmp_path)
  form.path.parent.mkdir()
  form.path.write_text(text)
  with pytest.raises(FormError, match=rf"a\.csv,? ?{said}"):
    form.read(["r0", "r1"])


def test_all_that_waits_is_said_at_once():
  def waits(text):
    raise Waiting(text)

  with pytest.raises(Waiting, match=r"^one\ntwo$"):
    waited([lambda: waits("one"), lambda: 3, lambda: waits("two")])
  assert waited([lambda: 3]) == [3]


# The new token


def test_a_tokenizer_without_an_end_of_turn_gets_one_and_the_export_stops_there(tmp_path):
  """The row is the mean of the rows, and the vocabulary is padded to what the mesh divides."""
  transformers = pytest.importorskip("transformers")
  from engine_models import CONFIG
  from text_tokenizers import sentencepieces

  tok = sentencepieces()
  config = CONFIG.__class__(**{**vars(CONFIG), "vocab": tok.size})
  model = llama.init(config, 0)
  weights.save(tmp_path / "base", model, weights.TextSide(tokenizer=tok, bos_id=tok.bos_id))
  options = ModelOptions(path=str(tmp_path / "base"), chat="lima", vocab_multiple=8, save_dtype="float32")
  host = Host(options, EngineOptions(), sharding.make_mesh())
  assert host.tokenizer.size == tok.size + 1 and host.vocab == -(-(tok.size + 1) // 8) * 8 > tok.size + 1
  mesh = sharding.make_mesh(1, 1, 8)
  loaded = host.load(host.base, mesh, sharding.TRAIN, "float32")
  assert loaded.embed[...].sharding.spec[0] == "tensor"
  rows = np.asarray(loaded.embed[...])
  np.testing.assert_allclose(
    rows[tok.size :], np.repeat(rows[: tok.size].mean(0)[None], host.vocab - tok.size, 0), atol=1e-6
  )
  user = [{"role": "user", "content": "country"}]
  ids, mask = chat.encode_example(host.tokenizer, host.chat, user, "lyon")
  eot = host.tokenizer.token_id("<|eot|>")
  assert ids.count(eot) == 2 and ids[-1] == eot and mask[-1] and not mask[ids.index(eot)]
  training.export(host, loaded, tmp_path / "out")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert theirs.eos_token_id == eot
  turns = [*user, {"role": "assistant", "content": "lyon"}]
  found = theirs.apply_chat_template(turns)
  assert list(found if isinstance(found, list) else found["input_ids"]) == ids
  pytest.importorskip("torch")
  hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  assert hf.get_input_embeddings().weight.shape[0] == host.vocab and eot in hf.generation_config.eos_token_id


# Several answers to a prompt


def test_grades_of_several_answers_are_averaged_by_prompt_and_the_interval_is_over_prompts(session):
  """Prompt a has 2 and 4, b 9 and none, c none at all."""
  rows = [Grade(p, x) for p, x in (("a", 2.0), ("a", 4.0), ("b", 9.0), ("b", None), ("c", None), ("c", None))]
  sums = evaluation._sums(rows, 2)
  assert sums == {"n": 6, "graded": 2, "score": 12.0, "score_squared": 90.0, "missing": 3}
  stage = session.run.stage("round_05/eval.judge", {"n": 2})
  stage.write_part(0, 1, rows, Grade, sums)
  stage.finish(judge={"identity": "x", "scale": None, "selects": False})
  mean = evaluation.mean_of(Artefact(stage, Grade))
  assert (mean.value, mean.n) == (6.0, 2) and mean.ci95 == pytest.approx(1.96 * 3 * 2**0.5 / 2**0.5)
  answered = [Answer(row.prompt_id, ({"role": "user", "content": row.prompt_id},), "x" * 4, 1, True) for row in rows]
  finished(session.run.stage("round_05/eval", {"n": 2}), answered, Answer)
  found = graded.read(session.run.dir, 5)
  assert found.prompts == ["a", "b", "c"] and found.characters.tolist() == [4.0, 4.0, 4.0]
  np.testing.assert_array_equal(found.scores["judge"], [3.0, 9.0, np.nan])
