"""ISARA's stages on planted texts and points: who is asked, after which pairs, which answers stay and why not; the same
bytes on two hosts and after any kill; the end below alpha. No model is run."""

import collections
import functools
import json
import os
import types

import numpy as np
import pytest
from sessions import changed, on_two_hosts, session_in

from alma_jax import start
from alma_jax.corpus.normalise import prompt_id
from alma_jax.judges.choices import MultipleChoice
from alma_jax.judges.contract import ReadsModel
from alma_jax.keys import key_of
from alma_jax.mini import CHECKPOINT
from alma_jax.options import ConfigError
from alma_jax.recipes import isara as recipe
from alma_jax.report import generated, numbers, page
from alma_jax.runtime import clustering, sampling
from alma_jax.runtime.sampling import Draft
from alma_jax.stages import categories, drafts, neighbours, pairs, policy, prompts, responses
from alma_jax.store import shards
from alma_jax.store.data import SeedRow
from alma_jax.store.handles import Data, PromptSet
from alma_jax.store.records import Grade, Prompt, Response
from alma_jax.text import chat, fewshot
from alma_jax.text.tokenizer import load_tokenizer
from configs import isara

SHOTS = 2


class Crash(BaseException):
  """Stands for the process being killed: nothing catches it."""


@pytest.fixture(scope="module", autouse=True)
def without_syncing():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, "fsync", lambda handle: None)
    yield


def turn(text):
  return ({"role": "user", "content": text},)


def edited(text, *places):
  """The text with other words at these places."""
  return " ".join("another" if i in places else word for i, word in enumerate(text.split()))


# What the model writes, and where its questions lie


@pytest.fixture(scope="module")
def world():
  tokenizer = load_tokenizer(CHECKPOINT)
  words = [word for i in range(tokenizer.size) if (word := tokenizer.decode([i])).isalpha()]
  rng = np.random.default_rng(0)

  def text(n=12):
    return " ".join(rng.choice(words, n, replace=False))

  human = [SeedRow(turn(text()), text(), None, i, category="ab"[i % 2]) for i in range(8)]
  near_human = human[0].messages[0]["content"]
  evaluated = edited(near_human, 0, 1, 2, 3, 4, 5).replace("another", "oslo", 3)  # ROUGE-L .5 to a pair of D_0
  fresh = [text() for _ in range(8)]
  drafted = [*fresh, evaluated, edited(evaluated, 11), f"{near_human}?", "oslo", None, edited(fresh[0], 3)]
  data = Data(human, [], [SeedRow(turn(evaluated), None, None, 1)], {"sft": "0", "eval": "1"})
  answer = [text() for _ in range(8)]
  said = dict(zip(fresh, answer, strict=True))  # and what is wrong with some of them
  said[fresh[1]], said[fresh[2]], said[fresh[3]] = (answer[1], False), "oslo", fresh[3].upper()
  said[fresh[4]] = None  # the answer of its nearest pair
  said[fresh[6]] = edited(said[fresh[5]], 2)
  said[drafted[-1]] = said[fresh[0]]
  return types.SimpleNamespace(data=data, human=human, fresh=fresh, drafted=drafted, said=said)


def point(ids):
  return np.random.default_rng(list(ids)).standard_normal(16).astype(np.float32)


def embedded(host, checkpoint, rows, kind, progress):
  progress(len(rows))
  return np.stack([np.zeros(16, np.float32), *map(point, rows)])[1:]


def brute(pool, of, ids, k):
  """The rows of the pool for one point, by a loop over cosines."""
  cosines = [float(np.round(of @ x / np.linalg.norm(of) / np.linalg.norm(x), 6)) for x in pool.astype(np.float64)]
  first = sorted(range(len(pool)), key=lambda i: (-cosines[i], ids[i]))[:k]
  return first[::-1]


@pytest.fixture
def nearest_pairs(world, session):
  """question -> the pairs of D_0 that it is answered after."""
  tok, fmt = session.host.tokenizer, session.host.chat

  def states(texts):
    return np.stack([point(chat.encode_prompt(tok, fmt, turn(x))) for x in texts]).astype(np.float64)

  pool = states([row.messages[0]["content"] for row in world.human])
  mean, scale = pool.mean(axis=0), pool.std(axis=0)
  points = (states(world.fresh) - mean) / scale
  ids = [prompt_id(row.messages) for row in world.human]
  return {
    x: [world.human[i] for i in brute((pool - mean) / scale, p, ids, SHOTS)]
    for x, p in zip(world.fresh, points, strict=True)
  }


