"""Parts 2 and 7: pooled features in bfloat16, ours folded against timm eager and compiled."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from experiments.benchmarks.gpu import models, peers, report, timing
from frozen_vision.backbones import families

# Norm of the difference between the bfloat16 outputs of two implementations, over the norm of the output.
_TOLERANCE = 0.1
# With less left, autotuning a model is not begun.
_TUNING_SECONDS = 60
_OURS = "ours, folded"


@dataclasses.dataclass(frozen=True)
class Case:
  """A model, the side of its images, the batches of which the fastest is taken, and its name in timm.

  Without a name it is a SwinV2, whose windows timm takes as an argument.
  """

  backbone: models.Backbone
  image_size: int
  batches: tuple[int, ...]
  timm: str = ""

  def peer(self, *, tiny: bool) -> peers.Timm:
    """timm's module of the same shape; of toy shape for a SwinV2 alone."""
    if self.timm:
      return peers.Timm(peers.named(self.timm, self.image_size), channels_last="vit" not in self.timm)
    config = self.backbone.shapes(tiny=tiny).config
    if config.extra_norm_interval:
      raise ValueError("timm's SwinV2 has no extra norms; set extra_norm_interval=0.")
    return peers.Timm(peers.swinv2(config, self.image_size, config.window_sizes[0]))

  def folded(self, state: dict[str, np.ndarray], *, tiny: bool) -> Any:
    """Our inference program with weights under timm's names."""
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "weights.safetensors"
      safetensors.numpy.save_file(state, path)
      name, options = self.backbone.name, dict(self.backbone.options)
      if not self.timm:  # timm's SwinV2, and a toy of it, is known by its shapes
        name, options["depths"] = None, self.backbone.shapes(tiny=tiny).config.depths
      return families.load_backbone(path, name=name, dtype=jnp.bfloat16, **options).fold()


def cases(*, tiny: bool) -> tuple[Case, ...]:
  """SwinV2."""
  if tiny:
    return tuple(Case(models.swinv2(name, (8, 8, 4, 2)), 64, (2,)) for name in ("swinv2_b", "swinv2_l"))
  return (
    Case(models.swinv2("swinv2_b", (16, 16, 16, 8)), 256, (64, 256)),
    Case(models.swinv2("swinv2_l", (24, 24, 24, 12)), 384, (32, 128)),
  )


def cases_of_families(*, tiny: bool) -> tuple[Case, ...]:
  """Vision transformers and convolutional networks."""

  def case(name: str, timm: str, side: int, *batches: int) -> Case:
    return Case(models.Backbone(name), 64 if tiny else side, (2,) if tiny else batches, timm)

  vit = case("dinov3_vitl16", "vit_large_patch16_dinov3", 512, 32, 64)
  resnet = case("resnet50", "resnet50", 224, 256, 512)
  if tiny:
    return vit, resnet
  return (
    vit,
    resnet,
    case("augreg_vitb16", "vit_base_patch16_224", 224, 128, 512),
    case("convnext_base", "convnext_base", 224, 128, 256),
    case("tf_efficientnet_b4", "tf_efficientnet_b4", 380, 64, 128),
    case("augreg_vitl16", "vit_large_patch16_224", 224, 128, 256),
  )


def embed(folded: Any, images: jax.Array) -> jax.Array:
  """The measured program: images on the device to pooled vectors."""
  return folded.embed(images)


def run(table: report.Report, cases: Callable[..., tuple[Case, ...]]) -> None:
  chosen = cases(tiny=table.tiny)
  absent = peers.why_absent(tiny=table.tiny)
  if table.tiny and any(case.timm for case in chosen):
    absent = "timm is not measured: it has no toys of these models."
  if absent:
    table.note(absent)
  for case in chosen:
    _measure(
      table,
      case,
      None if absent else {"timm, eager": peers.Timm.eager, "timm, torch.compile": peers.Timm.compiled},
    )
  if absent:
    return
  table.note("Outputs of all implementations were compared before the timing, which is in turns.")
  tuned = {"timm, max-autotune": lambda timm: timm.compiled("max-autotune-no-cudagraphs")}
  for case in chosen:
    if table.tiny or table.seconds_left() < _TUNING_SECONDS:
      table.note(f"{case.backbone.name}: torch.compile's max-autotune is left out, for want of time.")
      continue
    _measure(table, case, tuned)


