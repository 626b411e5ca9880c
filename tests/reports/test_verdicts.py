"""A verdict claims no more than its intervals allow, and names what does as well."""

import pytest

from sparsecut.reports.verdicts import (
    count_needed_images,
    describe_uses,
    judge_ablation,
    judge_comparison,
    judge_study,
)


def estimate(value, low, high) -> dict:
    """An estimate as the reports' JSON files hold it."""
    return {"value": value, "low": low, "high": high, "p": 0.01}


def study(alike: bool = False, gap=(0.254, 0.171, 0.337), note="", missing=()) -> dict:
    """The numbers of a study of a baseline, a variant, and a control."""
    wide = estimate(*gap)
    difference = {"average": wide, "corrected": wide, "note": note}
    results = {"cut": 0.9, "plain": 0.6, "control": 0.7}
    arms = {}
    for name, value in results.items():
        arms[name] = {"results": {"main": {"average": estimate(value, value - 0.1, value + 0.1)}}}
    arms["cut"]["results"]["main"]["difference"] = difference
    p = 0.5 if alike else 0.001
    cells = [["cut", "control", {**estimate(0.2, -0.1, 0.3), "corrected_p": p}]]
    return {
        "main": "main",
        "baseline": "plain",
        "arms": arms,
        "pairs": {"cells": cells},
        "missing": list(missing),
    }


def test_a_clear_lead_is_stated_with_its_interval():
    verdict = judge_study(study())
    assert "cut is above plain by 25.4 points (17.1 to 33.7)" in verdict
    assert "control" not in verdict


def test_a_control_that_does_as_well_is_named():
    assert "control cannot be distinguished" in judge_study(study(alike=True))


def test_a_lead_that_includes_zero_is_no_lead():
    verdict = judge_study(study(gap=(0.254, -0.01, 0.5)))
    assert verdict.startswith("No variant is clearly above plain")
    assert "-1.0 to 50.0" in verdict


def test_one_seed_and_missing_runs_are_mentioned():
    verdict = judge_study(study(note="one seed", missing=["main/plain/1"]))
    assert "one seed" in verdict
    assert "1 run is missing" in verdict


def test_a_baseline_that_is_best_is_called_so():
    results = study()
    results["baseline"] = "cut"
    assert "No variant is above cut" in judge_study(results)


def test_runs_are_sorted_into_above_below_and_neither():
    def run(*values):
        return {"difference": {"average": estimate(*values), "note": ""}}

    runs = {"a": {}, "b": run(0.2, 0.1, 0.3)}
    assert "b is above a by 20.0 points" in judge_comparison({"baseline": "a", "runs": runs})
    runs["b"] = run(-0.2, -0.3, -0.1)
    verdict = judge_comparison({"baseline": "a", "runs": runs})
    assert "b is below a by 20.0 points (10.0 to 30.0)" in verdict
    runs |= {"c": run(0.1, -0.1, 0.3), "d": run(0.3, 0.2, 0.4)}
    verdict = judge_comparison({"baseline": "a", "runs": runs})
    assert verdict.index("d (+30.0") < verdict.index("b (-20.0") < verdict.index("c (+10.0")


def explanation(losses: dict[int, tuple], together: tuple) -> dict:
    """What an ablation found: the change without each shortcut, and without all of them."""
    conditions = {"all": {}}
    for number, values in losses.items():
        conditions[f"without {number}"] = {"difference": {"average": estimate(*values)}}
    conditions["input only"] = {"difference": {"average": estimate(*together)}}
    shortcuts = [{"taps": [number], "layer": number} for number in range(4)]
    return {"conditions": conditions, "shortcuts": shortcuts}


def test_the_shortcut_that_is_missed_most_is_named():
    losses = {1: (-0.1, -0.2, -0.05), 2: (-0.4, -0.5, -0.3), 3: (0.0, -0.1, 0.1)}
    verdict = judge_ablation(explanation(losses, (-0.5, -0.6, -0.4)))
    assert "2 (tap 2 to layer 2)" in verdict
    assert "40.0 points (30.0 to 50.0)" in verdict
    assert "of the other 2, 1 is clearly missed" in verdict


def test_shortcuts_that_carry_the_same_are_not_called_useless():
    losses = {1: (0.0, -0.1, 0.1), 2: (0.0, -0.1, 0.1)}
    assert "without all of them" in judge_ablation(explanation(losses, (-0.5, -0.6, -0.4)))
    assert "no use" in judge_ablation(explanation(losses, (0.0, -0.1, 0.1)))


def seen(*, num_images: int = 100, accuracy: float = 0.5, norm: float = 1.0) -> dict:
    """An ablation with a clear loss without shortcut 1, with facts that may take it back."""
    found = explanation({1: (-0.4, -0.5, -0.3)}, (-0.5, -0.6, -0.4))
    for condition in found["conditions"].values():
        condition["accuracy"] = accuracy
    found["shortcuts"] = [{**one, "number": i} for i, one in enumerate(found["shortcuts"][:2])]
    found["shortcuts"][1]["norm"] = norm
    groups = {"digit": {**estimate(-0.9, -1, -0.8), "num_images": num_images // 8}}
    found["conditions"]["without 1"]["group_differences"] = groups
    return {**found, "model": "mine", "input": 0, "num_questions": 40, "num_images": num_images}


@pytest.mark.parametrize(
    ("facts", "word"),
    [({"num_images": 1}, "one image"), ({"num_images": 5}, "5 images"), ({"accuracy": 0}, "none")],
)
def test_nothing_is_told_where_nothing_can_be(facts, word):
    verdict = judge_ablation(seen(**facts))
    assert word in verdict and "mine" in verdict and "points" not in verdict
    assert not any("good for" in use for use in describe_uses(seen(**facts)))
    assert "40.0 points" in judge_ablation(seen())


def test_shortcuts_that_add_nothing_yet_are_said_to():
    assert "zero" in judge_ablation(seen(norm=0.0))
    assert not any("good for" in use for use in describe_uses(seen(norm=0.0)))


def test_a_kind_of_question_about_few_images_is_not_named():
    assert "digit" in describe_uses(seen())[0]
    assert "digit" not in describe_uses(seen(num_images=30))[0]


def test_as_many_images_are_needed_as_a_sign_test_needs():
    for comparisons in (1, 7, 23):
        needed = count_needed_images(comparisons)
        assert 2 * 0.5**needed <= 0.05 / comparisons < 2 * 0.5 ** (needed - 1)
