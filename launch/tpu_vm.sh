#!/usr/bin/env bash
# A Cloud TPU slice, its machines driven with gcloud.
#
#   export PROJECT=... ZONE=us-east5-a NAME=dopsd ACCELERATOR=v5litepod-16 VERSION=v2-alpha-tpuv5-lite
#   export SOURCE=https://... CONFIG=configs/zimage.py WORKDIR=gs://bucket/runs/dog
#   launch/tpu_vm.sh create            a queued resource; SPOT=1 for spot capacity
#   launch/tpu_vm.sh install           this project and jax on every worker; REF: branch, tag, commit
#   launch/tpu_vm.sh run train --config.data.path=gs://bucket/features
#   launch/tpu_vm.sh keep train ...    create, install, run; again whenever the slice is taken away
#   launch/tpu_vm.sh status | logs | stop | delete
#
# The program does not depend on this connection: `run` waits for it, and may be stopped and given
# again. What the workers print is in WORKDIR/logs. To stop for good, end `keep` first. DRY_RUN=1
# prints the gcloud commands.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${PROJECT:?set PROJECT to the Google Cloud project}"
: "${ZONE:?set ZONE, such as us-east5-a}"
: "${NAME:?set NAME to what the slice is to be called}"
command=${1:?say create, install, run, keep, status, logs, stop or delete}
shift
place=("--project=$PROJECT" "--zone=$ZONE")
POLL=${POLL:-60} # seconds

gcloud_() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' gcloud "$@"
    echo
  else
    gcloud "$@"
  fi
}

workers() { # COMMAND: on all workers at once
  gcloud_ compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all "--command=$1"
}

create() {
  : "${ACCELERATOR:?set ACCELERATOR, such as v5litepod-16 or v6e-8}"
  : "${VERSION:?set VERSION to the runtime, such as v2-alpha-tpuv5-lite or v2-alpha-tpuv6e}"
  local spot=()
  [[ -z ${SPOT:-} ]] || spot=(--spot)
  gcloud_ compute tpus queued-resources create "$NAME" "${place[@]}" "--node-id=$NAME" \
    "--accelerator-type=$ACCELERATOR" "--runtime-version=$VERSION" ${spot[@]+"${spot[@]}"}
}

state() {
  gcloud_ compute tpus queued-resources describe "$NAME" "${place[@]}" \
    "--format=value(state.state)"
}

delete() {
  gcloud_ compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
}

install() { # with a Python of its own: that of the images is older than jax wants
  : "${SOURCE:?set SOURCE to the address of the git repository}"
  workers "set -e; test -d dopsd_jax || git clone --quiet $(printf %q "$SOURCE") dopsd_jax; \
cd dopsd_jax; git fetch --quiet origin $(printf %q "${REF:-HEAD}"); git checkout --quiet FETCH_HEAD; \
python3 -m pip install --quiet --user uv; export PATH=\$HOME/.local/bin:\$PATH; \
uv venv --quiet --allow-existing --python 3.12 .venv; \
uv pip install --quiet --python .venv/bin/python -e '.[tpu,gcs]'"
}

start() { # PROGRAM OPTIONS...
  # shellcheck source=launch/env.sh
  source "$here/env.sh"
  check_program "${1:-}"
  local name variables=() arguments
  for name in WORKDIR LIBTPU_INIT_ARGS JAX_COMPILATION_CACHE_DIR \
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS; do
    [[ -z ${!name:-} ]] || variables+=("$name=${!name}")
  done
  arguments=("$1" "--config=$CONFIG" "--workdir=$WORKDIR" --distributed=on "${@:2}")
  workers "cd dopsd_jax && env$(printf ' %q' "${variables[@]}") launch/tpu_worker.sh start\
$(printf ' %q' "${arguments[@]}")"
}

statuses() { # a word for each worker; fails where one cannot be reached
  local said
  said=$(workers "cd dopsd_jax && launch/tpu_worker.sh status" 2>/dev/null) || return 1
  sed -n 's/^worker: //p' <<<"$said"
}

# Waits for the end of the program and returns its status; 255: the slice is gone.
finish() {
  local now
  while true; do
    if now=$(statuses); then
      if [[ $now != *running* ]]; then
        break
      fi
    elif [[ $(state 2>/dev/null) != ACTIVE ]]; then
      echo "slice $NAME is gone" >&2
      return 255
    fi
    sleep "$POLL"
  done
  # A fault of the user counts most: it ended the other workers too.
  local status
  for status in 2 lost; do
    if grep -qx "$status" <<<"$now"; then
      [[ $status == lost ]] || return 2
      return 255
    fi
  done
  return "$(sort -n <<<"$now" | tail -n 1)"
}

run() {
  start "$@"
  [[ -n ${DRY_RUN:-} ]] || finish
}

wait_until_active() {
  local now
  while true; do
    now=$(state 2>/dev/null || echo NONE)
    echo "slice $NAME: $now"
    case $now in
    ACTIVE) return ;;
    NONE) create || true ;; # it may have a name that is still being deleted
    FAILED | SUSPENDED | SUSPENDING) delete || true ;;
    esac
    sleep "$POLL"
  done
}

keep() {
  # shellcheck source=launch/env.sh
  source "$here/env.sh"
  check_program "${1:-}"
  local status crashes=0
  while true; do
    wait_until_active
    status=0
    if [[ $(statuses || true) != *running* ]]; then # left by an earlier `keep`
      { install && start "$@"; } || status=1
    fi
    [[ $status -ne 0 ]] || finish || status=$?
    case $status in
    0) return 0 ;;
    "$FAULT_EXIT")
      echo "the run needs mending (status $status); not started again" >&2
      return "$status"
      ;;
    "$STOPPED_EXIT" | 255) ;; # saved, or the slice is gone
    *) crashes=$((crashes + 1)) ;;
    esac
    if ((crashes > RESTARTS)); then
      echo "ended with status $status for the ${crashes}th time; not started again" >&2
      return "$status"
    fi
    echo "ended with status $status; going on when the slice is there" >&2
    sleep "$POLL"
  done
}

case $command in
create | install | run | delete) "$command" "$@" ;;
keep)
  [[ -z ${DRY_RUN:-} ]] || { create && install && run "$@"; exit; }
  keep "$@"
  ;;
status) state && workers "cd dopsd_jax && launch/tpu_worker.sh status" ;;
logs) workers "cd dopsd_jax && launch/tpu_worker.sh log" ;;
stop) workers "cd dopsd_jax && launch/tpu_worker.sh stop" ;;
*)
  echo "$command: say create, install, run, keep, status, logs, stop or delete" >&2
  exit 2
  ;;
esac
