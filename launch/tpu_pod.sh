#!/usr/bin/env bash
# One run over all hosts of a Cloud TPU slice, driven from your own machine with gcloud.
#
#   export TPU=my-slice ZONE=us-east5-a                       the slice, made with gcloud or a queued resource
#   launch/tpu_pod.sh [--dry-run] setup                       copies this checkout to every host and installs it
#   launch/tpu_pod.sh [--dry-run] run --config=configs/alma.py:8b --workdir=/mnt/share/alma_8b ...
#   launch/tpu_pod.sh [--dry-run] stop                        ends the run on every host
#
# Change: TPU and ZONE (and PROJECT, if gcloud has no default); VENV and CODE if you want them elsewhere on the hosts,
# and WORKERS=0 to look at one host alone. The hosts must share the run directory: mount a Filestore instance, or
# another network file system, at the same place on each. `run` lasts as long as the run; start it inside tmux, or again
# after a broken connection: the run goes on where it stopped. --dry-run prints the gcloud command.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"
VENV=${VENV:-alma_venv} CODE=${CODE:-alma_jax_code}
where=("--zone=$ZONE" "--worker=${WORKERS:-all}" ${PROJECT:+"--project=$PROJECT"})

gcloud_tpu() {
  if [[ $dry_run ]]; then
    printf '%q ' gcloud compute tpus tpu-vm "$@"
    echo
  else
    gcloud compute tpus tpu-vm "$@"
  fi
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
    gcloud_tpu ssh "$TPU" "${where[@]}" --command="set -e; mkdir -p $CODE; tar -xzf alma_jax_code.tgz -C $CODE
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
  stop)
    gcloud_tpu ssh "$TPU" "${where[@]}" --command='kill $(cat ~/alma_jax.pid)'
    ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac
