#!/usr/bin/env bash
# Zero-shot MMLU: the published weights as they are. Settings: common.sh.
#   DATA_DIR=/data SIZE=base launch/mmlu/zeroshot.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FILES=$MMLU/5-shot-multitask
NAME=$SIZE-mmlu-zeroshot
$ATLAS evaluate "${MODEL_FLAGS[@]}" --name "$NAME" \
  --eval_data "$FILES/combined_valid.jsonl" "$FILES/combined_test.jsonl" "$@"
$SCORES --predictions_path "$SAVE_DIR/$NAME/combined_test-step-1.jsonl" --gold_path "$FILES/combined_test.jsonl"
