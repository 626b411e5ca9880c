"""Makes a notebook of a page: texts become Markdown cells, Python blocks become code cells.

python docs/build_notebook.py                          # docs/five-minutes.ipynb
python docs/build_notebook.py docs/upgrade.md my.ipynb
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PAGE = Path(__file__).parent / "five-minutes.md"
BLOCK = re.compile(r"```python\n(.*?)\n```", re.S)
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def build_notebook(page: Path = PAGE) -> nbformat.NotebookNode:
    """Build the notebook of a page; equal pages give equal notebooks."""
    parts = BLOCK.split(page.read_text(encoding="utf-8"))
    cells = []
    for number, text in enumerate(parts):
        if text.strip():
            make = new_code_cell if number % 2 else new_markdown_cell
            cells.append(make(text.strip(), id=f"cell-{len(cells)}"))
    notebook = new_notebook(cells=cells, metadata={"kernelspec": KERNEL})
    nbformat.validate(notebook)
    return notebook


def main() -> None:
    """Write the notebook of the page that the command line names."""
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else page.with_suffix(".ipynb")
    nbformat.write(build_notebook(page), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
