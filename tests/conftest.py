"""Fixtures of several test modules."""

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache
import pytest

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
def quick_environment(cache_folder):
  """Environment variables that do the same for child processes."""
  return {name.upper(): str(value) for name, value in _OPTIONS.items()} | {
    "JAX_COMPILATION_CACHE_DIR": str(cache_folder)
  }
