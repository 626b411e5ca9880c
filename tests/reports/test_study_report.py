"""A study's report holds what its runs say, leaves nothing out silently, and stands on its own."""

import json
import re
import shutil
import xml.dom.minidom

import numpy as np
import pytest
from helpers.studies import DEPTHS, SPECS, made_up_study

from sparsecut.experiments.results import figures
from sparsecut.methods import make_plan
from sparsecut.reports import plots
from sparsecut.reports.study import headline, write_study_report

ARMS = ["llava", "sti", "sparsecut", "sparsecut_coarse"]
SHARES = {"llava": 0.5, "sti": 0.51, "sparsecut": 0.8, "sparsecut_coarse": 0.65}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study of four arms with known accuracies."""
    return made_up_study(tmp_path_factory.mktemp("study"), ARMS, seeds=(0, 1, 2), accuracies=SHARES)


@pytest.fixture(scope="module")
def found(study):
    """Its figures."""
    return figures(study)


def test_the_three_files_agree(study):
    path = write_study_report(study)
    page, table = path.read_text(), (study / "report.md").read_text()
    stored = json.loads((study / "report.json").read_text())
    for name in ARMS:
        average = stored["arms"][name]["results"]["main"]["average"]["value"]
        rows = [
            json.loads(line)
            for s in range(3)
            for line in _predictions(study, name, s).read_text().splitlines()
        ]
        assert average == pytest.approx(
            np.mean([row["correct"] for row in rows])
        )  # equally many questions per level
        assert f"{100 * average:.1f} (" in page and f"| {name} | 3 | {100 * average:.1f} (" in table
    assert stored["headline"] == headline(stored)


def test_the_page_needs_nothing_else(study):
    page = write_study_report(study).read_text()
    assert not re.search(r"<script|<link|(src|href)=|url\(", page)
    for drawing in re.findall(r"<svg.*?</svg>", page):
        xml.dom.minidom.parseString(drawing)


def test_the_headline_is_computed(found):
    words = headline(found)
    assert words[0].startswith("Highest average: sparsecut with") and "clear of zero" in words[0]
    assert any(
        "at CLIP-L/336 + 7B: sparsecut_coarse with" in line for line in words
    )  # 1.03 times, the better one is dearer
    assert any("not told apart from it (sti)" in line for line in words)
    assert any(
        line.startswith("Between the budgets main and long the lead of sparsecut") for line in words
    )


def test_the_frontier_holds_the_arms_that_none_beats(found):
    assert found["frontier"]["large"] == ["llava", "sparsecut_coarse", "sparsecut"]


def test_differences_are_paired_and_corrected(found):
    gap = found["arms"]["sparsecut"]["results"]["main"]["difference"]
    values = {n: found["arms"][n]["results"]["main"]["average"]["value"] for n in ARMS}
    assert gap["average"]["value"] == pytest.approx(values["sparsecut"] - values["llava"])
    assert gap["comparisons"] == 3
    assert (
        gap["corrected"]["low"]
        < gap["average"]["low"]
        < gap["average"]["high"]
        < gap["corrected"]["high"]
    )
    assert "difference" not in found["arms"]["llava"]["results"]["main"]
    assert len(found["pairs"]["cells"]) == 6


def test_an_unfinished_study_is_reported_as_far_as_it_goes(study, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(study, part)
    shutil.rmtree(part / "runs" / "long")
    for seed in (1, 2):  # the baseline's one seed that is left is not the other arm's
        (part / "runs" / "main" / "sti" / str(seed) / "facts.json").unlink()
    shutil.rmtree(part / "runs" / "main" / "llava" / "0")
    shutil.rmtree(part / "runs" / "main" / "sparsecut")
    (part / "costs.json").unlink()
    page = write_study_report(part).read_text()
    found = json.loads((part / "report.json").read_text())
    assert (
        "main/sti/1" in found["missing"]
        and "long/llava/0" in found["missing"]
        and "main/sparsecut/2" in found["missing"]
    )
    assert (
        found["arms"]["sti"]["results"]["main"]["seeds"] == [0]
        and "difference" not in found["arms"]["sti"]["results"]["main"]
    )
    assert found["arms"]["sparsecut"]["results"] == {}
    assert "main/sti seeds 1, 2" in page and "runs are missing" in page


def test_one_seed_is_said_to_be_one_seed(tmp_path):
    found = figures(made_up_study(tmp_path, ARMS[:2], seeds=(0,), budgets=("main",)))
    assert any("one seed in common" in line for line in headline(found))
    assert found["arms"]["sti"]["results"]["main"]["difference"]["num_seeds"] == 1


def test_a_study_without_any_run_says_so(study, tmp_path):
    shutil.copy(study / "study.yaml", tmp_path)
    assert "nothing to say yet" in write_study_report(tmp_path).read_text()
    with pytest.raises(ValueError, match=r"holds no study.yaml; give"):
        figures(tmp_path / "elsewhere")


def test_runs_that_were_asked_other_questions_are_refused(study, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(study, other)
    path = _predictions(other, "sti", 1)
    path.write_text(path.read_text().replace("test/0/", "test/x/"))
    with pytest.raises(ValueError, match=r"sti: seed 0 and seed 1 were asked different questions"):
        figures(other)


def test_labels_of_a_crowded_plot_cover_nothing():
    rng = np.random.default_rng(0)
    points = []
    for i, name in enumerate([*SPECS, "one_more", "two_more", "three_more"]):
        y = 0.6 + 0.2 * rng.random()
        cost = float(rng.choice([1, 1.02, 1.22, 1.25, 4]))
        points.append(plots.Point(name, cost, y, y - 0.02, y + 0.02, i % 6, i % 9 == 0))
    drawn = plots.scatter(points, ["one", "two"], x_label="cost")
    found = re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)"[^>]*font-size="11" stroke[^>]*>([^<]+)<', drawn
    )
    assert sorted(name for _, _, name in found) == sorted(p.name for p in points)
    boxes = [
        (float(x), float(y) - 9, float(x) + 0.5 * 11 * len(n), float(y) + 2) for x, y, n in found
    ]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


@pytest.mark.parametrize("name", list(SPECS))
def test_every_plan_can_be_sketched(name):
    drawing = plots.plan_sketch(make_plan(SPECS[name], *DEPTHS), *DEPTHS)
    plan = make_plan(SPECS[name], *DEPTHS)
    assert drawing.count('stroke="#222"') == sum(len(s.flat_taps) for s in plan.shortcuts)
    assert drawing.count(f'fill="{plots.INK}"') == len(plan.resolved_taps(8)) + len(
        {s.layer for s in plan.shortcuts}
    )


def _predictions(study, arm: str, seed: int):
    return study / "runs" / "main" / arm / str(seed) / "eval" / "predictions.jsonl"
