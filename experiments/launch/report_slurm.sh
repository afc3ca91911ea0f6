#!/usr/bin/env bash
# Runs the cells of a report as an array of Slurm, one task for each cell that is not finished:
#
#   python -m frozen_vision.main --mode=report --backbones=swinv2_nano,FILE.safetensors --workdir=/shared/report \
#     --print_commands > cells.txt
#   sbatch --array=1-$(wc -l < cells.txt)%16 --gpus=1 experiments/launch/report_slurm.sh cells.txt
#
# %16 lets at most 16 run at once. Slurm's SIGTERM before the time limit saves first: B: sends it to the batch shell,
# which becomes the run. When the array is done,
# `--mode=report ... --only_page` makes the page and names what is missing, and --print_commands prints what is not
# finished anew. Run it in a checkout; the environment with frozen_vision is found at VENV.
#SBATCH --job-name=frozen_vision_report
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -euo pipefail

if (($# != 1)); then
  echo "Give the file of commands; the first lines of $0 show how." >&2
  exit 2
fi
command="$(sed -n "${SLURM_ARRAY_TASK_ID:?}p" "$1")"
export PATH="${VENV:-venv}/bin:${PATH}"
exec bash -c "exec ${command}"
