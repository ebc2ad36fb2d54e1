#!/usr/bin/env bash
# One run over several processes of this machine: to try out what a cluster does, or to give each GPU its own process.
#
#   launch/local.sh [-n PROCESSES] [--dry-run] ARGUMENTS OF alma_jax.main
#   JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 launch/local.sh --config=configs/alma.py:mini --workdir=runs/two
#   launch/local.sh -n 8 --config=configs/alma.py:8b --workdir=runs/alma_8b ...
#
# Two processes if nothing is said. The GPUs in CUDA_VISIBLE_DEVICES (all if it is not set) are split evenly between
# them; on CPUs JAX_NUM_CPU_DEVICES is the number of devices of each. One process can drive all GPUs of a machine, so
# for a single machine `python -m alma_jax.main` without this script is the usual way.
# Lines of process 1, 2, ... begin with [1], [2], ... When one process fails, the others are stopped and its status is
# this script's. Starting it again goes on with the run. Change: nothing; PYTHON is the interpreter.
# The flags of a run itself: python -m alma_jax.main --help
set -euo pipefail

processes=2 dry_run=
while [[ $# -gt 0 ]]; do
  case $1 in
    -n) processes=${2:?"-n needs a number"}; shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) break ;;
  esac
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "error: -n $processes: expected a number of processes" >&2; exit 2; }
python=${PYTHON:-python}

gpus=()
if [[ ${JAX_PLATFORMS:-} != cpu ]]; then
  found=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}
  IFS=, read -ra gpus <<<"$found"
  if ((${#gpus[@]} % processes)); then
    echo "error: ${#gpus[@]} GPUs ($found) cannot be split evenly between $processes processes" >&2
    exit 2
  fi
fi
share=$((${#gpus[@]} / processes))

port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$processes

pids=()
# shellcheck disable=SC2317
stop() {
  ((${#pids[@]})) || return 0
  kill "${pids[@]}" 2>/dev/null || true
  for _ in {1..50}; do
    kill -0 "${pids[@]}" 2>/dev/null || return 0  # fails when none is left
    sleep 0.2
  done
  kill -9 "${pids[@]}" 2>/dev/null || true
}
trap 'stop; exit 130' INT TERM

for ((i = 0; i < processes; i++)); do
  environment=(JAX_PROCESS_ID="$i")
  if ((share)); then
    environment+=(CUDA_VISIBLE_DEVICES="$(IFS=,; echo "${gpus[*]:i*share:share}")")
  fi
  if [[ $dry_run ]]; then
    echo "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$processes ${environment[*]}" \
      "$python -m alma_jax.main$(printf ' %q' "$@")"
  elif ((i == 0)); then
    env "${environment[@]}" "$python" -m alma_jax.main "$@" &
    pids+=($!)
  else
    env "${environment[@]}" "$python" -m alma_jax.main "$@" > >(sed -u "s/^/[$i] /") 2>&1 &
    pids+=($!)
  fi
done

status=0
while ((${#pids[@]})) && ((status == 0)); do
  sleep 0.2
  alive=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then alive+=("$pid"); else wait "$pid" || status=$?; fi
  done
  pids=(${alive[@]+"${alive[@]}"})
done
if ((status)); then
  echo "error: a process ended with status $status; stopping the others" >&2
  stop
fi
exit "$status"
