"""The backbones of a report: what `--backbones` names, and what identifies their weights."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import pathlib
import re
from typing import Any

from absl import flags

from frozen_vision import messages
from frozen_vision.backbones import base, families
from frozen_vision.config import BackboneOptions
from frozen_vision.data import content
from frozen_vision.files import checkpoint_file, download, tensors

_GENERATED = ("random", "init")


@dataclasses.dataclass(frozen=True)
class Entry:
  """One backbone of a report.

  Attributes:
    label: what the page and the folders call it.
    source: what was asked for, without the label.
    options: the section `backbone` of every config.
    weights: identifies the weights: the fingerprint or SHA-256 of their file; "random".
    licence: of published weights; empty where it is not known.
    configs: {recipe: the config that takes the place of the recipe's}; none on the command line.
    changes: {recipe: options of its config that this entry alone has}; likewise.
  """

  label: str
  source: str
  options: BackboneOptions
  weights: str
  licence: str
  configs: Mapping[str, str] = dataclasses.field(default_factory=dict)
  changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def read(texts: Iterable[str]) -> list[Entry]:
  """The backbones that a list of texts names.

  Args:
    texts: each `SOURCE` or `LABEL=SOURCE`. A source is the name of shipped weights (`swinv2_nano`), the
      name of published weights (`efficientnet_lite0`), a file (our own `.safetensors`, or a public
      checkpoint), or `VARIANT:WEIGHTS`, which says the variant where a file does not, or takes `random`
      weights.

  Raises:
    FileNotFoundError, ConnectionError, ValueError: weights that are not there or do not fit, an unknown name,
      or two backbones of one label.
  """
  entries = [_read(text) for text in texts if text]
  labels = [entry.label for entry in entries]
  twice = sorted({label for label in labels if labels.count(label) > 1})
  if not entries:
    raise ValueError("A report needs backbones, such as --backbones=swinv2_nano,efficientnet_lite0.")
  if twice:
    first, second, *_ = (entry for entry in entries if entry.label == twice[0])
    raise ValueError(
      f"--backbones names {messages.listed(twice)} more than once; give one of them another label: "
      f"--backbones={first.source},other={second.source}."
    )
  return entries


def _read(text: str) -> Entry:
  label, equals, source = text.partition("=")
  if not equals or _is_file(text):  # such as lr=0.1.safetensors
    label, source = "", text
  head, colon, rest = source.partition(":")
  public = families.published_weights()
  if colon and head in families.variants():
    options = BackboneOptions(name=head, weights=rest)
  elif source in public:
    options = BackboneOptions(name=public[source].variant, weights=source)
  elif source in families.variants():
    options = BackboneOptions(name=source, weights="shipped")
  else:
    options = BackboneOptions(name=_variant(source), weights=source)
  named = ("shipped", *_GENERATED, *families.shipped_weights(), *public)
  is_path = options.weights not in named
  name = pathlib.Path(options.weights).stem if is_path else source.replace(":", "-")
  if is_path:  # so that the command of a cell runs in any folder
    path = str(pathlib.Path(options.weights).expanduser().absolute())
    source = f"{options.name}:{path}" if source != options.weights else path
    options = dataclasses.replace(options, weights=path)
  label = _folder_name(label or name)
  if options.weights in _GENERATED:
    return Entry(label, source, options, options.weights, "")
  path = families.weights_file(options.name if options.weights == "shipped" else options.weights)
  header = checkpoint_file.open_checkpoint(path).metadata
  options = dataclasses.replace(options, overrides=_sizes(options.name, header, path))
  licence = public[options.weights].licence if options.weights in public else ""
  if options.weights == "shipped" or options.weights in families.shipped_weights():
    licence = "Apache-2.0, with this package"
  return Entry(label, source, options, header.get("fingerprint") or _digest(path), licence)


def _is_file(source: str) -> bool:
  """Whether a source without a label is a file, or the variant and the file."""
  head, colon, rest = source.partition(":")
  path, _ = checkpoint_file.split_part(rest if colon and head in families.variants() else source)
  return path.exists()


def _folder_name(label: str) -> str:
  """A label as the name of a folder: no separators, and no `..`, which would leave the report's folder."""
  found = re.sub(r"[^\w.+-]+", "-", label).lstrip(".")
  if not found:
    raise ValueError(f"--backbones has the label {label!r}; expected one with a letter, such as mine=FILE.")
  return found


def _variant(source: str) -> str:
  """The variant that a file holds: the name in a file of ours, or the row whose sizes are the file's."""
  header = checkpoint_file.open_checkpoint(families.weights_file(source)).metadata
  if header.get("name") in families.variants():
    return header["name"]
  found = families.open_backbone(source).module.config
  fitting = [
    name
    for name, row in families.variants().items()
    if type(row) is type(found)
    and all(getattr(row, key) == getattr(found, key) for key in _named(row) if key not in row.weightless)
  ]
  if len(fitting) == 1:
    return fitting[0]
  reason = f"fits {messages.listed(fitting)}" if fitting else "fits no row of its family"
  raise ValueError(f"{source} {reason}; say which variant it is: --backbones=VARIANT:{source}.")


def _sizes(name: str, header: Mapping[str, str], path: pathlib.Path) -> dict[str, object]:
  """The sizes in which a file of ours differs from the row of its name; a public checkpoint has the row's."""
  row = families.backbone_config(name)
  if header.get("format") != tensors.FORMAT:
    return {}
  if header.get("name", name) != name:
    raise ValueError(f"{path} holds a {header['name']}, expected a {name}.")
  try:
    found = base.tuples(json.loads(header["config"]))
  except (KeyError, ValueError) as error:
    raise ValueError(f"{path} has no sizes of a {name} in its header: {error}.") from error
  return {
    key: found[key]
    for key in _named(row)
    if key not in row.weightless and key in found and found[key] != getattr(row, key)
  }


def _named(row: base.BackboneConfig) -> list[str]:
  return [field.name for field in dataclasses.fields(row)]


def _digest(path: pathlib.Path) -> str:
  """SHA-256 of a file, or of all files of a folder."""
  part, _ = checkpoint_file.split_part(path)
  if part.is_dir():
    files = sorted(file for file in part.iterdir() if file.is_file())
    return content.digest([download.file_sha256(file) for file in files])
  return download.file_sha256(part)


def describe(entries: Sequence[Entry]) -> str:
  """The entries as `--backbones` takes them, with their labels; a source with a comma is quoted."""
  return flags.CsvListSerializer(",").serialize([f"{entry.label}={entry.source}" for entry in entries])
