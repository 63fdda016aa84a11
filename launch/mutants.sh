#!/usr/bin/env bash
# Sets up .venv, puts faults into copies of this tree, one at a time, and runs the tests that must
# notice them. Arguments: parts of names, --list, --jobs N, --full, --json FILE; see --help.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup_env.sh requirements-dev.txt
export JAX_PLATFORMS=cpu
exec python tests/mutants/run.py "$@"
