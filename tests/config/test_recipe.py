"""Recipes: equal to their YAML, and every mistake in one is named with its place."""

import pytest

from sparsecut.config.recipe import Model, Recipe, Source, dump_recipe, load_recipe, parse_recipe
from sparsecut.config.yaml_io import expand_path, read_yaml
from sparsecut.schema import UserError

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
    data:
      - {path: a.jsonl, where: "^train", hold_out: tone}
      - {path: $DATA/b.parquet, images: b.tar, keep: 20, on_error: skip}
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


def plain(**changes) -> dict:
    return {**read_yaml(TEXT, "text"), **changes}


def stage(**changes) -> dict:
    """A recipe of one stage."""
    one = {"name": "one", "data": {"path": "a.json"}, "train": ["fusion"], **changes}
    return plain(stages=[one])


def test_a_recipe_is_read_with_its_types(file):
    recipe = load_recipe(file)
    align, tune = recipe.stages
    assert align.args["learning_rate"] == 1e-3
    assert align.data == (Source("pretrain.json", "pictures"),)
    assert tune.lr == {"fusion": 1e-3, "language": 2e-5}
    assert all(isinstance(rate, float) for rate in tune.lr.values())
    assert tune.data[1] == Source("$DATA/b.parquet", "b.tar", on_error="skip", keep=20)
    assert recipe.seed == 3
    assert recipe.evaluate.max_new_tokens == 8
    assert recipe.fusion["count"] == 8


