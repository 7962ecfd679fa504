#!/usr/bin/env bash
# Sets the project up in .venv and runs everything that must pass: ruff, mypy, pytest. Stops at the first failure.
# Arguments go to pytest; its summary is the last line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh

setup dev
echo "test: ruff check"
.venv/bin/ruff check
echo "test: ruff format --check"
.venv/bin/ruff format --check
echo "test: mypy"
.venv/bin/mypy
echo "test: pytest"
exec .venv/bin/python -m pytest "$@"
