"""The training benchmark runs from the command line and measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

SMALL = [
    "--vision-depth",
    "2",
    "--vision-width",
    "64",
    "--language-depth",
    "2",
    "--language-width",
    "64",
    "--batch",
    "1",
]


def test_plans_take_turns_and_ratios_are_to_the_first(tmp_path):
    script, out = Path(__file__).parents[2] / "benchmarks" / "train.py", tmp_path / "figures.json"
    plans = ["--plan", "llava", "--plan", "sparsecut_input"]
    run = [
        sys.executable,
        str(script),
        *plans,
        *SMALL,
        "--repeats",
        "2",
        "--vocabulary",
        "99",
        "--json",
        str(out),
    ]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert [row["plan"] for row in rows] == ["llava", "sparsecut_input"] * 2
    for row in rows:
        assert 0 < row["utilisation"] < 1.5 and row["tokens_per_second"] > 0
        assert row["least"] <= row["speed"] <= row["most"]
        assert row["plan"] != "llava" or row["speed"] == 1
    assert "utilisation" in done.stdout and "MiB" in done.stdout
