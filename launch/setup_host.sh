#!/usr/bin/env bash
# Makes a machine ready to train: a virtual environment with the versions of requirements.txt, JAX
# for TPUs, and this repository. For workers of a slice and for containers; again: no change.
#
#   bash launch/setup_host.sh [--dry-run]
#
# Variables:
#   VENV     the folder of the environment (~/sage_grpo_jax_venv)
#   PYTHON   the interpreter, 3.11 or newer. Without it the newest on PATH; where there is none (the
#            images of some TPU machines have 3.10), uv brings Python 3.12, from the internet.
#   EXTRAS   more requirements, separated by spaces, as "gcsfs"
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common.sh"
cd "$here/.."

venv=${VENV:-$HOME/sage_grpo_jax_venv}

is_new_enough() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# The interpreter, or nothing.
find_python() {
  local candidate
  for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
}

make_venv() {
  local python=${PYTHON:-}
  if [[ -n $python ]]; then
    is_new_enough "$python" || die "PYTHON: got ${python@Q}; allowed: Python 3.11 or newer with venv"
  else
    python=$(find_python)
  fi
  if [[ -n $python ]]; then
    run "$python" -m venv "$venv"
    return
  fi
  run python3 -m pip install --quiet --disable-pip-version-check --target "$venv-uv" uv
  run "$venv-uv/bin/uv" venv --seed --python 3.12 "$venv"
}

install() {
  local jax extras
  jax=$(sed -n 's/^jax==//p' requirements.txt)
  [[ -n $jax ]] || die "requirements.txt: no line jax==VERSION"
  read -r -a extras <<<"${EXTRAS:-}"
  # In one go: pip must not take a newer JAX with its TPU library than the one that is pinned.
  run "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r requirements.txt "jax[tpu]==$jax" "${extras[@]}"
  run "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
}

main() {
  local stamp="$venv/.installed" wanted
  wanted=$(cat requirements.txt setup.py - <<<"${EXTRAS:-}" | cksum)
  if [[ -e $stamp && $(<"$stamp") == "$wanted" ]]; then
    say "$venv: nothing to do"
    return
  fi
  [[ -x $venv/bin/python ]] || make_venv
  install
  [[ $DRY_RUN == yes ]] || echo "$wanted" >"$stamp"
}

for word in "$@"; do
  case $word in
    --dry-run) DRY_RUN=yes ;;
    -h | --help)
      show_help "$0"
      exit 0
      ;;
    *) die "${word@Q}: unknown word; allowed: --dry-run, --help" ;;
  esac
done
main
