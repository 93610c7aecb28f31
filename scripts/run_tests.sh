#!/usr/bin/env bash
# Set up and run the test suite: `bash scripts/run_tests.sh [--fast] [--parity] [PYTEST ARGUMENTS]`.
# --fast leaves out the slow tests; --parity installs PyTorch, without which the tests that compare with it are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=()
extras=(--test)
for argument in "$@"; do
    case $argument in
        --fast) arguments+=(-m "not slow") ;;
        --parity) extras+=(--parity) ;;
        *) arguments+=("$argument") ;;
    esac
done
bash scripts/setup.sh "${extras[@]}"
source .venv/bin/activate
exec python3 -m pytest ${arguments[@]+"${arguments[@]}"}
