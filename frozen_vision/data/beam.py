"""Preparing data on Apache Beam: the same work in the processes of one machine, or on a cluster.

Beam is optional, and imported where it is used.
"""

import base64
from collections.abc import Callable, Sequence
import dataclasses
import importlib.util
import os
import pathlib
import pickle
import tempfile
from typing import Any


@dataclasses.dataclass(frozen=True)
class Beam:
  """How pipelines are run.

  Attributes:
    flags: of Beam's `PipelineOptions`, such as `--runner=DirectRunner`.
    folder: where results of workers are collected; every worker must see it.
  """

  flags: tuple[str, ...]
  folder: str

  def pipeline_options(self) -> Any:
    """Beam's options; new ones each time, since pipelines change them."""
    from apache_beam.options import pipeline_options

    return pipeline_options.PipelineOptions(list(self.flags))

  def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Any]:
    """function(task) of each task, in order, computed by Beam's workers.

    Args:
      function: of a module, or a `functools.partial` of one; it and what it takes and returns must pickle.

    Raises:
      FileNotFoundError: results of workers do not reach this process.
      Exception: whatever a runner of Beam raises where a worker failed.
    """
    import apache_beam as beam

    os.makedirs(self.folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".beam_", dir=self.folder) as folder:
      with beam.Pipeline(options=self.pipeline_options()) as pipeline:
        _ = (
          pipeline
          | beam.Create(list(enumerate(tasks)))
          | beam.Reshuffle()
          | beam.Map(_call, function=function)
          | beam.io.WriteToText(os.path.join(folder, "results"))
        )
      found = {}
      for file in sorted(pathlib.Path(folder).iterdir()):
        for line in file.read_bytes().splitlines():
          index, result = pickle.loads(base64.b64decode(line))
          found[index] = result
    if len(found) < len(tasks):
      raise FileNotFoundError(
        f"Apache Beam's workers returned {len(found)} of {len(tasks)} results below {self.folder}; expected "
        "a folder that all of them see. Give one with --out."
      )
    return [found[index] for index in range(len(tasks))]


def _call(numbered: tuple[int, Any], function: Callable[[Any], Any]) -> str:
  index, task = numbered
  return base64.b64encode(pickle.dumps((index, function(task)))).decode("ascii")


def parse(text: str, folder: str | os.PathLike[str] | None) -> Beam | None:
  """What `--beam_options` asks for; None of an empty text.

  Args:
    text: `name=value` of Beam's options, or a name alone, with commas between them.
    folder: see `Beam`; by default that of temporary files, which workers on this machine see.

  Raises:
    ValueError: Beam is not installed, or the text is no list of options.
  """
  if not text:
    return None
  flags = [part.strip().removeprefix("--") for part in text.split(",")]
  if not all(part and part[0].isalpha() and " " not in part.partition("=")[0] for part in flags):
    raise ValueError(
      f"--beam_options is {text!r}; expected options of Apache Beam with commas between them, such as "
      "runner=DirectRunner,direct_num_workers=4,direct_running_mode=multi_processing."
    )
  if importlib.util.find_spec("apache_beam") is None:
    raise ValueError(
      "--beam_options needs Apache Beam, which is not installed: pip install apache-beam. Without it, "
      "--workers decodes in processes of this machine."
    )
  return Beam(tuple(f"--{part}" for part in flags), os.fspath(folder or tempfile.gettempdir()))
