# Settings and functions of the four MMLU experiments, which source this file. Set:
#   DATA_DIR   folder with models/atlas/$SIZE, indices/atlas/wiki/$SIZE and data/mmlu_data, as the published downloads make it
#   SIZE       base, large, xl or xxl (default xxl)
# Optional: PRECISION (fp32; default bf16), SAVE_DIR (folder for the runs), READER and RETRIEVER (folders with config.json and
# tokenizer, if the Hugging Face hub cannot be reached). The arguments of a script are passed on to atlas.
# ATLAS and SCORES are the commands that train or evaluate, and that print the score table, quoted as for a shell. DRY_RUN=1
# prints the commands.
set -euo pipefail

: "${DATA_DIR:?set DATA_DIR: the folder that holds models/, indices/ and data/}"
for name in DATA_DIR SAVE_DIR READER RETRIEVER; do # a shell leaves ~ alone in NAME="~/folder"
  [[ "${!name:-}" != \~/* ]] || printf -v "$name" %s "$HOME/${!name#*/}"
done
SIZE=${SIZE:-xxl}
SAVE_DIR=${SAVE_DIR:-$DATA_DIR/experiments}
MMLU=$DATA_DIR/data/mmlu_data
eval "ATLAS=(${ATLAS:-atlas})"
eval "SCORES=(${SCORES:-python $(printf %q "$(dirname "${BASH_SOURCE[0]}")/../../eval/evaluate_mmlu_predictions.py")})"

# Runs atlas; its exit status becomes that of the script. Signals are forwarded to atlas, so that it saves: in a container only
# the first process, which is this shell, gets them. Not with srun: SLURM itself signals the processes that srun has started,
# and srun kills them if it gets SIGTERM.
run_atlas() {
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${ATLAS[@]}" "$@"
    echo
    return
  fi
  if [ "${ATLAS[0]}" = srun ]; then
    trap : TERM USR1 # this shell must not end before srun
    "${ATLAS[@]}" "$@"
    return
  fi
  local atlas signal status again=1
  set -m # atlas has its own process group: Ctrl-C reaches it only once, forwarded by the trap below
  "${ATLAS[@]}" "$@" </dev/null &
  atlas=$!
  set +m
  for signal in INT TERM USR1 HUP; do
    # shellcheck disable=SC2064 # $signal is to be expanded now
    trap "again=1; kill -$signal $atlas 2>/dev/null || true" $signal
  done
  while [ -n "$again" ]; do # a signal interrupts `wait`
    again="" status=0
    wait "$atlas" || status=$?
  done
  trap - INT TERM USR1 HUP
  return "$status"
}

# Prints the score table; among the pods of a Kubernetes job only the first prints it.
run_scores() {
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${SCORES[@]}" "$@"
    echo
  elif [ "${JOB_COMPLETION_INDEX:-0}" = 0 ]; then
    "${SCORES[@]}" "$@"
  fi
}

# The flags of each experiment are its preset's (atlas_jax/commands/presets.py); these are what a preset leaves open
FLAGS=(
  --reader_model_type "${READER:-google/t5-$SIZE-lm-adapt}"
  --model_path "$DATA_DIR/models/atlas/$SIZE"
  --load_index_path "$DATA_DIR/indices/atlas/wiki/$SIZE"
  --checkpoint_dir "$SAVE_DIR"
)
[ -z "${RETRIEVER:-}" ] || FLAGS+=(--retriever_model_path "$RETRIEVER")
[ -z "${PRECISION:-}" ] || FLAGS+=(--precision "$PRECISION")