@pytest.fixture(autouse=True)
def planted(world, monkeypatch, nearest_pairs):
  """The model writes the planted texts; the requests that it was given."""
  monkeypatch.setattr(clustering, "embedded", embedded)
  by_key = {key_of(0, 2, "prompts", i): (text or "", text is not None) for i, text in enumerate(world.drafted)}
  for question, text in world.said.items():
    text = nearest_pairs[question][-1].response if text is None else text
    text = text if isinstance(text, tuple) else (text, True)
    by_key[key_of(0, 2, "responses", prompt_id(turn(question)), 0)] = text
  asked = []

  def written(host, checkpoint, requests, options, stops, bar):
    asked.extend(requests)
    found = [by_key[request.key] for request in requests]
    return [Draft(text, tuple(range(len(text.split()))), finished, (-1.0,)) for text, finished in found]

  monkeypatch.setattr(sampling, "drafts", written)
  return asked


@pytest.fixture(scope="module")
def config(world):
  c = isara.get_config("mini")
  c.shards, c.feedback_rounds = 3, 1
  c.prompts.update(dict(draws=len(world.drafted), words=(2, 20), similarity=0.7, max_prompt_tokens=200))
  c.neighbours.shots, c.pairs.similarity, c.responses.max_prompt_tokens = SHOTS, 0.7, 100
  c.pairs.tokens = (2, 20)
  return c


@pytest.fixture(scope="module")
def session(config, tmp_path_factory):
  return session_in(tmp_path_factory.mktemp("run"), config)


def iteration(s, world):
  """The stages of an iteration up to its training data."""
  o = s.options
  seeds = pairs.human(s.at(1), world.human, {"data": "0"})
  r = s.at(2)
  drafted = drafts.build(
    r, world.data, o.prompts.writing, "round_02", growing=drafts.Growing(s.base, [seeds], o.prompts.words)
  )
  asked = prompts.build(r, world.data, drafted, o.prompts.entering)
  shots = neighbours.build(r, asked, [seeds], o.neighbours, 64)
  template = fewshot.FewShot("test", "", "# {prompt} > {response} \n ", "# {prompt} >", "\n")
  answers = responses.build(r, asked, [s.base], recipe.once(o), responses.Shots(template, shots, [seeds]))
  return (
    seeds,
    asked,
    shots,
    pairs.build(r, pairs.Answered(asked, shots, answers, o.prompts.writing.draws), [seeds], o.pairs),
  )


def artefacts(directory):
  """Every file with its bytes, without times."""
  found = {}
  for path in sorted(path for path in directory.glob("round_*/**/*") if path.is_file()):
    content = path.read_bytes()
    if path.name == "manifest.json":
      content = {k: v for k, v in json.loads(content).items() if k not in ("seconds", "finished_at", "seal")}
    found[path.relative_to(directory).as_posix()] = content
  return found


# Who is asked, after what, and what stays


def test_an_evaluation_prompt_near_the_human_pairs_is_not_asked_nor_what_is_like_it(session, world):
  _, asked, _, _ = iteration(session, world)
  assert {p.messages[0]["content"] for p in asked.read()} == set(world.fresh[1:]) | {
    min(world.fresh[0], world.drafted[-1], key=lambda x: prompt_id(turn(x)))  # of two that are alike the lower id stays
  }
  counts = asked.manifest["counts"]
  assert counts["equals_eval_prompt"] == counts["near_eval_prompt"] == counts["equals_demonstration"] == 1
  made = json.loads((session.run.dir / "round_02/drafts/manifest.json").read_text())["counts"]
  assert made["too_few_or_many_words"] == made["cut_off"] == 1


