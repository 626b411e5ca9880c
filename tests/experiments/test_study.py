"""A study from its file to its runs: equal data for all variants, and nothing is run twice."""

import json
import os
import shutil
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.runs import write_records
from helpers.studies import QUICK, make_costs, rough_counts
from safetensors.torch import load_file, save_file

from sparsecut.building import read_depths
from sparsecut.config.folder_lock import lock_folder
from sparsecut.experiments import preparation, runner
from sparsecut.experiments.claims import claim
from sparsecut.experiments.run_progress import RunProgress
from sparsecut.experiments.runner import StudyRunError, check_folder, run_study
from sparsecut.experiments.study import Run, Study, load_study, narrow_study, parse_study
from sparsecut.methods import make_plan
from sparsecut.profiling.sizes import read_backbone_config
from sparsecut.reports.study import write_study_report
from sparsecut.schema import UserError
from sparsecut.shipped_model import BACKBONES_FOLDER

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
    paths = sorted((ROOT / "sparsecut" / "recipes" / "study").glob("*.yaml"))
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


def test_a_refused_study_leaves_its_folder_to_a_corrected_one(tmp_path, monkeypatch):
    recipe = {**RECIPE, "model": {**RECIPE["model"], "view_size": 50}}
    with pytest.raises(UserError, match="view_size"):
        run_study(build_study(tmp_path, recipe=recipe), log=lambda line: None)
    corrected = build_study(tmp_path)
    costs = Path(corrected.output) / "costs.json"
    costs.write_text("{}")  # of the refused one

    def stop(study, log):
        assert not costs.exists()
        raise InterruptedError("prepared")

    monkeypatch.setattr(runner, "prepare", stop)
    with pytest.raises(InterruptedError, match="prepared"):
        run_study(corrected, log=lambda line: None)


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
        view_size = None
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


def is_claimed(folder) -> bool:
    """Whether a run can be had by another thread, as by another process."""
    answers = []

    def ask() -> None:
        with claim(folder) as is_ours:
            answers.append(is_ours)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return not answers[0]


def test_a_run_belongs_to_one_living_process(tmp_path):
    mark = tmp_path / "running"
    with claim(tmp_path) as is_ours:
        assert is_ours
        assert mark.read_text() == f"{socket.gethostname()} {os.getpid()}"
        assert is_claimed(tmp_path)
    assert not mark.exists()
    assert not is_claimed(tmp_path)


@pytest.mark.parametrize(
    ("host", "pid", "age", "lives"),
    [
        ("here", "self", 0, True),
        ("here", "self", 10**7, False),  # the number went to another process later
        ("here", 2**22 + 1, 0, False),  # above the largest number that there can be
        ("here", 10**30, 0, False),
        ("elsewhere", 1, 0, True),
        ("elsewhere", 1, 3600, False),
        ("", "", 0, False),
    ],
)
def test_a_mark_of_an_old_version_counts_while_its_process_can_live(
    tmp_path, host, pid, age, lives
):
    host = socket.gethostname() if host == "here" else host
    mark = tmp_path / "running"
    mark.write_text(f"{host} {os.getpid() if pid == 'self' else pid}")
    os.utime(mark, (time.time() - age,) * 2)
    assert is_claimed(tmp_path) == lives


def test_a_mark_that_a_killed_process_left_does_not_count(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "running").write_text("elsewhere 1")
    assert not is_claimed(tmp_path)


def begin(study) -> None:
    """Prepare a study and leave what a run with a finished stage leaves."""
    prepare_only(study)
    stage = study.list_runs()[0].get_folder(study.output) / "tune"
    stage.mkdir(parents=True)
    (stage / "versions.json").write_text("{}")


