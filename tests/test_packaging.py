"""The wheel: its files, and a run of it from an empty folder. Config files: each finds its own `configs`."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import alma_jax
from alma_jax import config_files

ROOT = pathlib.Path(__file__).parents[1]
SHIPPED = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.py")}


def run(*command, cwd, **env):
  env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"TQDM_DISABLE": "1"} | env
  return subprocess.run([str(x) for x in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def interpreter(directory, *what):
  """The Python of a new virtual environment with the packages of this one, in which pip has installed `what`."""
  assert run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=ROOT).returncode == 0
  python = directory / "bin" / "python"
  found = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory)
  # A path in a .pth file adds the packages there, and none that is installed there in editable mode: no alma_jax.
  (pathlib.Path(found.stdout.strip()) / "those_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
  pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--no-build-isolation"]
  done = run(*pip, "--ignore-installed", *what, cwd=directory)
  assert done.returncode == 0, done.stdout + done.stderr
  return python


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A copy of what the package is built from, so that building leaves nothing in the checkout."""
  directory = tmp_path_factory.mktemp("source")
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, directory)
  for name in ("alma_jax", "configs"):
    shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
  return directory


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
  directory = tmp_path_factory.mktemp("wheel")
  pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
  done = run(*pip, "-w", directory, source, cwd=directory)
  assert done.returncode == 0, done.stdout + done.stderr
  return next(directory.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  return interpreter(tmp_path_factory.mktemp("venv"), wheel)


def test_the_wheel_holds_every_file_of_the_package_and_one_top_level_package(source, wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  assert wheel.name == f"alma_jax-{alma_jax.__version__}-py3-none-any.whl"
  assert {name.partition("/")[0] for name in names} == {"alma_jax", f"alma_jax-{alma_jax.__version__}.dist-info"}
  files = [path for path in (source / "alma_jax").rglob("*") if path.is_file()]
  wanted = {path.relative_to(source).as_posix() for path in files} | {f"alma_jax/shipped/{name}" for name in SHIPPED}
  assert {name for name in names if name.startswith("alma_jax/")} == wanted


ERROR = "config has no field 'policy.epocs'; did you mean 'policy.epochs'?"


@pytest.mark.parametrize("config", ["configs/alma.py:mini", "configs/ablations/table7_dpo.py"])
def test_the_installed_script_finds_the_shipped_configs(installed, tmp_path, config):
  alma = installed.with_name("alma")
  done = run(alma, "run", f"--config={config}", "--workdir=w", "--config.policy.epocs=2", cwd=tmp_path)
  assert done.returncode == 1 and ERROR in done.stderr, done.stdout + done.stderr
  assert not list(tmp_path.iterdir())


def test_an_editable_install_finds_the_configs_of_the_checkout(source, tmp_path):
  python = interpreter(tmp_path / "venv", "-e", source)
  (tmp_path / "empty").mkdir()
  alma = [python.with_name("alma"), "run", "--config=configs/alma.py:mini", "--config.policy.epocs=2", "--workdir=w"]
  assert ERROR in (done := run(*alma, cwd=tmp_path / "empty")).stderr, done.stdout + done.stderr
  common = source / "configs" / "common.py"
  text = common.read_text()
  common.write_text("raise SystemExit('this is the one')\n")
  assert "this is the one" in run(*alma, cwd=tmp_path / "empty").stderr
  common.write_text(text)


def test_the_installed_package_runs_a_miniature(installed, tmp_path):
  small = (
    "feedback_rounds=1", "shards=1", "prompts.draws=64", "clusters.k=8", "draw.prompts=2", "responses.n=2",
    "sft.epochs=0.2", "policy.epochs=0.2", "judge.train.epochs=0.1", "judge.distil.prompts=0", "data.eval=",
    "data.held_out=12",
  )  # fmt: skip
  flags = ["--config=configs/alma.py:mini", "--workdir=w", *(f"--config.{value}" for value in small)]
  done = run(installed.with_name("alma"), "run", *flags, cwd=tmp_path)
  assert done.returncode == 0, done.stdout + done.stderr
  assert (tmp_path / "w" / "report.html").exists() and "report: w/report.html" in done.stdout


# config_files


def loaded(config):
  with config_files.loading(["main", f"--config={config}"]) as argv:
    path = argv[1].removeprefix("--config=").partition(":")[0]
    scope = {"__name__": "a_config", "__file__": path}
    exec(compile(pathlib.Path(path).read_text(), path, "exec"), scope)
  return scope


def fork(directory, batch):
  shutil.copytree(ROOT / "configs", directory / "configs", ignore=shutil.ignore_patterns("__pycache__"))
  common = directory / "configs" / "common.py"
  common.write_text(common.read_text() + f"\nBATCH = {batch}\n")
  (directory / "configs" / "mine.py").write_text("from configs.common import BATCH\n")
  return directory / "configs" / "mine.py"


def test_a_copy_of_configs_reads_its_own_pieces(tmp_path, monkeypatch):
  """Whatever is imported already, and whichever folder is the working directory."""
  import configs.common

  first, second = fork(tmp_path / "first", 1), fork(tmp_path / "second", 2)
  monkeypatch.chdir(tmp_path / "first")
  path = list(sys.path)
  assert loaded(second)["BATCH"] == 2
  assert loaded(first)["BATCH"] == loaded("configs/mine.py")["BATCH"] == 1
  assert sys.path == path and sys.modules["configs.common"] is configs.common
  assert not hasattr(configs.common, "BATCH")


def test_a_file_outside_of_configs_reads_the_nearest_ones(tmp_path, monkeypatch):
  fork(tmp_path / "here", 3)
  file = tmp_path / "mine.py"
  file.write_text("import configs.common as found\n")
  monkeypatch.setattr(sys, "path", [place for place in sys.path if not (pathlib.Path(place) / "configs").is_dir()])
  (tmp_path / "empty").mkdir()
  for folder, expected in ((tmp_path / "here", tmp_path / "here"), (tmp_path / "empty", config_files.SHIPPED)):
    monkeypatch.chdir(folder)
    assert pathlib.Path(loaded(file)["found"].__file__) == expected / "configs" / "common.py"


@pytest.mark.parametrize(
  "argv",
  [["--config=configs/alma.py:mini", "--n=1"], ["--config", "configs/alma.py:mini"], ["-config=configs/alma.py:mini"]],
)
def test_a_path_that_does_not_exist_here_is_the_shipped_one(tmp_path, monkeypatch, argv):
  monkeypatch.chdir(tmp_path)
  with config_files.loading(argv) as found:
    assert found == [word.replace("configs/", f"{ROOT}/configs/") for word in argv]
  for other in ("configs/other.py", "/configs/alma.py", ""):
    assert config_files.found(other) == other
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "alma.py").touch()
  with config_files.loading(argv) as found:
    assert found == argv


def test_words_without_a_config_stay():
  with config_files.loading(["main", "--workdir=w", "--config.seed=1", "--config"]) as argv:
    assert argv == ["main", "--workdir=w", "--config.seed=1", "--config"]
