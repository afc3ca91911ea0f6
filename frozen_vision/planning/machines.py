"""This machine, and those that a plan can be made for without owning them: TPU slices, virtual devices."""

from collections.abc import Sequence
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import platform
import re

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of TPU.

  Attributes:
    axes: of a slice of such chips.
    memory: bytes of HBM that one program may use. Google names 16, 95 and 32 GB; this is what libtpu's
      compiler compares with ("exceeds available HBM (15.75G)", version 0.0.42).
    peak_flops: bfloat16, per second (cloud.google.com/tpu/docs/v5e, v5p and v6e).
    slices: those of one to 256 chips that people rent.
  """

  axes: int
  memory: int
  peak_flops: float
  slices: tuple[str, ...]


_GIB = 2**30
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
CHIPS = {
  "v5e": Chip(2, int(15.75 * _GIB), 197e12, _SQUARES),
  "v5p": Chip(3, int(95.74 * _GIB), 459e12, _CUBES),
  "v6e": Chip(2, int(31.25 * _GIB), 918e12, _SQUARES),
}


@dataclasses.dataclass(frozen=True)
class Machine:
  """Devices that programs can be compiled for.

  Attributes:
    name: as it was asked for, such as `v5e:8x8`.
    kind: `tpu` or `cpu`.
    devices: the compiler's; those of a TPU hold nothing and run nothing.
    device_memory: bytes that one device has for a program.
    peak_flops: of one device, per second; None where it is not known.
  """

  name: str
  kind: str
  devices: Sequence[jax.Device]
  device_memory: int
  peak_flops: float | None


def describe(name: str) -> Machine:
  """The machine of a name: `v5e:8x8`, `v5p:4x4x4`, `v6e:4x4` (chips along each axis), or `cpu:8`.

  In a process that has not used jax yet, jax then stays on the CPU, so that planning takes no accelerator.

  Raises:
    ValueError: an unknown name, libtpu is not installed, or jax runs already with fewer CPU devices.
  """
  kind, _, size = name.partition(":")
  if kind == "cpu" and re.fullmatch(r"[1-9]\d*", size):
    return Machine(name, "cpu", _cpu_devices(int(size)), _host_memory() // int(size), None)
  chip = CHIPS.get(kind)
  if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{chip.axes - 1}}}", size):
    known = "; ".join(f"{key}: {', '.join(row.slices)}" for key, row in CHIPS.items())
    raise ValueError(
      f"--topology={name} is unknown. Give a TPU and its chips along each axis, such as v5e:8x8 ({known}), "
      "or cpu:N for N virtual devices of this machine."
    )
  return Machine(name, "tpu", _tpu_devices(kind, size), chip.memory, chip.peak_flops)


def processor() -> str:
  """The name of this machine's CPU; its architecture where no name is known."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:  # no Linux
    lines = []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
  """Versions of the packages that compile, on which a plan depends."""
  found = {"jax": jax.__version__}
  try:
    found["libtpu"] = importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    pass
  return found


def _tpu_devices(kind: str, size: str) -> Sequence[jax.Device]:
  """Devices of a slice, from libtpu, which needs no TPU for it."""
  if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
    raise ValueError(
      f"--topology={kind}:{size} needs libtpu, which compiles for TPUs on any x86-64 Linux machine and is "
      "not installed: pip install 'frozen_vision[tpu]'. --topology=cpu:8 needs nothing."
    )
  # Read when libtpu starts. Without them it asks a metadata server for the machine that it is not on, and
  # lets one process at a time have it.
  variables = dict(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-1",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
  )
  for variable, value in variables.items():
    os.environ.setdefault(variable, value)
  jax.config.update("jax_platforms", "cpu")
  # Hosts have four chips, except for a slice of a single one.
  one = dict(chips_per_host_bounds=[1, 1, 1]) if math.prod(map(int, size.split("x"))) == 1 else {}
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{size}", **one).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f"--topology={kind}:{size}: libtpu refuses ({str(error).splitlines()[0]}). Slices of {kind} are "
      f"{', '.join(CHIPS[kind].slices)}."
    ) from error


def _cpu_devices(count: int) -> Sequence[jax.Device]:
  if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    try:
      jax.config.update("jax_num_cpu_devices", count)
      jax.config.update("jax_platforms", "cpu")
    except RuntimeError:  # jax is in use already, with as many devices as it has
      pass
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise ValueError(
      f"--topology=cpu:{count}: jax is already in use here, with {len(devices)} CPU device(s). Plan in a "
      "process of its own, or set "
      f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before it starts."
    )
  return devices[:count]


def _host_memory() -> int:
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
