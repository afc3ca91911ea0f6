"""Type checks of the package in tests, fixtures of several test modules, and which skips are allowed."""

import os

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache
import jaxtyping
import pytest

from tests import skips, type_check

# Every call of a function of the package checks its arguments and its result, shapes of arrays included.
# Child processes run without the checks. FROZEN_VISION_TEST_TYPES is 1 with them and 0 without.
if os.environ.get("FROZEN_VISION_TEST_TYPES", "0") != "0":
  jaxtyping.install_import_hook("frozen_vision", f"{type_check.__name__}.check")


# Compiling dominates the time of runs at toy size: half of it is LLVM's optimisation, which toy sizes do not
# need, and most programs of a module are the same.
_OPTIONS = dict(
  jax_disable_most_optimizations=True,
  jax_persistent_cache_min_compile_time_secs=0.0,
  jax_persistent_cache_min_entry_size_bytes=-1,
)


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
  return tmp_path_factory.mktemp("jax_cache")


@pytest.fixture
def quick_compilation(cache_folder):
  """Compiles with few optimisations, and reads what an earlier test compiled from disk."""
  options = dict(_OPTIONS, jax_compilation_cache_dir=str(cache_folder))
  before = {name: jax.config.values[name] for name in options}
  jax_cache.reset_cache()
  for name, value in options.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  jax_cache.reset_cache()


@pytest.fixture
def without_type_checks():
  """Calls reach the package's own checks of its arguments, as they do outside of tests."""
  before = jaxtyping.config.jaxtyping_disable
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def quick_environment(cache_folder):
  """Environment variables that do the same for child processes."""
  return {name.upper(): str(value) for name, value in _OPTIONS.items()} | {
    "JAX_COMPILATION_CACHE_DIR": str(cache_folder)
  }


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