def test_each_question_stands_after_its_nearest_pairs_and_the_nearest_one_comes_last(
  session, world, nearest_pairs, planted
):
  seeds, asked, shots, _ = iteration(session, world)
  texts = {p.id: p.messages[0]["content"] for p in asked.read()}
  found = {texts[x.prompt_id]: x for x in shots.read()}
  rows = seeds.in_order(seeds.kind)
  for question in set(world.fresh) & found.keys():
    shown = [rows[i] for i in found[question].shots]
    assert [x.response for x in shown] == [row.response for row in nearest_pairs[question]]
    assert list(found[question].similarities) == sorted(found[question].similarities)


def test_the_answers_that_stay_and_why_the_others_do_not(session, world):
  seeds, asked, _, kept = iteration(session, world)
  assert [x.response for x in seeds.in_order(seeds.kind)] == [row.response for row in world.human]
  place = {p.messages[0]["content"]: i for i, p in enumerate(asked.read())}
  alike = max(world.fresh[5:7], key=place.__getitem__)  # the second one of two that have nearly one answer
  wanted = sorted({*world.fresh[5:8], world.fresh[0], world.drafted[-1]} & place.keys() - {alike}, key=place.get)
  found = kept.in_order(kept.kind)
  assert [x.messages[0]["content"] for x in found] == wanted and {x.round for x in found} == {2}
  counts = kept.manifest["counts"]
  dropped = dict(cut_off=1, length=1, equals_question=1, copies_shot=1, near_answer=1)
  assert counts == dict(asked=len(place), kept=len(wanted), **dropped)
  assert kept.manifest["kept_share"] == len(wanted) / len(world.drafted)
  assert kept.manifest["growth"] == len(wanted) / len(world.human)
  report = json.loads((kept.dir / "report.json").read_text())["dropped"]
  assert {why: len(of) for why, of in report.items()} == dropped
  assert report["near_answer"][0]["question"] == alike and report["near_answer"][0]["near"] in world.said.values()


def test_two_hosts_and_any_kill_give_the_same_bytes(session, world, config, tmp_path, monkeypatch):
  iteration(session, world)
  wanted = artefacts(session.run.dir)
  on_two_hosts(tmp_path / "two", config, functools.partial(iteration, world=world))
  assert artefacts(tmp_path / "two") == wanted

  seen, replace = collections.Counter(), os.replace

  def killed(old, new):  # before every second file has its name, after every other one
    name = str(new)
    kill = not seen[name] and ("near/" not in name) and not name.endswith("seconds.json")
    seen[name] += 1
    seen["kills"] += kill
    if kill and seen["kills"] % 2:
      raise Crash
    replace(old, new)
    if kill:
      raise Crash

  one = session_in(tmp_path / "killed", config)
  monkeypatch.setattr(os, "replace", killed)
  for _ in range(200):
    try:
      iteration(one, world)
      break
    except Crash:
      shards.remove_temporaries(one.run.dir)
  assert artefacts(one.run.dir) == wanted
  assert all(any(f"round_02/{stage}/" in name for name in seen) for stage in ("neighbours", "responses", "trainset"))
  assert seen["kills"] > 40


# Neighbours


def test_nearest_rows_are_those_of_a_loop_over_all_cosines():
  rng = np.random.default_rng(1)
  pool = rng.standard_normal((40, 7)).astype(np.float32)
  pool[5:9] = pool[4] * np.float32(2)  # as near as each other: the lower id is first
  ids = [f"{x:04x}" for x in rng.permutation(40)]
  of = rng.standard_normal((9, 7)).astype(np.float32)
  of[0] = pool[4]
  rows, cosines = neighbours.nearest(pool, of, 6, ids)
  for row, point_ in zip(rows.tolist(), of.astype(np.float64), strict=True):
    assert row == brute(pool, point_, ids, 6)
  assert cosines[0, -1] == 1 and (np.diff(cosines, axis=1) >= 0).all()
  assert neighbours.nearest(pool[:3], of, 6, ids[:3])[0].shape == (9, 3)


def test_random_shots_are_each_questions_own(session, world, tmp_path):
  s = changed(session_in(tmp_path, session.config), neighbours=dict(method="random"))
  _, _, shots, _ = iteration(s, world)
  found = [x.shots for x in shots.read()]
  assert all(len(set(x)) == SHOTS and max(x) < len(world.human) for x in found) and len(set(found)) > 3
  assert not any(x.similarities for x in shots.read())


