"""Clears the outputs of notebooks, so that git holds only what people wrote.

  python .github/clear_notebooks.py notebooks/*.ipynb

A hook of pre-commit: the exit code is 1 if any file changed. Needs nothing but Python.
"""

import json
import pathlib
import sys

# What editors leave in a cell's metadata, beside the tags that people set.
EXECUTION = {"collapsed", "execution", "ExecuteTime", "scrolled"}


def cleared(text: str) -> str:
  """A notebook's JSON without outputs, execution counts and widgets' state."""
  notebook = json.loads(text)
  notebook["metadata"].pop("widgets", None)
  for cell in notebook["cells"]:
    for key in EXECUTION & cell["metadata"].keys():
      del cell["metadata"][key]
    if cell["cell_type"] == "code":
      cell["outputs"], cell["execution_count"] = [], None
  return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main(paths) -> int:
  changed = 0
  for path in map(pathlib.Path, paths):
    before = path.read_text(encoding="utf-8")
    after = cleared(before)
    if json.loads(after) != json.loads(before):
      path.write_text(after, encoding="utf-8")
      sys.stdout.write(f"cleared {path}\n")
      changed = 1
  return changed


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
