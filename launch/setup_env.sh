# shellcheck shell=bash
# Sourced by the launch scripts: makes .venv at the repository root once, and puts it on PATH.
# Usage: . launch/setup_env.sh requirements.txt
# PYTHON chooses the interpreter (3.11 or newer); VENV the folder.

requirements="$1"
venv="${VENV:-.venv}"
python="${PYTHON:-python3}"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or newer is needed; $python is $("$python" --version 2>&1). Set PYTHON=..." >&2
  exit 1
}
if [ ! -x "$venv/bin/python" ]; then
  echo "Making $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
# The stamp holds what was installed last, so that a second run starts at once.
stamp="$venv/.installed-$(basename "$requirements")"
wanted="$(cat requirements*.txt setup.py | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "Installing $requirements (once; a few minutes)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
  echo "$wanted" > "$stamp"
fi
PATH="$PWD/$venv/bin:$PATH"
export PATH