def test_the_furthest_pairs_give_way_where_there_is_no_room(session):
  tok, template = (
    session.host.tokenizer,
    fewshot.FewShot("test", "", "# {prompt} > {response} \n ", "# {prompt} >", "\n"),
  )
  shown = [{"prompt": "oslo", "response": x} for x in ("paris", "lima", "rome")]
  prompt = types.SimpleNamespace(messages=turn("cairo"))
  whole, none = responses._after(tok, template, shown, prompt, 1000)
  ids, left_out = responses._after(tok, template, shown, prompt, len(whole) - 1)
  assert (none, left_out) == (0, 1) and ids == fewshot.few_shot_ids(tok, template, shown[1:], "cairo")
  assert responses._after(tok, template, shown, prompt, 2)[1] == 3  # too long even without pairs: it is not asked


# Filters


@pytest.mark.parametrize("similarity", [0.0, 0.6])
def test_similar_texts_are_those_of_a_loop(similarity, monkeypatch):
  monkeypatch.setattr(pairs, "TOGETHER", 20)
  rng = np.random.default_rng(2)
  texts = [" ".join(rng.choice(list("abc"), rng.integers(1, 4))) for _ in range(30)]

  def like(one, other):
    a, b = one.split(), other.split()
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
      for j, y in enumerate(b):
        table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return 2 * table[-1, -1] / (len(a) + len(b)) >= similarity if similarity else one == other

  found = pairs.similar(texts, 8, similarity)
  assert [x.tolist() for x in found] == [[j for j in range(i) if like(texts[i], texts[j])] for i in range(8, 30)]
  assert sum(map(len, found)) > 5


def test_an_answer_that_is_dropped_drops_no_other():
  said = ["a b c d e", "a b c d x", "q b c d x"]  # the second one is like both others, which are not like each other
  asked = [Prompt(f"{i:016x}", turn(f"question {i}"), "test") for i in range(3)]
  candidates = [
    pairs._Candidate(i, asked[i], Response(asked[i].id, 0, "base", text, (1,) * 5, True, 0.0), [])
    for i, text in enumerate(said)
  ]
  found = pairs._judged(candidates, ["another one"], pairs.Options(similarity=0.7))
  assert found == [("kept", ""), ("near_answer", said[0]), ("kept", "")]
  repeats = pairs._judged(candidates, said, pairs.Options(similarity=0.7, repeats=True))
  assert [why for why, _ in repeats] == ["kept"] * 3


# D_0 and the end


