"""Our backbones against timm's, in one run: the same weights and inputs, equal outputs first, then time.

One Python that has both, for example this project's environment with `pip install torch timm` in it:

  PYTHONPATH=. python experiments/benchmarks/backbone.py --backbone=swinv2_t --image_size=256 --window=8 \
    --batch=4 --out=experiments/results/backbone_cpu.md
  PYTHONPATH=. python experiments/benchmarks/backbone.py --backbone=swinv2_b --image_size=256 --window=16 \
    --batch=64 --dtype=bfloat16 --peak_tflops=989
  PYTHONPATH=. python experiments/benchmarks/backbone.py --backbone=resnet50 --image_size=224 --channels_last

What is timed is the pooled vector of a batch that is on the device already. Rounds are interleaved, beginning
with another implementation each time. A ratio is taken within each round; its interval covers the median of
such ratios with at least 95% (order statistics, no assumption on the distribution). Memory is that of a
process that runs one implementation alone. H and G are compared without their extra norms (every sixth
block), which timm does not have.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the device

from collections.abc import Callable
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags
import numpy as np
import safetensors.numpy

from experiments import intervals, rounds
from experiments.benchmarks.gpu import peers

# Rows that are no SwinV2, and what timm calls them.
_TIMM_NAMES = {
  "resnet50": "resnet50",
  "efficientnet_lite0": "tf_efficientnet_lite0",
  "convnext_tiny": "convnext_tiny",
  "dino_vits16": "vit_small_patch16_224",
  "dinov2_vits14": "vit_small_patch14_dinov2",
}
_BACKBONE = flags.DEFINE_string("backbone", "swinv2_t", f"A row of SwinV2, or of {', '.join(_TIMM_NAMES)}.")
_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the images.")
_WINDOW = flags.DEFINE_integer("window", 8, "Window of a SwinV2, where the maps are as large.")
_BATCH = flags.DEFINE_integer("batch", 4, "Images at once.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and matrix products.")
_CHANNELS_LAST = flags.DEFINE_bool("channels_last", False, "PyTorch keeps channels innermost, as ours are.")
_RUN = flags.DEFINE_list("run", ["folded", "unfolded", "timm", "timm_compiled"], "Which implementations.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Interleaved rounds.")
_REPEATS = flags.DEFINE_integer("repeats", 1, "Batches per implementation and round.")
_PEAK = flags.DEFINE_float("peak_tflops", None, "Of the device, for model FLOPs utilisation.")
_SEED = flags.DEFINE_integer("seed", 0, "Of weights and images.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")
_MEMORY = flags.DEFINE_bool("memory", True, "Measure memory too, in a process per implementation.")
_MEMORY_OF = flags.DEFINE_string("memory_of", None, "Internal: measure this implementation's memory.")
_FOLDER = flags.DEFINE_string("folder", None, "Internal: where weights and images lie.")


def prepare(folder: pathlib.Path) -> None:
  """Writes weights under timm's names, and images."""
  state = peers.random_state(_timm_model(), _SEED.value)
  safetensors.numpy.save_file(state, folder / "weights.safetensors")
  rng = np.random.default_rng(_SEED.value)
  images = rng.standard_normal((_BATCH.value, _SIZE.value, _SIZE.value, 3)).astype(np.float32)
  np.save(folder / "images.npy", images)


def _timm_model() -> Any:
  if _BACKBONE.value in _TIMM_NAMES:
    return peers.named(_TIMM_NAMES[_BACKBONE.value], _SIZE.value)
  from frozen_vision.backbones import families

  return peers.swinv2(families.backbone_config(_BACKBONE.value), _SIZE.value, _WINDOW.value)


