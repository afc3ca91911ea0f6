#!/usr/bin/env bash
# Measures this project on one GPU in about ten minutes, the most important part first:
#
#   experiments/benchmarks/gpu.sh                      parts 1 to 6, tables into $OUT, or build/gpu without it
#   experiments/benchmarks/gpu.sh --part=2,6           some parts
#   experiments/benchmarks/gpu.sh --part=4 --limit=600 one part with more time
#   experiments/benchmarks/gpu.sh --tiny               the same at toy sizes: runs on a CPU in minutes
#
#   1  features of SwinV2 against the golden files, float32 and bfloat16
#   2  inference of SwinV2-B and L in bfloat16: folded, against timm eager and torch.compile
#   3  forward pass of SwinV2-G at 640, 1024 and 1536 px, bfloat16 and int8 weights
#   4  train steps: HTC on frozen B and G and on a B that trains; Mask2Former; Video Swin
#   5  three heads on one backbone pass against three passes
#   6  the costliest kernels of parts 2 and 4
#
# and with --part=7,8, in five minutes more:
#
#   7  inference of ViTs and convolutional networks in bfloat16, likewise against timm
#   8  frozen DINOv3: masks from the L with PMT's decoder, probes on features, forward pass of the 7B
#
# A part is a process with a time limit. It rewrites its table (partN.md, and its entry in tables.json) after
# every row, so that a run that is cut keeps what was measured. A part that fails does not stop the next; the
# exit status says whether all of them finished.
#
# Needs Python 3.11 or newer with jax, flax, optax, jaxtyping and safetensors; timm and torch for the peers in
# part 2. Nothing of TensorFlow, grain, clu, ml_collections, PyAV or pycocotools is imported, and no data or
# weights are read besides the golden files. $PYTHON names the interpreter.
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
limits=([1]=40 [2]=200 [3]=80 [4]=155 [5]=50 [6]=50 [7]=200 [8]=90)  # seconds
parts="1 2 3 4 5 6"
out=${OUT:-build/gpu}
tiny=()
limit=

for argument in "$@"; do
  case $argument in
    --tiny) tiny=(--tiny) ;;
    --part=*) parts=${argument#*=}; parts=${parts//,/ } ;;
    --out=*) out=${argument#*=} ;;
    --limit=*) limit=${argument#*=} ;;
    *) echo "gpu.sh: unknown argument '$argument'; known: --tiny, --part=N[,N], --out=FOLDER, --limit=SECONDS" >&2
       exit 2 ;;
  esac
done
for part in $parts; do
  if [[ ! $part =~ ^[1-8]$ ]]; then
    echo "gpu.sh: part '$part' is unknown; expected numbers from 1 to 8, such as --part=2,6" >&2
    exit 2
  fi
done

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Part 6 runs programs of parts 2 and 4 again, and a second run finds what the first has compiled.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${TMPDIR:-/tmp}/frozen_vision_jax_cache_$UID}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
if [[ ${#tiny[@]} -gt 0 ]]; then
  export JAX_DISABLE_MOST_OPTIMIZATIONS=1  # toy programs run for milliseconds and compile for seconds
fi

failed=
for part in $parts; do
  seconds=${limit:-${limits[$part]}}
  [[ ${#tiny[@]} -gt 0 && -z $limit ]] && seconds=1200
  # PyTorch shares the device in parts 2 and 7.
  preallocate=true
  [[ $part =~ ^[27]$ ]] && preallocate=false
  XLA_PYTHON_CLIENT_PREALLOCATE=$preallocate timeout --foreground -k 5 "$seconds" \
    "${PYTHON:-python3}" -m experiments.benchmarks.gpu "$part" --out="$out" --seconds="$seconds" \
    ${tiny[@]+"${tiny[@]}"}
  status=$?
  case $status in
    0) ;;
    124 | 137) echo "Part $part was cut at its limit of $seconds s; its table has the rows that were finished." ;;
    *) echo "Part $part failed (exit status $status)." ;;
  esac
  [[ $status -eq 0 ]] || failed="$failed $part"
done
[[ -z $failed ]] || { echo "Not finished: parts$failed. Tables are in $out."; exit 1; }
echo "All parts finished. Tables are in $out."
