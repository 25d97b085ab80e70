#!/usr/bin/env bash
# Full MMLU: one model, trained on all of MMLU's auxiliary questions. Settings: common.sh.
#   DATA_DIR=/data SIZE=base launch/mmlu/full.sh
# shellcheck source=launch/mmlu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FILES=$MMLU/full
NAME=$SIZE-mmlu-full
STEPS=2000
run_atlas train "${MODEL_FLAGS[@]}" "${TRAIN_FLAGS[@]}" --name "$NAME" --train_data "$FILES/train.jsonl" \
  --eval_data "$FILES/combined_valid.jsonl" "$FILES/combined_test.jsonl" \
  --total_steps $STEPS --warmup_steps 50 --eval_freq 150 "$@"
run_scores --predictions_path "$SAVE_DIR/$NAME/combined_test-step-$STEPS.jsonl" --gold_path "$FILES/combined_test.jsonl"
