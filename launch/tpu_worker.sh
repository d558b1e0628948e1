#!/usr/bin/env bash
# On one worker of a TPU slice: runs a program apart from the connection that started it, and keeps
# its log and status. For tpu_vm.sh, which calls it in the project's folder on every worker.
#
#   tpu_worker.sh start train|prepare OPTIONS... | status | log | stop
set -euo pipefail
# In memory: a worker that was restarted has neither a process nor a status.
kept=${DOPSD_STATE:-/dev/shm/dopsd-$(id -u)}
LOG=${LOG:-$HOME/dopsd.log}
mkdir -p "$kept"

running() {
  [[ -f $kept/pid ]] && kill -0 "$(<"$kept/pid")" 2>/dev/null
}

upload() { # the log, beside the run
  "$PYTHON" - "$LOG" "${WORKDIR%/}/logs/$(hostname).log" <<'PY' || echo "the log was not copied" >&2
import sys
from etils import epath
source, target = map(epath.Path, sys.argv[1:])
target.parent.mkdir(parents=True, exist_ok=True)
source.copy(target, overwrite=True)
PY
}

case ${1:?say start, status, log or stop} in
start)
  shift
  if running; then
    echo "a program runs here already; stop it first" >&2
    exit 1
  fi
  rm -f "$kept/status"
  setsid nohup "$0" _run "$@" >>"$LOG" 2>&1 </dev/null &
  echo $! >"$kept/pid"
  ;;
_run)
  PYTHON=${PYTHON:-.venv/bin/python}
  : "${WORKDIR:?set WORKDIR}"
  program=$2
  shift 2
  "$PYTHON" -m "dopsd_jax.$program" "$@" &
  child=$!
  trap 'signalled=yes; kill -TERM "$child" 2>/dev/null || true' TERM
  while sleep "${UPLOAD_SECONDS:-60}"; do upload; done &
  uploader=$!
  while true; do
    signalled='' status=0
    wait "$child" || status=$?
    # A wait that a signal ended says 143, even where the process has ended by now.
    [[ -n $signalled ]] || break
  done
  kill "$uploader" 2>/dev/null || true
  echo "ended with status $status"
  upload
  echo "$status" >"$kept/status"
  ;;
status)
  if running; then
    echo "worker: running"
  elif [[ -f $kept/status ]]; then
    echo "worker: $(<"$kept/status")"
  else
    echo "worker: lost"
  fi
  ;;
log) tail -n "${2:-20}" "$LOG" ;;
stop) # the program saves, then ends
  if running; then kill -TERM "$(<"$kept/pid")"; fi
  ;;
*)
  echo "$1: say start, status, log or stop" >&2
  exit 2
  ;;
esac
