#!/usr/bin/env bash
# Runs the long tests that test.sh leaves out: kills, crowds, damage and growth; some ten minutes. They report their
# figures as they go. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh

setup dev
exec .venv/bin/python -m pytest tests/stress -m stress --log-cli-level=INFO "$@"
