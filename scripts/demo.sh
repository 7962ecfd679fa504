#!/usr/bin/env bash
# Sets the project up in .venv and runs `lookonce demo`: with the model that LOOKONCE_MODEL names, or with the small one
# in the package, which knows drawn shapes and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh

setup
exec .venv/bin/lookonce demo "$@"
