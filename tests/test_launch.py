"""Launchers: what they would run, word for word, and a sweep of a small stand-in recipe run for real."""

import importlib.util
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import yaml

from alma_jax import start
from alma_jax.options import ConfigError

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


# A task that saves for a moment when it is told to, as alma_jax does, and ends with 143; FAILS: it fails by itself.
SRUN = """#!/usr/bin/env bash
trap 'sleep 0.3; echo saved >>"$OUT/log"; exit 143' TERM
echo $$ >"$OUT/task"
echo "srun $*" >>"$OUT/log"
[[ $FAILS ]] && exit "$FAILS"
while :; do sleep 0.05; done
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >>"$OUT/log"
kill -TERM "$(cat "$OUT/task")"
"""


@pytest.fixture
def slurm(tmp_path):
  """Stand-ins for Slurm's commands; each writes what it was asked into `log`."""
  names = {"srun": SRUN, "scancel": SCANCEL, "scontrol": '#!/bin/sh\necho "scontrol $*" >>"$OUT/log"\n'}
  for name, text in names.items():
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path), "PYTHON": "py", "SLURM_JOB_ID": "17"}


@pytest.mark.parametrize("array, job", [({}, "17"), ({"SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "2"}, "15_2")])
def test_slurm_saves_and_queues_itself_again_at_the_time_limit(slurm, tmp_path, array, job):
  """Slurm signals the batch shell, as --signal=B:TERM asks: the tasks save, and only then the job is queued again."""
  env = os.environ | slurm | array | {"FAILS": ""}
  shell = subprocess.Popen(["bash", ROOT / "launch" / "slurm.sbatch", "--workdir=w"], env=env, cwd=ROOT)
  while not (tmp_path / "log").exists():
    time.sleep(0.02)
  shell.send_signal(signal.SIGTERM)
  assert shell.wait(timeout=30) == 143
  assert (tmp_path / "log").read_text().splitlines() == [
    "srun --kill-on-bad-exit=1 py -m alma_jax.main --workdir=w",
    f"scancel --signal=TERM {job}",
    "saved",
    f"scontrol requeue {job}",
  ]
  assert "#SBATCH --signal=B:TERM@" in (ROOT / "launch" / "slurm.sbatch").read_text()


def test_slurm_does_not_queue_a_failed_run_again(slurm, tmp_path):
  done = run("bash", "launch/slurm.sbatch", "x", **slurm, FAILS="3")
  assert done.returncode == 3 and (tmp_path / "log").read_text().splitlines()[1:] == []


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


GCLOUD = """#!/usr/bin/env bash
# The slice's states stand in a file, in the order they are asked for; the first run fails.
case "$*" in
  *describe*) state=$(head -n1 "$OUT/states"); sed -i 1d "$OUT/states"; [[ $state != absent ]] && echo "$state"; exit ;;
esac
echo "${*:3:2}" >>"$OUT/log"
[[ "$*" != *alma_jax.main* || -e $OUT/lost ]] || { touch "$OUT/lost"; exit 1; }
"""


def test_tpu_pod_goes_on_when_a_spot_slice_is_taken_away(tmp_path):
  """From nothing: the slice is asked for, waited for, lost during the run, asked for again, and the run ends there."""
  (tmp_path / "gcloud").write_text(GCLOUD)
  (tmp_path / "gcloud").chmod(0o755)
  env = dict(TPU="s", ZONE="z", TYPE="v6e-16", RUNTIME="r", WAIT="0", OUT=str(tmp_path))
  command = ["timeout", "30", "launch/tpu_pod.sh", "keep", "--workdir=w"]

  def keep(*states):
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    done = run(*command, **env, PATH=f"{tmp_path}:{os.environ['PATH']}")
    log = (tmp_path / "log").read_text().splitlines()
    (tmp_path / "log").unlink()
    return done.returncode, log

  asked, gone = "queued-resources create", "queued-resources delete"
  once = ["tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]  # setup is a copy and a command, the run another one
  lost = ("absent", "PROVISIONING", "ACTIVE", "SUSPENDING", "SUSPENDED", "absent", "ACTIVE")
  assert keep(*lost) == (0, [asked, *once, gone, asked, *once])
  (tmp_path / "lost").unlink()
  assert keep("ACTIVE", "ACTIVE") == (1, once)  # the slice is still there: the run itself has failed
  printed = run("launch/tpu_pod.sh", "--dry-run", "keep", "--workdir=w", **env).stdout
  assert "create s --zone=z --node-id=s --accelerator-type=v6e-16 --runtime-version=r --spot" in printed


# Kubernetes, SkyPilot, Docker. The schemas are the parts of the public ones that the files use, with their sources.


def check(schema, value, where):
  """A small JSON schema: types, required fields, no other fields than those named, enums."""
  kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
  if kind := schema.get("type"):
    allowed = tuple(kinds[name] for name in ([kind] if isinstance(kind, str) else kind))
    assert isinstance(value, allowed), f"{where} is {value!r}, not {kind}"
  assert "enum" not in schema or value in schema["enum"], f"{where} is {value!r}, not one of {schema['enum']}"
  if isinstance(value, dict):
    assert set(schema.get("required", ())) <= set(value), f"{where} lacks {schema['required']}"
    for name, item in value.items():
      known = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
      assert known is not None, f"{where}.{name}: no such field"
      check(known, item, f"{where}.{name}")
  for item in value if isinstance(value, list) else ():
    check(schema.get("items", {}), item, f"{where}[]")


def documents(name):
  return list(yaml.safe_load_all((ROOT / "launch" / name).read_text()))


@pytest.mark.parametrize("name", ["gke.yaml", "gke_tpu.yaml", "trainjob.yaml", "sky.yaml"])
def test_yaml_files_follow_the_public_schemas(name):
  schemas = json.loads((ROOT / "tests" / "fixtures" / "launch_schemas.json").read_text())[name]
  assert all(schema["source"] and schema["date"] for schema in schemas)
  for schema, document in zip(schemas, documents(name), strict=True):
    check(schema["schema"], document, name)
    with pytest.raises(AssertionError, match="no such field"):
      check(schema["schema"], document | {"numNodes": 2}, name)


def hosts(**environment):
  return start.hosts_of(environment)


def test_gke_pods_find_each_other():
  service, job = documents("gke.yaml")
  pod, spec = job["spec"]["template"]["spec"], job["spec"]
  env = {e["name"]: e for e in pod["containers"][0]["env"]}
  first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
  assert pod["subdomain"] == service["metadata"]["name"]
  assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
  assert int(env["JAX_NUM_PROCESSES"]["value"]) == spec["completions"] == spec["parallelism"]
  given = {name: e["value"] for name, e in env.items() if "value" in e}
  assert env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"].endswith("job-completion-index']")
  found = hosts(**given, JAX_PROCESS_ID="1")  # the annotation of the second pod
  assert found == {"coordinator_address": f"{first}:1234", "num_processes": 2, "process_id": 1}


def test_a_trainjob_is_recognised_by_what_its_runtime_sets():
  """The names and the address are those of Kubeflow Trainer's plugin jax (pkg/runtime/framework/plugins/jax/jax.go)."""
  [job] = documents("trainjob.yaml")
  assert job["spec"]["runtimeRef"]["name"] == "jax-distributed"
  name, nodes = job["metadata"]["name"], job["spec"]["trainer"]["numNodes"]
  env = {
    "JAX_NUM_PROCESSES": str(nodes),
    "JAX_PROCESS_ID": "1",
    "JAX_COORDINATOR_ADDRESS": f"{name}-node-0-0.{name}:29500",
  }
  assert hosts(**env) == {"coordinator_address": "alma-node-0-0.alma:29500", "num_processes": nodes, "process_id": 1}
  [patch] = job["spec"]["runtimePatches"]
  [replicated] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
  pod = replicated["template"]["spec"]["template"]["spec"]
  assert (replicated["name"], pod["containers"][0]["name"]) == ("node", "node")  # those of the runtime


def test_sky_nodes_find_each_other(tmp_path):
  """The lines of `run` with SkyPilot's variables, and a stand-in for the interpreter."""
  [task] = documents("sky.yaml")
  python = tmp_path / "alma_venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text('#!/usr/bin/env bash\nenv | grep ^JAX_; printf "%s\\n" "$@"\n')
  python.chmod(0o755)
  env = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
  env |= {"HOME": str(tmp_path), "ARGUMENTS": '--workdir=w --config.rounds="{3: {}}"'}
  done = run("bash", "-c", task["run"], **env)
  lines = done.stdout.splitlines()
  found = hosts(**dict(line.split("=", 1) for line in lines if line.startswith("JAX_") and "PLATFORMS" not in line))
  assert found == {"coordinator_address": "10.0.0.1:8476", "num_processes": 2, "process_id": 1}, done.stderr
  assert lines[-4:] == ["-m", "alma_jax.main", "--workdir=w", "--config.rounds={3: {}}"]


def test_slurm_tasks_and_tpu_workers_are_recognised():
  """srun with one task per node takes all GPUs of it; JAX reads the rest itself."""
  task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"}
  assert hosts(**task) == {"local_device_ids": [0, 1, 2, 3]}
  assert hosts(**task | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}) == {"local_device_ids": None}
  assert hosts(SLURM_STEP_NUM_TASKS="1") is None
  assert hosts(TPU_WORKER_HOSTNAMES="a,b", TPU_WORKER_ID="1") == {}
  assert hosts(TPU_PROCESS_ADDRESSES="a:8471,b:8471") == {}
  assert hosts(TPU_WORKER_HOSTNAMES="a", MEGASCALE_NUM_SLICES="2") == {}  # slices of one host
  assert hosts(TPU_WORKER_HOSTNAMES="localhost") is None and hosts() is None


def test_half_of_the_variables_is_an_error_and_not_a_run_of_one_host():
  with pytest.raises(
    ConfigError, match="JAX_COORDINATOR_ADDRESS is set and JAX_NUM_PROCESSES and JAX_PROCESS_ID is not"
  ):
    hosts(JAX_COORDINATOR_ADDRESS="a:1")
  with pytest.raises(ConfigError, match=r"JAX_PROCESS_ID is '2' and JAX_NUM_PROCESSES '2'; they must be 0 .. n-1"):
    hosts(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="2")


def test_the_image_installs_the_extras_of_its_accelerator(tmp_path):
  """The RUN line of the Dockerfile with a stand-in for pip, for every ACCELERATOR."""
  text = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", "")
  [line] = [line.removeprefix("RUN ") for line in text.splitlines() if line.startswith("RUN ")]
  (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
  (tmp_path / "pip").chmod(0o755)
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

  def installed(accelerator, more=""):
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("sh", "-c", line, ACCELERATOR=accelerator, EXTRAS=more, PATH=path)
    return done.stdout.split()[-1] if done.returncode == 0 else None

  assert [installed(name) for name in ("cpu", "gpu", "tpu", "cuda")] == [".", ".[gpu]", ".[tpu]", None]
  assert installed("gpu", "ifeval,trackio") == ".[gpu,ifeval,trackio]" and installed("cpu", "ifeval") == ".[ifeval]"
  assert {"gpu", "tpu", "ifeval", "xmanager", "xmanager-slurm"} <= set(extras)
  copied = [part for row in text.splitlines() if row.startswith("COPY") for part in row.split()[1:-1]]
  assert all((ROOT / part).exists() for part in copied)


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
  done = run(*line, "--print=commands", "--config.feedback_rounds=2")
  commands = done.stdout.splitlines()
  assert len(commands) == 12, done.stderr
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
  assert " ".join(row.split()) == "3 finished 2 50 truth 4.100 ± 0.200 0 seed=1 responses.n=4"
  # Two values that differ by 0.1: t(0.975, 1) = 12.706, times 0.1 / sqrt 2 / sqrt 2.
  assert "truth  4.050 ± 0.635  n = 2  0 device-s  responses.n=4" in done.stdout
  assert "+5.000 ± 0.000 over 2 seeds  responses.n=9" in done.stdout  # the answers are gone: from progress.csv
  units = json.loads(sweep(project, "--print=json").stdout)
  assert [unit["state"] for unit in units] == ["finished"] * 4
  assert units[1]["overrides"] == {"seed": 0, "responses": {"n": 9}} and units[1]["arguments"][-1] == "--config.seed=0"
  done = sweep(project, "--config.draw.prompts=5", "--print=table")  # another config: the run itself says what changed
  assert [line.split()[1] for line in done.stdout.splitlines()[1:5]] == ["begun"] * 4


def test_a_sweep_is_one_slurm_array(project, slurm):
  """The printed script is slurm.sbatch with the arguments of every unit; task 3 runs unit 3."""
  script = sweep(project, "--print=array", "--parallel=2").stdout
  head = [line for line in script.splitlines() if line.startswith("#SBATCH --")]
  assert head[0] == "#SBATCH --array=1,2,3,4%2" and "#SBATCH --output=slurm-%A_%a.out" in head
  shipped = (ROOT / "launch" / "slurm.sbatch").read_text()
  assert [line for line in shipped.splitlines() if line.startswith("#SBATCH --")][:-1] == head[1:-1]
  (project / "script").write_text(script)
  run("bash", "script", cwd=project, **slurm, FAILS="1", SLURM_ARRAY_JOB_ID="15", SLURM_ARRAY_TASK_ID="3")
  [line] = (project / "log").read_text().splitlines()
  assert "main --config=sweep_file.py --workdir=runs/03_seed=1,n=4_" in line
  assert line.endswith(" --config.responses.n=4 --config.seed=1")


def test_sweep_splits_the_gpus(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "launch"))
  import sweep as module

  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
  assert [share["CUDA_VISIBLE_DEVICES"] for share in module.shares(2)] == ["4,6", "5"]
  with pytest.raises(SystemExit, match=r"--parallel=4: there are 3 GPUs \(4,5,6\) and each variant needs one"):
    module.shares(4)
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
  assert module.shares(2) == [{}, {}]


# launch/xm.py


def test_xm_sends_a_job_for_each_unit(monkeypatch, tmp_path):
  """Through XManager's own mock of an experiment (pip install -e '.[xmanager]')."""
  xm_mock = pytest.importorskip("xmanager.xm_mock", reason="needs the extra [xmanager]")
  from xmanager import xm

  from alma_jax.sweeps import Unit

  monkeypatch.syspath_prepend(str(ROOT / "launch"))
  module = importlib.import_module("xm")
  value = "--config.responses.checkpoints=('sft', 'latest')"
  units = [Unit(i, {}, None, (f"--workdir=runs/{i}", value), pathlib.Path(f"runs/{i}")) for i in (1, 2)]
  experiment, titles = xm_mock.MockExperiment(), []
  package = xm.binary(xm_mock.MockExecutor.Spec(), sys.executable, args=["-m", "alma_jax.main"])
  module.launch(lambda title: titles.append(title) or experiment, "t7", units, package, xm_mock.MockExecutor())
  jobs = experiment.launched_jobs
  assert titles == ["t7"] and [job.name for job in jobs] == ["1", "2"] and experiment.work_unit_count == 2
  assert [job.args.to_list(str) for job in jobs] == [[f"--workdir=runs/{i}", value] for i in (1, 2)]


@pytest.mark.skipif(importlib.util.find_spec("xmanager") is not None, reason="XManager is here")
def test_xm_without_xmanager_is_one_line(project):
  line = [sys.executable, ROOT / "launch" / "xm.py", "--config=sweep_file.py", "--workdir=runs", "--backend=slurm"]
  done = run(*line, cwd=project)
  assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
  assert "error: --backend=slurm needs the package xmanager-slurm" in done.stderr


def test_the_table_reads_columns_that_evaluations_write():
  from alma_jax.report import graded
  from alma_jax.stages.evaluation import in_columns
  from alma_jax.store.statistics import Mean

  row = in_columns("truth", Mean(1.0, 0.5, 4), "an identity")
  assert graded.judges([row]) == ["truth"] and {"truth", "truth_ci95"} <= set(row)
