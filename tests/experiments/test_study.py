"""A study from its file to its runs: equal data for all arms, nothing run twice, shared between
processes, loud refusals.
"""

import json
import os
from pathlib import Path

import pytest
from helpers.runs import write_records
from helpers.studies import QUICK

from sparsecut.experiments import runner as study_runner
from sparsecut.experiments.runner import claim, run_study
from sparsecut.experiments.study import Run, load_study, narrowed, parse_study
from sparsecut.reports.study import write_study_report

ROOT = Path(__file__).parents[2]


def study(tmp_path, **changes):
    """The quick study with its output inside the test's folder."""
    return parse_study({**QUICK, "output": str(tmp_path / "study"), **changes})


@pytest.fixture(scope="module", autouse=True)
def small():
    """Costs are told at a small size instead of 7B's, which takes seconds for each plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_runner, "LARGE", ("shapes", "shapes"))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(study, its folder), run to its end in two processes."""
    one = study(tmp_path_factory.mktemp("finished"))
    run_study(one, log=lambda line: None)
    write_study_report(one.output)
    return one, Path(one.output)


def test_every_study_file_loads_and_its_arms_are_plans_of_its_models():
    from sparsecut.building import depths_of
    from sparsecut.methods import make_plan

    found = sorted((ROOT / "configs" / "study").glob("*.yaml"))
    assert len(found) >= 3
    for path in found:
        one = load_study(path)
        model = one.recipe["model"]
        if set(model.values()) == {"shapes"}:
            depths = depths_of(model["vision"], model["language"])
            for arm, spec in one.arms.items():
                assert make_plan(spec, *depths), (path, arm)


def test_runs_come_by_budget_and_seed_and_a_budget_may_name_a_part(tmp_path):
    runs = study(tmp_path).runs()
    assert [(r.budget, r.seed, r.arm) for r in runs] == [
        ("short", 3, "plain"),
        ("short", 3, "cut"),
        ("short", 4, "plain"),
        ("short", 4, "cut"),
        ("long", 4, "cut"),
    ]
    recipes = [study(tmp_path).recipe_of(run) for run in runs]
    assert [r.stages[0].args["max_steps"] for r in recipes] == [2, 2, 2, 2, 4]
    assert [r.seed for r in recipes] == [3, 3, 4, 4, 4]
    assert len({r.stages[0].data for r in recipes}) == len({r.evaluate for r in recipes}) == 1
    assert len({r.output for r in recipes}) == 5 and len({r.states for r in recipes}) == 1


def test_a_study_leaves_what_its_report_reads_and_nothing_is_run_twice(finished):
    one, out = finished
    questions = set()
    for run in one.runs():
        folder = run.folder(out)
        facts = json.loads((folder / "facts.json").read_text())
        assert (facts["arm"], facts["budget"], facts["seed"]) == (run.arm, run.budget, run.seed)
        lines = [
            json.loads(line)
            for line in (folder / "eval" / "predictions.jsonl").read_text().splitlines()
        ]
        questions.add(tuple(line["id"] for line in lines))
        assert len(lines) == 6 * 7 and not (folder / "running").exists()
    assert len(questions) == 1, "all runs are asked the same questions in the same order"
    costs = json.loads((out / "costs.json").read_text())
    assert set(costs) == {"plain", "cut"} and all(
        costs[arm][size] for arm in costs for size in ("here", "large")
    )
    assert all((out / f"report.{kind}").is_file() for kind in ("html", "md", "json"))
    before = {run: (run.folder(out) / "facts.json").stat().st_mtime_ns for run in one.runs()}
    again = []
    run_study(one, log=again.append)
    assert "5 runs: 5 finished, 0 to do in 2 processes" in again and not any(
        "drawing" in line for line in again
    )
    assert before == {
        run: (run.folder(out) / "facts.json").stat().st_mtime_ns for run in one.runs()
    }
    assert load_study(out / "study.yaml") == one


