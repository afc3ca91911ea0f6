"""Names that options had before: in config files, in old runs and on the command line."""

from collections.abc import Mapping
import logging
from typing import Any

from frozen_vision.config import ConfigLike

_logger = logging.getLogger(__name__)

# Old names and new ones, of sections and of options; what lay below the old one lies below the new one.
RENAMED = {
  "detection.head_options": "detection.head",
  "segmentation.mask2former": "segmentation.head.mask2former",
  "segmentation.upernet": "segmentation.head.upernet",
  "segmentation.linear": "segmentation.head.linear",
  "action.video_swin": "action.head.video_swin",
  "action.attentive": "action.head.attentive",
  "action.average": "action.head.average",
  "detection.validation_share": "detection.validation_fraction",
}
# Sections that were a name alone: `detection.head="htc"` is `detection.head.name="htc"`.
NAMES = ("detection.head", "segmentation.head", "action.head")
# Options that a neck of either name had, and that only a BiFPN reads.
_OF_BIFPN = ("repeats", "separable", "norm")


def translate(values: ConfigLike, *, quiet: bool = False) -> dict[str, Any]:
  """Nested values of a config with old names replaced; each is logged unless `quiet`."""
  values, moved = _dicts(values), []
  for option in NAMES:
    section, last = _section(values, option)
    if section is not None and isinstance(section.get(last), str):
      section[last] = {"name": section[last]}
      moved.append((option, f"{option}.name"))
  for old, new in RENAMED.items():
    section, last = _section(values, old)
    if section is None or last not in section:
      continue
    taken = section.pop(last)
    target, name = _section(values, new, make=True)
    is_section = isinstance(taken, dict)
    target[name] = {**target.get(name, {}), **taken} if is_section else taken
    if taken or not is_section:
      moved.append((old, new))
  neck = values.get("detection", {}).get("neck")
  if isinstance(neck, dict) and neck.get("name", "fpn") == "fpn":
    for key in _OF_BIFPN:
      if key in neck:
        neck.setdefault("bifpn", {})[key] = neck.pop(key)
        moved.append((f"detection.neck.{key}", f"detection.neck.bifpn.{key}"))
  if not quiet:
    _log(moved)
  return values


def translate_changes(changes: Mapping[str, Any]) -> dict[str, Any]:
  """{dotted option: value} with old names replaced; each is logged."""
  translated: dict[str, Any] = {}
  moved = []
  for option, value in changes.items():
    name = option
    if (
      option in NAMES
      and not isinstance(value, Mapping)
      and not str(getattr(value, "text", "")).lstrip().startswith("{")
    ):
      name = f"{option}.name"
    for old, new in RENAMED.items():
      if option == old or option.startswith(f"{old}."):
        name = new + option.removeprefix(old)
    if name != option:
      moved.append((option, name))
    translated.pop(name, None)
    translated[name] = value
  _log(moved)
  return translated


def now_called(option: str) -> str | None:
  """The sentence for a config file that changes an option which has moved; None for any other name."""
  for old, new in RENAMED.items():
    if old.rpartition(".")[2] == option:
      return f"config.{old} is config.{new} now."
  return None


def _log(moved: list[tuple[str, str]]) -> None:
  for old, new in moved:
    _logger.info("config.%s is called config.%s now.", old, new)


def _section(values: dict[str, Any], option: str, *, make: bool = False) -> tuple[dict[str, Any] | None, str]:
  """(the dict that holds an option, the option's last name); None where there is no such dict."""
  *parts, last = option.split(".")
  for part in parts:
    values = values.setdefault(part, {}) if make else values.get(part)
    if not isinstance(values, dict):
      return None, last
  return values, last


def _dicts(values: Any) -> Any:
  return {key: _dicts(value) for key, value in values.items()} if hasattr(values, "items") else values