def _measure(table: report.Report, case: Case, forms: dict[str, Callable] | None) -> None:
  """Adds a row for ours and for each of timm's forms, measured again with each form that has compiled.

  Args:
    forms: {name: timm's module -> what is called}; None where there is no timm.
  """
  timm = case.peer(tiny=table.tiny) if forms else None
  folded = case.folded(timm.state, tiny=table.tiny) if timm else case.backbone.folded(tiny=table.tiny)
  images = {
    batch: np.asarray(models.random_images(batch, case.image_size), np.float32) for batch in case.batches
  }
  batch, program = _best_batch(table, case, folded, images)
  on_device = jnp.asarray(images[batch], jnp.bfloat16)
  runs = {_OURS: timing.repeat(program.call, folded, on_device)}
  details = {_OURS: dict(gib=program.bytes / 2**30, compile_s=program.compile_s)}
  if timm is None:
    _add_rows(table, case, batch, program, runs, details)
    return
  reference = np.asarray(program.call(folded, on_device), np.float32)
  tensor = timm.images(images[batch])
  names = [_OURS, *forms]
  for name, make in forms.items():
    if _add_peer(table, runs, details, name, timm, lambda make=make: make(timm), tensor, reference):
      table.remove(model=case.backbone.name, implementation=names)
      _add_rows(table, case, batch, program, runs, details)
  peers.release()


def _add_rows(
  table: report.Report,
  case: Case,
  batch: int,
  program: timing.Compiled,
  runs: dict[str, timing.Run],
  details: dict[str, dict[str, float | None]],
) -> None:
  """Times all in turns."""
  taken = timing.interleave(
    runs, rounds=6 if table.tiny else 11, round_s=0.0 if table.tiny else 0.4, seconds=table.seconds_left() / 4
  )
  for name, seconds in taken.items():
    rate = batch / statistics.median(seconds)
    table.add(
      model=case.backbone.name,
      pixels=case.image_size,
      batch=batch,
      implementation=name,
      rate=rate,
      ms=timing.milliseconds(seconds),
      mfu=table.utilisation(program.flops / batch * rate, 1.0),
      ratio=None if name == _OURS else timing.ratio(seconds, taken[_OURS]),
      **details[name],
    )


def _best_batch(
  table: report.Report, case: Case, folded: Any, images: dict[int, np.ndarray]
) -> tuple[int, timing.Compiled]:
  """The batch with most images a second among those that the compiler and the device take."""
  compiled = timing.compile_all(
    {batch: (embed, (folded, models.image_shape(batch, case.image_size))) for batch in case.batches},
    quick=table.tiny,
  )
  rates = {}
  for batch, program in compiled.items():
    if isinstance(program, Exception):
      table.note(f"{case.backbone.name}, batch {batch}: {report.first_line(program)}")
      continue
    run = timing.repeat(program.call, folded, jnp.asarray(images[batch], jnp.bfloat16))
    try:
      [seconds] = timing.interleave({"": run}, rounds=3, round_s=0.0 if table.tiny else 0.2).values()
    except jax.errors.JaxRuntimeError as error:
      table.note(f"{case.backbone.name}, batch {batch}: {report.first_line(error)}")
      continue
    rates[batch] = batch / statistics.median(seconds)
  if not rates:
    raise MemoryError(f"{case.backbone.name}: none of the batches {case.batches} runs on this device.")
  table.note(
    f"{case.backbone.name}, ours folded, images a second by batch: "
    + ", ".join(f"{batch}: {rate:,.0f}" for batch, rate in rates.items())
    + "."
  )
  best = max(rates, key=rates.get)
  return best, compiled[best]


def _add_peer(
  table: report.Report,
  runs: dict[str, timing.Run],
  details: dict[str, dict[str, float | None]],
  name: str,
  timm: peers.Timm,
  make: Callable,
  tensor: Any,
  reference: np.ndarray,
) -> bool:
  """Compiles a peer and compares its output; False, and a note, if it fails."""
  started = time.perf_counter()
  try:
    apply = make()
    output = timm.output(apply, tensor)
  except Exception as error:  # a compiler that is absent, memory: whatever it is, the others count
    table.note(f"{name}: {report.first_line(error)}")
    return False
  seconds = time.perf_counter() - started
  error = float(np.linalg.norm(output - reference) / np.linalg.norm(reference))
  if not error <= _TOLERANCE:
    table.note(f"{name} is not timed: its output and ours differ by {error:.2g} of their size.")
    return False
  runs[name] = timm.runner(apply, tensor)
  peak = timm.peak_bytes(runs[name])
  details[name] = dict(
    gib=None if peak is None else peak / 2**30,
    compile_s=None if name == "timm, eager" else seconds,
    error=error,
  )
  return True


_COLUMNS = dict(
  model="model",
  pixels="px",
  batch="batch",
  implementation="implementation",
  rate="images/s (median)",
  ms="ms a batch (range)",
  mfu="MFU %",
  ratio="times as long as ours (95% interval)",
  error="output differs from ours by",
  gib="peak GiB",
  compile_s="compile s",
)
PART = report.Part(
  "Inference of SwinV2 in bfloat16: images to pooled vectors", _COLUMNS, functools.partial(run, cases=cases)
)
PART_OF_FAMILIES = report.Part(
  "Inference of vision transformers and convolutional networks in bfloat16: images to pooled vectors",
  _COLUMNS,
  functools.partial(run, cases=cases_of_families),
)
