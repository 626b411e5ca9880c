"""Finished evaluations side by side: numbers, items that differ, and what cannot be compared."""

import json

import pytest
from helpers.pages import check_page
from helpers.tiny import tiny_model
from PIL import Image
from typer.testing import CliRunner

from sparsecut.building import save
from sparsecut.cli import main as cli
from sparsecut.experiments.compare import compare_runs, read_runs
from sparsecut.schema import UserError

BAD = "<script>alert(1)</script>"


def write_run(folder, correct, *, seed=0, wrong_answer="no"):
    """Write a training run's folder with an evaluation: for every question, whether it is right."""
    (folder / "eval").mkdir(parents=True)
    lines = []
    for i, is_right in enumerate(correct):
        record = {
            "id": f"q{i}",
            "prompt": f"<image> what is number {i}",
            "images": [f"{i % 3}.png"],
            "prediction": "yes" if is_right else wrong_answer,
            "reference": "yes",
            "correct": bool(is_right),
            "group": "ab"[i % 2],
            "level": ("low", "high")[i % 2],
        }
        lines.append(json.dumps(record) + "\n")
    (folder / "eval" / "predictions.jsonl").write_text("".join(lines))
    result = {"accuracy": sum(correct) / len(correct)}
    (folder / "eval" / "result.json").write_text(json.dumps(result))
    recipe = f"seed: {seed}\nevaluate: {{data: {{path: q.json, images: images}}}}\n"
    (folder / "config.yaml").write_text(recipe)
    return str(folder)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The current folder, with three images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 20), (90 * i, 30, 200)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def test_differences_are_paired_over_the_same_items(home):
    a = write_run(home / "runs" / "a" / "x", [1, 1, 0, 0] * 30)
    b = write_run(home / "runs" / "b" / "x", [1, 1, 1, 0] * 30)
    comparison = compare_runs(read_runs([a, b]))
    assert list(comparison["runs"]) == ["a", "b"], "named by what sets their paths apart"
    gap = comparison["runs"]["b"]["difference"]
    assert gap["average"]["value"] == pytest.approx(0.25)
    assert gap["levels"]["low"]["value"] == pytest.approx(0.5)
    assert gap["levels"]["high"]["low"] == gap["levels"]["high"]["high"] == 0
    assert comparison["num_differing"] == 30
    assert len(comparison["items"]) == 24
    assert comparison["runs"]["b"]["kinds"] == {"a": 1.0, "b": 0.5}


def test_folders_of_one_name_are_seeds_and_most_of_them_decide(home):
    arguments = []
    for seed, correct in enumerate([[1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 1, 1]]):
        arguments.append(f"one={write_run(home / f'a{seed}', correct, seed=seed)}")
    for seed in range(3):
        arguments.append(f"two={write_run(home / f'b{seed}', [1, 1, 0, 0], seed=seed)}")
    comparison = compare_runs(read_runs(arguments))
    one = comparison["runs"]["one"]
    assert one["seeds"] == [0, 1, 2]
    assert one["share"]["average"]["value"] == pytest.approx((1 + 0 + 1 / 3 + 1) / 4)
    assert [item["id"] for item in comparison["items"]] == ["q1", "q3"], "gained, lost, in turn"


def test_runs_of_different_seeds_are_paired_by_question(home):
    runs = [
        f"one={write_run(home / 'a', [1, 0, 0, 1], seed=0)}",
        f"two={write_run(home / 'b', [1, 1, 0, 1], seed=1)}",
    ]
    gap = compare_runs(read_runs(runs))["runs"]["two"]["difference"]
    assert gap["average"]["value"] == pytest.approx(0.25)


def test_the_page_shows_images_answers_and_the_plan(home):
    a = write_run(home / "a", [1, 0, 0, 1], wrong_answer=BAD)
    write_run(home / "b", [1, 1, 0, 0])
    save(*tiny_model(), home / "b" / "final")
    arguments = ["compare", a, "b", "--out", "out"]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "out/compare.html" in result.output
    page = (home / "out" / "compare.html").read_text()
    outline = check_page(page)
    assert outline.verdicts[0] in result.output
    assert page.count("data:image/png;base64") == 2
    assert "what is number 1" in page
    assert "&lt;script&gt;" in page, "answers of a model are escaped"
    stored = json.loads((home / "out" / "compare.json").read_text())
    assert stored["runs"]["b"]["cost"]["num_image_tokens"] == 4
    assert "| b | 1 |" in (home / "out" / "compare.md").read_text()


def test_what_cannot_be_compared_is_refused(home):
    a = write_run(home / "a", [1, 0, 0, 1])
    with pytest.raises(UserError, match="two runs or more, but 1"):
        read_runs([a])
    longer = write_run(home / "b", [1, 0, 0, 1, 1])
    with pytest.raises(UserError, match=r"different questions \(4 and 5, .* q4"):
        read_runs([a, longer])
    with pytest.raises(UserError, match=r"^images .*result\.json"):
        read_runs([a, "images"])
    (home / "a" / "eval" / "result.json").unlink()
    with pytest.raises(UserError, match="run the same command again"):
        read_runs([a, a])
