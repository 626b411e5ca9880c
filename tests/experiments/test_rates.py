"""Fair rates: chosen on a dev part cut by image, then used once on the test split."""

import json
from pathlib import Path

import pytest
from helpers.studies import QUICK, rough_counts
from typer.testing import CliRunner

from sparsecut.cli.main import app
from sparsecut.config.recipe import Source
from sparsecut.data.examples import read_source
from sparsecut.experiments.estimate import estimate_study, format_estimate
from sparsecut.experiments.preparation import draw_images
from sparsecut.experiments.rate_choice import RateChoice, find_rate, read_choice
from sparsecut.experiments.runner import check_folder, run_study
from sparsecut.experiments.study import load_study, narrow_study, parse_study
from sparsecut.experiments.study_parts import Run
from sparsecut.schema import UserError

RECIPE = QUICK["recipe"]
STAGE = {**RECIPE["stages"][0], "train": ["fusion", "language"], "lr": {"fusion": 3e-3}}
ALIGN = {**RECIPE["stages"][0], "name": "align", "template": "plain"}
TUNED = {
    **QUICK,
    "recipe": {**RECIPE, "stages": [ALIGN, STAGE]},
    "pictures": {"train": 10, "ask": 4},
    "seeds": [0],
    "budgets": {"main": []},
    "rates": {
        "grid": [1e-4, 3e-4],
        "dev": 0.3,
        "change": ["stages.0.args.max_steps=1", "stages.1.args.max_steps=1"],
    },
}


