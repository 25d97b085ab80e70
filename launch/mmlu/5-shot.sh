#!/usr/bin/env bash
# 5-shot MMLU: one model for each of the 57 domains, trained on five questions of the domain. Settings: common.sh.
#   DATA_DIR=/data SIZE=base launch/mmlu/5-shot.sh                  all domains, one after the other, and the score table
#   DATA_DIR=/data SIZE=base DOMAIN=anatomy launch/mmlu/5-shot.sh   one domain
# In a SLURM array, each task trains the domain of its index, 0 to 56, and the task that finishes last prints the table. A
# domain whose predictions exist is not trained again.
# Checkpoints of finished domains are deleted, as each is as large as the initial model; --keep 1 keeps the last one.
# shellcheck source=launch/mmlu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FILES=$MMLU/5-shot
STEPS=16 # of the preset; the last one is scored
RUNS=$SAVE_DIR/$SIZE-mmlu-5-shot
TRAIN=$FILES/individual_train
mapfile -t DOMAINS < <(cd "$TRAIN" 2>/dev/null && printf '%s\n' *.jsonl | sed -n 's/\.5-shot-train\.jsonl$//p' | LC_ALL=C sort)
if [ ${#DOMAINS[@]} = 0 ]; then
  echo "$TRAIN: no domains there; python preprocessing/prepare_mmlu.py --output_directory $DATA_DIR makes them" >&2
  exit 2
fi
TASK=${SLURM_ARRAY_TASK_ID:-0}
if [ "$TASK" -ge ${#DOMAINS[@]} ]; then
  echo "SLURM_ARRAY_TASK_ID $TASK: $TRAIN has ${#DOMAINS[@]} domains; submit with --array=0-$((${#DOMAINS[@]} - 1))" >&2
  exit 2
fi
CHOSEN=("${DOMAINS[@]}")
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || CHOSEN=("${DOMAINS[TASK]}")
[ -z "${DOMAIN:-}" ] || CHOSEN=("$DOMAIN")

for domain in "${CHOSEN[@]}"; do
  if [ -e "$RUNS/$domain/$domain.test-step-$STEPS.jsonl" ]; then
    echo "$domain: has its predictions"
    continue
  fi
  run_atlas train --preset mmlu-5-shot "${FLAGS[@]}" --checkpoint_dir "$RUNS" --name "$domain" \
    --train_data "$TRAIN/$domain.5-shot-train.jsonl" \
    --eval_data "$FILES/individual_valid/$domain.val.jsonl" "$FILES/individual_test/$domain.test.jsonl" \
    --save_freq 100 --keep 0 "$@"
done

shopt -s nullglob
predictions=("$RUNS"/*/*.test-step-"$STEPS".jsonl)
if [ -z "${DOMAIN:-}" ] && [ ${#predictions[@]} = ${#DOMAINS[@]} ]; then
  run_scores --predictions_path "$RUNS" --gold_path "$MMLU/5-shot-multitask/combined_test.jsonl" --step $STEPS --split test
fi
