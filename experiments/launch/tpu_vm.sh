#!/usr/bin/env bash
# Trains a config on a Cloud TPU slice, from your own machine, with gcloud (https://cloud.google.com/sdk) set up:
#
#   NAME=fv ZONE=us-west4-a TYPE=v5litepod-64 VERSION=v2-alpha-tpuv5-lite REPOSITORY=https://... \
#     experiments/launch/tpu_vm.sh --config=configs/coco_htc.py:swinv2_g --workdir=/mnt/runs/coco_g \
#     --config.detection.root=/mnt/data/coco --config.backbone.weights=/mnt/data/swinv2_g.safetensors
#
# What it takes can be seen before anything is rented: --mode=plan --topology=v5e:8x8 with the same options.
# The data must be readable and the workdir writable on every host at the same path (Filestore or gcsfuse; a
# read-only disk for the data). Running the same command again continues the run. Delete the slice when done: it
# costs money while it exists.
#
#   gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE"
set -euo pipefail

for variable in NAME ZONE TYPE VERSION REPOSITORY; do
  if [[ -z "${!variable:-}" ]]; then
    echo "Set $variable; the first lines of $0 show how." >&2
    exit 2
  fi
done
if (($# == 0)); then
  echo "Give the options of python -m frozen_vision.main; the first lines of $0 show how." >&2
  exit 2
fi

if ! gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" >/dev/null 2>&1; then
  gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION"
fi

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

everywhere "test -d frozen_vision || git clone --quiet '$REPOSITORY' frozen_vision"
everywhere "cd frozen_vision && python3 -m venv venv && venv/bin/pip install --quiet -r requirements.txt 'jax[tpu]'"
# Every host runs the same program; jax.distributed finds the others by itself on a TPU.
everywhere "cd frozen_vision && venv/bin/python -m frozen_vision.main --distributed$(printf ' %q' "$@")"
