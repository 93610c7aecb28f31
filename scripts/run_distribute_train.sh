#!/usr/bin/env bash
# Train on several devices of one machine: bash scripts/run_distribute_train.sh DEVICE_NUM DATA_PATH [DEVICE_TARGET] [--KEY=VALUE ...]
set -euo pipefail
usage="usage: bash scripts/run_distribute_train.sh DEVICE_NUM DATA_PATH [CPU|GPU|Ascend] [--KEY=VALUE ...]"
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { echo "error: DEVICE_NUM must be a number of ranks, got '${1:-}'; $usage" >&2; exit 2; }
[ $# -ge 2 ] && [[ $2 != -* ]] || { echo "error: no DATA_PATH; $usage" >&2; exit 2; }
ranks=$1; data=$2; shift 2
target=CPU; [ $# -ge 1 ] && [[ $1 != -* ]] && { target=$1; shift; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -f "$root/.venv/bin/activate" ]; then source "$root/.venv/bin/activate"; fi
exec python3 "$root/scripts/launch.py" --nproc_per_node="$ranks" "$root/train.py" --run_distribute=1 --device_target="$target" --data_path="$data" "$@"
