#!/usr/bin/env bash
# Sets up .venv and trains a small video model by SAGE-GRPO: minutes on two CPU cores.
# Arguments go to the trainer: bash launch/quickstart.sh --config.rollout.eta=0.7
# METHOD chooses the preset (sage, flow_grpo, dance_grpo, cps); WORKDIR the folder of the run.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup_env.sh requirements.txt

method="${METHOD:-sage}"
workdir="${WORKDIR:-runs/quickstart-$method}"
# Compiled programs are kept, so that a second run starts at once.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}"

echo "Training in $workdir; stop it at any time: the same command goes on."
python -m sage_grpo_jax.train \
  --config="configs/moving_shapes.py:method=$method" --workdir="$workdir" "$@"
# Stopped by a signal: saved, and not finished.
[ -f "$workdir/summary.json" ] || exit 0
python -m sage_grpo_jax.report --runs="$workdir" --out="$workdir/report"