def build_tuned(folder, **changes):
    """The quick study with rates, its output inside the test's folder."""
    return parse_study({**TUNED, "output": str(folder / "study"), **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(study, its folder), run to its end in this process."""
    study = build_tuned(tmp_path_factory.mktemp("tuned"))
    with rough_counts():
        run_study(study, workers=0, log=lambda line: None)
    return study, Path(study.output)


def read_facts(run, out) -> dict:
    """What a finished run noted."""
    return json.loads((run.get_folder(out) / "facts.json").read_text())


def test_the_grid_is_tried_on_dev_and_the_choice_is_used_on_test(finished):
    study, out = finished
    dev = study.list_dev_runs()
    assert len(dev) == 2 * 2 * 2  # variants, rates, seeds
    for run in study.list_runs():
        assert run.is_finished(out)
        lines = (run.get_folder(out) / "eval" / "predictions.jsonl").read_text().splitlines()
        split = "test" if run.rate is None else "dev"
        assert {json.loads(line)["id"].split("/")[0] for line in lines} == {split}
    for variant in study.arms:
        choice = read_choice(study, variant)
        assert choice.best == find_rate(study, variant)
        assert read_facts(Run("main", variant, 0), out)["rate"] == choice.best
    for run in dev:
        recipe = (run.get_folder(out) / "config.yaml").read_text()
        assert recipe.count(f"fusion: {run.rate}") == 2, "of every stage that trains fusion"
        assert not list(run.get_folder(out).rglob("*.safetensors"))


def test_drawn_images_that_choose_rates_are_no_others(tmp_path):
    study = build_tuned(tmp_path, pictures={"train": 10, "ask": 4, "split": "dev"})
    Path(study.output).mkdir()
    draw_images(study, log=lambda line: None)
    data = Path(study.output) / "data"
    asked = {json.dumps(record) for record in json.loads((data / "dev.json").read_text())}
    chosen = json.loads((data / "rates" / "dev.json").read_text())
    assert len({record["image"] for record in chosen}) == 3  # 0.3 of 10
    assert asked.isdisjoint(json.dumps(record) for record in chosen)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.json")}
    draw_images(study, log=lambda line: None)
    assert before == {path: path.stat().st_mtime_ns for path in data.rglob("*.json")}


def test_a_grown_grid_runs_its_new_cells_only(finished):
    out = finished[1]
    rates = {**TUNED["rates"], "grid": [1e-4, 3e-4, 1e-3]}
    grown = parse_study({**TUNED, "output": str(out), "rates": rates})
    check_folder(grown, out)
    left = [run for run in grown.list_runs() if not run.is_finished(out)]
    assert {run.rate for run in left} == {1e-3}


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"rates": {**TUNED["rates"], "dev": 0.5}}, "rates.dev"),
        ({"rates": {**TUNED["rates"], "change": []}}, "rates.change"),
        ({"rates": {**TUNED["rates"], "seeds": [5, 6]}, "seeds": [100]}, "100"),
    ],
)
def test_dev_runs_are_not_mixed_with_others(finished, changes, fact):
    out = finished[1]
    with pytest.raises(UserError, match=fact):
        check_folder(parse_study({**TUNED, "output": str(out), **changes}), out)


def test_text_only_has_no_image_anywhere_and_trains_the_same_steps(finished):
    out = finished[1]
    run = Run("main", "text_only", 0)
    recipe = load_recipe_of(run, out)
    [stage] = recipe["stages"]
    assert (stage["name"], stage["train"]) == ("tune", ["language"])
    assert stage["args"]["max_steps"] == STAGE["args"]["max_steps"]
    log = (run.get_folder(out) / "tune" / "log.jsonl").read_text().splitlines()
    assert all(json.loads(line)["image_tokens"] == 0 for line in log)
    texts = (run.get_folder(out) / "eval" / "predictions.jsonl").read_text()
    assert "<image>" not in texts
    other = Run("main", "plain", 0).get_folder(out) / "eval" / "predictions.jsonl"
    ids = [json.loads(line)["id"] for line in texts.splitlines()]
    assert ids == [json.loads(line)["id"] for line in other.read_text().splitlines()]


def load_recipe_of(run, out) -> dict:
    """The recipe that a run used."""
    from sparsecut.config.yaml_io import read_yaml_file

    return read_yaml_file(run.get_folder(out) / "config.yaml")


def test_a_rate_that_is_too_high_is_no_failure(tmp_path):
    rates = {"grid": [1e-4, 3e-4, 1e30], "change": ["stages.0.args.max_steps=3"]}
    recipe = {**RECIPE, "stages": [{**STAGE, "args": {**STAGE["args"], "max_grad_norm": 0}}]}
    study = build_tuned(tmp_path, rates=rates, recipe=recipe, text_only=False)
    with rough_counts():
        run_study(study, variants=["plain"], workers=0, log=lambda line: None)
    choice = read_choice(study, "plain")
    assert choice.diverged == {1e30: [100, 101]}
    assert choice.best in (1e-4, 3e-4)
    assert Run("main", "plain", 0).is_finished(study.output)


def test_a_rate_is_not_known_before_its_dev_runs_are(tmp_path):
    with pytest.raises(UserError, match="4 dev runs"):
        find_rate(build_tuned(tmp_path), "plain")


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"rates": {"grid": [3e-4]}}, ["grid", "0.0003"]),
        ({"rates": {"grid": [1e-4, 1e-3]}}, ["default", "0.0003", "0.0001, 0.001"]),
        ({"rates": {"seeds": [100]}}, ["seeds", "[100]", "2"]),
        ({"rates": {"dev": 1}}, ["dev", "1"]),
        ({"rates": {"gird": []}}, ["rates.gird", "'grid'"]),
        ({"seeds": [0, 101]}, ["[101]", "rates.seeds"]),
        (
            {"recipe": {**RECIPE, "stages": [{**STAGE, "train": ["language"], "lr": {}}]}},
            ["fusion"],
        ),
        ({"arms": {"text_only": "llava"}, "baseline": "text_only"}, ["'text_only'"]),
        ({"recipe": RECIPE, "text_only": True}, ["text_only", "language"]),
        ({"average_over": "kind"}, ["average_over", "'kind'", "'kinds'"]),
        ({"arms": {"plain": {"fusion": "llava", "rate": 1e-3, "rate_factor": 2}}}, ["rate_factor"]),
        ({"arms": {"plain": {"fusion": "llava", "change": ["seed=3"]}}}, ["'seed=3'"]),
        ({"arms": {"plain": {"fusion": "llava", "rate": 0}}}, ["arms.plain", "rate"]),
        ({"rates": None, "arms": {"plain": {"fusion": "llava", "rate_factor": 2}}}, ["rates"]),
    ],
)
def test_wrong_rates_are_refused_by_key_and_value(tmp_path, changes, facts):
    with pytest.raises(UserError) as error:
        build_tuned(tmp_path, **changes)
    for fact in facts:
        assert fact in str(error.value)


def test_a_variant_may_have_settings_of_its_own(tmp_path):
    arms = {
        "plain": "llava",
        "warm": {"fusion": "llava", "change": ["stages.1.args.warmup_steps=7"]},
        "wide": {"fusion": "sparsecut", "rate_factor": 0.2},
        "given": {"fusion": "sparsecut", "rate": 2e-3},
    }
    study = build_tuned(tmp_path, arms=arms)
    grids = {name: study.get_grid(name) for name in arms}
    assert grids == {"plain": (1e-4, 3e-4), "warm": (1e-4, 3e-4), "wide": (2e-5, 6e-5), "given": ()}
    recipes = {name: study.get_recipe(Run("main", name, 0), 5e-4) for name in arms}
    assert [recipe.stages[1].lr["fusion"] for recipe in recipes.values()] == [
        5e-4,
        5e-4,
        5e-4,
        2e-3,
    ]
    warm_up = {name: recipe.stages[1].args.get("warmup_steps") for name, recipe in recipes.items()}
    assert warm_up == {"plain": None, "warm": 7, "wide": None, "given": None}
    assert len({recipe.evaluate for recipe in recipes.values()}) == 1


def test_a_study_with_rates_is_written_and_read_back_equal(tmp_path, finished):
    study, out = finished
    assert load_study(out / "study.yaml") == study


def test_the_run_without_images_is_chosen_by_name(tmp_path):
    study = build_tuned(tmp_path)
    assert [str(run) for run in narrow_study(study, ["text_only"]).list_runs()] == [
        "main/text_only/0"
    ]
    assert "text_only" not in {run.variant for run in narrow_study(study, ["cut"]).list_runs()}
    fusion_alone = build_tuned(tmp_path, recipe=RECIPE, rates={"grid": [1e-4, 3e-4]})
    assert "text_only" not in {run.variant for run in fusion_alone.list_runs()}


# ---- the dev part


def get_images(source) -> set:
    return {image for example in read_source(source, []) for image in example.images}


def test_all_records_of_an_image_are_on_one_side(tmp_path):
    path = write_images(tmp_path, 60)
    whole = read_source(Source(path), [])
    sides = [Source(path, dev=0.3, side=side) for side in ("train", "dev")]
    train, dev = (get_images(side) for side in sides)
    assert train and dev and not train & dev
    assert sum(len(read_source(side, [])) for side in sides) == len(whole)
    assert 5 < len(dev) < 30
    smaller = get_images(Source(path, dev=0.1, side="dev"))
    assert smaller < dev, "a smaller part lies inside a larger one"


def test_the_side_goes_by_what_an_image_shows(tmp_path):
    path = write_images(tmp_path, 30)
    (tmp_path / "copies").mkdir()
    records = json.loads(Path(path).read_text())
    for record in records:
        content = (tmp_path / record["image"]).read_bytes()
        (tmp_path / "copies" / record["image"]).write_bytes(content)
    other = tmp_path / "copies" / "data.json"
    other.write_text(json.dumps(records))
    sides = [get_images(Source(str(file), dev=0.3, side="dev")) for file in (path, other)]
    assert sides[0] == sides[1]


def test_records_with_images_of_both_sides_are_on_none(tmp_path):
    path = write_images(tmp_path, 20)
    records = json.loads(Path(path).read_text())
    dev = sorted(get_images(Source(path, dev=0.3, side="dev")))
    train = sorted(get_images(Source(path, dev=0.3, side="train")))
    text = "<image><image>which?"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "one"}]
    for name, images in (("mixed", [dev[0], train[0]]), ("dev", dev[:1] * 2)):
        records.append({"id": name, "image": images, "conversations": turns})
    records.append({"id": "blind", "conversations": [{**turns[0], "value": "who?"}, turns[1]]})
    Path(path).write_text(json.dumps(records))
    ids = {}
    for side in ("train", "dev"):
        ids[side] = {example.id for example in read_source(Source(path, dev=0.3, side=side), [])}
    assert "mixed" not in ids["train"] | ids["dev"]
    assert "dev" in ids["dev"] and "blind" in ids["train"]


def test_too_few_images_for_a_dev_part_are_refused(tmp_path):
    path = write_images(tmp_path, 2)
    with pytest.raises(UserError, match=r"dev=0\.001.*'dev'.*2 images"):
        read_source(Source(path, dev=0.001, side="dev"), [])


@pytest.mark.parametrize(
    ("keys", "facts"),
    [
        ({"dev": 0.2}, ["side"]),
        ({"side": "dev"}, ["dev"]),
        ({"dev": 0, "side": "dev"}, ["dev is 0"]),
        ({"dev": 0.2, "side": "test"}, ["side", "'test'"]),
        ({"dev": 0.2, "side": "dev", "streaming": True}, ["dev", "stream"]),
    ],
)
def test_wrong_sides_are_refused(keys, facts):
    with pytest.raises(UserError) as error:
        Source("data.json", **keys)
    for fact in facts:
        assert fact in str(error.value)


def write_images(folder, number: int) -> str:
    """Two records about each of some images that differ."""
    from PIL import Image

    records = []
    for i in range(number):
        Image.new("RGB", (8, 8), (i, 2 * i, 255 - i)).save(folder / f"{i}.png")
        for question in ("shade", "shape"):
            turns = [
                {"from": "human", "value": f"<image>\nwhich {question}?"},
                {"from": "gpt", "value": f"{question} {i % 2}"},
            ]
            records.append({"id": f"{i}.{question}", "image": f"{i}.png", "conversations": turns})
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_records_without_their_images(tmp_path, streaming):
    from sparsecut.data.streaming import read_stream

    path = write_images(tmp_path, 3)
    source = Source(path, text_only=True, streaming=streaming)
    examples = list(read_stream(source)) if streaming else read_source(source, [])
    assert len(examples) == 6
    assert not any(example.images for example in examples)
    assert examples[0].messages[0]["content"] == "which shade?"


# ---- the choice


def make_choice(scores: dict[float, list[float]], default=3e-4) -> RateChoice:
    """A choice from made-up scores of 200 questions, two seeds."""
    import numpy as np

    from sparsecut.evaluation.variant_answers import Answers

    answers = {}
    names = [str(i) for i in range(200)]
    for rate, by_seed in scores.items():
        right = np.stack([np.arange(200) < round(200 * score) for score in by_seed])
        answers[rate] = Answers(right, names, ["all"] * 200, names, [100, 101])
    return RateChoice("plain", tuple(sorted(scores)), default, answers)


def test_the_best_mean_is_chosen_and_one_at_the_edge_is_marked():
    choice = make_choice({1e-4: [0.2, 0.2], 3e-4: [0.9, 0.1], 1e-3: [0.6, 0.6]})
    assert (choice.best, choice.is_at_edge) == (1e-3, True)
    described = choice.describe()
    assert described["lost_at_default"] == pytest.approx(0.1)
    assert described["cells"]["0.0003"]["by_seed"] == {"100": 0.9, "101": 0.1}
    assert 3e-4 in described["unclear"]


def test_a_clear_choice_is_not_called_unclear():
    described = make_choice({1e-4: [0.1, 0.1], 3e-4: [0.9, 0.9], 1e-3: [0.1, 0.1]}).describe()
    assert (described["rate"], described["at_edge"], described["unclear"]) == (3e-4, False, [])


def test_of_equals_the_one_nearest_to_the_default_is_chosen():
    assert make_choice({1e-4: [0.5] * 2, 3e-4: [0.5] * 2, 1e-3: [0.5] * 2}).best == 3e-4


# ---- counting and estimating


def test_a_dry_run_counts_what_is_left_and_predicts_from_finished_runs(finished):
    study, out = finished
    rates = {**TUNED["rates"], "grid": [1e-4, 3e-4, 1e-3]}
    grown = parse_study({**TUNED, "output": str(out), "rates": rates, "seeds": [0, 1]})
    estimate = estimate_study(grown)
    groups = {group.name: (group.total, group.finished) for group in estimate.groups}
    assert groups == {"dev": (12, 8), "main": (4, 2), "text_only": (2, 1)}
    seconds = [read_facts(run, out)["seconds"] for run in study.list_runs() if run.rate]
    assert estimate.groups[0].seconds == pytest.approx(4 * sum(seconds) / 8, rel=0.5)


def test_a_dry_run_writes_nothing(tmp_path):
    study = build_tuned(tmp_path)
    estimate = estimate_study(study)
    assert estimate.seconds > 0
    assert not Path(study.output).exists()
    lines = format_estimate(estimate, workers=2).splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["dev", "8"],
        ["main", "2"],
        ["text_only", "1"],
        ["all", "11"],
    ]


def test_the_command_line_counts_a_study_that_ships_without_its_data():
    result = CliRunner().invoke(app, ["study", "emoji", "--dry-run", "--seed", "0"])
    assert result.exit_code == 0, result.output
    counts = dict(line.split()[:2] for line in result.output.splitlines()[:3])
    assert counts == {"dev": "64", "main": "8", "text_only": "1"}
