"""Launchers: what they would run, word for word, and a sweep of a small stand-in recipe run for real."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = [ROOT / ".ci" / "run", *sorted((ROOT / "launch").glob("*.s[hb]*"))]

# Stands for the interpreter: writes its process id and its part in the run, then does as it is told.
WORKER = """#!/usr/bin/env bash
[[ $1 == -c ]] && exec python3 "$@"
env | grep -E '^(JAX_(COORD|NUM_P|PROC)|CUDA)' >"$OUT/$JAX_PROCESS_ID.env"
printf '%s\\n' "$@" >"$OUT/$JAX_PROCESS_ID.args"
echo $$ >"$OUT/$JAX_PROCESS_ID.pid"
[[ $JAX_PROCESS_ID == "${FAILS:-}" ]] && { sleep 0.5; exit 7; }
[[ ${FAILS:-} ]] && exec sleep 60
echo "process $JAX_PROCESS_ID"
"""

# A recipe that needs no device: it counts its starts and fails when a file says so.
MAIN = """
import csv, json, pathlib, sys
from absl import app
from alma_jax import main as door

def main(_):
  config, workdir = door._CONFIG.value, pathlib.Path(door._WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / "starts", "a") as file:
    file.write("x")
  (workdir / "config.json").write_text(json.dumps(config.to_dict()))
  (workdir / "log.jsonl").write_text(json.dumps({"event": "start"}) + "\\n")
  if config.responses.n == 9 and not pathlib.Path("mended").exists():
    sys.exit(3)
  with open(workdir / "progress.csv", "w") as file:
    file.write("round,n,truth,truth_ci95,judge,judge_ci95\\n1,50,1.0,0.2,1,0.2\\n")
    file.write(f"2,50,{config.responses.n + 0.1 * config.seed},0.2,1,0.2\\n")
  with open(workdir / "log.jsonl", "a") as file:
    file.write(json.dumps({"event": "end"}) + "\\n")

app.run(main, flags_parser=door.parse)
"""

SWEEP = """
from configs import alma

get_config = alma.mini

def sweep(add):
  for seed in (0, 1):
    for n in (4, 9):
      add(seed=seed, responses=dict(n=n))
