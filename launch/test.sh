#!/usr/bin/env bash
# Sets up .venv and runs the test suite. Arguments go to pytest: bash launch/test.sh --slow tests/flow
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup_env.sh requirements-dev.txt
export JAX_PLATFORMS=cpu
exec python -m pytest -n "${TEST_WORKERS:-2}" "$@"
