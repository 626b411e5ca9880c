"""What `pip install sparsecut` gives without any extra: it trains, evaluates and chats.

`make corners CORNER=core` runs this where no extra is installed. Elsewhere it is not collected.
"""

import contextlib
import io
import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import sparsecut
from sparsecut.schema import UserError
from sparsecut.shapes import EXAMPLE_IMAGE

RECIPE = Path(__file__).parents[2] / "sparsecut" / "recipes" / "tiny.yaml"
EXTRAS = [
    "fastapi",
    "hypothesis",
    "matplotlib",
    "openai",
    "openpyxl",
    "peft",
    "scipy",
    "tensorboard",
    "uvicorn",
]


def run(*words: str) -> tuple[int, str]:
    """(exit code, all that was printed) of a command of the command line, in this process."""
    typed, sys.argv = sys.argv, ["sparsecut", *map(str, words)]
    shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    try:
        with (
            pytest.raises(SystemExit) as ended,
            contextlib.redirect_stdout(shown),
            contextlib.redirect_stderr(shown),
        ):
            runpy.run_module("sparsecut", run_name="__main__")
    finally:
        sys.argv = typed
    return ended.value.code or 0, shown.buffer.getvalue().decode("utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output of a recipe of three steps on drawn images, beside `pictures`."""
    folder = tmp_path_factory.mktemp("core")
    pictures = folder / "pictures"
    code, text = run("shapes", "draw", pictures, "--train", "8", "--dev", "4", "--test", "0")
    assert code == 0, text
    recipe = RECIPE.read_text().replace("runs/pictures", str(pictures))
    (folder / "recipe.yaml").write_text(recipe)
    steps = [f"stages.{number}.args.max_steps=3" for number in (0, 1)]
    code, text = run("train", folder / "recipe.yaml", *steps, f"output={folder / 'out'}")
    assert code == 0, text
    return folder


@pytest.mark.parametrize("name", EXTRAS)
def test_no_extra_is_installed_here(name):
    assert find_spec(name) is None


def test_a_recipe_trains_and_evaluates(trained):
    lines = (trained / "out" / "tune" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])
    assert (trained / "out" / "final" / "model.safetensors").is_file()
    assert json.loads((trained / "out" / "eval" / "result.json").read_text())


def test_a_trained_model_is_evaluated_and_answers(trained):
    model = trained / "out" / "final"
    data = ("--data", trained / "pictures" / "dev.json", "--images", trained / "pictures")
    code, text = run("eval", model, *data, "--out", trained / "again", "--limit", "4")
    assert code == 0, text
    assert len((trained / "again" / "predictions.jsonl").read_text().splitlines()) == 4
    code, text = run("chat", model, EXAMPLE_IMAGE, "--ask", "what shape is top-left")
    assert code == 0, text
    assert text.strip()


def test_a_model_is_built_drawn_and_priced():
    model, processor = sparsecut.build("shapes", "shapes")
    assert sparsecut.Chat(model, processor).ask("what shape is top-right", EXAMPLE_IMAGE)
    for words in (("show", "sparsecut"), ("cost", "llava", "--vision", "shapes")):
        options = ("--language", "shapes") if words[0] == "cost" else ()
        code, text = run(*words, *options)
        assert code == 0, text


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (("serve", "MODEL"), "serve"),
        (("demo", "--out", "OUT"), "reports"),
        (("compare", "a=EVAL", "b=EVAL", "--out", "OUT"), "reports"),
    ],
)
def test_a_command_names_the_extra_that_it_misses(trained, words, extra):
    places = {
        "MODEL": trained / "out" / "final",
        "EVAL": trained / "out" / "eval",
        "OUT": trained / "new",
    }
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    code, text = run(*words)
    assert code == 2
    assert extra in text
    assert "pip install" in text
    assert "Traceback" not in text
    assert not (trained / "new").exists()


def test_a_recipe_with_an_adapter_names_its_extra(trained):
    adapter = ("stages.1.train=[fusion, language:lora]", "stages.1.lora={r: 2}")
    out = trained / "adapted"
    code, text = run("train", trained / "recipe.yaml", *adapter, f"output={out}")
    assert code == 2
    assert "sparsecut[lora]" in text
    assert not out.exists()


def test_an_adapter_names_its_extra():
    from sparsecut.adapters import import_peft

    with pytest.raises(UserError, match=r"sparsecut\[lora\]"):
        import_peft()
