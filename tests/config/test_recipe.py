"""Recipes: equal to their YAML, and every mistake in one ends in a sentence that names the
place.
"""

import pytest

from sparsecut.config.recipe import Recipe, Source, dump_recipe, load_recipe, parse_recipe
from sparsecut.config.yaml_io import expand_path, read_yaml

TEXT = """
model: {vision: some/encoder, language: some/llm}
fusion: {method: sparsecut, count: 8}
stages:
  - name: align
    data: {path: pretrain.json, images: pictures}
    train: [fusion]
    args: {learning_rate: 1e-3, max_steps: 100}
    template: plain
  - name: tune
    data: [{path: a.jsonl, where: "^train", hold_out: tone}, {path: $DATA/b.parquet, images: b.tar, keep: 20, on_error: skip}]
    train: [fusion, language]
    lr: {fusion: 1e-3, language: 2e-5}
    max_length: 512
evaluate: {data: {path: test.json, images: pictures}, max_new_tokens: 8}
output: runs/x
seed: 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def plain(**changes):
    return {**read_yaml(TEXT, "text"), **changes}


def stage(**changes):
    return plain(
        stages=[{"name": "one", "data": {"path": "a.json"}, "train": ["fusion"], **changes}]
    )


def test_a_recipe_is_read_with_its_types(file):
    recipe = load_recipe(file)
    align, tune = recipe.stages
    assert align.args["learning_rate"] == 1e-3 and align.data == (
        Source("pretrain.json", "pictures"),
    )
    assert tune.lr == {"fusion": 1e-3, "language": 2e-5} and all(
        isinstance(v, float) for v in tune.lr.values()
    )
    assert tune.data[1] == Source("$DATA/b.parquet", "b.tar", on_error="skip", keep=20)
    assert recipe.seed == 3 and recipe.evaluate.max_new_tokens == 8 and recipe.fusion["count"] == 8


def test_the_dumped_recipe_is_the_recipe(file, tmp_path):
    recipe = load_recipe(file, ["stages.1.args.max_steps=5"])
    dump_recipe(recipe, tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml") == recipe


def test_overrides_change_one_value_each(file):
    changes = [
        "stages.0.args.max_steps=10",
        "fusion.count=4",
        "stages.1.data.0.keep=7",
        "seed=1",
        "stages.0.lr.fusion=1e-4",
    ]
    recipe = load_recipe(file, changes)
    assert (
        recipe.stages[0].args == {"learning_rate": 1e-3, "max_steps": 10}
        and recipe.fusion["count"] == 4
    )
    assert (
        recipe.stages[1].data[0].keep == 7
        and recipe.seed == 1
        and recipe.stages[0].lr == {"fusion": 1e-4}
    )
    assert load_recipe(file).seed == 3


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("seed", "not written as key=value"),
        ("stage.0.args.max_steps=1", "did you mean 'stages'"),
        ("stages.7.name=x", "a list with places 0 to 1"),
        ("stages.one.name=x", "a list with places 0 to 1"),
        ("output.folder=x", "output is 'runs/x', which has no keys"),
        ("sed=1", "sed is not known .did you mean 'seed'"),
        ("stages.0.arg=1", "stages.0.arg is not known .did you mean 'args'"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_an_override_that_hits_nothing_says_so(file, override, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_recipe(file, [override])


@pytest.mark.parametrize(
    "recipe, sentence",
    [
        (
            plain(moddel={}),
            (
                "recipe: moddel is not known .did you mean 'model'..; allowed at the top are model,"
                " stages"
            ),
        ),
        (
            plain(model={"vision": "a", "langage": "b"}),
            "model.langage is not known .did you mean 'language'",
        ),
        (plain(model={"vision": "a"}), "either vision and language, or base, but vision was given"),
        (plain(model="some/encoder"), "model is 'some/encoder', but keys and values are needed"),
        (plain(fusion=None), "needs a plan, but fusion is not given"),
        (stage(train=["projector"]), "only an upgraded model .* has one of its own"),
        (plain(fusion=8), "fusion is 8, but must be text or keys and values or nothing"),
        (plain(stages=[]), "at least one stage is needed"),
        (plain(stages=None), "recipe lacks stages"),
        (plain(seed="zero"), "seed is 'zero', but must be a whole number"),
        (plain(seed=True), "seed is True"),
        (plain(output=None), "lacks output"),
        ([1], "recipe is .1., but keys and values are needed"),
        (stage(train=[]), "would train nothing"),
        (stage(data=[]), "would train nothing"),
        (
            stage(train=["fuson"]),
            "stages.0: train names a part that is 'fuson' .did you mean 'fusion'",
        ),
        (stage(lr={"language": 1e-3}), "lr is set for 'language', but stage one trains fusion"),
        (stage(lr={"fusion": "fast"}), "lr.fusion is 'fast', but must be a number"),
        (stage(name="final"), "it names a folder"),
        (stage(name="a/b"), "it names a folder"),
        (stage(template="caption"), "template is 'caption', but allowed are chat, plain"),
        (stage(args=[1]), "args is .1., but must be keys and values"),
        (stage(data={"pth": "a.json"}), "stages.0.data.pth is not known .did you mean 'path'"),
        (
            stage(data=[{"path": "a"}, {"path": "b", "on_error": "ignore"}]),
            "stages.0.data.1: on_error is 'ignore'",
        ),
        (stage(data={"path": "a", "where": "("}), "where is '.', which is no regular expression"),
        (stage(data={"path": "a", "keep": 0}), "keep is 0, but at least 1"),
        (plain(stages=[stage()["stages"][0]] * 2), "names must differ"),
    ],
)
def test_every_mistake_is_a_sentence(recipe, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_recipe(recipe)


def test_a_key_written_twice_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text(TEXT + "seed: 4\n")
    with pytest.raises(ValueError, match="the key 'seed' is written twice"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(ValueError, match="there is no recipe"):
        load_recipe(tmp_path / "missing.yaml")


def test_keys_can_be_taken_over_from_another_place():
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: *a}", "text")["b"] == {
        "x": 1,
        "y": 3,
    }


def test_paths_take_environment_variables_when_they_are_used(monkeypatch):
    monkeypatch.setenv("SOME_DATA", "/data")
    assert expand_path("$SOME_DATA/a.json") == "/data/a.json" == expand_path("${SOME_DATA}/a.json")
    with pytest.raises(ValueError, match="the environment variable NOT_SET, which is not set"):
        expand_path("$NOT_SET/a.json")


def test_a_recipe_can_be_made_in_python():
    recipe = parse_recipe({**stage(), "fusion": "llava"})
    assert (
        isinstance(recipe, Recipe)
        and recipe.fusion == "llava"
        and recipe.stages[0].train == ("fusion",)
    )


def test_a_base_comes_with_a_plan_or_without():
    given = stage(train=["projector", "language"]) | {"model": {"base": "some/vlm"}}
    assert parse_recipe(given).fusion == {"method": "sparsecut", "count": 8}
    del given["fusion"]
    assert parse_recipe(given).fusion is None and parse_recipe(given).stages[0].train == (
        "projector",
        "language",
    )


def test_a_view_size_is_for_encoders_that_are_joined():
    from sparsecut.config.recipe import Model

    assert Model(vision="a", language="b", view_size=56).view_size == 56
    with pytest.raises(ValueError, match="view_size=56 is for an encoder that is joined"):
        Model(base="c", view_size=56)
