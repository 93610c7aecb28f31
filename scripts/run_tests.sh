#!/usr/bin/env bash
# Set up and run the test suite:
#
#   bash scripts/run_tests.sh [--fast | --extended] [--parity] [PYTEST ARGUMENTS]
#
# --fast leaves out the slow tests, --extended adds the longest. --parity installs PyTorch; without
# it, the tests that compare with PyTorch are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=(-m "not extended")
extras=(--test)
for argument in "$@"; do
    case $argument in
        --fast) arguments+=(-m "not slow and not extended") ;;
        --extended) arguments+=(-m "") ;;
        --parity) extras+=(--parity) ;;
        *) arguments+=("$argument") ;;
    esac
done
bash scripts/setup.sh "${extras[@]}"
source "${VENV:-.venv}/bin/activate"
# Two at a time: most tests wait for one core, while something compiles or starts. A later -n wins.
exec python3 -m pytest -n 2 --dist worksteal ${arguments[@]+"${arguments[@]}"}
