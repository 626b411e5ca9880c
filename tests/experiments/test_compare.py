"""Finished evaluations side by side: figures, items on which they differ, and what cannot be
compared.
"""

import json

import pytest
from helpers.tiny import tiny_model
from PIL import Image
from typer.testing import CliRunner

from sparsecut.building import save
from sparsecut.cli import main as cli
from sparsecut.experiments import compare


def evaluated(folder, right, *, seed=0, images="pictures"):
    """A training run's folder with an evaluation: for every question, whether it was answered
    right.
    """
    (folder / "eval").mkdir(parents=True)
    records = [
        {
            "id": f"q{i}",
            "prompt": f"<image> what is number {i}",
            "images": [f"{i % 3}.png"],
            "prediction": "yes" if ok else "no",
            "reference": "yes",
            "correct": bool(ok),
            "group": "ab"[i % 2],
            "level": ("low", "high")[i % 2],
        }
        for i, ok in enumerate(right)
    ]
    (folder / "eval" / "predictions.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records)
    )
    (folder / "eval" / "result.json").write_text(json.dumps({"accuracy": sum(right) / len(right)}))
    (folder / "config.yaml").write_text(
        f"seed: {seed}\nevaluate: {{data: {{path: q.json, images: {images}}}}}\n"
    )
    return str(folder)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The current folder, with three pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 20), (90 * i, 30, 200)).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path


def test_differences_are_paired_over_the_same_items(home):
    a = evaluated(home / "runs" / "a" / "x", [1, 1, 0, 0] * 30)
    b = evaluated(home / "runs" / "b" / "x", [1, 1, 1, 0] * 30)
    found = compare.figures(compare.read_runs([a, b]))
    assert list(found["runs"]) == ["a", "b"], "named by what sets their paths apart"
    gap = found["runs"]["b"]["difference"]
    assert gap["average"]["value"] == pytest.approx(0.25) and gap["levels"]["low"][
        "value"
    ] == pytest.approx(0.5)
    assert gap["levels"]["high"]["low"] == gap["levels"]["high"]["high"] == 0
    assert found["num_differing"] == 30 and len(found["items"]) == 24
    assert found["runs"]["b"]["kinds"] == {"a": 1.0, "b": 0.5}


def test_folders_of_one_name_are_seeds_and_most_of_them_decide(home):
    first = [
        evaluated(home / f"a{s}", row, seed=s)
        for s, row in enumerate([[1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 1, 1]])
    ]
    other = [evaluated(home / f"b{s}", [1, 1, 0, 0], seed=s) for s in range(3)]
    runs = compare.read_runs([f"one={f}" for f in first] + [f"two={f}" for f in other])
    found = compare.figures(runs)
    assert found["runs"]["one"]["seeds"] == [0, 1, 2]
    assert found["runs"]["one"]["share"]["average"]["value"] == pytest.approx(
        (1 + 0 + 1 / 3 + 1) / 4
    )
    assert [item["id"] for item in found["items"]] == ["q1", "q3"], "gained and lost in turn"


def test_the_page_shows_pictures_answers_and_the_plan(home):
    a = evaluated(home / "a", [1, 0, 0, 1])
    evaluated(home / "b", [1, 1, 0, 0])
    save(*tiny_model(), home / "b" / "final")
    result = CliRunner().invoke(
        cli.app, ["compare", a, "b", "--out", "out"], catch_exceptions=False
    )
    assert (
        result.exit_code == 0
        and "1 seed" not in result.output
        and "wrote out/compare.html" in result.output
    )
    page = (home / "out" / "compare.html").read_text()
    assert (
        page.count("data:image/png;base64") == 2 and "what is number 1" in page and "<svg" in page
    )
    cost = json.loads((home / "out" / "compare.json").read_text())["runs"]["b"]["cost"]
    assert (
        cost["num_image_tokens"] == 4 and "| b | 1 |" in (home / "out" / "compare.md").read_text()
    )


def test_what_cannot_be_compared_is_refused(home):
    a = evaluated(home / "a", [1, 0, 0, 1])
    with pytest.raises(ValueError, match="needs two runs or more, but 1 was named"):
        compare.read_runs([a])
    with pytest.raises(
        ValueError,
        match=r"asked different questions \(4 and 5, for example q4 by one of them alone\)",
    ):
        compare.read_runs([a, evaluated(home / "b", [1, 0, 0, 1, 1])])
    with pytest.raises(ValueError, match="pictures holds no finished evaluation"):
        compare.read_runs([a, "pictures"])
    (home / "a" / "eval" / "result.json").unlink()
    with pytest.raises(ValueError, match="only a begun one: run the same command again"):
        compare.read_runs([a, a])
