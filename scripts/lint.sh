#!/usr/bin/env bash
# Check style, imports and types: `bash scripts/lint.sh [--fix]`. The rules stand in pyproject.toml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh --lint
source .venv/bin/activate
ruff check "$@" .
mypy
