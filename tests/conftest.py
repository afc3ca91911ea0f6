"""How tests compile, type checks of the package, shared fixtures, and which skips are allowed."""

import os
import pathlib
import shutil
import tempfile

import jax
import jaxtyping
import pytest

from tests import skips, type_check

# Compiling dominates the time of tests at toy size. Four fifths of it on CPU are optimisations of LLVM and
# XLA's fusion emitters, which save a toy program no time. Child processes inherit the variables.
# FROZEN_VISION_TEST_COMPILATION=default compiles as users do.
_FLAGS = os.environ.get("XLA_FLAGS", "")
if os.environ.get("JAX_PLATFORMS") == "cpu" and os.environ.get("FROZEN_VISION_TEST_COMPILATION") != "default":
  # XLA reads its flags at the first computation. An unknown one, as this is to jax 0.12, ends the process.
  if "--xla_cpu_use_fusion_emitters" not in _FLAGS and jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_cpu_use_fusion_emitters=false".strip()
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "True"
  jax.config.update("jax_disable_most_optimizations", True)

# Every call of a function of these rooms checks its arguments and its result, shapes of arrays included.
# Child processes run without the checks. FROZEN_VISION_TEST_TYPES=0 leaves them out here too, and
# FROZEN_VISION_TEST_TYPES=all adds those of every other room; simulations of the report's statistics then
# take three times as long.
_CHECKED = (
  "frozen_vision.backbones.swinv2",
  "frozen_vision.backbones.video_swin",
  "frozen_vision.data",
  "frozen_vision.diagnostics",
  "frozen_vision.files",
  "frozen_vision.freezing",
  "frozen_vision.heads",
  "frozen_vision.metrics",
  "frozen_vision.necks",
  "frozen_vision.ops",
  "frozen_vision.probes",
  "frozen_vision.visualization",
)
_TYPES = os.environ.get("FROZEN_VISION_TEST_TYPES", "1")
if _TYPES != "0":
  rooms = ["frozen_vision"] if _TYPES == "all" else _CHECKED
  jaxtyping.install_import_hook(rooms, f"{type_check.__name__}.check")


# Most programs of a test are those of another, in this process, in other workers and in child processes: all
# share one folder of compiled programs.
_CACHE = "FROZEN_VISION_TEST_CACHE"
_CACHING = dict(
  jax_persistent_cache_min_compile_time_secs=0.0,
  jax_persistent_cache_min_entry_size_bytes=-1,
)


def pytest_configure(config):
  """Keeps compiled programs in the folder $FROZEN_VISION_TEST_CACHE, or in one that goes with the run."""
  if not os.environ.get(_CACHE):  # workers of pytest-xdist inherit what their controller sets
    folder = tempfile.mkdtemp(prefix="frozen_vision_tests.")
    os.environ[_CACHE] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
  options = dict(_CACHING, jax_compilation_cache_dir=os.environ[_CACHE])
  for name, value in options.items():
    jax.config.update(name, value)
  os.environ.update({name.upper(): str(value) for name, value in options.items()})


@pytest.fixture(scope="session")
def cache_folder() -> pathlib.Path:
  """Where compiled programs are kept."""
  return pathlib.Path(os.environ[_CACHE])


@pytest.fixture(scope="session", autouse=True)
def draw_whole_figures():
  """What draws whole figures of runs; it is not what runs call."""
  from tests import figures  # after the hook of the type checks

  return figures.draw_first_panels_alone()


@pytest.fixture
def without_type_checks():
  """Calls reach the package's own checks of its arguments, as they do outside of tests."""
  before = jaxtyping.config.jaxtyping_disable
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", before)


def _skip_message(report: pytest.TestReport | pytest.CollectReport) -> str:
  return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


def _skipped(reporter) -> dict[str, list[str]]:
  """Names of the skipped tests by what is missing, those of an unlisted reason by its message."""
  found = {}
  for report in reporter.stats.get("skipped", []):
    if hasattr(report, "wasxfail"):
      continue
    message = _skip_message(report)
    found.setdefault(skips.explanation(message) or f"NOT ALLOWED: {message}", []).append(report.nodeid)
  return found


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
  """Fails the run if a test was skipped for a reason that `tests/skips.py` does not list."""
  reporter = session.config.pluginmanager.get_plugin("terminalreporter")
  if reporter and any(reason.startswith("NOT ALLOWED") for reason in _skipped(reporter)):
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
  skipped = _skipped(terminalreporter)
  if skipped:
    terminalreporter.section("skipped")
  for reason, tests in sorted(skipped.items()):
    terminalreporter.line(f"{len(tests):4} {reason}")
    if reason.startswith("NOT ALLOWED"):
      for name in tests:
        terminalreporter.line(f"       {name}")
