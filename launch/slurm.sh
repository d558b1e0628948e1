#!/usr/bin/env bash
# Slurm: one process a node, which drives all GPUs of the node.
#
#   CONFIG=configs/zimage.py WORKDIR=/shared/runs/dog \
#     sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh train --config.data.path=/shared/features
#
# To be given in the project's folder. Before its time is over, or when it is preempted, the run
# saves, ends with status 75 and is queued again; after a crash too, at most RESTARTS times.
#SBATCH --job-name=dopsd
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=dopsd_%j.log
set -euo pipefail
: "${SLURM_JOB_ID:?to be started with sbatch}"
: "${SLURM_GPUS_ON_NODE:?to be given GPUs, such as sbatch --gpus-per-node=8}"
here=${LAUNCH:-$SLURM_SUBMIT_DIR/launch} # Slurm runs a copy of this file from elsewhere
# shellcheck source=launch/env.sh
source "$here/env.sh"
check_program "${1:-}"
program=$1
shift
# Under Slurm jax takes one GPU for each process unless it is told otherwise.
export JAX_LOCAL_DEVICE_IDS="${JAX_LOCAL_DEVICE_IDS:-$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))}"
# Each process leaves its status in a file: where one ends with a fault of the user, jax may abort
# the others, and srun tells the highest status alone.
STATUSES=$LOGS/statuses_$SLURM_JOB_ID
export STATUSES
# shellcheck disable=SC2016
keep='trap : TERM; "$@" || status=$?; echo "${status:-0}" >"$STATUSES/$SLURM_PROCID"; exit "${status:-0}"'
# Where the others are comes from Slurm's own variables. A process that ends first must not end the
# others, which may still be saving; those that wait for one that died are ended by jax.
step=(srun --kill-on-bad-exit=0 "--output=$LOGS/%j_%t.log" --open-mode=append bash -c "$keep" bash
  "${PYTHON:-python}" -m "dopsd_jax.$program" "--config=$CONFIG" "--workdir=$WORKDIR"
  --distributed=on "$@")
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${step[@]}"
  echo
  exit
fi
mkdir -p "$LOGS"
rm -rf "$STATUSES"
mkdir "$STATUSES"
trap : TERM # what ends the processes must not end this script before them
status=0
"${step[@]}" || status=$?
if grep -qsx "$FAULT_EXIT" "$STATUSES"/*; then
  status=$FAULT_EXIT
fi
rm -rf "$STATUSES"
# Slurm's own count has preemptions and lost nodes in it, for which there is no limit.
crashes=$LOGS/crashes_$SLURM_JOB_ID
case $status in
0 | "$FAULT_EXIT") ;;
"$STOPPED_EXIT") scontrol requeue "$SLURM_JOB_ID" ;;
*)
  echo "status $status" >>"$crashes"
  if (($(wc -l <"$crashes") <= RESTARTS)); then
    echo "status $status, a crash: queued again; see $LOGS" >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
  ;;
esac
exit "$status"
