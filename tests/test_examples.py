"""Examples run, in small."""

import importlib.util
from pathlib import Path

import pytest
from helpers.runs import write_records


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_a_model_is_upgraded_trained_and_asked(kind, tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[1] / "examples" / "upgrade_vlm.py"
    spec = importlib.util.spec_from_file_location("upgrade_vlm", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    write_records(tmp_path)
    for name, pattern in {"KINDS": "", "TONES": "^[0-3]$", "GROUP": "^(.)"}.items():
        monkeypatch.setattr(example, name, pattern)
    example.main(kind, str(tmp_path / "out"), str(tmp_path / "data.json"), str(tmp_path), steps=1)
    rows = capsys.readouterr().out.splitlines()[-9:]
    named = [
        "without shortcuts",
        *example.controls(kind),
        "upgraded",
        "its shortcuts switched off",
        *(f"its shortcut {i} switched off" for i in (1, 2)),
    ]
    assert [row[:28].strip() for row in rows if row[:28].strip() in named] == named
