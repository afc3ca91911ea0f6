"""Checkpoints: bit-exact restore, strict comparison, damage, kill -9."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import state_leaves
from tests import comparing
from tests.runs import states


@pytest.mark.parametrize("asynchronous", [True, False])
def test_everything_comes_back_bit_for_bit(tmp_path, asynchronous):
  state = states.make(3)
  with checkpoint.Checkpoints(tmp_path, asynchronous=asynchronous) as checkpoints:
    assert checkpoints.latest_step() is None
    checkpoints.save(3, state, states.META)
    assert checkpoints.latest_step() == 3
    restored, meta = checkpoints.restore(states.abstract(state))
  assert meta == {**states.META, "step": 3}
  comparing.assert_equal(restored, state)
  with checkpoint.Checkpoints(tmp_path) as again, warnings.catch_warnings():
    warnings.simplefilter("error")
    assert again.read_meta() == again.read_meta(3) == meta
    comparing.assert_equal(again.restore(state, step=3)[0], state)  # concrete arrays serve as the template
  assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints"]


def test_paths_are_those_of_the_model():
  leaves, _ = state_leaves.flatten(states.make())
  assert {
    "trainable/first/kernel",
    "ema/rest/1/bias",
    "opt_state/1/0/mu/rest/0/kernel",
    "opt_state/1/0/count",
    "key",
  } <= set(leaves)
  model_paths = ["/".join(map(str, p)) for p, _ in nnx.to_flat_state(states.make()["trainable"])]
  assert {f"trainable/{p}" for p in model_paths} == {p for p in leaves if p.startswith("trainable")}


def test_restores_on_another_mesh(tmp_path):
  """Saved on 8 devices in one layout, restored on 4 in another (in a process that has 8)."""
  script = f"""
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from frozen_vision.runs import checkpoints as checkpoint
devices = np.array(jax.devices())
assert devices.size == 8
put = lambda x, mesh, spec: jax.device_put(x, NamedSharding(mesh, spec))
one, two = Mesh(devices, "a"), Mesh(devices[:4].reshape(2, 2), ("a", "b"))
w, key = jax.random.normal(jax.random.key(1), (16, 8)), jax.random.split(jax.random.key(2), 8)
with checkpoint.Checkpoints({str(tmp_path)!r}) as c:
  c.save(1, dict(w=put(w, one, P("a")), key=put(key, one, P("a")), n=put(w[0], one, P())), {{}})
  target = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(two, spec))
  got, _ = c.restore(dict(w=target(w, P("b", "a")), key=target(key, P("b")), n=target(w[0], P())))
