#!/usr/bin/env bash
# Train on one GPU, as the model zoo's script: bash scripts/run_standalone_train_for_gpu.sh DEVICE_ID DATA_PATH [CHECKPOINT] [--KEY=VALUE ...]
DEVICE_TARGET=GPU exec bash "$(dirname "${BASH_SOURCE[0]}")/run_standalone_train.sh" "$@"
