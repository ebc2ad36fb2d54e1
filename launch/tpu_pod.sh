#!/usr/bin/env bash
# One run over all hosts of a Cloud TPU slice, driven from your own machine with gcloud.
#
#   export TPU=my-slice ZONE=us-east5-a                       the slice, made with gcloud or by `keep`
#   launch/tpu_pod.sh [--dry-run] setup                       copies this checkout to every host and installs it
#   launch/tpu_pod.sh [--dry-run] run --config=configs/alma.py:8b --workdir=/mnt/share/alma_8b ...
#   launch/tpu_pod.sh [--dry-run] stop                        ends the run on every host
#
#   export TYPE=v6e-16 RUNTIME=v2-alpha-tpuv6e                one command from nothing to a finished run, on spot slices:
#   launch/tpu_pod.sh [--dry-run] keep --config=... --workdir=...
#
# `keep` asks for the slice as a queued resource, waits for it, sets it up and runs. When the slice is taken away, it asks
# for the next one, where the run goes on where it stopped; when the run itself fails, so does `keep`. It ends with the
# run and leaves the slice (`gcloud compute tpus queued-resources delete`).
#
# Change: TPU and ZONE (and PROJECT, if gcloud has no default); SPOT="" for slices that are not taken away; MOUNT, a shell
# line that mounts the shared file system in `setup`; VENV and CODE if you want them elsewhere on the hosts, and WORKERS=0
# to look at one host alone. The hosts must share the run directory: mount a Filestore instance, or another network file
# system, at the same place on each (a bucket does not do). `run` lasts as long as the run; start it inside tmux, or again
# after a broken connection: the run goes on where it stopped. --dry-run prints the gcloud commands.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"
VENV=${VENV:-alma_venv} CODE=${CODE:-alma_jax_code} MOUNT=${MOUNT:-true} SPOT=${SPOT---spot} WAIT=${WAIT:-60}
where=("--zone=$ZONE" "--worker=${WORKERS:-all}" ${PROJECT:+"--project=$PROJECT"})

gcloud_do() {
  if [[ $dry_run ]]; then
    printf '%q ' gcloud compute tpus "$@"
    echo
  else
    gcloud compute tpus "$@"
  fi
}
gcloud_tpu() { gcloud_do tpu-vm "$@"; }
queued() { gcloud_do queued-resources "$1" "$TPU" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} "${@:2}"; }
create() {
  queued create "--node-id=$TPU" "--accelerator-type=${TYPE:?set TYPE, such as v6e-16}" \
    "--runtime-version=${RUNTIME:?set RUNTIME, such as v2-alpha-tpuv6e}" ${SPOT:+"$SPOT"}
}

case ${1:-} in
  setup)
    root=$(cd "$(dirname "$0")/.." && pwd)
    bundle=$(mktemp -d)
    trap 'rm -rf "$bundle"' EXIT
    if [[ ! $dry_run ]]; then
      git -C "$root" ls-files -z --cached --others --exclude-standard | tar -C "$root" -czf "$bundle/code.tgz" --null -T -
    fi
    gcloud_tpu scp "$bundle/code.tgz" "$TPU:alma_jax_code.tgz" "${where[@]}"
    gcloud_tpu ssh "$TPU" "${where[@]}" --command="set -e; $MOUNT; mkdir -p $CODE; tar -xzf alma_jax_code.tgz -C $CODE
test -d $VENV || python3 -m venv $VENV; $VENV/bin/pip install --quiet -e '$CODE[tpu]'
$VENV/bin/python -c 'import jax; print(jax.__version__)'"
    ;;
  run)
    shift
    # Every host asks its own metadata who the others are; the first of them is the coordinator.
    gcloud_tpu ssh "$TPU" "${where[@]}" --command="set -e; cd $CODE
attribute() { curl -sSf -H Metadata-Flavor:Google http://metadata.google.internal/computeMetadata/v1/instance/attributes/\$1; }
endpoints=\$(attribute worker-network-endpoints)
IFS=, read -ra hosts <<<\"\$endpoints\"
if ((\${#hosts[@]} > 1)); then
  export JAX_COORDINATOR_ADDRESS=\${hosts[0]##*:}:8476 JAX_NUM_PROCESSES=\${#hosts[@]}
  JAX_PROCESS_ID=\$(attribute agent-worker-number); export JAX_PROCESS_ID
fi
echo \$\$ >~/alma_jax.pid
exec ~/$VENV/bin/python -m alma_jax.main$(printf ' %q' "$@")"
    ;;
  keep)
    shift
    if [[ $dry_run ]]; then
      create
      "$0" --dry-run setup
      "$0" --dry-run run "$@"
      exit
    fi
    while :; do
      state=$(queued describe --format="value(state.state)" 2>/dev/null || echo NONE)
      echo "$TPU: $state" >&2
      case $state in
        NONE) create ;;
        ACTIVE)
          status=0
          "$0" setup && "$0" run "$@" || status=$?
          ((status)) || exit 0
          sleep "$WAIT" # the state of a slice that was taken away changes a little later
          [[ $(queued describe --format="value(state.state)" 2>/dev/null) != ACTIVE ]] || exit "$status"
          ;;
        SUSPENDED | FAILED) queued delete --force --quiet ;;
        *) sleep "$WAIT" ;; # waiting, provisioning, suspending, deleting
      esac
    done
    ;;
  stop)
    gcloud_tpu ssh "$TPU" "${where[@]}" --command='kill $(cat ~/alma_jax.pid)'
    ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac
