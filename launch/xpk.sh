#!/usr/bin/env bash
# Runs a container on the slices of a GKE cluster through XPK, which makes the JobSet and queues it.
#
#   bash launch/xpk.sh [--dry-run] WORD [COMMAND...]
#
#   submit COMMAND  hands it in, as workload sage-NAME; every worker runs it
#   status          of the workload
#   logs            the last LINES of every worker (100)
#   delete          the workload, after XPK has asked
#
# --dry-run prints the commands instead, and calls nothing. Variables:
#   PROJECT, ZONE, CLUSTER, NAME  where the cluster is, its name, and one for the run
#   SLICE           v6e:4x4, v5e:2x4, v5p:2x2x2, tpu7x:2x2x1, ...; for submit
#   SLICES          how many of them (1)
#   IMAGE           of launch/Dockerfile, in a registry that the cluster reads; for submit
#   CAPACITY        for clusters that make nodes on demand: spot, on_demand or reserved, with
#                   RESERVATION its name (what the cluster has)
#   PRIORITY        very-low, low, medium, high or very-high (medium)
#   MAX_RESTARTS    how often the JobSet begins again (50)
#   SAVE_SECONDS    the longest phase of a step and a save, see docs/operations.md (300)
#   GRACE_SECONDS   between SIGTERM and SIGKILL, not below SAVE_SECONDS (600)
#   LIBTPU_FLAGS    groups of libtpu_flags.sh, separated by spaces (none)
#
# The command's exit statuses (docs/operations.md) but 0 and 2 lead to a restart.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common.sh"

readonly WORDS='submit, status, logs, delete'

check_place() {
  require_variable PROJECT '[a-z][a-z0-9.:-]*' 'the id of a project'
  require_variable ZONE '[a-z]+-[a-z]+[0-9]+(-[a-z])?' 'a zone or region, as us-east5-b'
  require_variable CLUSTER '[a-z][a-z0-9-]{0,38}' 'the name of a cluster'
  # With its prefix the workload stays below the 28 characters that XPK has room for.
  require_variable NAME '[a-z0-9]([a-z0-9-]{0,21}[a-z0-9])?' \
    'up to 23 lower-case letters, digits and hyphens'
  workload="sage-$NAME"
  place=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
}

tpu_type() {
  local chip=${SLICE%%:*} topology=${SLICE#*:}
  [[ $chip == v5e ]] && chip=v5litepod
  echo "$chip-$topology"
}

check_submit() {
  require_slice
  SLICES=${SLICES:-1} PRIORITY=${PRIORITY:-medium} MAX_RESTARTS=${MAX_RESTARTS:-50}
  SAVE_SECONDS=${SAVE_SECONDS:-300} GRACE_SECONDS=${GRACE_SECONDS:-600}
  require_variable SLICES '[1-9][0-9]{0,3}' 'a whole number of slices'
  require_variable IMAGE '[A-Za-z0-9][A-Za-z0-9._/:@-]*' 'an image in a registry, with its tag'
  require_variable PRIORITY 'very-low|low|medium|high|very-high' \
    'very-low, low, medium, high or very-high'
  require_variable MAX_RESTARTS '0|[1-9][0-9]*' 'a whole number'
  require_variable SAVE_SECONDS '[1-9][0-9]*' 'a whole number of seconds'
  require_variable GRACE_SECONDS '[1-9][0-9]*' 'a whole number of seconds'
  ((GRACE_SECONDS >= SAVE_SECONDS)) ||
    die "GRACE_SECONDS: got $GRACE_SECONDS; allowed: at least SAVE_SECONDS, $SAVE_SECONDS"
  capacity=()
  if [[ -n ${CAPACITY:-} ]]; then
    require_variable CAPACITY 'spot|on_demand|reserved' 'spot, on_demand or reserved'
    case $CAPACITY in
      spot) capacity=(--spot) ;;
      on_demand) capacity=(--on-demand) ;;
      reserved)
        require_variable RESERVATION '[a-z][a-z0-9/-]*' 'the name of a reservation'
        capacity=(--reservation="$RESERVATION")
        ;;
    esac
  fi
}

submit() {
  [[ ${1:-} == -- ]] && shift
  (($#)) || die "COMMAND: missing; allowed: submit python -m sage_grpo_jax.train --config=... --workdir=..."
  # XPK writes the command into one line of YAML.
  [[ $* != *$'\n'* ]] || die "COMMAND: it has line breaks; allowed: one line"
  check_submit
  local groups flags
  read -r -a groups <<<"${LIBTPU_FLAGS:-}"
  if ((${#groups[@]})); then
    flags=$(bash "$here/libtpu_flags.sh" "${SLICE%%:*}" "${groups[@]}") || exit
    set -- env "LIBTPU_INIT_ARGS=$flags" "$@"
  fi
  require_program xpk 'pip install xpk'
  # exec: SIGTERM must reach the run, not a shell around it.
  run xpk workload create "${place[@]}" --workload="$workload" \
    --tpu-type="$(tpu_type)" --num-slices="$SLICES" --docker-image="$IMAGE" \
    --priority="$PRIORITY" --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=1,75 \
    --termination-grace-period-seconds="$GRACE_SECONDS" "${capacity[@]}" \
    --command="exec $(quoted bash launch/run_host.sh foreground "$@")"
}

show_status() {
  require_program xpk 'pip install xpk'
  run xpk workload list "${place[@]}" --filter-by-job="^$workload\$"
}

show_logs() {
  LINES=${LINES:-100}
  require_variable LINES '[1-9][0-9]*' 'a whole number'
  require_program kubectl 'gcloud components install kubectl'
  run kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$workload" --all-containers \
    --prefix --tail="$LINES"
}

delete() {
  require_program xpk 'pip install xpk'
  run xpk workload delete "${place[@]}" --workload="$workload"
}

main() {
  local word=$1
  shift
  case $word in
    submit | status | logs | delete) ;;
    *) die "${word@Q}: unknown word; allowed: $WORDS, --help, --dry-run" ;;
  esac
  [[ $word == submit ]] || (($# == 0)) || die "${1@Q}: unexpected word after $word"
  check_place
  case $word in
    status | logs) "show_$word" ;;
    *) "$word" "$@" ;;
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
