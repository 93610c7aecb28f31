#!/usr/bin/env bash
# Train on 8 GPUs of one machine, or RANK_SIZE, as the model zoo's script:
#   [RANK_SIZE=8] bash scripts/run_distribute_train_for_gpu.sh DATA_PATH [CHECKPOINT] [--KEY=VALUE ...]
set -euo pipefail
usage="usage: bash scripts/run_distribute_train_for_gpu.sh DATA_PATH [CHECKPOINT] [--KEY=VALUE ...]"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_apart "$@"
[ -z "$number$table$target" ] || fail "'${number:-${table:-$target}}' is no path; RANK_SIZE=N in front of the command is the number of ranks"
if [ -n "$checkpoint" ]; then flags=("--checkpoint_file_path=$checkpoint" ${flags[@]+"${flags[@]}"}); fi
exec bash "$root/scripts/run_distribute_train.sh" "${RANK_SIZE:-8}" "$data" GPU --output_path=./output ${flags[@]+"${flags[@]}"}