def test_more_arms_and_seeds_may_join_but_no_other_study_may_take_the_folder(finished):
    out = finished[1]
    more = parse_study({**QUICK, "output": str(out), "seeds": [3, 4, 5]})
    from sparsecut.experiments.runner import check_folder

    check_folder(more, out)
    for changes, words in (
        ({"pictures": {**QUICK["pictures"], "train": 17}}, "differs in pictures"),
        ({"arms": {**QUICK["arms"], "cut": "sparsecut"}}, "differs in arms.cut"),
        ({"budgets": {"short": ["stages.0.args.max_steps=3"]}}, "differs in budgets.short"),
    ):
        with pytest.raises(ValueError, match=words):
            run_study(parse_study({**QUICK, "output": str(out), **changes}), log=print)


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path):
    bad = study(tmp_path, seeds=[0], budgets={"short": []})
    bad.recipe["stages"][0]["args"] = {
        **bad.recipe["stages"][0]["args"],
        "learning_rate": 1e30,
        "max_steps": 6,
    }
    with pytest.raises(
        ChildProcessError,
        match=r"runs failed \(short/plain/0.*that training cannot go on|runs failed",
    ):
        run_study(bad, workers=1, log=lambda line: None)
    failed = [
        run for run in bad.runs() if (run.folder(tmp_path / "study") / "failed.txt").is_file()
    ]
    assert failed and "loss" in (failed[0].folder(tmp_path / "study") / "failed.txt").read_text()


def test_a_run_belongs_to_one_living_process(tmp_path):
    assert claim(tmp_path / "a") and not claim(tmp_path / "a")
    mark = tmp_path / "a" / "running"
    host = mark.read_text().split()[0]
    mark.write_text(f"{host} {2**22 + 1}")  # above the largest process number there can be
    assert claim(tmp_path / "a")
    assert mark.read_text() == f"{host} {os.getpid()}"
    mark.write_text("elsewhere 1")
    assert not claim(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "plane"}, r"baseline names the arm 'plane' \(did you mean 'plain'\?\)"),
        ({"seeds": []}, "at least one whole number is needed"),
        ({"seeds": [1, 1]}, "each seed can be run once only"),
        ({"arms": {}}, "arms are named nothing"),
        ({"arms": {"A b": "llava"}, "baseline": "A b"}, "names become folders"),
        ({"recipe": {**QUICK["recipe"], "fusion": "llava"}}, "recipe.fusion is set by arms"),
        ({"sedes": [1]}, r"sedes is not known \(did you mean 'seeds'\?\)"),
        ({"budgets": {"short": {"chnge": []}}}, "chnge is not known"),
        ({"budgets": {"short": ["stages.0.args.max_stps=1"]}}, None),
        ({"recipe": {**QUICK["recipe"], "stags": []}}, "stags is not known"),
        (
            {"recipe": {**QUICK["recipe"], "model": {"base": "some/vlm"}}},
            "a study's arms are plans of models that are built",
        ),
    ],
)
def test_wrong_studies_are_refused_in_a_sentence(tmp_path, changes, words):
    if words is None:  # names of training arguments are known where training starts
        assert study(tmp_path, **changes)
        return
    with pytest.raises(ValueError, match=words):
        study(tmp_path, **changes)


def test_a_part_of_a_study_is_asked_for_by_name(tmp_path):
    part = narrowed(study(tmp_path), ["cut"], [4])
    assert part.runs() == [Run("short", "cut", 4), Run("long", "cut", 4)] and part.baseline == "cut"
    with pytest.raises(ValueError, match=r"no arm 'cutt' \(did you mean 'cut'\?\)"):
        narrowed(study(tmp_path), ["cutt"])
    with pytest.raises(ValueError, match="no seed 9; it has 3, 4"):
        narrowed(study(tmp_path), [], [9])


def test_a_study_may_ask_about_data_of_its_own(tmp_path):
    write_records(tmp_path)
    source = {"path": str(tmp_path / "data.json")}
    plain = {**QUICK, "pictures": None, "output": str(tmp_path / "study")}
    plain["recipe"] = {**QUICK["recipe"], "evaluate": {"data": source}}
    plain["recipe"]["stages"] = [{**QUICK["recipe"]["stages"][0], "data": source}]
    recipe = parse_study(plain).recipe_of(Run("short", "cut", 3))
    assert recipe.stages[0].data[0].path == source["path"] and recipe.states == str(
        tmp_path / "study" / "states"
    )
