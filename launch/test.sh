#!/usr/bin/env bash
# Sets up .venv and runs the test suite. Arguments go to pytest: bash launch/test.sh --slow tests/flow
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup_env.sh requirements-dev.txt
export JAX_PLATFORMS=cpu
# A file stays with one worker, so that its tests share what they compile.
exec python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
