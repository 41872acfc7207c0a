#!/usr/bin/env bash
# One job of Slurm, with one process for each GPU; launch/slurm.py submits it.
#   sbatch [options] launch/slurm.sh --config=configs/X.py --workdir=/shared/run
# Ten minutes before the time is up, and when the job is preempted, the run saves its
# state and the job goes back to the queue. It goes on where it stopped.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
set -uo pipefail

readonly PREEMPTED=75

# Local ranks are found out by jax from Slurm's own variables.
srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m sora_jax.main --distributed \
  --preempted_code="$PREEMPTED" "$@" &
step=$!
trap 'kill -TERM "$step"' USR1 TERM

# `wait` returns early when a signal comes.
while true; do
  wait "$step"
  code=$?
  kill -0 "$step" 2>/dev/null || break
done
if [[ "$code" == "$PREEMPTED" ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
