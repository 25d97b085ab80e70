#!/usr/bin/env bash
# 5-shot multitask MMLU: one model for all 57 domains, trained on five questions of each. Settings: common.sh.
# Scored are the test predictions of the step that is best on the validation questions.
#   DATA_DIR=/data SIZE=base launch/mmlu/5-shot-multitask.sh
# shellcheck source=launch/mmlu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FILES=$MMLU/5-shot-multitask
NAME=$SIZE-mmlu-5-shot-multitask
run_atlas train --preset mmlu-5-shot-multitask "${FLAGS[@]}" --name "$NAME" --train_data "$FILES/train.jsonl" \
  --eval_data "$FILES/combined_valid.jsonl" "$FILES/combined_test.jsonl" \
  --save_freq 100 --keep 1 "$@"
run_scores --predictions_path "$SAVE_DIR/$NAME" --step best --gold_path "$FILES/combined_test.jsonl"
