#!/usr/bin/env bash
# An experiment of launch/mmlu on every worker of a Cloud TPU slice, over `gcloud`; arguments go to atlas.
#   TPU=my-slice ZONE=us-central2-b DATA_DIR=/data SIZE=xl launch/tpu/run.sh full --seed 7
#   TPU=my-slice ZONE=us-central2-b launch/tpu/run.sh stop     Ctrl-C ends gcloud, not the workers: this saves and ends them
# Each worker has this repository in REPOSITORY (default atlas_jax, below its home), perhaps with a .venv in it, and sees the
# same DATA_DIR. The workers find each other by Google's metadata. DRY_RUN=1 prints the commands.
set -euo pipefail

: "${TPU:?set TPU: the name of the slice}" "${ZONE:?set ZONE: where the slice is}"
experiment=${1:?usage: TPU=... ZONE=... DATA_DIR=... launch/tpu/run.sh zeroshot|5-shot|5-shot-multitask|full|stop [FLAGS]}
shift

on() { # WORKER COMMAND
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
run() { # SETTINGS... : with these besides
  printf '%q ' cd "${REPOSITORY:-atlas_jax}"
  # shellcheck disable=SC2016 # for the worker's shell
  printf '&& PATH=$PWD/.venv/bin:$PATH %s ' env
  printf '%q ' "$@" "${settings[@]}" "launch/mmlu/$experiment.sh" "${flags[@]}"
}
flags=("$@")
on all "$(run SCORES=true)" # trains, and prints no table
on 0 "$(run ATLAS=true)"    # prints the table, and does not train
