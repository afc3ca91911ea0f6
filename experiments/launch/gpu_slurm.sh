#!/usr/bin/env bash
# Trains a config on several GPU machines under Slurm, one process for each GPU:
#
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 experiments/launch/gpu_slurm.sh \
#     --config=configs/coco_htc.py:swinv2_g --workdir=/shared/coco_g --config.mesh.model=8
#
# mesh.model=8 with mesh.frozen=model keeps one copy of the frozen weights in every machine of 8 GPUs, so that their
# gathering stays inside of it; mesh.frozen=all (the default) shards them over all GPUs and takes the least memory. The
# environment with frozen_vision and jax[cuda12] is found at VENV. Slurm's SIGTERM before the time limit saves first;
# the same command continues.
#SBATCH --job-name=frozen_vision
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

if (($# == 0)); then
  echo "Give the options of python -m frozen_vision.main; the first lines of $0 show how." >&2
  exit 2
fi
# jax.distributed finds the other processes through Slurm's variables.
srun --kill-on-bad-exit=1 "${VENV:-venv}/bin/python" -m frozen_vision.main --distributed "$@"
