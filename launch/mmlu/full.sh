#!/usr/bin/env bash
# Full MMLU: one model, trained on all of MMLU's auxiliary questions. Settings: common.sh.
# Scored are the test predictions of the step that is best on the validation questions.
#   DATA_DIR=/data SIZE=base launch/mmlu/full.sh
# shellcheck source=launch/mmlu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FILES=$MMLU/full
NAME=$SIZE-mmlu-full
run_atlas train --preset mmlu-full "${FLAGS[@]}" --name "$NAME" --train_data "$FILES/train.jsonl" \
  --eval_data "$FILES/combined_valid.jsonl" "$FILES/combined_test.jsonl" \
  --save_freq 100 --keep 1 "$@"
run_scores --predictions_path "$SAVE_DIR/$NAME" --step best --gold_path "$FILES/combined_test.jsonl"