def prepare_only(study, lines=None) -> None:
    """Do what is done before the runs."""
    lines = [] if lines is None else lines
    with rough_counts(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsecut.experiments.runner.work", lambda *args, **settings: None)
        run_study(study, workers=0, log=lines.append)


def build_own_study(folder, **changes):
    """A study of records and images that are not drawn."""
    (folder / "own").mkdir()
    write_records(folder / "own")
    source = {"path": str(folder / "own" / "data.json")}
    stage = {**RECIPE["stages"][0], "data": source}
    recipe = {**RECIPE, "evaluate": {"data": source}, "stages": [stage]}
    return build_study(folder, pictures=None, recipe=recipe, **changes)


def change_records(folder) -> str:
    file = folder / "own" / "data.json"
    file.write_text(file.read_text().replace("a cat", "a dog"))
    return "data.json"


def change_image(folder) -> str:
    file = folder / "own" / "4.png"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes((folder / "own" / "5.png").read_bytes())
    os.utime(file, ns=times)
    return "4.png"


@pytest.mark.parametrize("change", [change_records, change_image])
@pytest.mark.parametrize("caches", [True, False])
def test_a_study_does_not_go_on_with_other_data(tmp_path, change, caches):
    study = build_own_study(tmp_path, feature_cache=caches, budgets={"short": []})
    begin(study)
    name = change(tmp_path)
    before = {path: path.read_bytes() for path in Path(study.output).rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=name):
        prepare_only(study)
    for path, content in before.items():
        assert path.name == ".lock" or path.read_bytes() == content


@pytest.mark.parametrize("change", [change_records, change_image])
def test_data_may_be_mended_before_anything_was_trained_with_it(tmp_path, change):
    study = build_own_study(tmp_path, budgets={"short": []})
    prepare_only(study)
    change(tmp_path)
    prepare_only(study)


def test_a_study_does_not_go_on_with_another_backbone(tmp_path):
    shutil.copytree(BACKBONES_FOLDER, tmp_path / "shapes")
    model = {part: str(tmp_path / "shapes" / part) for part in ("vision", "language")}
    study = build_study(tmp_path, recipe={**RECIPE, "model": model}, budgets={"short": []})
    begin(study)
    file = tmp_path / "shapes" / "language" / "model.safetensors"
    weights = load_file(file)
    name = max(weights, key=lambda key: weights[key].numel())
    weights[name].view(-1)[-2] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="language model"):
        prepare_only(study)


def test_a_study_goes_on_where_the_language_model_gets_a_row_for_images(tmp_path):
    language = tmp_path / "language"
    shutil.copytree(BACKBONES_FOLDER / "language", language)
    for file in language.glob("*.json"):
        file.write_text(file.read_text().replace("<image>", "<picture>"))
    model = {"vision": "shapes", "language": str(language)}
    study = build_study(tmp_path, recipe={**RECIPE, "model": model}, budgets={"short": []})
    begin(study)
    prepare_only(study)


def test_progress_is_counted_by_logs_without_reading_recipes_again(tmp_path, monkeypatch):
    study = build_study(tmp_path, budgets={"short": []})
    first, second, *_ = runs = study.list_runs()
    progress = RunProgress(study, runs)
    monkeypatch.setattr(Study, "get_recipe", None)
    assert progress.count_steps() == (0, 2 * len(runs))
    assert progress.describe(first) == "loading"
    for run, step in ((first, 1), (second, 2)):
        log = run.get_folder(study.output) / "tune" / "log.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text(json.dumps({"step": step, "loss": 1.5}) + '\n{"step": 9')
    assert progress.count_steps() == (3, 2 * len(runs))
    assert progress.describe(first) == "tune 1/2 loss 1.50"


def test_a_copied_study_goes_on(tmp_path):
    study = build_study(tmp_path, budgets={"short": []})
    begin(study)
    copied = tmp_path / "copied"
    shutil.copytree(study.output, copied, copy_function=shutil.copy)  # with new times
    shutil.rmtree(study.output)
    before = (copied / "states" / "tap-07.f16").stat().st_mtime_ns
    prepare_only(replace(study, output=str(copied)))
    assert (copied / "states" / "tap-07.f16").stat().st_mtime_ns == before


def test_a_study_of_an_old_version_goes_on_and_a_line_says_what_is_not_known(tmp_path):
    study = build_study(tmp_path, budgets={"short": []})
    begin(study)
    (Path(study.output) / "inputs.json").unlink()
    lines = []
    prepare_only(study, lines)
    assert any("not known" in line for line in lines)
    assert (Path(study.output) / "inputs.json").is_file()


@pytest.mark.parametrize("name", ["data/train.json", "runs/notes.txt", "costs.json", "report.html"])
def test_files_of_something_else_are_not_replaced(tmp_path, name):
    study = build_study(tmp_path)
    file = Path(study.output) / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match=name.partition("/")[0]):
        run_study(study, log=print)
    assert [path for path in Path(study.output).rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"


def test_one_process_at_a_time_prepares_a_study(tmp_path):
    study = build_study(tmp_path)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_folder(study.output):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        with pytest.raises(UserError, match="in use"):
            run_study(study, log=print)
    finally:
        done.set()
        thread.join()


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
