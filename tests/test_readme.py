"""What the README and docs/ name exists, their links lead somewhere, and the code in the guides does what they say."""

import pathlib
import re

import pytest

from alma_jax import names

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
pages = pytest.mark.parametrize("page", TEXTS)


@pages
def test_files_that_a_page_names_exist(page):
  named = set(re.findall(r"\b(?:alma_jax|configs|launch|benchmarks|tests|docs)/[\w/]+\.\w+", TEXTS[page]))
  to_be_made = {"configs/mine.py", "configs/NAME.py", "configs/ablations/NAME.py"}  # by the reader
  assert not [path for path in named - to_be_made if not (ROOT / path).exists()]


def test_the_readme_names_enough_files_to_be_a_map():
  assert len(set(re.findall(r"\b(?:docs|configs|launch)/[\w/]+\.\w+", README))) >= 8
  rooms = {path.name for path in (ROOT / "alma_jax").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
  assert not [room for room in rooms if f"{room}/" not in README]


@pages
def test_links_lead_to_files_and_headings(page):
  for text, link in re.findall(r"\[([^]]*)\]\(([^)]+)\)", TEXTS[page]):
    if link.startswith("https://"):
      continue
    path, _, heading = link.partition("#")
    target = (ROOT / page).parent / path
    assert target.is_file(), f"[{text}]({link})"
    headings = [h.strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", target.read_text(), re.M)]
    assert not heading or heading in headings, f"[{text}]({link})"


@pages
def test_modules_and_commands_that_a_page_runs_exist(page):
  from alma_jax.main import TOOLS

  modules = set(re.findall(r"python -m ([\w.]+)", TEXTS[page]))
  assert not [m for m in modules if not (ROOT / (m.replace(".", "/") + ".py")).exists()]
  commands = set(re.findall(r"(?:^|`|&& )alma ([a-z]+)", TEXTS[page], re.M))
  assert commands <= {"run", *TOOLS}


def test_ci_runs_the_readmes_test_command():
  assert "pip install -e '.[test]' && pytest -n 2" in README
  ci = (ROOT / ".ci" / "run").read_text()
  assert "pip install --quiet -e '.[test]'" in ci and "\npytest -n 2" in ci


# The code of the guides


@pytest.fixture
def guide(tmp_path, monkeypatch):
  """Writes the Python of a page into a module and gives what `module:NAME` stands for, as a config finds it."""

  def found(page, table, name):
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS[page], re.S)
    module, _, _ = name.partition(":")
    (tmp_path / f"{module}.py").write_text(code)
    assert name in TEXTS[page]
    return names.resolve(table, name, "field")

  monkeypatch.chdir(tmp_path)
  return found


def test_the_judge_of_the_guide_keeps_the_contract(guide):
  from alma_jax.judges import contract

  guide("docs/your_own_judge.md", names.EVALUATORS, "my_judges:brief")
  judge = contract.by_name(names.EVALUATORS, "my_judges:brief", None, None, "eval.judges")
  asked = ({"role": "user", "content": "hi"},)
  pairs = [contract.Answered(asked, text, done) for text, done in (("hello", True), ("word " * 43, True), ("x", False))]
  assert [verdict.score for verdict in contract.scores(judge, pairs)] == [10, 7, 0]
  assert judge.identity.startswith("brief 40 ") and len(judge.identity) > len("brief 40 ")


def test_the_chat_format_of_the_guide_can_be_written(guide):
  import text_tokenizers

  from alma_jax.text import chat

  fmt = guide("docs/your_own_chat_format.md", names.CHAT_FORMATS, "my_formats:CHATML")
  tok, added = chat.prepare(text_tokenizers.byte_bpe(), fmt)
  assert added == ("<|im_start|>", "<|im_end|>")
  ids, mask = chat.encode_example(tok, fmt, [{"role": "user", "content": "hi"}], "hello")
  assert mask[-1] and ids[-1] == tok.token_id("<|im_end|>") and ids.count(tok.bos_id) == 1
