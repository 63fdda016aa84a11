#!/usr/bin/env bash
# Rents a slice of TPUs as a queued resource, and runs the same command on all of its workers.
#
#   bash launch/tpu_vm.sh [--dry-run] WORD [COMMAND...]
#
#   create       asks for the slice; there already: no change
#   wait         until it is ACTIVE
#   setup        copies the committed state of this repository to all workers and installs it
#   run COMMAND  starts it on all workers, in the background; running already: no change
#   status       state of the slice, and what each worker does
#   logs         end of the log of worker 0 (LINES, WORKER, FOLLOW)
#   stop         SIGTERM on all workers: the run saves and ends
#   delete       gives the slice back, with all that is on its disks
#   state        one word for scripts: NONE, WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, ...
#
# --dry-run prints the commands instead, and calls nothing. Variables:
#   PROJECT, ZONE, NAME  where the slice is, and its name
#   SLICE            v6e:4x4, v5e:2x4, v5p:2x2x2, ...; for create and run
#   SLICES           how many of them (1)
#   CAPACITY         spot, reserved or on_demand (spot)
#   RUNTIME          image of the machines (that of the chip)
#   SSH_VIA          external, internal or iap (external); create gives the machines no external
#                    addresses unless it is external
#   NETWORK, SUBNETWORK, SERVICE_ACCOUNT  of the machines (the project's defaults)
#   SETUP_COMMAND    shell command at the end of setup on every worker, as one that mounts storage
#   LIBTPU_FLAGS     groups of libtpu_flags.sh for run, separated by spaces (none)
#   LINES, WORKER, FOLLOW  for logs: how many (100), whose (0, or all), yes to go on (no)
#   POLL_SECONDS, MAX_POLLS  for wait: how often and how many times it looks (30, 2880: a day)
#
# Only what `create` made, which carries its label, is deleted.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common.sh"
root=$(dirname "$here")

readonly WORDS='create, wait, setup, run, status, logs, stop, delete, state'
readonly LABEL=created_by OWNER=sage_grpo_jax
readonly REMOTE=sage_grpo_jax # in the home of every worker

check_place() {
  require_variable PROJECT '[a-z][a-z0-9.:-]*' 'the id of a project'
  require_variable ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone, as us-east5-b'
  require_variable NAME '[a-z]([a-z0-9-]{0,59}[a-z0-9])?' 'lower-case letters, digits and hyphens'
  SSH_VIA=${SSH_VIA:-external}
  require_variable SSH_VIA 'external|internal|iap' 'external, internal or iap'
  place=(--project="$PROJECT" --zone="$ZONE")
  require_program gcloud 'it comes with the Google Cloud CLI'
}

check_slice() {
  require_slice
  [[ $SLICE != tpu7x:* ]] ||
    die "SLICE: got $SLICE; allowed here: v5e, v5p and v6e (tpu7x is on GKE only: launch/xpk.sh)"
}

# What queued resources call a slice: v5p counts cores, two a chip.
accelerator_type() {
  local chips
  chips=$(chips_of "$SLICE")
  case $SLICE in
    v5e:*) echo "v5litepod-$chips" ;;
    v5p:*) echo "v5p-$((2 * chips))" ;;
    v6e:*) echo "v6e-$chips" ;;
  esac
}

runtime() {
  case $SLICE in
    v5e:*) echo v2-alpha-tpuv5-lite ;;
    v5p:*) echo v2-alpha-tpuv5 ;;
    v6e:*) echo v2-alpha-tpuv6e ;;
  esac
}

# Sets `state` and `owner` of NAME. Listed, not described: a failure of the network is no absence.
look_up() {
  local columns="name.basename(),state.state,tpu.nodeSpec[0].node.labels.$LABEL"
  local list=(gcloud compute tpus queued-resources list "${place[@]}" "--format=value($columns)")
  state=NONE owner=
  if [[ $DRY_RUN == yes ]]; then
    quoted "${list[@]}"
    return
  fi
  local rows name its_state its_owner
  rows=$("${list[@]}") || fail "the queued resources of $PROJECT in $ZONE cannot be listed"
  while IFS=$'\t' read -r name its_state its_owner; do
    # shellcheck disable=SC2153  # NAME is checked
    [[ $name == "$NAME" ]] && state=$its_state owner=$its_owner
  done <<<"$rows"
  return 0
}

require_ours() {
  [[ $state == NONE || $owner == "$OWNER" ]] ||
    die "NAME: $NAME was not made by this script (its label $LABEL is ${owner:-missing}); it stays"
}

create() {
  check_slice
  CAPACITY=${CAPACITY:-spot} SLICES=${SLICES:-1}
  require_variable CAPACITY 'spot|reserved|on_demand' 'spot, reserved or on_demand'
  require_variable SLICES '[1-9][0-9]{0,3}' 'a whole number of slices'
  local make=(gcloud compute tpus queued-resources create "$NAME" "${place[@]}"
    --accelerator-type="$(accelerator_type)" --runtime-version="${RUNTIME:-$(runtime)}"
    --labels="$LABEL=$OWNER")
  if ((SLICES == 1)); then
    make+=(--node-id="$NAME")
  else
    make+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  case $CAPACITY in
    spot) make+=(--spot) ;;
    reserved) make+=(--reserved) ;;
  esac
  [[ $SSH_VIA == external ]] || make+=(--internal-ips)
  [[ -z ${NETWORK:-} ]] || make+=(--network="$NETWORK")
  [[ -z ${SUBNETWORK:-} ]] || make+=(--subnetwork="$SUBNETWORK")
  [[ -z ${SERVICE_ACCOUNT:-} ]] || make+=(--service-account="$SERVICE_ACCOUNT")

  look_up
  require_ours
  case $state in
    NONE) run "${make[@]}" ;;
    FAILED | SUSPENDED) fail "$NAME is $state: bash launch/tpu_vm.sh delete, then create" ;;
    *) say "$NAME is there: $state" ;;
  esac
}

