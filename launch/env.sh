# Read by the other scripts: what every way of launching has in common.
# shellcheck shell=bash

: "${WORKDIR:?set WORKDIR to the folder of the run, on storage that every machine sees}"
: "${CONFIG:?set CONFIG to the configuration, such as configs/zimage.py}"

# Compiled programs are kept beside the run: a restart does not compile again.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${WORKDIR%/}/jax_cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-2}"

# What the processes print: beside the run, or in this folder where the run is in an object store.
case $WORKDIR in
*://*) LOGS=${LOGS:-logs/$(basename "$WORKDIR")} ;;
*) LOGS=${LOGS:-${WORKDIR%/}/logs} ;;
esac
export LOGS

# Statuses of the programs; docs/running.md has all of them.
export STOPPED_EXIT=75 # saved after SIGTERM; the same command goes on
export FAULT_EXIT=2    # something that the user must correct; starting again does not help
export RESTARTS="${RESTARTS:-20}" # after crashes; after STOPPED_EXIT there is no limit

check_program() {
  case ${1:-} in
  train | prepare) ;;
  *)
    echo "${1:-nothing}: say train or prepare, then its options" >&2
    exit "$FAULT_EXIT"
    ;;
  esac
}
