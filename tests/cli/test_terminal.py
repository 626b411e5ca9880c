"""What reaches a terminal: text from anywhere, without what would control it."""

import ast
import io
import logging
import re
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest

import sparsecut
from sparsecut.cli import main as cli
from sparsecut.cli.app import echo, print_scores
from sparsecut.drawing import escape_controls, text_table
from sparsecut.training.progress import print_message
from sparsecut.waits import show_step
from sparsecut.waits.display import DISPLAY

HOSTILE = "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \u202eevil\u2069 \x7f\r\x08 \u2028 \u200f"
FRIENDLY = "caf\u00e9 \U0001f469\u200d\U0001f52c \u0645\u06cc\u200c\u062e ja\u0304 \u2713 a\tb"


def controls_terminal(text: str) -> bool:
    bidi = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    for character in text:
        is_control = unicodedata.category(character) in ("Cc", "Zl", "Zp")
        if is_control and character not in "\n\t":
            return True
        if unicodedata.bidirectional(character) in bidi or character in "\u200e\u200f\u061c":
            return True
    return False


def test_every_character_that_controls_is_escaped_and_no_other():
    for number in [*range(0xD800), *range(0xE000, 0x11000)]:
        character = chr(number)
        escaped = escape_controls(character)
        assert not controls_terminal(escaped), hex(number)
        if not controls_terminal(character) and not 0x206A <= number <= 0x206F:
            assert escaped == character, hex(number)
    assert escape_controls(FRIENDLY) == FRIENDLY
    assert escape_controls("a\r\nb") == "a\nb"
    assert escape_controls("\x1b[1m") == "\\x1b[1m"
    assert escape_controls("a\nb\tc", keep_lines=False) == "a\\nb\\tc"


def test_a_cell_cannot_add_lines_or_controls_to_a_table():
    table = text_table([["", "x"], [f"{HOSTILE}\nall  100 %", "1"]])
    assert table.count("\n") == 1
    assert not controls_terminal(table)


def test_scores_with_hostile_names_are_printed_safely(capsys):
    scores = {"accuracy": 1.0, "num_correct": 1, "num_examples": 1, "interval": [0, 1]}
    groups = {f"a {HOSTILE}": scores, "\nall  0.0 %": scores}
    result = {**scores, "levels": groups, "groups": groups, "mean_over_levels": None}
    print_scores(result, Path(HOSTILE))
    output = capsys.readouterr().out
    assert not controls_terminal(output)
    assert "red" in output


class FakeChat:
    """A chat whose answers control the terminal, in pieces."""

    processor = None

    def __init__(self, *args, **kwargs):
        pass

    def stream(self, text, *images):
        yield from HOSTILE


@pytest.mark.parametrize("lines", [None, ["hello", f"/{HOSTILE}", f"/image {HOSTILE}.png"]])
def test_answers_and_mistakes_in_a_chat_are_printed_safely(monkeypatch, capsys, tmp_path, lines):
    monkeypatch.setattr("sparsecut.cli.chat.load_model", lambda *args: (None, None))
    monkeypatch.setattr("sparsecut.chat.Chat", FakeChat)
    (tmp_path / "config.json").write_text("{}")
    arguments = ["chat", str(tmp_path)]
    if lines is None:
        arguments += ["--ask", "a"]
    else:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    with pytest.raises(SystemExit) as exit:
        cli.app(arguments)
    assert not exit.value.code
    output = capsys.readouterr().out
    assert not controls_terminal(output)
    assert "evil" in output


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line and returns what it printed to stderr."""
    factory, formatwarning, hook = (
        logging.getLogRecordFactory(),
        warnings.formatwarning,
        sys.excepthook,
    )

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sparsecut", *arguments])
        try:
            cli.main()
        except SystemExit:
            pass
        except Exception:
            sys.excepthook(*sys.exc_info())
        return capsys.readouterr().err

    yield run
    logging.setLogRecordFactory(factory)
    warnings.formatwarning = formatwarning
    sys.excepthook = hook


def test_errors_are_printed_safely(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('"a\\e[31m": 1\n"\\u202e": 2\n')
    for arguments in (["show", HOSTILE], ["train", f"{HOSTILE}.yaml"], ["train", str(recipe)]):
        output = run(*arguments)
        assert "error" in output
        assert not controls_terminal(output)


def test_tracebacks_are_printed_safely(run, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise ValueError(HOSTILE)

    monkeypatch.setattr("sparsecut.cli.chat.load_model", fail)
    (tmp_path / "config.json").write_text("{}")
    output = run("chat", str(tmp_path), "--ask", "a")
    assert "Traceback" in output
    assert "evil" in output
    assert not controls_terminal(output)


def test_what_is_logged_and_warned_is_safe(run, caplog):
    run("--version")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("sparsecut.anything")
    logger.addHandler(handler)
    try:
        logger.warning("a record of %s", HOSTILE)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logger.exception("failed")
    finally:
        logger.removeHandler(handler)
    text = stream.getvalue() + warnings.formatwarning(HOSTILE, UserWarning, "file.py", 1, "")
    assert text.count("evil") == 3
    assert not controls_terminal(text)


def test_progress_and_messages_are_safe(capsys):
    print_message(f"{HOSTILE} [red]kept[/red]")
    with show_step(f"{HOSTILE} {{x}} [red]kept[/red]", 10) as step:
        step.start -= 100
        step.advance()
        DISPLAY.look()
    echo(HOSTILE, err=True)
    output = capsys.readouterr().err
    assert output.count("evil") == 4
    assert output.count("[red]kept[/red]") == 3
    assert not controls_terminal(output)


def test_commands_print_with_one_function():
    folder = Path(sparsecut.__file__).parent / "cli"
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                is_raw = re.fullmatch(r"print|(typer|click)\.s?echo", name)
                assert not is_raw or path.name == "app.py", (path.name, node.lineno)
