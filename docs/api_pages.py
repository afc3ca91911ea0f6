"""Makes the pages of the API: one for every module, and one for the names of `frozen_vision` itself."""

import pathlib

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import frozen_vision

_PACKAGE = pathlib.Path(frozen_vision.__file__).resolve().parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Called by mkdocs once it knows the written pages."""
  files.append(File.generated(config, "names.md", content=_names()))
  for path in sorted(_PACKAGE.rglob("*.py")):
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    if parts == ("__init__",):  # in names.md
      continue
    module = ".".join((_PACKAGE.name, *(part for part in parts if part != "__init__")))
    page = "/".join("index" if part == "__init__" else part for part in parts)
    content = f"# {module.removeprefix('frozen_vision.')}\n\n`{module}`\n\n::: {module}\n"
    files.append(File.generated(config, f"modules/{page}.md", content=content))
  return files


def _names() -> str:
  """A table of what `import frozen_vision` offers, with links to where it is described."""
  rows = [
    f"| `fv.{name}` | [`{module}.{attribute}`][frozen_vision.{module}.{attribute}] |"
    for name, (module, attribute) in sorted(frozen_vision._SOURCES.items())
  ]
  return "\n".join(
    ["# Names", "", frozen_vision.__doc__, "", "| name | described at |", "|---|---|", *rows, ""]
  )
