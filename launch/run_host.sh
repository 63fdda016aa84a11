#!/usr/bin/env bash
# Runs a command on one worker of a slice, and tells how it ended. tpu_vm.sh calls it on every worker.
#
#   bash launch/run_host.sh start COMMAND...       in the background; it outlives the connection
#   bash launch/run_host.sh foreground COMMAND...  in the foreground, for containers
#   bash launch/run_host.sh status                 "worker HOST: idle | running | lost | exit N"
#   bash launch/run_host.sh logs [LINES] [follow]  the end of the newest log
#   bash launch/run_host.sh stop                   SIGTERM, and SIGKILL after STOP_SECONDS
#
# The exit status is the command's (docs/operations.md), but 75 where the command ended with 0 and
# its last lines say "stopped": a signal ended it, all is saved, and it is not finished.
#
# --dry-run, before the word, prints what `start` and `foreground` would run. Variables:
#   RUN_DIR        lock, pid, status and logs (~/sage_grpo_jax_run)
#   VENV           what setup_host.sh made (~/sage_grpo_jax_venv)
#   STOP_SECONDS   how long `stop` waits for a save (600)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common.sh"

readonly NOT_FINISHED=75
run_dir=${RUN_DIR:-$HOME/sage_grpo_jax_run}
venv=${VENV:-$HOME/sage_grpo_jax_venv}
child="" interrupted="" # of `hand_on_signals`

# The command of this worker: in the repository, with the interpreter of setup_host.sh.
prepare() {
  (($#)) || die "COMMAND: missing; allowed: what a worker runs, as python -m sage_grpo_jax.train ..."
  cd "$here/.."
  PATH="$venv/bin:$PATH"
  export PATH PYTHONUNBUFFERED=1
}

# Signals are handed on to the command. Called before it starts: one may come at any moment.
hand_on_signals() {
  child="" interrupted=""
  trap 'interrupted=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
}

# await PID: its exit status, into `status`. It may need time to save.
await() {
  child=$1
  [[ -z $interrupted ]] || kill -TERM "$child" 2>/dev/null || true # one that came before it
  while
    interrupted=
    status=0
    wait "$child" || status=$?
    [[ -n $interrupted ]] # then it was `wait` that ended, not the child
  do :; done
}

# translate LOG: `status` as the babysitter and Kubernetes need it.
translate() {
  if ((status == 0)) && grep -q '^stopped' <(tail -n 5 "$1"); then
    status=$NOT_FINISHED
  fi
}

start() {
  prepare "$@"
  if [[ $DRY_RUN == yes ]]; then
    quoted "$@"
    return
  fi
  mkdir -p "$run_dir"
  # Held by the run as long as it lives: a second start does nothing.
  exec 9>"$run_dir/lock"
  if ! flock -w "${LOCK_SECONDS:-2}" 9; then
    echo "worker $(hostname): running already"
    return
  fi
  local log
  log="$run_dir/$(date -u +%Y%m%dT%H%M%S).$$.log"
  rm -f "$run_dir/status"
  ln -sfn "$log" "$run_dir/log"
  # shellcheck disable=SC2094  # the supervisor reads the log when nobody writes any more
  setsid bash "$here/run_host.sh" supervise "$log" "$@" </dev/null >"$log" 2>&1 &
  echo "$!" >"$run_dir/pid"
  echo "worker $(hostname): started, log $log"
}

# supervise LOG COMMAND...: what `start` leaves behind.
supervise() {
  local log=$1 status
  shift
  hand_on_signals
  "$@" &
  await "$!"
  translate "$log"
  echo "$status" >"$run_dir/status.new"
  mv "$run_dir/status.new" "$run_dir/status"
}

foreground() {
  local folder status
  prepare "$@"
  if [[ $DRY_RUN == yes ]]; then
    quoted "$@"
    return
  fi
  hand_on_signals
  folder=$(mktemp -d)
  mkfifo "$folder/pipe"
  tee "$folder/log" <"$folder/pipe" &
  local copier=$!
  "$@" >"$folder/pipe" 2>&1 &
  await "$!"
  wait "$copier" # the last line is in the log then
  translate "$folder/log"
  rm -r "$folder"
  exit "$status"
}

is_running() {
  [[ -e $run_dir/lock ]] && ! flock -n -s "$run_dir/lock" true
}

show_status() {
  local text=idle
  if is_running; then
    text=running
  elif [[ -s $run_dir/status ]]; then
    text="exit $(<"$run_dir/status")"
  elif [[ -s $run_dir/pid ]]; then
    text=lost # killed with its supervisor, or the machine was restarted
  fi
  echo "worker $(hostname): $text"
}

logs() {
  [[ -e $run_dir/log ]] || fail "worker $(hostname): nothing was run yet"
  local follow=()
  [[ ${2:-} == follow ]] && follow=(-F)
  tail -n "${1:-100}" "${follow[@]}" "$run_dir/log"
}

stop() {
  if is_running; then
    local pid
    pid=$(<"$run_dir/pid")
    kill -TERM "$pid" 2>/dev/null || true
    if ! flock -w "${STOP_SECONDS:-600}" "$run_dir/lock" true; then
      kill -KILL -- "-$pid" 2>/dev/null || true # its session, which `start` made
    fi
  fi
  show_status
}

if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=yes
  shift
fi
word=${1:-}
(($#)) && shift
case $word in
  start | foreground | supervise | logs | stop) "$word" "$@" ;;
  status) show_status ;;
  -h | --help) show_help "$0" ;;
  *) die "${word@Q}: unknown word; allowed: start, foreground, status, logs, stop, --help" ;;
esac
