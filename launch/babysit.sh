#!/usr/bin/env bash
# Keeps a run on spot machines going until it is finished: creates the slice, starts the command on
# all workers, looks after it, and begins again with the same command where the slice was taken away
# or the run was stopped. Runs on a machine that stays, as in tmux; stopped itself, start it again.
#
#   bash launch/babysit.sh [--dry-run] COMMAND...
#
#   bash launch/babysit.sh python -m sage_grpo_jax.train --config=... --workdir=/mnt/runs/a
#
# It ends with
#   0  finished: every worker ended with 0
#   1  given up: too many failures, or what tpu_vm.sh says
#   2  refused: the command ended with 2, a rerun cannot help; or the input of this script is wrong
# The command's other exit statuses (docs/operations.md) and a taken slice lead to a rerun.
#
# --dry-run prints the commands of one round that meets no trouble. Variables, beside those of
# tpu_vm.sh (PROJECT, ZONE, NAME, SLICE, ...):
#   MAX_SLICES       how many slices are asked for in all (50)
#   MAX_FAILURES     how often the run may fail on a slice that stays (5)
#   MAX_UNREACHABLE  how often in a row the workers or the service may not answer (20)
#   MAX_STRAGGLES    how often in a row some workers may still run when others ended, before these
#                    are stopped (10)
#   POLL_SECONDS     between two looks (60)
#   WHEN_DONE        keep, or delete: the slice, when this script ends with 0 or 2 (keep; it costs).
#                    delete takes all with it that lies on its disks: workdir elsewhere!
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common.sh"

slices=0 failures=0 unreachable=0 straggles=0
started= # a command of this script runs, or did, on the slice that is there

tpu_vm() {
  bash "$here/tpu_vm.sh" "$@"
}

pause() {
  sleep "${POLL_SECONDS:-60}"
}

# Something did not answer, which may be the network, or a slice that is being taken away.
no_answer() {
  ((++unreachable <= MAX_UNREACHABLE)) || fail "$1 $unreachable times in a row"
  say "$1; trying again ($unreachable of $MAX_UNREACHABLE)"
  pause
}

# The input is wrong (2): the same again cannot help. Other failures may pass.
checked() {
  local status=0
  tpu_vm "$@" || status=$?
  ((status != 2)) || exit 2
  return "$status"
}

make_slice() {
  ((++slices <= MAX_SLICES)) || fail "$MAX_SLICES slices were asked for; MAX_SLICES allows no more"
  say "asking for slice $slices of at most $MAX_SLICES"
  started=
  # shellcheck disable=SC2153  # NAME is checked by tpu_vm.sh
  checked create || no_answer "$NAME could not be created"
}

replace_slice() {
  say "$NAME is $1"
  checked delete || no_answer "$NAME could not be deleted"
}

launch() {
  if ! checked setup; then
    no_answer "$NAME could not be set up"
  elif ! checked run "${command[@]}"; then
    no_answer "the command could not be started"
  else
    started=yes
    say "running on $NAME"
    pause
  fi
}

leave() {
  if [[ ${WHEN_DONE:-keep} == delete ]]; then
    tpu_vm delete || fail "$2, and $NAME could not be deleted: it is still paid for"
  else
    say "$NAME is still there, and paid for: bash launch/tpu_vm.sh delete"
  fi
  say "$2"
  exit "$1"
}

rerun() {
  ((++failures <= MAX_FAILURES)) || fail "the command ended with $1; $MAX_FAILURES reruns did not help"
  say "the command ended with $1; rerun $failures of $MAX_FAILURES"
  started=
}

# Looks at the workers of an ACTIVE slice.
look_after() {
  local report worst=0 running=0 ended=0 word
  if ! report=$(tpu_vm status); then
    no_answer "the workers of $NAME do not answer"
    # After a restart of a machine, or where another session made the slice, nothing is installed.
    [[ -n $started ]] || launch
    return
  fi
  unreachable=0
  while read -r word; do
    case $word in
      running) running=$((running + 1)) ;;
      idle | lost | exit\ *)
        ended=$((ended + 1)) word=${word#exit }
        [[ $word == [0-9]* ]] || word=1
        # 2 weighs most: the others may have ended because that worker did.
        if ((word == 2 || (word != 0 && worst != 2))); then worst=$word; fi
        ;;
    esac
  done < <(sed -n 's/^worker [^ ]*: //p' <<<"$report")

  if ((running && ended)); then
    stragglers
  elif ((running)); then
    started=yes straggles=0
    pause
  elif [[ -z $started ]]; then
    launch # whatever an earlier command left behind
  elif ((ended == 0)); then
    no_answer "no worker of $NAME reports"
  elif ((worst == 0)); then
    leave 0 "finished"
  elif ((worst == 2)); then
    tpu_vm logs || true
    leave 2 "refused: the command ended with 2; a rerun cannot help"
  else
    rerun "$worst"
  fi
}

# One worker ended: soon the others notice, and end as well. If not, they are told to.
stragglers() {
  if ((++straggles > MAX_STRAGGLES)); then
    straggles=0
    say "some workers still run, others do not; stopping them"
    checked stop || no_answer "the workers of $NAME could not be stopped"
  else
    pause
  fi
}

babysit() {
  local state status
  while true; do
    status=0
    state=$(tpu_vm state) || status=$?
    ((status != 2)) || exit 2
    if ((status)); then
      no_answer "the state of $NAME is not known"
      continue
    fi
    case $state in
      NONE) make_slice ;;
      SUSPENDED | FAILED | PREEMPTED) replace_slice "$state" ;;
      ACTIVE) look_after ;;
      *) pause ;; # on the way to one of these
    esac
  done
}

one_round() {
  local word
  for word in create wait setup; do
    tpu_vm --dry-run "$word" || return
  done
  tpu_vm --dry-run run "${command[@]}" || return
  tpu_vm --dry-run status || return
  [[ $WHEN_DONE == keep ]] || tpu_vm --dry-run delete
}

case ${1:-} in
  -h | --help)
    show_help "$0"
    exit 0
    ;;
  --dry-run)
    DRY_RUN=yes
    shift
    ;;
esac
[[ ${1:-} == -- ]] && shift
(($#)) || die "COMMAND: missing; allowed: python -m sage_grpo_jax.train --config=... --workdir=..."
[[ $1 != -* ]] || die "${1@Q}: unknown word; allowed: --dry-run, --help, or a command"
command=("$@")
MAX_SLICES=${MAX_SLICES:-50} MAX_FAILURES=${MAX_FAILURES:-5} WHEN_DONE=${WHEN_DONE:-keep}
MAX_UNREACHABLE=${MAX_UNREACHABLE:-20} MAX_STRAGGLES=${MAX_STRAGGLES:-10}
for name in MAX_SLICES MAX_FAILURES MAX_UNREACHABLE MAX_STRAGGLES; do
  require_variable "$name" '[0-9]+' 'a whole number'
done
require_variable WHEN_DONE 'keep|delete' 'keep or delete'
# Everything that tpu_vm.sh would refuse, before the first call of the cloud.
preview=$(one_round) || exit
if [[ $DRY_RUN == yes ]]; then
  printf '%s\n' "$preview"
  exit 0
fi
babysit
