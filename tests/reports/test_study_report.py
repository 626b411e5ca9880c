"""A study's report holds what its runs say, leaves nothing out silently, and stands on its own."""

import json
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.pages import check_page
from helpers.studies import make_study

from sparsecut.experiments.results import compute_results
from sparsecut.reports.findings import write_findings
from sparsecut.reports.study import draw_scatters, write_page, write_study_report
from sparsecut.schema import UserError

NAMES = ["llava", "sti", "sparsecut", "sparsecut_coarse"]
ACCURACIES = {"llava": 0.5, "sti": 0.51, "sparsecut": 0.8, "sparsecut_coarse": 0.65}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study of four variants with known accuracies, and its report."""
    folder = tmp_path_factory.mktemp("study")
    make_study(folder, NAMES, seeds=(0, 1, 2), accuracies=ACCURACIES)
    write_study_report(folder)
    return folder


@pytest.fixture(scope="module")
def results(study):
    """Its numbers, as its report holds them."""
    return json.loads((study / "report.json").read_text())


def test_the_three_files_agree(study, results):
    page = (study / "report.html").read_text()
    table = (study / "report.md").read_text()
    for name in NAMES:
        average = results["arms"][name]["results"]["main"]["average"]["value"]
        correct = []
        for seed in range(3):
            for line in get_predictions(study, name, seed).read_text().splitlines():
                correct.append(json.loads(line)["correct"])
        assert average == pytest.approx(np.mean(correct)), "equally many questions per level"
        assert f"{100 * average:.1f} (" in page
        assert f"| {name} | 3 | {100 * average:.1f} (" in table
    assert f"**{results['verdict']}**" in table
    assert results["headline"] == write_findings(results)


def test_the_page_is_whole_and_equal_each_time(study, results):
    page = (study / "report.html").read_text()
    outline = check_page(page)
    assert outline.verdicts == [results["verdict"]]
    assert outline.counts["svg"] >= 4 + 2 + len(NAMES)
    assert "is empty" not in page
    assert write_page(results, draw_scatters(results)) == page


def test_the_findings_are_computed(results):
    findings = write_findings(results)
    assert "sparsecut with" in findings[0]
    assert "clear of zero" in findings[0]
    affordable = [line for line in findings if "sparsecut_coarse with" in line]
    assert any("CLIP-L/336" in line for line in affordable), "the better one is dearer"
    assert any("not distinguishable from it (sti)" in line for line in findings)
    assert any("main and long" in line for line in findings)


def test_the_frontier_holds_the_variants_that_none_beats(results):
    assert results["frontier"]["large"] == ["llava", "sparsecut_coarse", "sparsecut"]


def test_the_drawings_are_files_of_their_own(study):
    names = sorted(path.name for path in study.glob("report.*.svg"))
    assert names == ["report.average-here.svg", "report.average-large.svg"]
    for name in names:
        root = ElementTree.parse(study / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        texts = {text.strip() for text in root.itertext()}
        assert texts.issuperset(NAMES)


def test_differences_are_paired_and_corrected(results):
    averages = {}
    for name in NAMES:
        averages[name] = results["arms"][name]["results"]["main"]["average"]["value"]
    gap = results["arms"]["sparsecut"]["results"]["main"]["difference"]
    average = gap["average"]
    assert average["value"] == pytest.approx(averages["sparsecut"] - averages["llava"])
    assert gap["comparisons"] == 3
    assert gap["corrected"]["low"] < average["low"] < average["high"] < gap["corrected"]["high"]
    assert "difference" not in results["arms"]["llava"]["results"]["main"]
    assert len(results["pairs"]["cells"]) == 6


def test_an_unfinished_study_is_reported_as_far_as_it_goes(study, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(study, part)
    shutil.rmtree(part / "runs" / "long")
    for seed in (1, 2):  # the baseline's one seed that is left is not the other variant's
        (part / "runs" / "main" / "sti" / str(seed) / "facts.json").unlink()
    shutil.rmtree(part / "runs" / "main" / "llava" / "0")
    shutil.rmtree(part / "runs" / "main" / "sparsecut")
    (part / "costs.json").unlink()
    page = write_study_report(part).read_text()
    outline = check_page(page)
    found = json.loads((part / "report.json").read_text())
    assert {"main/sti/1", "long/llava/0", "main/sparsecut/2"} <= set(found["missing"])
    sti = found["arms"]["sti"]["results"]["main"]
    assert sti["seeds"] == [0]
    assert "difference" not in sti
    assert found["arms"]["sparsecut"]["results"] == {}
    assert "main/sti seeds 1, 2" in page
    assert f"{len(found['missing'])} runs are missing" in outline.verdicts[0]
    assert "is empty" in page, "no cost is known, so the charts of cost have nothing to show"


def test_one_seed_is_called_one_seed(tmp_path):
    make_study(tmp_path, NAMES[:2], seeds=(0,), budgets=("main",))
    results = compute_results(tmp_path)
    assert any("one seed" in line for line in write_findings(results))
    assert results["arms"]["sti"]["results"]["main"]["difference"]["num_seeds"] == 1


def test_a_study_without_any_run_says_so(study, tmp_path):
    shutil.copy(study / "study.yaml", tmp_path)
    outline = check_page(write_study_report(tmp_path).read_text())
    assert "There is no verdict yet" in outline.verdicts[0]
    with pytest.raises(UserError, match=r"study\.yaml"):
        compute_results(tmp_path / "elsewhere")


def test_runs_that_answered_other_questions_are_refused(study, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(study, other)
    path = get_predictions(other, "sti", 1)
    path.write_text(path.read_text().replace("test/0/", "test/x/"))
    with pytest.raises(UserError, match=r"sti: .*test/x/"):
        compute_results(other)


def test_what_a_study_names_is_escaped(results):
    bad = "<script>alert(1)</script>"
    changed = json.loads(json.dumps(results).replace("sparsecut_coarse", bad))
    changed |= {"title": bad, "note": bad, "verdict": f"{bad}."}
    check_page(write_page(changed, draw_scatters(changed)))


def get_predictions(study, name: str, seed: int):
    """The file of a run's answers."""
    return study / "runs" / "main" / name / str(seed) / "eval" / "predictions.jsonl"
