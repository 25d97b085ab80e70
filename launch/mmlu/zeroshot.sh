#!/usr/bin/env bash
# Zero-shot MMLU: evaluates the published weights without training. Settings: common.sh.
#   DATA_DIR=/data SIZE=base launch/mmlu/zeroshot.sh
# shellcheck source=launch/mmlu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FILES=$MMLU/5-shot-multitask
NAME=$SIZE-mmlu-zeroshot
run_atlas evaluate --preset mmlu-zeroshot "${FLAGS[@]}" --name "$NAME" \
  --eval_data "$FILES/combined_valid.jsonl" "$FILES/combined_test.jsonl" "$@"
run_scores --predictions_path "$SAVE_DIR/$NAME/combined_test-step-1.jsonl" --gold_path "$FILES/combined_test.jsonl"
