"""What the README names exists, and its set-up commands are those that CI runs."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_files_that_the_readme_names_exist():
  named = set(re.findall(r"(?:alma_jax|configs|launch|benchmarks|tests)/[\w/]+\.\w+", README))
  assert len(named) >= 8
  assert not [path for path in named if not (ROOT / path).exists()]


def test_modules_that_the_readme_runs_exist():
  modules = set(re.findall(r"python -m ([\w.]+)", README))
  assert "alma_jax.main" in modules
  assert not [m for m in modules if not (ROOT / (m.replace(".", "/") + ".py")).exists()]


def test_ci_runs_the_readmes_test_command():
  assert "pip install -e '.[test]' && pytest -n 2\n" in README
  ci = (ROOT / ".ci" / "run").read_text()
  assert "pip install --quiet -e '.[test]'" in ci and "\npytest -n 2" in ci
