"""The commands, as typed: what they print, what they write, and one line for every mistake."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.released import build_released, write_released_folder, write_vision_folder
from helpers.tiny import tiny_language, tiny_tokenizer, tiny_vision
from PIL import Image
from transformers import CLIPImageProcessorPil

from sparsecut import load
from sparsecut.cli import main as cli
from sparsecut.methods import make_plan
from sparsecut.plan import Plan

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with an encoder, a language model, a built model, two images and eight
    questions.
    """
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(1)  # what the model answers must not hang on the tests before
    tiny_vision().save_pretrained(home / "vision")
    CLIPImageProcessorPil().save_pretrained(home / "vision")
    tiny_language().save_pretrained(home / "language")
    tiny_tokenizer().save_pretrained(home / "language")
    (home / "pictures").mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (20, 30), color).save(home / "pictures" / f"{color}.png")
    records = [question(i, ("red", "blue")[i % 2]) for i in range(8)]
    (home / "questions.json").write_text(json.dumps(records))
    (home / "recipe.yaml").write_text(RECIPE)
    return home


def question(number: int, color: str) -> dict:
    turns = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": color}]
    kind = "ab"[number // 4]
    return {
        "id": f"{kind}.{number}",
        "image": f"{color}.png",
        "conversations": turns,
        "level": ("low", "high")[number % 2],
    }


RECIPE = """
model: {vision: vision, language: language}
fusion: {method: sparsecut, count: 2, pattern: sparse}
stages:
  - name: align
    data: {path: questions.json, images: pictures}
    train: [fusion]
    args: {max_steps: 2, per_device_train_batch_size: 2, learning_rate: 1.0e-3, use_cpu: true}
evaluate: {data: {path: questions.json, images: pictures}, max_new_tokens: 2}
output: trained
"""


@pytest.fixture
def run(home, monkeypatch, capsys):
    """Types a command in a copy-free home; returns (exit code, output, errors)."""

    def run(*arguments: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["sparsecut", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        return leaving.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def model(home, run):
    """The name of a built model's folder."""
    if not (home / "model").is_dir():
        assert (
            run("build", "--vision", "vision", "--language", "language", "--out", "model")[0] == 0
        )
    return "model"


COMMANDS = (
    "show build upgrade train eval chat serve convert card push demo cost study search explain"
    " compare"
)
GROUPS = ["shapes draw", "shapes pretrain"]


def test_help_is_quick_and_loads_no_model_library():
    heavy = (
        "import sys; from sparsecut.cli import main;"
        " sys.exit(bool({'torch', 'transformers', 'rich.progress'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", heavy]).returncode == 0
    seconds = []  # of the processor, so that a busy machine does not count
    for _ in range(3):
        start = sum(os.times()[2:4])
        help_command = [sys.executable, "-m", "sparsecut", "--help"]
        done = subprocess.run(help_command, capture_output=True, text=True)
        seconds.append(sum(os.times()[2:4]) - start)
    assert done.returncode == 0
    assert min(seconds) < 0.7
    assert all(f" {command} " in done.stdout for command in [*COMMANDS.split(), "shapes"])


def test_every_command_has_help(run):
    for command in [*COMMANDS.split(), *GROUPS]:
        code, out, _ = run(*command.split(), "--help")
        assert code == 0
        assert f"Usage: sparsecut {command}" in out
    assert run("--version")[1].startswith("sparsecut 0.")


def test_the_old_name_of_shapes_still_runs_and_names_the_new_one(run, home):
    code, out, err = run("world", "draw", "old-name", "--train", "1", "--dev", "0", "--test", "0")
    assert code == 0
    assert "old-name/train.json" in out
    assert "sparsecut shapes" in err


def test_show_draws_methods_files_recipes_and_models(run, home, model):
    assert "4 shortcuts" in run("show", "sparsecut")[1]
    options = ["-o", "count=2", "--option", "gate=zero"]
    depths = ["--vision-depth", "6", "--language-depth", "4"]
    code, out, _ = run("show", "sparsecut", *options, *depths)
    assert code == 0
    assert "2 shortcuts" in out
    code, out, _ = run("show", "llava", "--json")
    assert Plan.from_dict(json.loads(out)) == make_plan("llava", 24, 32)
    (home / "plan.json").write_text(out)
    assert "no shortcuts" in run("show", "plan.json")[1]
    code, out, _ = run("show", "recipe.yaml")  # the depths are those of the recipe's models
    assert code == 0
    assert "6 blocks" in out
    assert "4 layers" in out
    assert "4 patches" in run("show", model)[1]


def test_studies_and_searches_are_refused_before_anything_runs(run, home):
    study = str(ROOT / "sparsecut" / "recipes" / "study" / "shapes.yaml")
    out = f"output={home / 'none'}"
    cases = [
        (["study", "nothing.yaml"], ["nothing.yaml"]),
        (["study", study, "seeds=[]"], ["seeds"]),
        (["study", study, out, "--report"], ["study.yaml"]),
        (["study", study, out, "--arm", "lava"], ["'lava'", "'llava'"]),
        (["search", study, out], ["budget"]),
    ]
    for command, facts in cases:
        code, _, err = run(*command)
        assert code == 2, command
        assert all(fact in err for fact in facts), err
        assert not (home / "none").exists()


def test_build_takes_a_plan_file_and_writes_what_load_reads(run, home):
    plan = "tiles: 0\nshortcuts: [{taps: [-2], layer: 0}, {taps: [2], layer: 1}]\n"
    (home / "plan.yaml").write_text(plan)
    parts = ["--vision", "vision", "--language", "language"]
    code, out, _ = run("build", *parts, "--plan", "plan.yaml", "--out", "planned")
    assert code == 0
    assert "wrote planned" in out
    built, processor = load(home / "planned")
    assert [s.layer for s in built.plan.shortcuts] == [0, 1]
    assert processor.tiles == 0


def test_train_checks_trains_and_evaluates(run, home):
    code, out, _ = run("train", "recipe.yaml", "--check", "--save-images", "sheets")
    assert code == 0
    assert "recipe.yaml can be trained" in out
    assert "stage align, questions.json record 0" in out
    before, _, rest = out.partition("[[so]]")[2].partition("[[")  # the heading explains the marks
    marked = rest.partition("]]")[0]
    assert "red" in marked and "what" not in marked and "image tokens>" in before
    assert "are learned" in out and "pixel_values: 1 x" in out
    assert Image.open(home / "sheets" / "align.png").width > 2 * 16
    assert not (home / "trained").exists()
    code, _, errors = run("train", "recipe.yaml", "--save-images", "sheets")
    assert code == 2 and "--check" in errors
    command = ["train", "recipe.yaml", "stages.0.args.max_steps=1", "output=other"]
    code, out, _ = run(*command)
    assert code == 0
    assert "mean over levels" in out
    result = json.loads((home / "other" / "eval" / "result.json").read_text())
    assert result["num_examples"] == 8
    assert load(home / "other" / "final")[0].plan.layers == (1, 3)
    assert run(*command, "--resume")[0] == 0


def test_eval_scores_writes_and_continues(run, home, model):
    command = ["eval", model, "--data", "questions.json", "--images", "pictures"]
    written = [*command, "--out", "answers", "--max-new-tokens"]
    code, out, _ = run(*written, "3")
    assert code == 0
    assert "level high" in out
    assert "answers/result.json" in out
    assert len((home / "answers" / "predictions.jsonl").read_text().splitlines()) == 8
    assert run(*written, "3")[0] == 0
    assert json.loads((home / "answers" / "result.json").read_text())["num_kept"] == 8
    code, _, err = run(*written, "4")
    assert code == 2
    assert "max_new_tokens (3 then, 4 now)" in err
    assert run(*written, "4", "--fresh")[0] == 0
    part = ["--where", "^a", "--group", r"^(.)\.", "--limit", "3", "--batch-size", "2"]
    code, out, _ = run(*command, *part)
    assert code == 0
    assert "group a" in out
    assert "wrote" not in out


def test_eval_and_explain_take_other_names_of_keys(run, home, model):
    german = {"frage": "what is it", "antwort": "red", "image": "pictures/red.png"}
    (home / "german.jsonl").write_text(json.dumps(german))
    for command in ("eval", "explain"):
        asked = [command, model, "--data", "german.jsonl", "--column", "question=frage"]
        code, out, _ = run(*asked, "--column", "answer=antwort", "--max-new-tokens", "2")
        assert code == 0 and out
        for wrong, facts in (
            ("answer=antwrot", ["'antwrot'", "'antwort'"]),
            ("anwser=antwort", ["'anwser'", "'answer'"]),
            ("antwort", ["--column", "'antwort'"]),
            ("question=antwort", ["--column", "question=antwort"]),
        ):
            code, _, err = run(*asked, "--column", wrong)
            assert code == 2 and all(fact in err for fact in facts), err


def test_options_of_eval_that_do_not_go_together_are_refused(run, model):
    cases = [
        (["eval", model], ["--data", "--tasks"]),
        (["eval", model, "--data", "questions.json", "--root", "x"], ["--root", "--tasks"]),
        (["eval", model, "--tasks", "pope"], ["--root"]),
        (["eval", model, "--tasks", "pope", "--root", "x"], ["--out"]),
        (["eval", model, "--tasks", "pope", "--data", "questions.json"], ["--data"]),
    ]
    for command, facts in cases:
        code, _, err = run(*command)
        assert code == 2, command
        assert all(fact in err for fact in facts), err


OUTPUTS = [
    "shapes draw FILE",
    "build --vision vision --language language --out FILE",
    "eval model --data questions.json --images pictures --out FILE/inside",
    "explain model --data questions.json --images pictures --out FILE",
    "compare answers --out FILE",
    "cost llava --vision shapes --language shapes --json FILE/costs.json",
    "demo --quick --out FILE",
    "train recipe.yaml output=FILE",
    "shapes pretrain --quick --out FILE",
]


@pytest.mark.parametrize("typed", OUTPUTS)
def test_an_output_folder_that_cannot_be_is_refused_before_anything_runs(run, home, typed):
    file = home / "FILE"
    file.write_text("a thesis")
    code, out, err = run(*typed.split())
    assert code == 2
    assert not out
    assert "FILE is a file" in err
    assert file.read_text() == "a thesis"


def test_only_a_user_error_is_shortened(run, home, monkeypatch):
    from sparsecut.config import recipe

    def fail(*arguments, **settings):
        raise ValueError("a fault of ours")

    monkeypatch.setattr(recipe, "load_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["sparsecut", "train", "recipe.yaml"])
    with pytest.raises(ValueError, match="a fault of ours"):
        cli.main()


def test_chat_asks_once_and_talks_through_a_pipe(run, model):
    code, out, _ = run(
        "chat", model, "pictures/red.png", "--ask", "what is it", "--max-new-tokens", "4"
    )
    assert code == 0 and len(out.strip()) > 1
    talk = (
        "what is it\n/image pictures/blue.png\n/image none.png\nis it"
        " blue\n/history\n/reset\n/history\n/quit\nnever\n"
    )
    code, output, _ = run("chat", model, "pictures/red.png", "--max-new-tokens", "4", typed=talk)
    assert code == 0 and output.startswith(out)
    assert "error: there is no image none.png" in output and "user: [image]\nis it blue" in output
    assert output.count("the conversation is empty") == 2
    assert run("chat", model, typed="")[:2] == (0, "")


@pytest.mark.parametrize(
    ("value", "named"), [("enable_thinking=false", "'enable_thinking'"), ("x", "name=value")]
)
def test_a_mistaken_argument_of_the_chat_template_is_named(run, model, value, named):
    code, out, err = run("chat", model, "--ask", "what", "--template-arg", value)
    last = err.strip().splitlines()[-1]
    assert code == 2 and not out and last.startswith("error: ") and named in last


def test_convert_reads_a_released_folder(run, home):
    weights, configs, _ = build_released("cross_mlp", depth=6)
    write_released_folder(
        home / "checkpoint", weights, configs["text_config"].to_dict(), tower=False
    )
    write_vision_folder(home / "tower", weights, configs["vision_config"])
    code, out, _ = run(
        "convert",
        "checkpoint",
        "converted",
        "--vision",
        "tower",
        "--taps",
        "0,3",
        "--layers",
        "1,4",
    )
    assert (
        code == 0
        and "2 shortcuts, 2x2 fine views, one shared projector" in out
        and "wrote converted" in out
    )
    assert load(home / "converted")[0].plan.layers == (1, 4)
    code, out, _ = run(
        "convert", "checkpoint", "plain", "--vision", "tower", "--taps", "none", "--layers", "none"
    )
    assert code == 0 and "no shortcuts" in out
    code, _, err = run("convert", "checkpoint", "third", "--vision", "tower", "--taps", "0;3")
    assert code == 2 and "--taps is '0;3', but must be whole numbers with commas" in err


def test_shapes_draws_images(run, home):
    code, out, _ = run(
        "shapes", "draw", "drawn", "--train", "2", "--dev", "1", "--test", "0", "--questions", "1"
    )
    assert code == 0 and out == "train: 2 images, drawn/train.json\ndev: 1 images, drawn/dev.json\n"
    assert (home / "drawn" / "train_captions.json").is_file() and not (
        home / "drawn" / "test.json"
    ).exists()
    assert "did you mean" in run("shapes", "drw")[2].lower()


def test_numbers_out_of_range_are_refused_before_anything_is_loaded(run):
    for option in ("--batch-size=0", "--max-new-tokens=0", "--limit=0"):
        code, _, err = run("eval", "nothing", "--data", "nothing", option)
        assert code == 2 and option.partition("=")[0] in err and "Invalid value" in err
    assert "Invalid value" in run("chat", "nothing", "--temperature=-1")[2]


MISTAKES = {  # a command -> the fact that its error names
    "show sparcut": "'sparsecut'",
    "show sparsecut -o pattrn=top": "'pattern'",
    "show sparsecut -o count": "key=value",
    "show sparsecut --vision-depth 0": "at least 1",
    "show official_13b": "layers 0 to 31",
    "show nothing.yaml": "nothing.yaml",
    "show questions.json": "questions.json",
    "show pictures": "config.json",
    "show model -o count=2": "options",
    "build --vision pictures --language language --out new": "'pictures'",
    "build --vision vision --language vision --out new": "tokenizer",
    "build --vision vision --language language --out model": "model",
    "train nothing.yaml": "nothing.yaml",
    "train recipe.yaml stages.0.args.max_stps=1": "max_steps",
    "eval pictures --data questions.json --images pictures": "config.json",
    "eval model --data questions.json": "red.png",
    "eval model --data nothing.json": "nothing.json",
    "eval model --data questions.json --images pictures --where (": "regular expression",
    "eval model --data questions.json --images pictures --where zzz": "zzz",
    "eval model --data questions.json --images pictures --device nothing": "--device nothing",
    "chat model nothing.png": "nothing.png",
    "convert pictures new --vision vision": "config.json",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_line(run, home, model, typed):
    code, out, err = run(*typed.split())
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and not out and len(lines) == 1, err
    assert lines[0].startswith("error: ") and MISTAKES[typed] in lines[0]
    assert not (home / "new").exists()


def test_the_whole_traceback_is_there_on_request(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["sparsecut", "show", "nothing", "--traceback"])
    with pytest.raises(ValueError, match="nothing"):
        cli.main()
    monkeypatch.setattr(sys, "argv", ["sparsecut", "show", "nothing"])
    monkeypatch.setenv("SPARSECUT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="nothing"):
        cli.main()
