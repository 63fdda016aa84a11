# shellcheck shell=bash
# Sourced by the scripts that start runs elsewhere: messages, quoting, and --dry-run.

# macOS has 3.2; these scripts quote words as 4.4 does.
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash $BASH_VERSION; allowed: 4.4 or newer" >&2
  exit 2
fi

DRY_RUN=${DRY_RUN:-no}

# Exit statuses are those of docs/operations.md: 2 for input that a rerun cannot help, 1 for the world.
die() {
  echo "error: $*" >&2
  exit 2
}

fail() {
  echo "stopped: $*" >&2
  exit 1
}

say() {
  echo "$*" >&2
}

# Words, quoted where needed, as one line that bash reads back as the same words.
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command; with --dry-run it prints it instead.
run() {
  if [[ $DRY_RUN == yes ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# require_variable NAME PATTERN WHAT: the value is there and matches the whole pattern.
require_variable() {
  local value=${!1:-}
  [[ -n $value ]] || die "$1: missing; allowed: $3"
  [[ $value =~ ^($2)$ ]] || die "$1: got ${value@Q}; allowed: $3"
}

require_program() {
  [[ $DRY_RUN == yes ]] || command -v "$1" >/dev/null || die "$1: not found on PATH; $2"
}

# The comment at the head of a script, which is its help.
show_help() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$1"
}

# Chip generations that queued resources and GKE have; a slice is named as in docs/scaling.md.
readonly SLICE_PATTERN='(v5e|v5p|v6e|tpu7x):[1-9][0-9]*(x[1-9][0-9]*){1,2}'
readonly SLICE_HELP='CHIP:TOPOLOGY of one slice, as v6e:4x4, v5e:2x4 or v5p:2x2x2'

chips_of() {
  local topology=${1#*:}
  echo $((${topology//x/*}))
}

# require_slice: SLICE is there, and its topology has as many dimensions as the chip's network.
require_slice() {
  require_variable SLICE "$SLICE_PATTERN" "$SLICE_HELP"
  local dimensions=2 crosses=${SLICE//[^x]/}
  [[ $SLICE == tpu7x:* ]] && crosses=${crosses#x} # the one in its name
  [[ $SLICE == v5p:* || $SLICE == tpu7x:* ]] && dimensions=3
  ((${#crosses} + 1 == dimensions)) ||
    die "SLICE: got $SLICE; allowed: $dimensions dimensions for a ${SLICE%%:*}; $SLICE_HELP"
}
