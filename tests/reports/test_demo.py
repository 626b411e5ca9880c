"""The demo from end to end, small: four variants, one page, and nothing trained twice."""

from pathlib import Path

import pytest
from helpers.pages import check_page
from helpers.studies import rough_counts

from sparsecut.cli.demo import run_demo
from sparsecut.experiments.demo import FIVE_SEEDS, OVER_CONTROLS, VARIANTS, build_demo_study
from sparsecut.schema import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, page, lines of the log) of a quick demo."""
    folder = tmp_path_factory.mktemp("demo")
    lines = []
    with rough_counts():
        page = run_demo(folder, quick=True, workers=0, log=lines.append)
    return folder, page, lines


def test_variants_differ_in_fusion_and_output_only(tmp_path):
    study = build_demo_study(tmp_path)
    recipes = [study.get_recipe(run) for run in study.list_runs()]
    assert len({recipe.output for recipe in recipes}) == len(recipes) == len(VARIANTS)
    for recipe in recipes:
        assert recipe.stages == recipes[0].stages
        assert recipe.evaluate == recipes[0].evaluate
    methods = {recipe.fusion["method"] for recipe in recipes}
    assert methods == set(VARIANTS) == set(study.arms)


def test_the_page_shows_every_variant_and_some_answers(finished):
    _, page, lines = finished
    text = page.read_text()
    outline = check_page(text)
    for variant in VARIANTS.values():
        assert variant.title in text
        assert any(variant.title in line for line in lines)
    assert outline.counts["svg"] >= 8
    assert text.count("data:image/png;base64,") == 8
    assert "one run per variant" in text
    assert "mean nothing" in outline.verdicts[0]
    assert "is empty" in text, "four steps log one loss, which is no curve"


def test_five_seeds_and_the_one_tap_control_stand_beside_the_run(finished):
    _, page, lines = finished
    text = page.read_text()
    results = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    for name, published in FIVE_SEEDS.items():
        row = next(row for row in results.splitlines() if row.startswith(f"| {name} | 5 |"))
        assert f"| {published.average} |" in row
        assert f"| {published.above} |" in row
        assert published.title in text
        assert published.average in text
        assert published.variant is None or published.variant in VARIANTS
    for difference in OVER_CONTROLS.values():
        assert difference in text
        assert any(difference in line for line in lines)
        value, interval = difference.split(" points ")
        assert value in results
        assert interval.strip("()") in results


def test_what_is_finished_is_kept_and_another_demo_is_refused(finished):
    folder, page, lines = finished
    for number in range(1, 5):
        assert any(line.startswith(f"{number}/4  main ") for line in lines)
    again = []
    assert run_demo(folder, quick=True, log=again.append) == page
    assert any("4 finished, 0 to do" in line for line in again)
    with pytest.raises(UserError, match="pictures"):
        run_demo(folder, seed=1, quick=True, log=again.append)