"""


def run(*command, cwd=ROOT, **env):
  env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
  return subprocess.run([str(x) for x in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def alive(pid):
  try:
    os.kill(pid, 0)
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except (ProcessLookupError, FileNotFoundError):
    return False


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_valid_bash(script):
  assert run("bash", "-n", script).stderr == ""
  assert script.suffix == ".sbatch" or os.access(script, os.X_OK)


def test_the_scripts_are_all_there():
  assert [p.name for p in SCRIPTS] == ["run", "local.sh", "slurm.sbatch", "tpu_pod.sh"]


# launch/local.sh


@pytest.fixture
def worker(tmp_path):
  path = tmp_path / "worker"
  path.write_text(WORKER)
  path.chmod(0o755)
  return {"PYTHON": str(path), "OUT": str(tmp_path), "JAX_PLATFORMS": "cpu"}


def test_local_prints_what_it_would_run():
  env = dict(PORT="1234", PYTHON="python3", JAX_PLATFORMS="", CUDA_VISIBLE_DEVICES="4,5,6,7")
  done = run("launch/local.sh", "--dry-run", "--config=a b.py", "--workdir=w", **env)
  start = "JAX_COORDINATOR_ADDRESS=localhost:1234 JAX_NUM_PROCESSES=2"
  end = "python3 -m alma_jax.main --config=a\\ b.py --workdir=w"
  assert done.stdout.splitlines() == [
    f"{start} JAX_PROCESS_ID=0 CUDA_VISIBLE_DEVICES=4,5 {end}",
    f"{start} JAX_PROCESS_ID=1 CUDA_VISIBLE_DEVICES=6,7 {end}",
  ]


def test_local_prints_its_own_help():
  done = run("launch/local.sh", "--help", PYTHON="false")
  assert done.returncode == 0 and done.stdout.startswith("One run over several processes of this machine")
  assert "-n PROCESSES" in done.stdout and "set -" not in done.stdout


def test_local_refuses_an_uneven_split():
  done = run("launch/local.sh", "-n", "3", "--dry-run", JAX_PLATFORMS="", CUDA_VISIBLE_DEVICES="0,1")
  assert done.returncode == 2 and "2 GPUs (0,1) cannot be split evenly between 3 processes" in done.stderr


def test_local_starts_every_process_with_its_part_and_all_arguments(worker, tmp_path):
  done = run("launch/local.sh", "-n", "3", "--config=x y", "--config.rounds={3: {}}", **worker)
  assert done.returncode == 0, done.stderr
  assert sorted(done.stdout.splitlines()) == ["[1] process 1", "[2] process 2", "process 0"]
  found = [dict(x.split("=", 1) for x in (tmp_path / f"{i}.env").read_text().splitlines()) for i in range(3)]
  assert [f["JAX_PROCESS_ID"] for f in found] == ["0", "1", "2"]
  assert {f["JAX_NUM_PROCESSES"] for f in found} == {"3"} and len({f["JAX_COORDINATOR_ADDRESS"] for f in found}) == 1
  for i in range(3):
    args = (tmp_path / f"{i}.args").read_text().splitlines()
    assert args == ["-m", "alma_jax.main", "--config=x y", "--config.rounds={3: {}}"]


@pytest.mark.parametrize("fails", ["0", "1"])
def test_local_stops_the_others_when_one_fails(worker, tmp_path, fails):
  begin = time.monotonic()
  done = run("launch/local.sh", "x", FAILS=fails, **worker)
  assert done.returncode == 7 and "status 7; stopping the others" in done.stderr
  assert time.monotonic() - begin < 30
  assert not any(alive(int((tmp_path / f"{i}.pid").read_text())) for i in range(2))


def test_local_stops_all_when_it_is_stopped(worker, tmp_path):
  env = os.environ | worker | {"FAILS": "none"}
  script = subprocess.Popen([ROOT / "launch" / "local.sh", "x"], env=env, cwd=ROOT)
  pids = [tmp_path / f"{i}.pid" for i in range(2)]
  while not all(p.exists() and p.read_text() for p in pids):
    time.sleep(0.05)
  script.send_signal(signal.SIGTERM)
  assert script.wait(timeout=30) == 130
  assert not any(alive(int(p.read_text())) for p in pids)


# The cluster launchers


def test_slurm_gives_one_process_all_gpus_of_its_node():
  done = run("bash", "launch/slurm.sbatch", "--dry-run", "--config=a b", PYTHON="py", SLURM_GPUS_ON_NODE="4")
  line = "JAX_LOCAL_DEVICE_IDS=0,1,2,3 srun --kill-on-bad-exit=1 py -m alma_jax.main --config=a\\ b"
  assert done.stdout.strip() == line


def test_tpu_pod_hands_the_arguments_through_two_shells(tmp_path):
  """The printed gcloud line, and what a host's shell makes of it: metadata in, the three variables out."""
  value = "--config.rounds={3: {'a': 1}}"
  done = run("launch/tpu_pod.sh", "--dry-run", "run", value, TPU="slice", ZONE="zone", VENV="venv", CODE="code")
  assert done.stdout.startswith("gcloud compute tpus tpu-vm ssh slice --zone=zone --worker=all $'--command=")
  (tmp_path / "code").mkdir()
  (tmp_path / "venv" / "bin").mkdir(parents=True)
  for name, text in {
    "venv/bin/python": 'printf "%s\\n" "$JAX_COORDINATOR_ADDRESS" "$JAX_NUM_PROCESSES" "$JAX_PROCESS_ID" "$@"',
    "curl": "case ${!#} in *endpoints) echo -n a:b:10.0.0.1,c:d:10.0.0.2 ;; *number) echo -n 1 ;; esac",
    "gcloud": 'for x; do case $x in --command=*) cd "$HOME"; exec bash -c "${x#--command=}" ;; esac; done',
  }.items():
    (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (tmp_path / name).chmod(0o755)
  path = f"{tmp_path}:{os.environ['PATH']}"
  env = dict(TPU="slice", ZONE="zone", VENV="venv", CODE="code", HOME=str(tmp_path), PATH=path)
  done = run("launch/tpu_pod.sh", "run", value, **env)
  assert done.stdout.splitlines() == ["10.0.0.1:8476", "2", "1", "-m", "alma_jax.main", value], done.stderr


def test_gke_pods_find_each_other():
  service, job = yaml.safe_load_all((ROOT / "launch" / "gke.yaml").read_text())
  pod, spec = job["spec"]["template"]["spec"], job["spec"]
  env = {e["name"]: e for e in pod["containers"][0]["env"]}
  source = (ROOT / "alma_jax" / "start.py").read_text()
  assert set(env) == {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
  assert all(f'"{name}"' in source for name in env)
  first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
  assert env["JAX_COORDINATOR_ADDRESS"]["value"].partition(":")[0] == first
  assert pod["subdomain"] == service["metadata"]["name"]
  assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
  assert int(env["JAX_NUM_PROCESSES"]["value"]) == spec["completions"] == spec["parallelism"]
  mounts = {m["name"] for m in pod["containers"][0]["volumeMounts"]}
  assert mounts == {v["name"] for v in pod["volumes"]}


# launch/sweep.py


@pytest.fixture
def project(tmp_path):
  """A directory in which `python -m alma_jax.main` is the stand-in."""
  (tmp_path / "stand_in").mkdir()
  (tmp_path / "stand_in" / "sitecustomize.py").write_text(
    "import os, sys\nif sys.orig_argv[1:3] == ['-m', 'alma_jax.main']:\n"
    f"  os.execv(sys.executable, [sys.executable, {str(tmp_path / 'main.py')!r}, *sys.orig_argv[3:]])\n"
  )
  (tmp_path / "main.py").write_text(MAIN)
  (tmp_path / "sweep_file.py").write_text(SWEEP)
  return tmp_path


def sweep(project, *arguments):
  line = [sys.executable, ROOT / "launch" / "sweep.py", "--config=sweep_file.py", "--workdir=runs", *arguments]
  return run(*line, cwd=project, PYTHONPATH=f"{project / 'stand_in'}:{ROOT}", CUDA_VISIBLE_DEVICES="")


def test_sweep_prints_the_exact_commands():
  line = [sys.executable, "launch/sweep.py", "--config=configs/ablations/table5_checkpoints.py", "--workdir=/runs/t5"]
  done = run(*line, "--dry_run", "--config.feedback_rounds=2")
  first, *commands = done.stdout.splitlines()
  assert first == "table5_checkpoints: 12 variants, 0 finished" and len(commands) == 12, done.stderr
  python, *words, workdir, a, b, c = shlex.split(commands[3])
  assert [python, *words] == [sys.executable, "-m", "alma_jax.main", "--config=configs/ablations/table5_checkpoints.py"]
  assert workdir.startswith("--workdir=/runs/t5/04_seed=0,checkpoints=-sft-,-latest-_")
  assert a == "--config.feedback_rounds=2" and c == "--config.seed=0"
  assert b == "--config.responses.checkpoints=('sft', 'latest')"
  assert len({shlex.split(x)[4] for x in commands}) == 12


def test_sweep_runs_resumes_and_tabulates(project):
  done = sweep(project, "--parallel=2")
  assert done.returncode == 1, done.stderr
  table = [line.split()[:2] for line in done.stdout.splitlines() if " responses.n=" in line and line[2:3].isdigit()]
  assert table == [["1", "finished"], ["2", "failed"], ["3", "finished"], ["4", "failed"]]
  (project / "mended").touch()
  done = sweep(project)
  assert done.returncode == 0 and "4 variants, 2 finished" in done.stdout, done.stderr
  starts = {p.parent.name[:2]: p.read_text() for p in project.glob("runs/*/starts")}
  assert starts == {"01": "x", "02": "xx", "03": "x", "04": "xx"}
  row = next(line for line in done.stdout.splitlines() if line.startswith("  3"))
  assert " ".join(row.split()) == "3 finished 2 50 truth 4.100 ± 0.200 seed=1 responses.n=4"
  # Two values that differ by 0.1: t(0.975, 1) = 12.706, times 0.1 / sqrt 2 / sqrt 2.
  assert "truth  4.050 ± 0.635  n = 2  responses.n=4" in done.stdout
  assert "4 variants, 4 finished" in sweep(project).stdout


def test_sweep_runs_again_what_was_finished_with_another_config(project):
  (project / "mended").touch()
  assert sweep(project).returncode == 0
  done = sweep(project, "--config.draw.prompts=5", "--dry_run")
  assert "4 variants, 0 finished" in done.stdout  # the run itself then says what changed


def test_sweep_finds_its_directories_again_when_variants_are_added_before(project):
  (project / "mended").touch()
  sweep(project)
  file = project / "sweep_file.py"
  file.write_text(file.read_text().replace("(4, 9)", "(2, 4, 9)"))
  assert "6 variants, 4 finished" in sweep(project, "--dry_run").stdout


@pytest.mark.parametrize(
  "call, message",
  [
    (
      "add(seed=1, respones=dict(n=4))",
      "work unit 5 (seed=1 respones.n=4): config has no field 'respones.n'; did you mean",
    ),
    ("add(responses=dict(temprature=1.0))", "did you mean 'responses.temperature'?"),
    ("add(responses=4)", "responses is a section; give it a dict"),
    ("add(responses=dict(n='4'))", "responses.n is a int, not '4'"),
    ("add(rounds={20: dict(seed=1)})", "an entry for round 20"),
    ("add(rounds={3: dict(sed=1)})", "did you mean 'seed'?"),
    ("add(seed=0, responses=dict(n=4))", "the same as work unit 1"),
  ],
)
def test_sweep_checks_all_variants_before_it_starts_one(project, call, message):
  with open(project / "sweep_file.py", "a") as file:
    file.write(f"  {call}\n")
  done = sweep(project)
  assert done.returncode == 1 and message in done.stderr, done.stderr
  assert not (project / "runs").exists()


def test_sweep_queues_on_slurm_once(project):
  """With stand-ins for sbatch and squeue: a job that is still queued is not queued again."""
  for name, text in {"sbatch": 'echo "$@" >>calls; echo "17;cluster"', "squeue": "cat queue"}.items():
    (project / "stand_in" / name).write_text(f"#!/bin/sh\n{text}\n")
    (project / "stand_in" / name).chmod(0o755)
  (project / "queue").write_text("PENDING\n")
  path = f"{project / 'stand_in'}:{os.environ['PATH']}"
  line = [sys.executable, ROOT / "launch" / "sweep.py", "--config=sweep_file.py", "--workdir=runs", "--launcher=slurm"]
  first, second = (run(*line, cwd=project, PATH=path) for _ in range(2))
  assert first.stdout.count("queued") == 4 and second.stdout.count("pending") == 4, first.stderr
  calls = (project / "calls").read_text().splitlines()
  assert len(calls) == 4
  assert all("slurm.sbatch --config=sweep_file.py --workdir=runs/0" in call for call in calls)
  (project / "queue").write_text("")
  run(*line, cwd=project, PATH=path)
  assert len((project / "calls").read_text().splitlines()) == 8


def test_the_table_reads_columns_that_evaluations_write():
  from alma_jax.report import graded
  from alma_jax.stages.evaluation import in_columns
  from alma_jax.store.statistics import Mean

  row = in_columns("truth", Mean(1.0, 0.5, 4), "an identity")
  assert graded.judges([row]) == ["truth"] and {"truth", "truth_ci95"} <= set(row)
