#!/usr/bin/env bash
# Runs an experiment of launch/mmlu on every worker of a Cloud TPU slice through `gcloud`; arguments are passed on to atlas.
#   TPU=my-slice ZONE=us-central2-b DATA_DIR=/data SIZE=xl launch/tpu/run.sh full --seed 7
#   TPU=my-slice ZONE=us-central2-b launch/tpu/run.sh stop     makes the workers save and exit (Ctrl-C only ends gcloud)
# Each worker must have this repository in REPOSITORY (default: atlas_jax in its home folder), optionally with a .venv, and the
# same DATA_DIR. The workers find each other through Google's metadata server. DRY_RUN=1 prints the commands.
set -euo pipefail

: "${TPU:?set TPU: the name of the slice}" "${ZONE:?set ZONE: where the slice is}"
experiment=${1:?usage: TPU=... ZONE=... DATA_DIR=... launch/tpu/run.sh zeroshot|5-shot|5-shot-multitask|full|stop [FLAGS]}
shift

on() { # WORKER COMMAND: runs the command on a worker, or on all
  ${DRY_RUN:+printf '%q '} gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
  ${DRY_RUN:+echo}
}

if [ "$experiment" = stop ]; then
  on all "pkill -TERM -x atlas"
  exit
fi
settings=()
for name in DATA_DIR SIZE PRECISION SAVE_DIR READER RETRIEVER DOMAIN; do
  [ -z "${!name:-}" ] || settings+=("$name=${!name}")
done
run() { # SETTINGS...: prints the worker's command line, with these settings added to its environment
  local folder=${REPOSITORY:-atlas_jax}
  printf '%q ' cd "${folder#\~/}" # ssh starts in the home folder
  # shellcheck disable=SC2016 # the worker's shell is to expand it
  printf '&& PATH=$PWD/.venv/bin:$PATH %s ' env
  printf '%q ' "$@" "${settings[@]}" "launch/mmlu/$experiment.sh" "${flags[@]}"
}
flags=("$@")
on all "$(run SCORES=true)" # trains or evaluates, without the score table
on 0 "$(run ATLAS=true)"    # prints only the score table
