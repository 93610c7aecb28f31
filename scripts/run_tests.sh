#!/usr/bin/env bash
# Set up and run the test suite: `bash scripts/run_tests.sh [--fast] [PYTEST ARGUMENTS]`; --fast leaves out the slow tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=()
for argument in "$@"; do
    if [ "$argument" = --fast ]; then arguments+=(-m "not slow"); else arguments+=("$argument"); fi
done
bash scripts/setup.sh --test
source .venv/bin/activate
exec python3 -m pytest ${arguments[@]+"${arguments[@]}"}
