"""The trained model that ships: small, whole, known by its name, and right about the example."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file

import sparsecut
from sparsecut.building import read_depths, save
from sparsecut.cli.main import app
from sparsecut.cli.plan_argument import draw_argument
from sparsecut.methods import make_plan
from sparsecut.schema import UserError
from sparsecut.shapes import EXAMPLE_ANSWERS, EXAMPLE_IMAGE, EXAMPLE_QUESTIONS, vision_path
from sparsecut.shapes.questions import KINDS, find_kind, split_scene
from sparsecut.shapes.scenes import DIGITS, SHAPES, TEXTURES
from sparsecut.shapes.sizes import SMALL
from sparsecut.shipped_model import (
    SHIPPED_FOLDER,
    find_shipped_model,
    name_model,
    read_backbone_depth,
)

ROOT = Path(__file__).parents[1]
MAX_BYTES = 4 * 2**20
RECIPE = """
model: {{vision: {name}, language: {name}}}
fusion: {{method: sparsecut}}
output: out
stages: [{{name: one, train: [fusion], data: {{path: q.json}}}}]
"""
SCENE_OF_THE_EXAMPLE = "test/0/0"


@pytest.fixture(scope="module")
def shipped():
    return sparsecut.load("shapes")


@pytest.fixture
def no_model_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_reports_call_it_by_its_name(no_model_here):
    assert name_model(find_shipped_model("shapes")) == "shapes"
    assert name_model("runs/tiny/final") == "runs/tiny/final"


def test_the_depths_of_its_backbones_are_known_without_a_model_library():
    known = read_backbone_depth("vision"), read_backbone_depth("language")
    assert known == read_depths("shapes", "shapes")


@pytest.mark.parametrize("name", ["shapes", "world"])
def test_a_recipe_on_its_backbones_is_drawn_with_their_depths(name, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(name=name))
    plan, _ = draw_argument(str(recipe), None, None, [])
    assert plan == make_plan("sparsecut", *read_depths("shapes", "shapes"))


def test_the_answers_to_the_example_are_what_its_scene_holds():
    scene = split_scene(SCENE_OF_THE_EXAMPLE, SMALL)
    seen = {scene.places[thing.place]: thing for thing in scene.things}
    for question, answer in zip(EXAMPLE_QUESTIONS, EXAMPLE_ANSWERS, strict=True):
        thing = seen[question.split()[-1]]
        assert answer in {SHAPES[thing.shape], TEXTURES[thing.texture], DIGITS[thing.digit]}
    levels = {KINDS[find_kind(question)][0] for question in EXAMPLE_QUESTIONS}
    assert len(levels) == len(EXAMPLE_QUESTIONS) == 3, "one question of each level"


def test_it_answers_the_example_one_by_one_and_in_a_conversation(shipped):
    conversation = sparsecut.Chat(*shipped)
    images = [EXAMPLE_IMAGE]
    for question, answer in zip(EXAMPLE_QUESTIONS, EXAMPLE_ANSWERS, strict=True):
        assert sparsecut.Chat(*shipped).ask(question, EXAMPLE_IMAGE) == answer
        assert conversation.ask(question, *images) == answer
        images = []


def test_it_is_small_and_part_of_the_package():
    files = [path for path in SHIPPED_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["sparsecut"]
    for path in files:
        name = path.relative_to(ROOT / "sparsecut").as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns), name


def test_its_encoder_is_the_frozen_backbone_and_it_computes_in_single_precision(shipped):
    model, _ = shipped
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    backbone = load_file(vision_path() / "model.safetensors")
    own = model.vision_tower.state_dict()
    for name, values in backbone.items():
        found = own[name] if name in own else own[name.removeprefix("vision_model.")]
        assert torch.equal(values.float(), found)


def test_its_card_says_how_it_was_trained():
    card = (SHIPPED_FOLDER / "README.md").read_text(encoding="utf-8")
    command = re.search(r"trained by \| `sparsecut ([^`]+)`", card)[1].split()
    group = typer.main.get_command(app)
    options = {name for parameter in group.commands[command[0]].params for name in parameter.opts}
    assert {word for word in command if word.startswith("--")} <= options
    assert "--seed" in command
    assert str(Path.home()) not in card and "/tmp" not in card


def test_no_file_of_it_names_the_machine_that_made_it():
    for path in SHIPPED_FOLDER.glob("*.json"):
        assert not re.search(r'"/\w', path.read_text(encoding="utf-8")), path.name


def test_a_model_in_a_folder_of_that_name_comes_first(no_model_here, tiny):
    Path("shapes").mkdir()
    Path("shapes", "train.json").write_text("[]")
    assert find_shipped_model("shapes") == str(SHIPPED_FOLDER)
    save(*tiny, "shapes")
    assert find_shipped_model("shapes") == "shapes"
    assert find_shipped_model("./shapes") == "./shapes"


def run(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        app([*words])
    assert not ended.value.code


@pytest.mark.parametrize("words", [(), ("shapes", str(EXAMPLE_IMAGE))], ids=["alone", "named"])
def test_chat_asks_it_about_the_example(no_model_here, capsys, words):
    run("chat", *words, "--device", "cpu", "--ask", EXAMPLE_QUESTIONS[0])
    printed = capsys.readouterr()
    assert printed.out.strip() == EXAMPLE_ANSWERS[0]
    is_offered = all(question in printed.err for question in EXAMPLE_QUESTIONS)
    assert is_offered == (not words)


def test_an_image_in_the_place_of_the_model_is_told(no_model_here):
    with pytest.raises(UserError, match=r"MODEL.*shapes"):
        app(["chat", str(EXAMPLE_IMAGE)], standalone_mode=False)
