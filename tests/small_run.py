"""A small ALMA run as a user starts it: a command in a process of its own, on data files in the usual format."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
SMALL = (
  "feedback_rounds=2",
  "prompts.draws=192",
  "clusters.k=24",
  "draw.prompts=6",
  "responses.n=6",
  "judge.distil.prompts=24",
  "sft.epochs=2.0",
  "policy.epochs=2.0",
  "policy.checkpoint_every=4",
  "judge.train.epochs=1.0",
)


def write_data(directory, evaluated=24):
  """Seed data of the miniature world as ordinary JSONL files; returns the config values that name them."""
  from alma_jax.mini import seeds

  seeds.make(directory, 0)
  lines = {name: (directory / f"{name}.jsonl").read_text().splitlines(keepends=True) for name in ("judge", "eval")}
  (directory / "judge.jsonl").write_text("".join(lines["judge"][:256]))
  (directory / "eval.jsonl").write_text("".join(lines["eval"][::24][:evaluated]))
  return [f"data.{name}={directory / name}.jsonl" for name in ("sft", "judge", "eval")]


def command(workdir, *values):
  flags = [f"--config.{value}" for value in (*SMALL, *values)]
  return [
    sys.executable, "-m", "alma_jax.main", "--config=configs/alma.py:mini", f"--workdir={workdir}", *flags,
  ]  # fmt: skip


def environment(**more):
  return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"} | more


# LLVM optimises nothing. Until jaxlib 0.11, which does not know the flag and stops at it, the older emitters of fused
# loops compile in two thirds of the newer ones' time.
QUICKLY = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
  QUICKLY.append("--xla_cpu_use_fusion_emitters=false")


def users_flags():
  """The XLA_FLAGS that the tests were started with."""
  return [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in QUICKLY]


def compiled_quickly():
  """XLA_FLAGS with which programs compile in half the time, and run slower."""
  return " ".join([*users_flags(), *QUICKLY])


def optimised():
  """The environment without the flags that let tests compile quickly."""
  env = environment(XLA_FLAGS=" ".join(users_flags()))
  return env if env["XLA_FLAGS"] else {name: value for name, value in env.items() if name != "XLA_FLAGS"}


def start(workdir, *values, **env):
  """The finished process; its output is in .stdout."""
  return subprocess.run(
    command(workdir, *values), cwd=ROOT, env=environment(**env), text=True, timeout=400,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip


def finished(workdir, *values, **env):
  done = start(workdir, *values, **env)
  assert done.returncode == 0, done.stdout[-4000:]
  return done


def artefacts(workdir, leave_out=()):
  """name -> digest of every record shard, array and weight file, and the contents that the manifests vouch for."""
  found = {}
  for path in sorted(pathlib.Path(workdir).rglob("*")):
    name = str(path.relative_to(workdir))
    if any(part in name for part in leave_out):
      continue
    if path.suffix in (".parquet", ".npy", ".safetensors"):
      found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    elif path.name == "manifest.json":
      found[name] = json.loads(path.read_text())["content"]
  return found