def test_more_than_a_hundred_pairs_and_unknown_categories_are_early_errors(tmp_path):
  rows = [{"prompt": f"question {i}", "response": "an answer", "category": "ab"[i % 2]} for i in range(204)]
  (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  c = isara.get_config("7b")
  c.data.update(dict(sft=str(tmp_path / "sft.jsonl"), eval=str(tmp_path / "sft.jsonl"), pairs=0))
  c.model.path, c.eval.judges = "mini", ("rules:length",)
  with pytest.raises(ConfigError, match=r"eval\.judges is empty"):
    start.checked_options(_without_judges())
  o = start.checked_options(c)[0]
  held = [
    SeedRow(turn(row["prompt"]), row["response"], None, i, category=row["category"]) for i, row in enumerate(rows)
  ]
  with pytest.raises(ConfigError, match=r"data.sft has 204 pairs, and D_0 is at most 100: set data.pairs"):
    recipe.d_0(o, held)
  with pytest.raises(ConfigError, match=r"data.pairs is 101; it must be at most 100"):
    c.data.pairs = 101
    start.checked_options(c)
  c.data.pairs, c.categories.seeds = 60, ("a",)
  found = recipe.d_0(start.checked_options(c)[0], held)
  assert len(found) == 60 and {row.category for row in found} == {"a"} and found != held[:120:2]
  c.categories.seeds = ("c",)
  with pytest.raises(ConfigError, match=r"names 'c', and no demonstration is of it; they are of a \(102\), b \(102\)"):
    recipe.d_0(start.checked_options(c)[0], held)


def test_every_size_is_a_valid_config():
  for size in ("mini", "mini_safety"):
    assert len(recipe.seeds_of(start.checked_options(isara.get_config(size))[0])) == 16
  with pytest.raises(ValueError, match="no size '8b'; there are mini, mini_safety, 7b"):
    isara.get_config("8b")


def _without_judges():
  c = isara.get_config("mini")
  c.eval.judges = ()
  return c


def test_a_run_ends_below_alpha_before_it_trains(world, config, tmp_path, monkeypatch, capsys):
  trained = []
  monkeypatch.setattr(policy, "mixed", lambda s, job, *_: trained.append(job.name) or s.base)
  monkeypatch.setattr(recipe, "evaluated", lambda *_: {})
  monkeypatch.setattr(recipe, "read", lambda s: (world.data, pairs.human(s.at(1), world.human, {})))
  for alpha, wanted in ((0.1, ["sft_1", "round_02/policy"]), (0.9, ["sft_1"])):
    c = config.copy_and_resolve_references()
    c.alpha, c.responses.template = alpha, "mini"
    trained.clear()
    recipe.run(session_in(tmp_path / str(alpha), c))
    assert trained == wanted
  assert "less than alpha, 0.9; the run ends before training on it" in capsys.readouterr().err


# Scores by category


def test_scores_by_category_with_seen_and_unseen_ones_and_the_rate_of_harm(session, monkeypatch):
  rows = [SeedRow(turn(f"prompt {i}"), None, None, i, category="abc"[i % 3] if i < 9 else None) for i in range(10)]
  scores = {prompt_id(row.messages): float(i) for i, row in enumerate(rows)}
  run, r = session.run, session.at(1)
  stage = run.stage("round_01/eval.truth", {})
  if not stage.done:
    stage.write_part(0, 1, [Grade(id, score) for id, score in scores.items()], Grade)
    stage.finish()
  options = categories.Options(judge="truth", bound=5.5)
  categories.build(r, [PromptSet("", rows, "0")], ["truth", "absent"], ["a"], options)
  found = json.loads((run.dir / "round_01/categories.truth/report.json").read_text())
  assert {name: row["score"]["mean"] for name, row in found["by"].items()} == {"a": 3.0, "b": 4.0, "c": 5.0}
  assert found["seen"]["score"] == found["by"]["a"]["score"] and found["unseen"]["score"]["mean"] == 4.5
  assert found["unseen"]["harmful"]["mean"] == pytest.approx(2 / 6) and found["without_category"] == 1
  assert [row["seen"] for row in found["by"].values()] == [True, False, False]
  below = categories.table(scores, {id: "a" for id in scores}, [], categories.Options(harmful="below", bound=2.5))
  assert below["unseen"]["harmful"]["mean"] == pytest.approx(0.3) and "seen" not in below


def test_the_report_shows_what_was_kept_and_the_categories(session, world):
  _, _, _, kept = iteration(session, world)
  categories_of = session.run.dir / "round_01/categories.truth"
  assert categories_of.exists()  # by the test above
  facts = numbers.facts(session.run.dir)
  found = generated.generated(facts)
  (row,) = found.table.rows
  share = f"{len(kept.read()) / len(world.drafted):.1%}"
  assert row[0] == "2" and row[1] == f"{len(world.drafted)}" and row[3] == f"{len(kept.read())}" and row[4] == share
  assert {cells[0] for cells in found.dropped.rows} >= {"near answer", "copies shot"}
  (section,) = generated.categories(facts)
  assert section.title == "truth, the evaluation prompts"
  assert section.table.head[:4] == ["round", "seen", "unseen", "a (seen)"]
  assert section.table.rows[0][1].startswith("3.00 ±") and "seen 3.00" in section.chart
  text = page.write(session.run.dir).read_text()
  assert "Generated pairs" in text and "harmful: unseen" in text and "could not be made" not in text


def test_multiple_choice_grades_the_checkpoint_of_the_round():
  host = types.SimpleNamespace(chat=types.SimpleNamespace(name="plain"))
  of = [types.SimpleNamespace(content=x * 64) for x in "ab"]
  judge = MultipleChoice(host, of[0])
  assert isinstance(judge, ReadsModel) and judge.identity == f"rules:multiple_choice 1 plain {'a' * 16}"
  assert judge.of(of[1]).checkpoint is of[1]
  assert judge.of(of[1]).identity == judge.of(of[0]).identity  # one column of progress.csv, other answers
