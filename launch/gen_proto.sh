#!/usr/bin/env bash
# Regenerates the gRPC stubs of the reward service from sage_grpo_jax/rewards/reward.proto.
#
#   bash launch/gen_proto.sh           writes reward_pb2.py and reward_pb2_grpc.py
#   bash launch/gen_proto.sh --check   fails if they differ from what it would write
#
# The generator is pinned: its output sets the lowest protobuf (5.29) and grpcio (1.71) that can
# import it, and newer ones accept it. protoc runs from the repository root, so the second stub
# imports the first by its package path and needs no patching.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VERSION=1.71.2
readonly PROTO=sage_grpo_jax/rewards/reward.proto
readonly STUBS=(sage_grpo_jax/rewards/reward_pb2.py sage_grpo_jax/rewards/reward_pb2_grpc.py)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/venv"
# grpcio-tools of this age imports pkg_resources, which newer setuptools no longer has.
"$work/venv/bin/pip" install --quiet "grpcio-tools==$VERSION" "setuptools<81"
mkdir "$work/out"
"$work/venv/bin/python" -m grpc_tools.protoc -I. \
  --python_out="$work/out" --grpc_python_out="$work/out" "$PROTO"

for stub in "${STUBS[@]}"; do
  if [[ "${1:-}" == --check ]]; then
    diff -u "$stub" "$work/out/$stub" || { echo "$stub is stale: run $0" >&2; exit 1; }
  else
    cp "$work/out/$stub" "$stub"
    echo "wrote $stub"
  fi
done
