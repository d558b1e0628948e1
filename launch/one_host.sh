#!/usr/bin/env bash
# One machine with one or several GPUs.
#
#   CONFIG=configs/zimage.py WORKDIR=runs/dog launch/one_host.sh train --config.data.path=photos
#   CONFIG=... WORKDIR=... launch/one_host.sh prepare --out=features --config.data.path=photos
#
# One process drives all GPUs. With PROCESSES=n GPUS=m there are n, each with its share of m GPUs and
# a log of its own. DRY_RUN=1 prints the commands instead. launch/dopsd.service restarts it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
source "$here/env.sh"
check_program "${1:-}"
run=("${PYTHON:-python}" -m "dopsd_jax.$1" "--config=$CONFIG" "--workdir=$WORKDIR")
shift
count=${PROCESSES:-1}

if [[ $count -eq 1 ]]; then
  run+=(--distributed=off "$@")
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${run[@]}"
    echo
    exit
  fi
  exec "${run[@]}"
fi

: "${GPUS:?set GPUS to the number of GPUs, which PROCESSES divides}"
((GPUS % count == 0)) || { echo "PROCESSES=$count does not divide GPUS=$GPUS" >&2; exit "$FAULT_EXIT"; }
pids=()
# SIGTERM goes on to the processes, which save and end with $STOPPED_EXIT.
trap 'kill -TERM ${pids[@]+"${pids[@]}"} 2>/dev/null || true' TERM INT
each=$((GPUS / count))
for ((i = 0; i < count; i++)); do
  command=(env "CUDA_VISIBLE_DEVICES=$(seq -s, $((i * each)) $(((i + 1) * each - 1)))" "${run[@]}"
    --distributed=on "--coordinator=localhost:${PORT:-12345}"
    "--num_processes=$count" "--process_id=$i" "$@")
  log=$LOGS/process_$i.log
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    printf '> %q\n' "$log"
    continue
  fi
  mkdir -p "$LOGS"
  "${command[@]}" >>"$log" 2>&1 &
  pids+=($!)
done

# Waits for all. A fault of the user counts more than its effect on the other processes.
status=0
for pid in ${pids[@]+"${pids[@]}"}; do
  while true; do
    own=0
    wait "$pid" || own=$?
    kill -0 "$pid" 2>/dev/null || break # a signal ended the wait, not the process
  done
  if [[ $own -eq $FAULT_EXIT || $status -eq 0 ]]; then
    status=$own
  fi
done
if [[ $status -eq $STOPPED_EXIT ]]; then
  echo "stopped and saved; the same command goes on" >&2
elif [[ $status -ne 0 ]]; then
  echo "status $status; see $LOGS" >&2
fi
exit "$status"
