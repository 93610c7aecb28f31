#!/usr/bin/env bash
# Train on one device, as the model zoo's script or in our order:
#   bash scripts/run_standalone_train.sh DEVICE_ID DATA_PATH [CHECKPOINT] [--KEY=VALUE ...]
#   bash scripts/run_standalone_train.sh DATA_PATH [CPU|GPU|Ascend] [DEVICE_ID] [--KEY=VALUE ...]
set -euo pipefail
usage="usage: bash scripts/$(basename "$0") [DEVICE_ID] DATA_PATH [CHECKPOINT] [CPU|GPU|Ascend] [DEVICE_ID] [--KEY=VALUE ...]"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_apart "$@"
[ -z "$table" ] || fail "'$table' is no folder of images"
words=(--run_distribute=0 "--device_target=${target:-${DEVICE_TARGET:-CPU}}" "--device_id=${number:-0}" "--data_path=$data")
if is_zoo_order "$@"; then words+=(--output_path=./output); fi
if [ -n "$checkpoint" ]; then words+=("--checkpoint_file_path=$checkpoint"); fi
exec python3 "$root/train.py" "${words[@]}" ${flags[@]+"${flags[@]}"}
