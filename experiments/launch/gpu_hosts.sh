#!/usr/bin/env bash
# Trains a config on several GPU machines that ssh reaches, without a scheduler, one process for each machine:
#
#   HOSTS="node0 node1 node2" DIRECTORY=/shared/frozen_vision experiments/launch/gpu_hosts.sh \
#     --config=configs/coco_htc.py:swinv2_g --workdir=/shared/coco_g
#
# DIRECTORY is this repository with its environment in venv/, the workdir and the data are at the same path on all of them.
# The first host coordinates, at PORT. When one fails the others end within two minutes, and so does this script.
set -euo pipefail

if [[ -z "${HOSTS:-}" || -z "${DIRECTORY:-}" ]] || (($# == 0)); then
  echo "Set HOSTS and DIRECTORY and give the options of python -m frozen_vision.main; the first lines of $0 show how." >&2
  exit 2
fi
read -r -a hosts <<<"$HOSTS"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for index in "${!hosts[@]}"; do
  ssh -tt "${hosts[$index]}" "cd '$DIRECTORY' && FROZEN_VISION_COORDINATOR='${hosts[0]}:${PORT:-8476}' \
    FROZEN_VISION_PROCESSES=${#hosts[@]} FROZEN_VISION_PROCESS=$index \
    venv/bin/python -m frozen_vision.main --distributed$(printf ' %q' "$@")" </dev/null &
done
status=0
for _ in "${hosts[@]}"; do
  wait -n || { status=$?; break; }
done
exit "$status"
