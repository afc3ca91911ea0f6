"""Runs the cells of a notebook in this interpreter and keeps what they show; needs no Jupyter.

  python tests/notebook.py FILE.ipynb OUT [NAME=VALUE ...]
  python tests/notebook.py FILE.ipynb --store

After the cell tagged `parameters`, the given values, Python literals, replace its own. OUT/cells.json lists
for every code cell what it printed and what its last expression is: its text, or for a picture the name of
a PNG in OUT. `--store` runs the notebook as it is and puts that into the file, as Jupyter would. Cells are
plain Python: shell commands and magics are a syntax error here.
"""

import ast
import base64
import io
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from PIL import Image


def code_cells(path: pathlib.Path) -> list[dict[str, Any]]:
  return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def run(path: pathlib.Path, out: pathlib.Path, parameters: dict[str, Any]) -> None:
  """Runs everything, in the notebook's own folder, and writes to `out`; an error in a cell ends it."""
  out = out.absolute()
  cells = code_cells(path)
  os.chdir(path.parent)
  names: dict[str, Any] = {"__name__": "__main__"}
  shown = []
  # One stream for all cells: a log handler keeps the one that it was given.
  stdout, sys.stdout = sys.stdout, io.StringIO()
  try:
    for index, cell in enumerate(cells):
      start = sys.stdout.tell()
      body = ast.parse("".join(cell["source"]), f"cell {index + 1}").body
      last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
      exec(compile(ast.Module(body, []), f"cell {index + 1}", "exec"), names)
      value = None
      if last is not None:
        value = eval(compile(ast.Expression(last.value), f"cell {index + 1}", "eval"), names)
      if "parameters" in cell["metadata"].get("tags", ()):
        unknown = sorted(set(parameters) - set(names))
        if unknown:
          raise NameError(f"{path.name} has no parameters {unknown}.")
        names.update(parameters)
      entry = dict(text=None if value is None else repr(value), picture=None)
      if isinstance(value, Image.Image):
        entry = dict(text=None, picture=f"{index}.png")
        value.save(out / entry["picture"])
      shown.append(dict(printed=sys.stdout.getvalue()[start:], **entry))
  finally:
    sys.stdout = stdout
  (out / "cells.json").write_text(json.dumps(shown, indent=1))


def store(path: pathlib.Path) -> None:
  """Runs the notebook and writes what its cells showed into it."""
  path = path.absolute()
  with tempfile.TemporaryDirectory() as out:
    run(path, pathlib.Path(out), {})
    shown = json.loads(pathlib.Path(out, "cells.json").read_text())
    content = json.loads(path.read_text())
    cells = (cell for cell in content["cells"] if cell["cell_type"] == "code")
    for count, (cell, entry) in enumerate(zip(cells, shown, strict=True), start=1):
      outputs = []
      if entry["printed"]:
        outputs.append(
          dict(output_type="stream", name="stdout", text=entry["printed"].splitlines(keepends=True))
        )
      if entry["picture"]:
        picture, file = Image.open(pathlib.Path(out, entry["picture"])).convert("RGB"), io.BytesIO()
        picture.save(file, format="JPEG", quality=85)
        entry["data"] = {
          "image/jpeg": base64.b64encode(file.getvalue()).decode(),
          "text/plain": [f"<picture of {picture.width} x {picture.height} pixels>"],
        }
      elif entry["text"] is not None:
        entry["data"] = {"text/plain": entry["text"].splitlines(keepends=True)}
      if "data" in entry:
        outputs.append(
          dict(output_type="execute_result", execution_count=count, metadata={}, data=entry["data"])
        )
      cell.update(execution_count=count, outputs=outputs)
  path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  _, notebook, folder, *assignments = sys.argv
  if folder == "--store":
    store(pathlib.Path(notebook))
  else:
    run(
      pathlib.Path(notebook),
      pathlib.Path(folder),
      {name: ast.literal_eval(value) for name, _, value in (text.partition("=") for text in assignments)},
    )
