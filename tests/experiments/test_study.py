"""A study from its file to its runs: equal data for all variants, and nothing is run twice."""

import json
import os
from pathlib import Path

import pytest
from helpers.runs import write_records
from helpers.studies import QUICK, make_costs, rough_counts

from sparsecut.building import read_depths
from sparsecut.experiments import preparation
from sparsecut.experiments.runner import StudyRunError, check_folder, claim, run_study
from sparsecut.experiments.study import Run, load_study, narrow_study, parse_study
from sparsecut.methods import make_plan
from sparsecut.profiling.sizes import read_backbone_config
from sparsecut.reports.study import write_study_report
from sparsecut.schema import UserError

ROOT = Path(__file__).parents[2]
RECIPE = QUICK["recipe"]


def build_study(folder, **changes):
    """The quick study with its output inside the test's folder."""
    return parse_study({**QUICK, "output": str(folder / "study"), **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(study, its folder, lines of the log), run to its end.

    Two processes share the runs of one seed. This process does the rest afterwards.
    """
    study = build_study(tmp_path_factory.mktemp("finished"))
    lines = []
    with rough_counts():
        run_study(study, seeds=[4], log=lines.append)
        run_study(study, workers=0, log=lines.append)
    write_study_report(study.output)
    return study, Path(study.output), lines


def test_every_study_file_loads_and_its_variants_are_plans_of_its_models():
    paths = sorted((ROOT / "configs" / "study").glob("*.yaml"))
    assert len(paths) >= 3
    for path in paths:
        study = load_study(path)
        model = study.recipe["model"]
        if set(model.values()) != {"shapes"}:
            continue
        depths = read_depths(model["vision"], model["language"])
        for name, spec in study.arms.items():
            assert make_plan(spec, *depths), (path, name)


def test_runs_come_by_budget_and_seed_and_a_budget_may_name_a_part(tmp_path):
    study = build_study(tmp_path)
    runs = study.list_runs()
    assert [str(run) for run in runs] == [
        "short/plain/3",
        "short/cut/3",
        "short/plain/4",
        "short/cut/4",
        "long/cut/4",
    ]
    recipes = [study.get_recipe(run) for run in runs]
    assert [recipe.stages[0].args["max_steps"] for recipe in recipes] == [2, 2, 2, 2, 4]
    assert [recipe.seed for recipe in recipes] == [3, 3, 4, 4, 4]
    assert len({recipe.stages[0].data for recipe in recipes}) == 1
    assert len({recipe.evaluate for recipe in recipes}) == 1
    assert len({recipe.feature_cache for recipe in recipes}) == 1
    assert len({recipe.output for recipe in recipes}) == 5


def test_every_run_leaves_its_facts_and_answers_to_the_same_questions(finished):
    study, out, lines = finished
    questions = set()
    for run in study.list_runs():
        folder = run.get_folder(out)
        facts = json.loads((folder / "facts.json").read_text())
        assert (facts["arm"], facts["budget"], facts["seed"]) == (run.variant, run.budget, run.seed)
        records = (folder / "eval" / "predictions.jsonl").read_text().splitlines()
        questions.add(tuple(json.loads(line)["id"] for line in records))
        assert len(records) == 6 * 7
        assert not (folder / "running").exists()
        assert any(f"{run.budget} {run.variant} seed {run.seed}:" in line for line in lines)
    assert len(questions) == 1
    costs = json.loads((out / "costs.json").read_text())
    assert set(costs) == {"plain", "cut"}
    assert all(cost["here"] and cost["large"] for cost in costs.values())
    assert all((out / f"report.{kind}").is_file() for kind in ("html", "md", "json"))


def test_nothing_is_run_twice(finished):
    study, out, lines = finished
    assert any("3 runs: 0 finished, 3 to do in 2 processes" in line for line in lines)
    assert any("5 runs: 3 finished, 2 to do" in line for line in lines)
    files = [run.get_folder(out) / "facts.json" for run in study.list_runs()]
    before = [file.stat().st_mtime_ns for file in files]
    again = []
    run_study(study, log=again.append)
    assert any("5 runs: 5 finished, 0 to do" in line for line in again)
    assert not any("drawing" in line for line in again)
    assert before == [file.stat().st_mtime_ns for file in files]
    assert load_study(out / "study.yaml") == study


def test_more_variants_and_seeds_may_join_a_folder(finished):
    folder = finished[1]
    arms = {**QUICK["arms"], "another": "sparsecut"}
    more = parse_study({**QUICK, "output": str(folder), "seeds": [3, 4, 5], "arms": arms})
    check_folder(more, folder)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"pictures": {**QUICK["pictures"], "train": 17}}, "pictures"),
        ({"arms": {**QUICK["arms"], "cut": "sparsecut"}}, "arms.cut"),
        ({"budgets": {"short": ["stages.0.args.max_steps=3"]}}, "budgets.short"),
    ],
)
def test_no_other_study_may_take_a_folder(finished, changes, key):
    other = parse_study({**QUICK, "output": str(finished[1]), **changes})
    with pytest.raises(UserError, match=rf"differs in {key}\)"):
        run_study(other, log=print)


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path):
    args = {**RECIPE["stages"][0]["args"], "learning_rate": 1e30, "max_steps": 6}
    stage = {**RECIPE["stages"][0], "args": args}
    changes = {"recipe": {**RECIPE, "stages": [stage]}, "seeds": [0], "budgets": {"short": []}}
    bad = build_study(tmp_path, **changes)
    with rough_counts(), pytest.raises(StudyRunError, match="short/plain/0"):
        run_study(bad, variants=["plain"], workers=0, log=lambda line: None)
    folder = Run("short", "plain", 0).get_folder(bad.output)
    assert "loss" in (folder / "failed.txt").read_text()
    assert not (folder / "running").exists()


def test_costs_are_counted_once_and_at_the_large_size_where_a_method_scales(tmp_path):
    plan = {"shortcuts": [{"taps": [-2], "layer": 0}]}
    arms = {"cut": plan, "fixed": "official_13b", "plain": "llava"}
    study = build_study(tmp_path, arms=arms, budgets={"short": []})
    Path(study.output).mkdir()
    plans = {name: make_plan(spec, 24, 40) for name, spec in arms.items()}

    class Config:
        parts = ("vision", "language")
        vision_config, text_config = [read_backbone_config("shapes", part) for part in parts]

    with rough_counts():
        preparation.write_costs(study, plans, Config, log=lambda line: None)
        file = Path(study.output) / "costs.json"
        costs = json.loads(file.read_text())
        before = file.stat().st_mtime_ns
        preparation.write_costs(study, plans, Config, log=lambda line: None)
    assert file.stat().st_mtime_ns == before
    assert costs["cut"]["here"] == make_costs(plans["cut"])["here"]
    assert costs["plain"]["large"]
    assert costs["cut"]["large"] is None, "a plan in full means these depths"
    assert costs["fixed"]["large"] is None, "this method has 40 decoder layers, a 7B model 32"


def test_a_run_belongs_to_one_living_process(tmp_path):
    assert claim(tmp_path / "a")
    assert not claim(tmp_path / "a")
    mark = tmp_path / "a" / "running"
    host = mark.read_text().split()[0]
    mark.write_text(f"{host} {2**22 + 1}")  # above the largest process number there can be
    assert claim(tmp_path / "a")
    assert mark.read_text() == f"{host} {os.getpid()}"
    mark.write_text("elsewhere 1")
    assert not claim(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"baseline": "plane"}, ["baseline", "'plane'", "'plain'"]),
        ({"families": {"cutt": "ours"}}, ["families", "'cutt'", "'cut'"]),
        ({"seeds": []}, ["seeds", "[]"]),
        ({"seeds": [True]}, ["seeds.0", "True"]),
        ({"seeds": [1, 1]}, ["seeds", "[1, 1]"]),
        ({"arms": {}}, ["arms"]),
        ({"arms": {"A b": "llava"}, "baseline": "A b"}, ["arms", "'A b'"]),
        ({"recipe": {**RECIPE, "fusion": "llava"}}, ["recipe.fusion", "arms"]),
        ({"sedes": [1]}, ["sedes", "'seeds'"]),
        ({"budgets": {"short": {"chnge": []}}}, ["budgets.short", "chnge", "'change'"]),
        ({"budgets": {"short": {"arms": ["cutt"]}}}, ["budgets.short.arms", "'cutt'", "'cut'"]),
        ({"recipe": {**RECIPE, "stags": []}}, ["stags", "'stages'"]),
        ({"recipe": {**RECIPE, "model": {"base": "some/vlm"}}}, ["model.base", "'some/vlm'"]),
    ],
)
def test_wrong_studies_are_refused_by_key_and_value(tmp_path, changes, facts):
    with pytest.raises(UserError) as error:
        build_study(tmp_path, **changes)
    for fact in facts:
        assert fact in str(error.value)


def test_names_of_training_arguments_are_checked_where_training_starts(tmp_path):
    assert build_study(tmp_path, budgets={"short": ["stages.0.args.max_stps=1"]})


def test_a_part_of_a_study_is_chosen_by_name(tmp_path):
    study = build_study(tmp_path)
    part = narrow_study(study, ["cut"], [4])
    assert part.list_runs() == [Run("short", "cut", 4), Run("long", "cut", 4)]
    assert part.baseline == "cut"
    with pytest.raises(UserError, match=r"'cutt' .*'cut'"):
        narrow_study(study, ["cutt"])
    with pytest.raises(UserError, match=r"seed 9.* 3, 4"):
        narrow_study(study, [], [9])


def test_a_study_may_use_data_of_its_own(tmp_path):
    write_records(tmp_path)
    source = {"path": str(tmp_path / "data.json")}
    stage = {**RECIPE["stages"][0], "data": source}
    recipe = {**RECIPE, "evaluate": {"data": source}, "stages": [stage]}
    study = build_study(tmp_path, pictures=None, recipe=recipe)
    recipe = study.get_recipe(Run("short", "cut", 3))
    assert recipe.stages[0].data[0].path == source["path"]
    assert recipe.feature_cache == str(tmp_path / "study" / "states")
