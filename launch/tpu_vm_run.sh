#!/usr/bin/env bash
# On each worker of a TPU VM: the run, in the background, started again when it fails.
# Usage: tpu_vm_run.sh FOLDER RESTARTS ARGUMENTS...
set -uo pipefail

folder=$1
restarts=$2
shift 2
cd "$folder" || exit 1
if [[ -f run.pid ]] && kill -0 "$(cat run.pid)" 2>/dev/null; then
  echo "a run is under way here: process $(cat run.pid); stop it first" >&2
  exit 1
fi

run() {
  local child code attempt
  for ((attempt = 0; attempt <= restarts; attempt++)); do
    .venv/bin/python -m sora_jax.main --distributed --preempted_code=75 "$@" &
    child=$!
    # After a signal the run saves, and is not started again.
    trap 'restarts=-1; kill -TERM "$child"' TERM
    while true; do
      wait "$child"
      code=$?
      kill -0 "$child" 2>/dev/null || break
    done
    echo "attempt $attempt ended with code $code"
    [[ "$code" == 0 ]] && return
    # The others must have noticed before they all meet again.
    ((attempt < restarts)) && sleep 30
  done
}

run "$@" >>run.log 2>&1 </dev/null &
echo $! >run.pid
disown
