#!/usr/bin/env bash
# Train on several devices of one machine, called like the model zoo's script, whose RANK_TABLE_FILE
# gives the number of devices, or in our order:
#   bash scripts/run_distribute_train.sh RANK_TABLE_FILE DATA_PATH [CHECKPOINT] [--KEY=VALUE ...]
#   bash scripts/run_distribute_train.sh DEVICE_NUM DATA_PATH [CPU|GPU|Ascend] [--KEY=VALUE ...]
set -euo pipefail
usage="usage: bash scripts/run_distribute_train.sh DEVICE_NUM|RANK_TABLE_FILE DATA_PATH [CHECKPOINT] [CPU|GPU|Ascend] [--KEY=VALUE ...]"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_apart "$@"
words=("--data_path=$data")
if [ -n "$table" ]; then
    number=$(grep -o '"device_id"' "$table" | wc -l) || fail "the rank table '$table' names no device_id"
    target=${target:-Ascend}
    words+=(--output_path=./output)
fi
[[ $number =~ ^[1-9] ]] || fail "DEVICE_NUM must be a number of ranks from 1, got '$number'"
if [ -n "$checkpoint" ]; then words+=("--checkpoint_file_path=$checkpoint"); fi
exec python3 "$root/scripts/launch.py" --nproc_per_node="$number" "$root/train.py" --run_distribute=1 "--device_target=${target:-CPU}" \
    "${words[@]}" ${flags[@]+"${flags[@]}"}
