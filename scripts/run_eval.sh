#!/usr/bin/env bash
# Evaluate: bash scripts/run_eval.sh DATA_PATH CHECKPOINT_FILE_OR_FOLDER [DEVICE_TARGET] [DEVICE_ID] [--KEY=VALUE ...]
set -euo pipefail
usage="usage: bash scripts/run_eval.sh DATA_PATH CHECKPOINT_FILE_OR_FOLDER [CPU|GPU|Ascend] [DEVICE_ID] [--KEY=VALUE ...]"
[ $# -ge 2 ] && [[ $1 != -* && $2 != -* ]] || { echo "error: DATA_PATH and a checkpoint are needed; $usage" >&2; exit 2; }
data=$1; checkpoint=$2; shift 2
target=CPU; [ $# -ge 1 ] && [[ $1 != -* ]] && { target=$1; shift; }
id=0; [ $# -ge 1 ] && [[ $1 != -* ]] && { id=$1; shift; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -f "$root/.venv/bin/activate" ]; then source "$root/.venv/bin/activate"; fi
exec python3 "$root/eval.py" --device_target="$target" --device_id="$id" --data_path="$data" --checkpoint_file_path="$checkpoint" "$@"
