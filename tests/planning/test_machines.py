"""Names of machines, what is known of them, and what is said of those that are not there."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from frozen_vision.planning import machines


@pytest.mark.parametrize(
  "name",
  [
    "",
    "v5e",
    "v5e:",
    "v4:2x2",
    "v5e:8",
    "v5e:4x4x4",
    "v5p:4x4",
    "v6e:0x4",
    "v5e:8x8x",
    "cpu",
    "cpu:0",
    "cpu:-1",
    "cpu:2x2",
    "gpu:8",
  ],
)
def test_an_unknown_machine_is_an_error_that_lists_the_known_ones(name):
  with pytest.raises(ValueError) as error:
    machines.describe(name)
  for text in (f"--topology={name} is unknown", "v5e: 1x1", "8x8", "v5p: 2x2x1", "4x4x4", "v6e: ", "cpu:N"):
    assert text in str(error.value)


def test_virtual_devices_share_the_memory_of_this_machine():
  machine = machines.describe("cpu:1")
  assert [device.platform for device in machine.devices] == ["cpu"]
  assert machine.kind == "cpu" and machine.peak_flops is None
  assert 2**28 < machine.device_memory < 2**50


def test_too_late_for_more_virtual_devices():
  jax.devices()
  with pytest.raises(ValueError, match="cpu:4096: jax is already in use here, with .* process of its own"):
    machines.describe("cpu:4096")


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
  with pytest.raises(ValueError, match=r"v5e:8x8 needs libtpu.*: pip install 'frozen_vision\[tpu\]'"):
    machines.describe("v5e:8x8")


def test_the_table_has_every_slice_in_the_form_that_its_chip_has():
  for name, chip in machines.CHIPS.items():
    assert all(len(size.split("x")) == chip.axes for size in chip.slices), name


@pytest.fixture
def libtpu(monkeypatch):
  """Skips without libtpu (pip install 'frozen_vision[tpu]'), which ends a process that has flags for CPU."""
  pytest.importorskip("libtpu")
  monkeypatch.delenv("XLA_FLAGS", raising=False)


@pytest.mark.parametrize(
  "name, devices", [("v5e:1x1", 1), ("v5e:8x8", 64), ("v5p:4x4x4", 64), ("v6e:4x4", 16)]
)
def test_tpu_slices(libtpu, name, devices):
  machine = machines.describe(name)
  assert len(machine.devices) == devices
  assert {device.platform for device in machine.devices} == {"tpu"}


def test_a_slice_that_does_not_exist(libtpu):
  with pytest.raises(ValueError, match="v5e:3x3: libtpu refuses .* Slices of v5e are 1x1, 2x2"):
    machines.describe("v5e:3x3")


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_memory_is_what_the_compiler_compares_with(libtpu, name):
  machine = machines.describe(name)
  place = jax.sharding.SingleDeviceSharding(machine.devices[0])
  large = jax.ShapeDtypeStruct((2**36,), jnp.float32, sharding=place)
  with pytest.raises(jax.errors.JaxRuntimeError) as error:
    jax.jit(lambda x: x * 2).lower(large).compile()
  available = float(re.search(r"available HBM \(([\d.]+)G\)", str(error.value))[1])
  assert machine.device_memory == int(available * 2**30)


def test_the_processor_has_a_name():
  assert machines.processor().strip()
