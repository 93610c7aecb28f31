#!/usr/bin/env bash
# Check style, imports, types and the layout of C++: `bash scripts/lint.sh [--fix]`. The rules are in
# pyproject.toml and .clang-format.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh --lint
source .venv/bin/activate
cpp=(src/kernels/source/*.cpp src/kernels/source/*.h tests/kernels/*.cpp tests/gpu/*.c)
if [ "${1:-}" = --fix ]; then
    ruff format -q .
    clang-format -i "${cpp[@]}"
fi
ruff check "$@" .
ruff format --check .
clang-format --dry-run -Werror "${cpp[@]}"
mypy
