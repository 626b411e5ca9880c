"""The notebook of docs/five-minutes.md runs from its first cell to its last, in an empty folder."""

import importlib.util
import re
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "five-minutes.md"
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
SPEC = importlib.util.spec_from_file_location("build_notebook", ROOT / "docs" / "build_notebook.py")
builder = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(builder)


def test_the_notebook_runs_in_five_minutes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = builder.build_notebook()
    start = time.monotonic()
    client = nbclient.NotebookClient(
        notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert time.monotonic() - start < 300
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    blocks = re.findall(r"```python\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.S)
    assert [cell.source for cell in codes] == blocks and len(blocks) > 4
    shown = [
        "".join(one.get("text", "") for one in cell.outputs if one.get("name") == "stdout")
        for cell in codes
    ]
    assert "vision encoder" in shown[0]
    assert re.search(r"\d+\.\d %", shown[3])
    assert len(shown[4].splitlines()) > 4
    assert (tmp_path / "runs" / "five-minutes" / "final" / "model.safetensors").is_file()
