#!/usr/bin/env bash
# Train on one device: bash scripts/run_standalone_train.sh DATA_PATH [DEVICE_TARGET] [DEVICE_ID] [--KEY=VALUE ...]
set -euo pipefail
usage="usage: bash scripts/run_standalone_train.sh DATA_PATH [CPU|GPU|Ascend] [DEVICE_ID] [--KEY=VALUE ...]"
[ $# -ge 1 ] && [[ $1 != -* ]] || { echo "error: no DATA_PATH; $usage" >&2; exit 2; }
data=$1; shift
target=CPU; [ $# -ge 1 ] && [[ $1 != -* ]] && { target=$1; shift; }
id=0; [ $# -ge 1 ] && [[ $1 != -* ]] && { id=$1; shift; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -f "$root/.venv/bin/activate" ]; then source "$root/.venv/bin/activate"; fi
exec python3 "$root/train.py" --run_distribute=0 --device_target="$target" --device_id="$id" --data_path="$data" "$@"
