#!/usr/bin/env bash
# Sets the project up in .venv and runs `lookonce demo`: with the model that LOOKONCE_MODEL names, or with a tiny
# one of random weights, whose answers are nonsense but whose looks, files and times are real.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh

setup
if [ -z "${LOOKONCE_MODEL:-}" ]; then
    LOOKONCE_MODEL=build/tiny-model
    export LOOKONCE_MODEL
    unset LOOKONCE_MMPROJ
    .venv/bin/python scripts/make_model.py "$LOOKONCE_MODEL" >/dev/null
    echo "demo: a tiny model of random weights answers, so expect nonsense; LOOKONCE_MODEL=NAME takes a real one"
fi
exec .venv/bin/lookonce demo "$@"