def _backbone(folder: pathlib.Path) -> Any:
  import jax.numpy as jnp

  from frozen_vision.backbones import families

  dtype = jnp.dtype(_DTYPE.value)
  if _BACKBONE.value in _TIMM_NAMES:
    return families.load_backbone(folder / "weights.safetensors", name=_BACKBONE.value, dtype=dtype)
  config = families.backbone_config(_BACKBONE.value)
  windows = tuple(min(_WINDOW.value, _SIZE.value // (4 * 2**stage)) for stage in range(4))
  # Without its name, H and G load without their extra norms, which timm does not have.
  backbone = families.load_backbone(folder / "weights.safetensors", dtype=dtype, window_sizes=windows)
  assert backbone.config.depths == config.depths and backbone.config.embed_dim == config.embed_dim
  return backbone


@dataclasses.dataclass(frozen=True)
class _Prepared:
  """An implementation that is ready: a call of it, and what it took to get there.

  Attributes:
    device_bytes: after calls, the accelerator's memory that they need, weights included; None on CPU.
  """

  run: Callable[[], Any]
  compile_s: float
  device_bytes: Callable[[], int] | None


def _ours(folder: pathlib.Path, folded: bool) -> _Prepared:
  from flax import nnx
  import jax
  import jax.numpy as jnp

  from frozen_vision.freezing import partition

  backbone, dtype = _backbone(folder), jnp.dtype(_DTYPE.value)
  if folded:
    weights, apply = backbone.fold(), lambda folded, x: folded.embed(x)
  else:
    graphdef, state = nnx.split(backbone)
    weights, apply = partition.cast(state, dtype), lambda state, x: nnx.merge(graphdef, state).embed(x)
  del backbone
  images = jnp.asarray(np.load(folder / "images.npy"), dtype)
  started = time.perf_counter()
  program = jax.jit(apply).lower(weights, images).compile()
  seconds = time.perf_counter() - started
  memory = program.memory_analysis()
  needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
  on_cpu = jax.devices()[0].platform == "cpu"
  return _Prepared(
    lambda: jax.block_until_ready(program(weights, images)), seconds, None if on_cpu else lambda: needed
  )


def _flops(folder: pathlib.Path) -> int:
  """FLOPs of the matrix products of one image, whatever an implementation computes besides."""
  import jax
  import jax.numpy as jnp

  from frozen_vision.layers import storage as stored
  from frozen_vision.planning import flops

  image = jax.ShapeDtypeStruct((1, _SIZE.value, _SIZE.value, 3), jnp.float32)
  backbone = _backbone(folder)
  folded = stored.shapes(backbone)
  return flops.count(lambda folded, image: folded.embed(image), folded, image)


def _timm(folder: pathlib.Path, compiled: bool) -> _Prepared:
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  dtype = getattr(torch, _DTYPE.value)
  model = _timm_model()
  state = safetensors.numpy.load_file(folder / "weights.safetensors")
  state = {key: torch.from_numpy(value) for key, value in state.items()}
  missing, unexpected = model.load_state_dict(state, strict=False)
  if unexpected or any(not key.endswith(peers.COMPUTED) for key in missing):
    raise ValueError(f"timm's names have changed: missing {missing}, unexpected {unexpected}.")
  order = torch.channels_last if _CHANNELS_LAST.value else torch.contiguous_format
  model = model.to(device, dtype, memory_format=order)
  images = torch.from_numpy(np.load(folder / "images.npy")).permute(0, 3, 1, 2)
  images = images.contiguous(memory_format=order).to(device, dtype)
  apply = torch.compile(model) if compiled else model

  def run():
    with torch.inference_mode():
      output = apply(images)
      if device == "cuda":
        torch.cuda.synchronize()
      return output.float().cpu().numpy() if device == "cpu" else output

  started = time.perf_counter()
  run()
  seconds = time.perf_counter() - started
  if device == "cuda":
    torch.cuda.reset_peak_memory_stats()
  return _Prepared(run, seconds, torch.cuda.max_memory_allocated if device == "cuda" else None)


IMPLEMENTATIONS = {
  "folded": ("ours, folded", lambda folder: _ours(folder, True)),
  "unfolded": ("ours, as it trains", lambda folder: _ours(folder, False)),
  "timm": ("timm, eager", lambda folder: _timm(folder, False)),
  "timm_compiled": ("timm, torch.compile", lambda folder: _timm(folder, True)),
}


def _memory(folder: pathlib.Path, name: str) -> float:
  """MB that one implementation takes at most while it runs, weights included; what libraries take is not."""
  out = subprocess.run(
    [
      sys.executable,
      __file__,
      f"--memory_of={name}",
      f"--folder={folder}",
      *(
        f"--{flag}={flags.FLAGS[flag].value}"
        for flag in ("backbone", "image_size", "window", "batch", "dtype", "seed", "channels_last")
      ),
    ],
    check=True,
    capture_output=True,
    text=True,
  )
  return json.loads(out.stdout.splitlines()[-1])


def _report_memory() -> None:
  """In the process that `_memory` starts."""
  folder = pathlib.Path(_FOLDER.value)
  if _MEMORY_OF.value.startswith("timm"):
    peers.import_timm()  # so that what libraries take is in `before`
  else:
    from frozen_vision.backbones import families  # noqa: F401
  before = _resident("VmRSS")
  prepared = IMPLEMENTATIONS[_MEMORY_OF.value][1](folder)
  prepared.run()
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of compiling: begin anew
  for _ in range(2):
    prepared.run()
  peak = prepared.device_bytes() if prepared.device_bytes else _resident("VmHWM") - before
  print(json.dumps(peak / 1e6))


def _resident(field: str) -> int:
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  [line] = [line for line in lines if line.startswith(field)]
  return 1024 * int(line.split()[1])


def _main(argv: list[str]) -> None:
  del argv
  if _MEMORY_OF.value:
    return _report_memory()
  unknown = set(_RUN.value) - set(IMPLEMENTATIONS)
  if unknown or len(_RUN.value) < 2:
    raise ValueError(f"--run: two or more of {sorted(IMPLEMENTATIONS)}, found {_RUN.value}.")
  with tempfile.TemporaryDirectory() as folder:
    text = _compare(pathlib.Path(folder))
  from experiments import tables  # not before: it brings jax, which timm's memory does not count

  tables.publish(text, _OUT.value)


def _compare(folder: pathlib.Path) -> str:
  prepare(folder)
  memory = {name: _memory(folder, name) if _MEMORY.value else math.nan for name in _RUN.value}
  runs, compile_s, outputs, flops = {}, {}, {}, _flops(folder)
  for name in _RUN.value:
    prepared = IMPLEMENTATIONS[name][1](folder)
    runs[name], compile_s[name] = prepared.run, prepared.compile_s
    output = prepared.run()
    outputs[name] = np.asarray(output.float().cpu() if hasattr(output, "cpu") else output, np.float64)
  wanted = outputs[_RUN.value[-1]]
  tolerance = 1e-5 if _DTYPE.value == "float32" else 0.05
  for name, output in outputs.items():
    error = np.abs(output - wanted).max() / np.abs(wanted).max()
    if not error <= tolerance:
      raise ValueError(
        f"{name} and {_RUN.value[-1]} differ by {error:.2g} of the largest output; nothing to compare."
      )

  def repeated(run: Callable[[], Any]) -> Callable[[], None]:
    def run_all() -> None:
      for _ in range(_REPEATS.value):
        run()

    return run_all

  seconds = rounds.interleaved({name: repeated(run) for name, run in runs.items()}, _ROUNDS.value)
  return _table(seconds, memory, compile_s, flops)


def _table(
  seconds: dict[str, list[float]],
  memory: dict[str, float],
  compile_s: dict[str, float],
  flops: int,
) -> str:
  import jax
  import timm
  import torch

  from frozen_vision.planning import machines

  images = _BATCH.value * _REPEATS.value
  theirs = [name for name in seconds if name.startswith("timm")]
  header = [
    "images/s (median)",
    *(f"times {IMPLEMENTATIONS[name][0]} (95% interval)" for name in theirs),
    "peak memory MB",
    "compile s",
    *(["MFU"] if _PEAK.value else []),
  ]
  rows = ["| " + " | ".join(["implementation", *header]) + " |", "|---|" + "---|" * len(header)]
  for name, times in seconds.items():
    rate = images / np.median(times)
    cells = [f"{rate:.2f}"]
    for other in theirs:
      ratio, low, high = intervals.median_interval(np.asarray(seconds[other]) / np.asarray(times))
      cells.append("1" if other == name else f"{ratio:.2f} ({low:.2f} to {high:.2f})")
    cells += [f"{memory[name]:.0f}", "-" if name == "timm" else f"{compile_s[name]:.1f}"]
    if _PEAK.value:
      cells.append(f"{rate * flops / _PEAK.value / 1e12:.1%}")
    rows.append("| " + " | ".join([IMPLEMENTATIONS[name][0], *cells]) + " |")
  device = jax.devices()[0]
  on_cpu = device.platform == "cpu"
  where = f"{os.cpu_count()} cores of {machines.processor()}" if on_cpu else device.device_kind
  kind = f"window {_WINDOW.value}"
  if _BACKBONE.value in _TIMM_NAMES:
    kind = f"PyTorch with channels {'last' if _CHANNELS_LAST.value else 'first'}"
  return (
    f"Made by `experiments/benchmarks/backbone.py`: {_BACKBONE.value}, {_SIZE.value} px, {kind}, batch "
    f"{_BATCH.value}, {_DTYPE.value}, {_ROUNDS.value} interleaved rounds of {_REPEATS.value} batches, "
    f"{flops / 1e9:.1f} GFLOP of matrix products an image, on {where}; jax {jax.__version__}, "
    f"torch {torch.__version__}, timm {timm.__version__}. Outputs were compared before the timing.\n\n"
    + "\n".join(rows)
    + "\n"
  )


if __name__ == "__main__":
  app.run(_main)
