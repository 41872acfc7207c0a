#!/usr/bin/env bash
# One job of Slurm, with one process for each GPU; launch/slurm.py submits it.
#   sbatch [options] launch/slurm.sh --config=configs/X.py --workdir=/shared/run
# Ten minutes before the time is up, and when the job is preempted, the run saves its
# state and the job goes back to the queue. It goes on where it stopped.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
set -uo pipefail

requeue=
# $! is the step's process. Before it starts: a signal may come at any time.
trap 'requeue=yes; kill -TERM "${!-}"' USR1
trap 'kill -TERM "${!-}"' TERM
# Local ranks are found out by jax from Slurm's own variables.
srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m sora_jax.main --distributed \
  --preempted_code=75 "$@" &
step=$!

# `wait` returns early when a signal comes.
while true; do
  wait "$step"
  code=$?
  kill -0 "$step" 2>/dev/null || break
done
if [[ "$requeue" && "$code" != 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
