"""What the hosts of a run must agree on: what they were started with, and that a batch cannot be read.

Config, data, weights and versions are compared before the first step. Hosts that differ would train on other
examples than the run says, average gradients of different networks, or wait for each other in an exchange
that the others never begin. A host that fails alone leaves the others waiting, too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import fnmatch
import importlib.metadata
import platform
import socket
from typing import Any, TypeVar

from flax import nnx
import jax
import numpy as np

from frozen_vision import messages
from frozen_vision.config import Config
from frozen_vision.data import content, fingerprint, images
from frozen_vision.devices import processes
from frozen_vision.files import trees
from frozen_vision.freezing import prepare
from frozen_vision.metrics import gather
from frozen_vision.runs import workdir as workdir_lib

_PACKAGES = (
  "frozen_vision",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "numpy",
  "pillow",
)
# Options that may differ between hosts: each has its own disks and cores.
_OWN_OPTIONS = ("loader.*", "headline")
_SHOWN = 5
_Value = TypeVar("_Value")


def compare_start(config: Config, data: Mapping[str, fingerprint.Fingerprint], mode: str) -> None:
  """Compares configs, data and versions of all hosts; raises a ValueError that names hosts and differences.

  Args:
    config: of this host.
    data: fingerprints of this host's sources, as `data.reports` has them.
    mode: what this host is about to do, such as "train".
  """
  if jax.process_count() > 1:
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    options = workdir_lib.to_json(config.to_dict(), "config")
    _compare("start", {"versions": versions, "config": {"mode": mode, **options}, "data": dict(data)})


def compare_weights(model: prepare.Model, trainable: nnx.State | None, newest_step: int | None) -> None:
  """Compares weights and the newest checkpoint of all hosts; raises as `compare_start`.

  Args:
    model: with the fingerprints of what is frozen.
    trainable: what a run begins with, arrays on a mesh; those that every host holds as a whole are compared.
      None where it is read from the checkpoint in any case.
    newest_step: step of the newest checkpoint in the workdir as this host sees it; None for none.
  """
  if jax.process_count() > 1:
    kept = {
      path: np.asarray(leaf.addressable_data(0))
      for path, leaf in (trees.flatten(trainable) if trainable is not None else {}).items()
      if isinstance(leaf, jax.Array) and leaf.is_fully_replicated
    }
    weights = {"trainable": content.digest(kept)[:16], "frozen": model.feature_key, "teacher": model.teacher}
    _compare(
      "weights",
      {"weights": workdir_lib.to_json(weights, "weights"), "checkpoints": {"newest step": newest_step}},
    )


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "none"


def _compare(what: str, facts: Mapping[str, Any]) -> None:
  """Exchanges facts by subject, and raises a ValueError where they differ."""
  processes.wait_for_all(f"comparison of {what}")
  everyone = gather.gather_objects({"host": socket.gethostname(), **facts})
  sentences = [sentence for index in range(1, len(everyone)) for sentence in differences(everyone, index)]
  if sentences:
    raise ValueError(
      f"The hosts of this run were not started alike: {messages.listed(sentences, _SHOWN)}. Give all of them "
      "the same data, config, weights and versions."
    )


def differences(everyone: Sequence[Mapping[str, Any]], index: int) -> Iterator[str]:
  """What host `index` has otherwise than host 0, a clause for each difference.

  Args:
    everyone: of every host its name, `host`, and facts by subject: `versions`, `config`, `data`, ...
  """
  first, other = everyone[0], everyone[index]
  names = [f"host {number} ({facts['host']})" for number, facts in ((0, first), (index, other))]
  for subject in (name for name in first if name not in ("host", "data")):
    for key, (there, here) in workdir_lib.changes(first[subject], other.get(subject)).items():
      if not (subject == "config" and any(fnmatch.fnmatchcase(key, own) for own in _OWN_OPTIONS)):
        yield f"{names[1]} has {subject} {key} {here} where {names[0]} has {there}"
  for split, value in fingerprint.changed(first.get("data", {}), other.get("data", {})).items():
    if isinstance(value, tuple):
      yield f"{names[1]} found {value[1]:,} {split} examples where {names[0]} found {value[0]:,}"
    else:
      yield f"the {split} examples of {names[1]} have other {value} than those of {names[0]}"


def read_together(read: Callable[[], _Value]) -> _Value:
  """What a function reads in this process; all processes call this, and raise if it fails in one of them.

  Raises:
    FileError, ValueError: names the host; with one process whatever `read` raises.
  """
  if jax.process_count() == 1:
    return read()
  value = failure = None
  try:
    value = read()
  except Exception as error:
    failure = error
  for found in gather.gather_objects(None if failure is None else describe_failure(failure)):
    if found is not None:
      raise failure_of(found) from failure
  return value


def describe_failure(error: Exception) -> dict[str, str]:
  """What the other processes are told of an error in reading a batch; see `failure_of`."""
  found = {"host": f"host {jax.process_index()} ({socket.gethostname()})"}
  if isinstance(error, images.FileError):
    return found | {"name": error.name, "reason": error.reason, "kind": error.kind}
  return found | {"text": f"{type(error).__name__}: {error}"}


def failure_of(found: Mapping[str, str]) -> ValueError:
  """The error that every process raises for a failure which one of them describes."""
  if "name" in found:
    return images.FileError(f"{found['host']}: {found['name']}", found["reason"], found["kind"])
  return ValueError(f"{found['host']} cannot read its part of the next batch: {found['text']}")