assert got["w"].sharding == NamedSharding(two, P("b", "a")), got["w"].sharding
assert got["key"].sharding == NamedSharding(two, P("b")), got["key"].sharding
np.testing.assert_array_equal(got["w"], w)
np.testing.assert_array_equal(got["n"], w[0])
np.testing.assert_array_equal(jax.random.key_data(got["key"]), jax.random.key_data(key))
"""
  _run(script, XLA_FLAGS="--xla_force_host_platform_device_count=8")


def test_an_asynchronous_save_survives_donation(tmp_path):
  """The next step donates the buffers that are being written."""
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = {f"w{i}": jnp.full((256, 1024), i, jnp.float32) for i in range(8)}
  template = states.abstract(state)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for n in range(1, 4):
      value = float(state["w0"][0, 0])
      checkpoints.save(n, state, {})
      for _ in range(3):
        state = step(state)
      restored, _ = checkpoints.restore(template, step=n)
      for i in range(8):
        assert (np.asarray(restored[f"w{i}"]) == value + i).all()


def test_a_mutated_numpy_leaf_is_saved_as_it_was(tmp_path):
  state = dict(x=jnp.ones(3), n=np.zeros((512, 512)))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    state["n"][:] = 7
    assert not checkpoints.restore(state)[0]["n"].any()


def test_an_existing_or_older_step_is_refused(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(5, states.make(), states.META)
    for step in (5, 4):
      with pytest.raises(ValueError, match=rf"Step {step} was not saved.*holds steps \[5\]"):
        checkpoints.save(step, states.make(1), states.META)
    comparing.assert_equal(checkpoints.restore(states.make())[0], states.make())


def test_retention_and_best_are_independent(tmp_path):
  saved = []
  with checkpoint.Checkpoints(tmp_path, keep=2, best_metric="eval/box_AP") as checkpoints:
    for step, ap in enumerate([0.1, 0.4, 0.4, float("nan"), 0.2], start=1):
      checkpoints.save(step, states.make(step), states.META)
      if checkpoints.save_best(step, states.make(step), states.META, {"eval/box_AP": ap, "eval/other": 1.0}):
        saved.append(step)
  assert saved == [1, 2]  # equal and NaN are not better

  def names(folder):
    return sorted(p.name for p in (tmp_path / folder).iterdir())

  assert names("checkpoints") == ["4", "5"] and names("best") == ["2"]
  with checkpoint.Checkpoints(tmp_path, best_metric="eval/box_AP") as checkpoints:
    assert checkpoints.latest_step() == 5 and checkpoints.best_step() == 2
    assert checkpoints.read_metrics() == {"eval/box_AP": 0.4, "eval/other": 1.0}
    restored, meta = checkpoints.restore(states.make(), best=True)
    assert meta["step"] == 2
    comparing.assert_equal(restored, states.make(2))
    # A run that resumed from an earlier checkpoint may do better, at a smaller or the same step.
    assert not checkpoints.save_best(1, states.make(1), states.META, {"eval/box_AP": 0.4})
    assert checkpoints.save_best(1, states.make(11), states.META, {"eval/box_AP": 0.5})
    assert checkpoints.best_step() == 1
    assert checkpoints.save_best(1, states.make(12), states.META, {"eval/box_AP": 0.6})
    comparing.assert_equal(checkpoints.restore(states.make(), best=True)[0], states.make(12))
    with pytest.raises(ValueError, match="'eval/box_AP'.*found.*box_AP50"):
      checkpoints.save_best(9, states.make(), states.META, {"box_AP50": 0.9})
  assert names("checkpoints") == ["4", "5"] and names("best") == ["1"]


def test_best_by_the_smallest(tmp_path):
  with checkpoint.Checkpoints(tmp_path, best_metric="loss", best_mode="min") as checkpoints:
    kept = [
      checkpoints.save_best(i, states.make(i), states.META, {"loss": x}) for i, x in enumerate([3, 2, 5])
    ]
    assert kept == [True, True, False] and checkpoints.best_step() == 1
  # A killed deletion of the old best: not preferred, and gone after the next save.
  (tmp_path / "best" / "7" / "state").mkdir(parents=True)
  with checkpoint.Checkpoints(tmp_path) as reader, warnings.catch_warnings():
    warnings.simplefilter("error")
    # Who evaluates need not know the metric.
    assert reader.best_step() == 1 and reader.read_metrics() == {"loss": 2.0}
  with checkpoint.Checkpoints(tmp_path, best_metric="loss", best_mode="min") as checkpoints:
    assert checkpoints.save_best(5, states.make(5), states.META, {"loss": 1.0})
  assert [p.name for p in (tmp_path / "best").iterdir()] == ["5"]


def test_a_mismatch_lists_every_key_before_reading_arrays(tmp_path):
  states.save(tmp_path, 1)
  shutil.rmtree(tmp_path / "checkpoints" / "1" / "state" / "d")
  wanted = states.abstract(states.make(1))
  wanted["extra"] = dict(scale=jnp.zeros((2, 5)))
  wanted["half"] = jnp.zeros(9, jnp.bfloat16)
  wanted["step"] = jnp.float32(0)
  wanted["epoch"] = 0.5
  wanted["key"] = jax.random.key(0, impl="rbg")
  del wanted["ids"], wanted["ema"]
  with checkpoint.Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError) as error:
    checkpoints.restore(wanted)
  text = str(error.value)
  for line in (
    "missing extra/scale float32[2,5]",
    "unexpected ids int64[1]",
    "unexpected ema/rest/0/kernel float32[4,4]",
    "half is bfloat16[8], expected bfloat16[9]",
    "step is int32[], expected float32[]",
    "epoch is int, expected float",
    "key is key<fry>[], expected key<rbg>[]",
    "checkpoints/1",
    "12 keys at fault",
  ):
    assert line in text, text


def test_a_part_is_restored_without_the_rest(tmp_path):
  states.save(tmp_path, 1)
  state = states.make(1)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    part = {k: state[k] for k in ("ema", "epoch")}
    restored, _ = checkpoints.restore(states.abstract(part), partial=True)
    comparing.assert_equal(restored, part)
    assert checkpoints.restore(dict(epoch=0), partial=True)[0] == dict(epoch=1)
    with pytest.raises(ValueError, match="unexpected opt_state"):
      checkpoints.restore(part)
    head = nnx.to_pure_dict(state["trainable"])
    del head["first"]
    with pytest.raises(ValueError, match="unexpected trainable/first/bias"):
      checkpoints.restore(dict(trainable=head), partial=True)
    with pytest.raises(ValueError, match="missing student/w float32"):
      checkpoints.restore(dict(student=dict(w=jnp.zeros(2))), partial=True)


def _empty_directory(step_dir):
  shutil.rmtree(step_dir)
  step_dir.mkdir()


def _without(*parts):
  def damage(step_dir):
    path = step_dir.joinpath(*parts)
    shutil.rmtree(path) if path.is_dir() else path.unlink()

  return damage


def _half_of_the_record(step_dir):
  path = step_dir / "meta" / "metadata"
  path.write_bytes(path.read_bytes()[:200])


def _half_of_the_data(step_dir):
  for path in (step_dir / "state").rglob("d/*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
  "damage",
  [
    _empty_directory,
    _half_of_the_record,
    _half_of_the_data,
    _without("state"),
    _without("state", "d"),
    _without("state", "manifest.ocdbt"),
    _without("meta"),
  ],
  ids=["empty", "record", "data", "state", "chunks", "manifest", "meta"],
)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's loop
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, damage):
  states.save(tmp_path, 1, 2)
  damage(tmp_path / "checkpoints" / "2")
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.warns(RuntimeWarning, match="checkpoints/2 cannot be read and is passed over"):
      restored, meta = checkpoints.restore(states.abstract(states.make()))
    assert meta["step"] == 1
    comparing.assert_equal(restored, states.make(1))
    assert checkpoints.latest_step() == 1
    with pytest.raises(ValueError, match="No checkpoint can be read.*\n.*checkpoints/2"):
      checkpoints.restore(states.make(), step=2)
    # Reading moved nothing; training on replaces the damaged one without deleting it.
    assert (tmp_path / "checkpoints" / "2").is_dir()
    with pytest.warns(RuntimeWarning, match="Renamed .*2.unreadable"):
      checkpoints.save(2, states.make(2), states.META)
    comparing.assert_equal(checkpoints.restore(states.make())[0], states.make(2))
  names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
  assert names == ["1", "2", "2.unreadable"]


def test_nothing_readable_is_an_error_and_not_a_fresh_start(tmp_path):
  states.save(tmp_path, 1, 2)
  for step in "12":
    _half_of_the_record(tmp_path / "checkpoints" / step)
  with checkpoint.Checkpoints(tmp_path) as checkpoints, pytest.warns(RuntimeWarning):
    with pytest.raises(ValueError, match="(?s)No checkpoint can be read.*/2: meta.*/1: meta"):
      checkpoints.latest_step()


def test_no_checkpoint_at_all(tmp_path):
  with checkpoint.Checkpoints(tmp_path / "new") as checkpoints:
    assert checkpoints.latest_step() is None and checkpoints.best_step() is None
    for call in (checkpoints.read_meta, lambda: checkpoints.restore(states.make(), best=True)):
      with pytest.raises(FileNotFoundError, match="No checkpoint in .*new"):
        call()
    with pytest.raises(FileNotFoundError, match="No checkpoint of step 3"):
      checkpoints.read_meta(3)
  assert not (tmp_path / "new").exists()  # looking creates nothing


def test_stray_directories(tmp_path):
  """Orbax takes any directory with a numeric name for a step, and then refuses smaller ones."""
  for name in ("90", "notes", "007", "3.orbax-checkpoint-tmp"):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.warns(RuntimeWarning, match="checkpoints/90 cannot be read"):
      assert checkpoints.latest_step() is None
    with pytest.warns(RuntimeWarning, match="Renamed"):
      checkpoints.save(1, states.make(1), states.META)
    checkpoints.save(2, states.make(2), states.META)
    assert checkpoints.latest_step() == 2
  names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert names == {"1", "2", "90.unreadable", "notes", "007"}


def test_a_damaged_best_is_replaced(tmp_path):
  with checkpoint.Checkpoints(tmp_path, best_metric="ap") as checkpoints:
    checkpoints.save_best(4, states.make(4), states.META, {"ap": 0.9})
  _half_of_the_record(tmp_path / "best" / "4")
  with checkpoint.Checkpoints(tmp_path, best_metric="ap") as checkpoints:
    with pytest.warns(RuntimeWarning):
      assert checkpoints.save_best(5, states.make(5), states.META, {"ap": 0.1})
    assert checkpoints.best_step() == 5


def test_what_cannot_be_saved_is_named(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for state, meta, message in (
      (dict(a=dict(b="text")), {}, "a/b is a str"),
      (dict(a=np.array([None])), {}, "a is a NumPy array of objects"),
      (dict(a=jnp.ones(2)), dict(config=dict(x=[1, {2}])), r"meta.config.x\[1\] is a set"),
    ):
      with pytest.raises(TypeError, match=message):
        checkpoints.save(1, state, meta)
    with pytest.raises(ValueError, match="every leaf has a path"):
      checkpoints.save(1, jnp.ones(2), {})
    with pytest.raises(ValueError, match="no array"):
      checkpoints.save(1, dict(a=1), {})
    with pytest.raises(TypeError, match="step is 1.0"):
      checkpoints.save(1.0, dict(a=jnp.ones(2)), {})
    with pytest.raises(ValueError, match="best_metric"):
      checkpoints.save_best(1, dict(a=jnp.ones(2)), {}, {"ap": 1})
  with pytest.raises(ValueError, match="best_mode"):
    checkpoint.Checkpoints(tmp_path, best_mode="largest")
  assert not list(tmp_path.iterdir())


_SAVER = """
import sys
import jax, numpy as np, jax.numpy as jnp
from frozen_vision.runs import checkpoints as checkpoint
directory, size = sys.argv[1], int(sys.argv[2])
def state(step):
  bits = np.random.default_rng(step).integers(0, 256, (4, size), np.uint8)
  return {"w%d" % i: jnp.asarray(b) for i, b in enumerate(bits)} | {"key": jax.random.key(step)}