wait_until_active() {
  local polls
  for ((polls = 0; polls < ${MAX_POLLS:-2880}; polls++)); do
    look_up
    if [[ $DRY_RUN == yes ]]; then
      return
    fi
    case $state in
      ACTIVE) return 0 ;;
      NONE | FAILED | SUSPENDED | SUSPENDING | DELETING) fail "$NAME is $state" ;;
    esac
    ((polls)) || say "$NAME is $state; waiting"
    sleep "${POLL_SECONDS:-30}"
  done
  fail "$NAME is still $state"
}

# on_workers WORKER COMMAND: one shell command on one worker, or on all of all slices.
on_workers() {
  local node=0
  [[ $1 == all ]] && node=all
  run gcloud compute tpus queued-resources ssh "$NAME" "${place[@]}" \
    --node="$node" --worker="$1" "${via[@]}" --command="$2"
}

setup() {
  local archive="${TMPDIR:-/tmp}/$REMOTE-$NAME.tar.gz"
  git -C "$root" rev-parse --verify --quiet HEAD >/dev/null ||
    die "$root: not a git repository with a commit; setup copies the committed state"
  if [[ -n $(git -C "$root" status --porcelain) ]]; then
    say "note: changes that are not committed do not travel"
  fi
  local install="mkdir -p $REMOTE && tar -xzf $REMOTE.tar.gz -C $REMOTE"
  install+=" && bash $REMOTE/launch/setup_host.sh"
  [[ -z ${SETUP_COMMAND:-} ]] || install+=" && $(quoted bash -c "$SETUP_COMMAND")"

  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus queued-resources scp "$archive" "$NAME:$REMOTE.tar.gz" "${place[@]}" \
    --node=all --worker=all "${via[@]}"
  run rm "$archive"
  on_workers all "$install"
}

start() {
  [[ ${1:-} == -- ]] && shift
  (($#)) || die "COMMAND: missing; allowed: run python -m sage_grpo_jax.train --config=... --workdir=..."
  check_slice
  local groups flags=
  read -r -a groups <<<"${LIBTPU_FLAGS:-}"
  if ((${#groups[@]})); then
    flags=$(bash "$here/libtpu_flags.sh" "${SLICE%%:*}" "${groups[@]}") || exit
    set -- env "LIBTPU_INIT_ARGS=$flags" "$@"
  fi
  on_workers all "$(quoted bash "$REMOTE/launch/run_host.sh" start "$@")"
}

show_status() {
  look_up
  [[ $DRY_RUN == yes ]] || echo "slice $NAME: $state"
  if [[ $state == ACTIVE || $DRY_RUN == yes ]]; then
    on_workers all "bash $REMOTE/launch/run_host.sh status"
  fi
}

show_logs() {
  LINES=${LINES:-100} WORKER=${WORKER:-0} FOLLOW=${FOLLOW:-no}
  require_variable LINES '[1-9][0-9]*' 'a whole number'
  require_variable WORKER '[0-9]+|all' 'the number of a worker, or all'
  require_variable FOLLOW 'yes|no' 'yes or no'
  local command="bash $REMOTE/launch/run_host.sh logs $LINES"
  [[ $FOLLOW == no ]] || command+=" follow"
  on_workers "$WORKER" "$command"
}

delete() {
  look_up
  require_ours
  if [[ $state == NONE && $DRY_RUN == no ]]; then
    say "$NAME: nothing to delete"
    return
  fi
  if [[ $state == DELETING ]]; then
    say "$NAME is being deleted"
    return
  fi
  run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
}

main() {
  local word=$1
  shift
  case $word in
    create | wait | setup | run | status | logs | stop | delete | state) ;;
    *) die "${word@Q}: unknown word; allowed: $WORDS, --help, --dry-run" ;;
  esac
  [[ $word == run ]] || (($# == 0)) || die "${1@Q}: unexpected word after $word"
  check_place
  via=()
  [[ $SSH_VIA == internal ]] && via=(--internal-ip)
  [[ $SSH_VIA == iap ]] && via=(--tunnel-through-iap)
  case $word in
    run) start "$@" ;;
    wait) wait_until_active ;;
    status) show_status ;;
    logs) show_logs ;;
    stop) on_workers all "bash $REMOTE/launch/run_host.sh stop" ;;
    state)
      look_up
      require_ours
      [[ $DRY_RUN == yes ]] || echo "$state"
      ;;
    *) "$word" ;;
  esac
}

if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=yes
  shift
fi
case ${1:-} in
  -h | --help) show_help "$0" ;;
  '') die "WORD: missing; allowed: $WORDS, --help, --dry-run" ;;
  *) main "$@" ;;
esac
