#!/usr/bin/env bash
# Prints the flags of named groups for a chip, to be put into LIBTPU_INIT_ARGS (not XLA_FLAGS: that
# one is read by the compiler for CPUs and GPUs, which refuses flags of the TPU's).
#
#   LIBTPU_INIT_ARGS=$(bash launch/libtpu_flags.sh v6e collectives all_to_all) python -m ...
#   bash launch/libtpu_flags.sh --list     the groups of every chip
#
# Chips: v5e v5p v6e tpu7x. None of the groups was measured with this project: start without, then
# add one at a time and compare `time/update` and `time/rollout` of a few steps. Flags change
# schedules and memory, not results to more than rounding. --dry-run changes nothing: it only prints.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common.sh"

readonly CHIPS='v5e v5p v6e tpu7x'
readonly GROUPS_ALL='collectives all_to_all vmem host_offload several_slices'

# group_flags CHIP GROUP: one flag a line; nothing where the group is not for the chip.
group_flags() {
  local chip=$1
  case $2 in
    # Parameters are sharded over fsdp and context: every block gathers its weights. These let the
    # gather of one block run beside the products of another. Not on tpu7x: collectives run on its
    # SparseCores by default, and fusing them into the TensorCore's programs works against that.
    collectives)
      [[ $chip == tpu7x ]] || printf '%s\n' \
        --xla_tpu_enable_async_collective_fusion=true \
        --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
        --xla_tpu_enable_async_collective_fusion_multiple_steps=true \
        --xla_tpu_overlap_compute_collective_tc=true \
        --xla_enable_async_all_gather=true
      ;;
    # With mesh.context above 1 tokens are exchanged for heads before and after attention. This
    # makes the exchange asynchronous, so that projections can run beside it.
    all_to_all)
      printf '%s\n' --xla_tpu_enable_async_all_to_all=true
      ;;
    # How much of a core's fast memory one fused program may use: more lets larger tiles through,
    # and leaves less for prefetching weights. Not on tpu7x, whose cores have less of it.
    vmem)
      case $chip in
        v6e) printf '%s\n' --xla_tpu_scoped_vmem_limit_kib=98304 ;;
        v5e | v5p) printf '%s\n' --xla_tpu_scoped_vmem_limit_kib=65536 ;;
      esac
      ;;
    # For references, moments or block inputs in pinned host memory: copies are scheduled early and
    # several at a time, so that they hide behind products.
    host_offload)
      printf '%s\n' \
        --xla_tpu_enable_all_experimental_scheduler_features=true \
        --xla_tpu_enable_scheduler_memory_pressure_tracking=true \
        --xla_tpu_host_transfer_overlap_limit=24 \
        --xla_max_concurrent_host_send_recv=100 \
        --xla_latency_hiding_scheduler_rerun=2
      ;;
    # Gradients are summed between slices over the data centre's network, which is slow: the sums
    # are spread over the backward pass instead of waiting for its end.
    several_slices)
      printf '%s\n' \
        --xla_tpu_enable_data_parallel_all_reduce_opt=true \
        --xla_tpu_data_parallel_opt_different_sized_ops=true
      ;;
  esac
}

one_of() { # WORD "WORDS": whether it is among them
  [[ $1 =~ ^[a-z0-9_]+$ && " $2 " == *" $1 "* ]]
}

list_groups() {
  local chip group flags
  for chip in $CHIPS; do
    for group in $GROUPS_ALL; do
      flags=$(group_flags "$chip" "$group")
      [[ -z $flags ]] || echo "$chip $group: ${flags//$'\n'/ }"
    done
  done
}

combine() {
  local chip=$1 group flags seen=' ' all=()
  shift
  one_of "$chip" "$CHIPS" || die "CHIP: got ${chip@Q}; allowed: ${CHIPS// /, }"
  for group in "$@"; do
    one_of "$group" "$GROUPS_ALL" || die "GROUP: got ${group@Q}; allowed: ${GROUPS_ALL// /, }"
    flags=$(group_flags "$chip" "$group")
    [[ -n $flags ]] || die "GROUP: got $group, which a $chip does not have; see --list"
    [[ $seen == *" $group "* ]] && continue
    seen+="$group "
    mapfile -t -O "${#all[@]}" all <<<"$flags"
  done
  echo "${all[*]}"
}

[[ ${1:-} == --dry-run ]] && shift
case ${1:-} in
  -h | --help) show_help "$0" ;;
  --list) list_groups ;;
  '') die "CHIP: missing; allowed: ${CHIPS// /, }" ;;
  *) combine "$@" ;;
esac