def test_the_dumped_recipe_is_the_recipe(file, tmp_path):
    recipe = load_recipe(file, ["stages.1.args.max_steps=5", "feature_cache=features"])
    dump_recipe(recipe, tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml") == recipe


def test_an_old_key_is_read_and_its_new_name_logged(caplog):
    recipe = parse_recipe(plain(states="features"), name="mine.yaml")
    assert recipe.feature_cache == "features"
    (line,) = caplog.messages
    assert "mine.yaml" in line and "`states`" in line and "`feature_cache`" in line
    with pytest.raises(UserError, match=r"both feature_cache and states"):
        parse_recipe(plain(states="a", feature_cache="b"))


def test_overrides_change_one_value_each(file):
    changes = [
        "stages.0.args.max_steps=10",
        "fusion.count=4",
        "stages.1.data.0.keep=7",
        "seed=1",
        "stages.0.lr.fusion=1e-4",
    ]
    recipe = load_recipe(file, changes)
    align, tune = recipe.stages
    assert align.args == {"learning_rate": 1e-3, "max_steps": 10}
    assert align.lr == {"fusion": 1e-4}
    assert tune.data[0].keep == 7
    assert recipe.fusion["count"] == 4
    assert recipe.seed == 1
    assert load_recipe(file).seed == 3


@pytest.mark.parametrize(
    "override, facts",
    [
        ("seed", "'seed' .*key=value"),
        ("stage.0.args.max_steps=1", "no stage .*'stages'"),
        ("stages.7.name=x", "stages .*0 to 1"),
        ("stages.one.name=x", "stages .*0 to 1"),
        ("output.folder=x", "output is 'runs/x'"),
        ("sed=1", "sed .*'seed'"),
        ("stages.0.arg=1", "stages.0.arg .*'args'"),
        ("seed=[1", "YAML"),
    ],
)
def test_an_override_without_effect_is_refused(file, override, facts):
    with pytest.raises(UserError, match=facts):
        load_recipe(file, [override])


TWO_SOURCES = [{"path": "a"}, {"path": "b", "on_error": "ignore"}]
MISTAKES = [
    (plain(moddel={}), "recipe: moddel .*'model'.* stages"),
    (plain(model={"vision": "a", "langage": "b"}), "model.langage .*'language'"),
    (plain(model={"vision": "a"}), "base, but vision was given"),
    (plain(model="some/encoder"), "model is 'some/encoder'"),
    (plain(fusion=None), "fusion .*method: sparsecut"),
    (stage(train=["projector"]), "projector.*base"),
    (plain(model={"vision": "a", "language": "b", "replan": True}), "replan .*base"),
    (plain(model={"base": "a", "replan": True}, fusion=None), "replan .*fusion"),
    (plain(fusion=8), "fusion is 8"),
    (plain(stages=[]), "at least one stage"),
    (plain(stages=None), "stages"),
    (plain(seed="zero"), "seed is 'zero', .*whole number"),
    (plain(seed=True), "seed is True"),
    (plain(output=None), "output"),
    ([1], "recipe is .1."),
    (stage(train=[]), "stage one .*nothing"),
    (stage(data=[]), "stage one .*nothing"),
    (stage(train=["fuson"]), "stages.0: .*'fuson'.*'fusion'"),
    (stage(train=["language", "language:lora"]), "language and language:lora"),
    (stage(lr={"language": 1e-3}), "lr .*'language'.*stage one"),
    (stage(lr={"fusion": "fast"}), "lr.fusion is 'fast'"),
    (stage(weight_decay={"vision": 0.1}), "weight_decay .*'vision'"),
    (stage(lora={"r": 4}), "lora .*language:lora"),
    (stage(train=["language:lora"], lora={"dropout": 1.0}), "dropout is 1.0"),
    (stage(name="final"), "name is 'final'"),
    (stage(name="a/b"), "name is 'a/b'"),
    (stage(template="caption"), "template is 'caption', .*chat, plain"),
    (stage(args=[1]), "args is .1."),
    (stage(data={"pth": "a.json"}), "stages.0.data.pth .*'path'"),
    (stage(data=TWO_SOURCES), "stages.0.data.1: on_error is 'ignore'"),
    (stage(data={"path": "a", "where": "("}), "where is '.'"),
    (stage(data={"path": "a", "group": "a"}), "group is 'a', .*parentheses"),
    (stage(data={"path": "a", "keep": 0}), "keep is 0"),
    (stage(pad_to=0), "pad_to is 0"),
    (stage(gate_penalty=-1), "gate_penalty is -1"),
    (plain(stages=stage()["stages"] * 2), r"\['one', 'one'\]"),
]


@pytest.mark.parametrize("recipe, facts", MISTAKES)
def test_every_mistake_is_named(recipe, facts):
    with pytest.raises(UserError, match=facts):
        parse_recipe(recipe)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text(TEXT + "seed: 4\n")
    with pytest.raises(UserError, match=r"r.yaml .*'seed' is written twice"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(UserError, match=r"missing.yaml"):
        load_recipe(tmp_path / "missing.yaml")


def test_keys_can_be_merged_from_another_place():
    merged = read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: *a}", "text")
    assert merged["b"] == {"x": 1, "y": 3}


def test_paths_take_environment_variables_when_they_are_used(monkeypatch):
    monkeypatch.setenv("SOME_DATA", "/data")
    assert expand_path("$SOME_DATA/a.json") == "/data/a.json"
    assert expand_path("${SOME_DATA}/a.json") == "/data/a.json"
    with pytest.raises(UserError, match="NOT_SET"):
        expand_path("$NOT_SET/a.json")


def test_a_recipe_can_be_made_in_python():
    recipe = parse_recipe({**stage(), "fusion": "llava"})
    assert isinstance(recipe, Recipe)
    assert recipe.fusion == "llava"
    assert recipe.stages[0].train == ("fusion",)


def test_a_base_comes_with_a_plan_or_without():
    values = stage(train=["projector", "language"]) | {"model": {"base": "some/vlm"}}
    assert parse_recipe(values).fusion == {"method": "sparsecut", "count": 8}
    del values["fusion"]
    recipe = parse_recipe(values)
    assert recipe.fusion is None
    assert recipe.stages[0].train == ("projector", "language")


def test_a_view_size_is_for_encoders_that_are_joined():
    assert Model(vision="a", language="b", view_size=56).view_size == 56
    with pytest.raises(UserError, match=r"view_size=56 .*base=c"):
        Model(base="c", view_size=56)


@pytest.mark.parametrize("value", [".nan", ".inf", "[1.0, -.inf]"])
def test_numbers_inside_of_arguments_are_finite(value):
    plain = read_yaml(TEXT.replace("learning_rate: 1e-3", f"learning_rate: {value}"), "recipe")
    with pytest.raises(UserError, match=r"args\.learning_rate"):
        parse_recipe(plain)