with checkpoint.Checkpoints(directory, best_metric="ap") as checkpoints:
  step = checkpoints.latest_step() or 0
  if step:
    checkpoints.restore(state(step))
  print("ready", flush=True)
  while True:
    step += 1
    checkpoints.save(step, state(step), {"examples": 8 * step})
    checkpoints.save_best(step, state(step), {}, {"ap": step})
    if step % 3 == 0:
      checkpoints.wait()
    print("confirmed" if step % 3 == 0 else "started", step, flush=True)
"""


def test_kill_9_in_the_middle_of_saves(tmp_path):
  size, rounds, rng = 400_000, 3, random.Random(0)
  namespace = {}
  exec(
    _SAVER[_SAVER.index("def state") : _SAVER.index("with ")],
    dict(np=np, jnp=jnp, jax=jax, size=size),
    namespace,
  )
  steps = []
  for _ in range(rounds):
    child = subprocess.Popen(
      [sys.executable, "-c", _SAVER, str(tmp_path), str(size)],
      stdout=subprocess.PIPE,
      text=True,
      env=_environment(),
      cwd=_ROOT,
    )
    try:
      output = [child.stdout.readline() for _ in range(1 + rng.randint(1, 5))]
      assert output[0] == "ready\n"
      time.sleep(rng.uniform(0, 0.1))
    finally:
      child.kill()
      output += child.communicate()[0].splitlines(keepends=True)
    assert child.returncode == -signal.SIGKILL
    confirmed = [int(s.split()[1]) for s in output if s.startswith("confirmed") and s[-1] == "\n"]
    with checkpoint.Checkpoints(tmp_path) as checkpoints, warnings.catch_warnings():
      warnings.simplefilter("error")  # a fallback would warn: the newest listed must be whole
      step = checkpoints.latest_step()
      if step is None:  # killed in the very first save
        assert not confirmed and not steps
        continue
      assert step >= max(confirmed + steps, default=0)
      restored, meta = checkpoints.restore(namespace["state"](step))
      assert meta == {"examples": 8 * step, "step": step}
      comparing.assert_equal(restored, namespace["state"](step))
      best = checkpoints.best_step()
      if best is not None:
        assert best in (step - 1, step)
        comparing.assert_equal(checkpoints.restore(restored, best=True)[0], namespace["state"](best))
    steps.append(step)
  assert steps


_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _environment(**more):
  return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT), **more}


def _run(script, **environment):
  subprocess.run([sys.executable, "-c", script], check=True, env=_environment(**environment))
