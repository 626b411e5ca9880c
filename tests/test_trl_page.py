"""The blocks of docs/trl-and-peft.md run as printed, in their order."""

import math
import re
from pathlib import Path

import pytest

from sparsecut.shapes.questions import split_scene
from sparsecut.shapes.scenes import draw

PAGE = Path(__file__).parents[1] / "docs" / "trl-and-peft.md"


def test_the_page_of_other_trainers_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    draw(split_scene("test/0/0")).save("picture.png")
    room = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), room)
    assert math.isfinite(room["trainer"].state.log_history[-1]["train_loss"])
    labels = room["collate"](room["trainer"].train_dataset[:1])["labels"]
    assert 0 < (labels != -100).sum() < labels.numel() / 4
    assert not any("lora" in name for name, _ in room["merged"].named_modules())
