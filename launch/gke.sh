#!/usr/bin/env bash
# GKE: a JobSet, one pod for each machine of a TPU slice. Needs kubectl and a cluster with JobSet.
#
#   export NAME=dog IMAGE=... ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 HOSTS=4 CHIPS=4
#   export SERVICE_ACCOUNT=... CONFIG=configs/zimage.py WORKDIR=gs://bucket/runs/dog
#   launch/gke.sh render train --config.data.path=gs://bucket/features > dog.yaml
#   launch/gke.sh apply  train --config.data.path=gs://bucket/features
#   launch/gke.sh delete
#
# IMAGE is what launch/Dockerfile makes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
source "$here/env.sh"
command=${1:?say render, apply or delete}
shift
: "${NAME:?set NAME of the JobSet}"
[[ $NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || {
  echo "NAME=$NAME: must be lower-case letters, digits and dashes" >&2
  exit "$FAULT_EXIT"
}

render() { # PROGRAM OPTIONS...
  local text name argument list=""
  : "${IMAGE:?set IMAGE to the container image}"
  : "${ACCELERATOR:?set ACCELERATOR as GKE calls it, such as tpu-v5-lite-podslice}"
  : "${TOPOLOGY:?set TOPOLOGY of the slice, such as 4x4}"
  : "${HOSTS:?set HOSTS to the machines of the slice}"
  : "${CHIPS:?set CHIPS to the chips of a machine}"
  : "${SERVICE_ACCOUNT:?set SERVICE_ACCOUNT to one that may read and write WORKDIR}"
  check_program "${1:-}"
  local module=dopsd_jax.$1 LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:-}
  shift
  text=$(<"$here/jobset.yaml")
  # A JSON string is a YAML string, whatever is in it.
  quoted() {
    local value=${1//\\/\\\\}
    [[ $value != *[[:cntrl:]]* ]] || { echo "control character in ${1@Q}" >&2; exit 2; }
    printf '"%s"' "${value//\"/\\\"}"
  }
  for argument in "--config=$CONFIG" "--workdir=$WORKDIR" --distributed=on "$@"; do
    list+="${list:+, }$(quoted "$argument")"
  done
  for name in NAME IMAGE ACCELERATOR TOPOLOGY SERVICE_ACCOUNT LIBTPU_INIT_ARGS \
    JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS; do
    text=${text//"@$name@"/"$(quoted "${!name}")"}
  done
  text=${text//@MODULE@/$module}
  for name in HOSTS CHIPS; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || { echo "$name=${!name}: must be a number" >&2; exit 2; }
    text=${text//"@$name@"/"${!name}"}
  done
  printf '%s\n' "${text//"@ARGUMENTS@"/"[$list]"}"
}

case $command in
render) render "$@" ;;
apply) render "$@" | kubectl apply -f - ;;
delete) kubectl delete jobset "$NAME" ;;
*)
  echo "$command: say render, apply or delete" >&2
  exit 2
  ;;
esac
