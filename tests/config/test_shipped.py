"""Files that ship with the package are found by name, from any folder."""

import json

import pytest

from sparsecut.config.recipe import load_recipe
from sparsecut.config.shipped import FOLDERS, find_deepspeed, find_file, find_shipped, list_shipped
from sparsecut.experiments.study import load_study
from sparsecut.methods import METHODS
from sparsecut.schema import UserError


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_file_says_what_it_is_for():
    for one in [*list_shipped("recipe"), *list_shipped("study")]:
        facts = one.describe()
        assert facts.keys() == {"what", "takes", "needs"}, one.long_name
        assert all(facts.values()) and len(facts["what"]) < 125
        verb = "train" if one.kind == "recipe" else "study"
        own = [text for text in one.list_commands() if f"sparsecut {verb} {one.name}" in text]
        assert own, f"{one.long_name} does not say how it is run"
    assert {one.name for one in list_shipped("plan")} == set(METHODS)
    assert all(one.describe()["what"] for one in list_shipped("plan"))


def test_a_long_name_is_unique_and_finds_its_file():
    names = [one.long_name for one in list_shipped()]
    assert len(set(names)) == len(names) > 25
    for one in list_shipped():
        assert find_shipped(one.long_name, list(FOLDERS)) == one


def test_recipes_and_studies_load_by_name():
    for one in list_shipped("recipe"):
        assert load_recipe(one.name) == load_recipe(one.path)
    for one in list_shipped("study"):
        assert load_study(one.name) == load_study(one.path)
    assert load_recipe("tiny", ["seed=4"]).seed == 4


@pytest.mark.parametrize("old", ["configs/tiny.yaml", "configs/study/shapes.yaml"])
def test_paths_of_before_are_found_with_a_line(old, caplog):
    kind, name = ("study", "shapes") if "study" in old else ("recipe", "tiny")
    assert find_file(old, kind) == find_shipped(name, [kind]).path
    assert name in caplog.text
    assert find_file(name, kind) == find_file(old, kind)


def test_an_existing_file_of_that_name_wins(empty):
    text = find_file("tiny", "recipe").read_text(encoding="utf-8")
    (empty / "tiny").write_text(text.replace("seed=0", "") + "\nseed: 7\n", encoding="utf-8")
    (empty / "configs").mkdir()
    (empty / "configs" / "tiny.yaml").write_text(text + "\nseed: 8\n", encoding="utf-8")
    assert load_recipe("tiny").seed == 7
    assert load_recipe("configs/tiny.yaml").seed == 8


def test_a_folder_of_that_name_does_not_hide_it(empty):
    (empty / "tiny").mkdir()
    assert load_recipe("tiny").stages


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tinny", ["tinny", "did you mean 'tiny'"]),
        ("tiny.yaml", ["did you mean 'tiny'", "upgrade-llava-7b"]),
        ("mine/smoll.yaml", ["did you mean 'smol'"]),
        ("shapes", ["is no recipe but a study", "sparsecut study shapes"]),
        ("llava", ["is no recipe but a plan", "sparsecut show llava"]),
        ("zero2", ["deepspeed: zero2"]),
        ("x" * 300, ["there is no recipe"]),
        ("a\0b", ["there is no recipe"]),
        ("", ["there is no recipe"]),
        ("configs/none.yaml", ["there is no recipe configs/none.yaml"]),
        ("../tiny", ["there is no recipe"]),
    ],
)
def test_an_unknown_name_is_told_the_nearest(text, words):
    with pytest.raises(UserError) as caught:
        load_recipe(text)
    assert all(word in str(caught.value) for word in words)


def test_a_recipe_is_no_study():
    with pytest.raises(UserError, match="sparsecut train tiny"):
        load_study("tiny")


def test_deepspeed_settings_are_found_by_name(empty, monkeypatch):
    stages = [json.loads(find_deepspeed(f"zero{n}").read_text()) for n in (2, 3)]
    assert [one["zero_optimization"]["stage"] for one in stages] == [2, 3]
    own = empty / "own.json"
    own.write_text("{}", encoding="utf-8")
    monkeypatch.setenv("MINE", str(empty))
    assert find_deepspeed("$MINE/own.json") == own
    assert find_deepspeed("configs/deepspeed/zero3.json") == find_deepspeed("zero3")
    with pytest.raises(UserError, match=r"args.deepspeed: .*zero3"):
        find_deepspeed("zero33")


def test_a_stage_gets_the_file_of_a_deepspeed_name():
    from sparsecut.training.arguments import check_arguments

    stage = load_recipe("tiny", ["stages.0.args.deepspeed=zero2"]).stages[0]
    assert check_arguments(stage)["deepspeed"] == str(find_deepspeed("zero2"))
    stage = load_recipe("tiny", ["stages.0.args.deepspeed=zero22"]).stages[0]
    with pytest.raises(UserError, match=r"stage align: args.deepspeed: .*zero2"):
        check_arguments(stage)
