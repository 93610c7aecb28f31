#!/usr/bin/env bash
# Evaluate, as the model zoo's script or in our order:
#   bash scripts/run_eval.sh DEVICE_ID DATA_PATH CHECKPOINT PLATFORM [--KEY=VALUE ...]
#   bash scripts/run_eval.sh DATA_PATH CHECKPOINT [CPU|GPU|Ascend] [DEVICE_ID] [--KEY=VALUE ...]
set -euo pipefail
usage="usage: bash scripts/run_eval.sh [DEVICE_ID] DATA_PATH CHECKPOINT_FILE_OR_FOLDER [CPU|GPU|Ascend] [DEVICE_ID] [--KEY=VALUE ...]"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_apart "$@"
[ -n "$checkpoint" ] || fail "no checkpoint"
exec python3 "$root/eval.py" "--device_target=${target:-CPU}" "--device_id=${number:-0}" "--data_path=$data" \
    "--checkpoint_file_path=$checkpoint" ${flags[@]+"${flags[@]}"}
