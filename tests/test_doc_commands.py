"""Commands of README, CONTRIBUTING and docs: each exists, and a test follows its page.

`tests/conformance/test_doc_pages.py` runs the pages. Here all commands are read by the real
argument parser, and what no test runs is listed.
"""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from helpers.doc_pages import PAGES, PROGRAMS, ROOT, list_commands, parse_shown, read_blocks

from sparsecut.cli.main import app
from sparsecut.config.recipe import Recipe, Stage
from sparsecut.experiments.study import Study, Variant
from sparsecut.plan import Plan

BLOCKS = [block for page in PAGES for block in read_blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
SHOWN = [
    block
    for block in BLOCKS
    if block.language in ("json", "yaml") and not block.file and not block.reason
]
# Why no test runs some blocks of a page, in their order. What is added needs a good reason.
NOT_RUN = {
    "CONTRIBUTING.md": [
        "runs the whole suite, and installs",
    ],
    "README.md": [
        "installs from a network; test_wheel.py installs",
        "installs, and takes minutes",
    ],
    "lmms.md": [
        "fetches POPE from the hub",
        "fetches POPE from the hub",
    ],
    "older-results.md": [
        "takes hours",
        "takes hours",
        "needs a run of hours",
        "takes hours",
        "needs outside data",
        "needs outside data",
    ],
    "real.md": [
        "downloads, and takes half an hour",
        "downloads",
    ],
    "recipes.md": [
        "takes hours",
    ],
    "results.md": [
        "takes hours",
        "takes hours",
        "takes an hour",
        "takes hours",
        "takes an hour and more",
        "takes hours",
    ],
    "serving.md": [
        "needs vLLM; test_vllm_families.py serves models there",
        "needs vLLM and a GPU",
        "needs vLLM",
        "needs Ray; test_ray.py starts both engines",
        "needs Kubernetes",
    ],
    "share.md": [
        "needs the hub; test_sharing.py pushes to one of its own",
        "needs the hub; test_sharing.py pushes to one of its own",
        "needs the hub; test_sharing.py loads from one of its own",
        "needs the hub; test_upgrade_hub.py pushes to one of its own",
    ],
    "training.md": [
        "needs eight GPUs; test_engines.py trains with two processes",
    ],
    "trl-and-peft.md": [
        "installs",
    ],
}


def test_blocks_that_no_test_runs_are_those_listed_here():
    reasons: dict[str, list[str]] = {}
    for block in BLOCKS:
        if block.reason:
            reasons.setdefault(block.page, []).append(block.reason)
    assert reasons == NOT_RUN


def test_tests_that_a_reason_names_exist():
    names = re.findall(r"test_\w+\.py", str(NOT_RUN))
    assert names
    assert [name for name in names if not list((ROOT / "tests").rglob(name))] == []


def test_commands_stand_in_shell_blocks_alone():
    pattern = re.compile(rf"^(?: {{4}})?(?:{'|'.join(PROGRAMS)}) [\w./-]+", re.MULTILINE)
    hidden = []
    for page in PAGES:
        text = re.sub(r"^```bash\n.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        fenced = "".join(re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
        plain = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        indented = "".join(re.findall(r"^ {4}.*\n", plain, re.MULTILINE))
        hidden += [(page.name, found) for found in pattern.findall(fenced + indented)]
    assert hidden == []


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_the_real_parser_reads_every_command(block):
    commands = list_commands(block.text)
    assert commands
    for words in commands:
        assert words[0] in PROGRAMS, words
        check_command(words)


def check_command(words: list[str]) -> None:
    """Assert that a command could be run: its program, options and files exist."""
    if "sparsecut" in words and words[0] in ("sparsecut", "python", "torchrun", "accelerate"):
        if "lmms_eval" not in words:
            parse_sparsecut(words[words.index("sparsecut") + 1 :])
    elif words[0] == "python":
        check_script(words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[0] == "pip":
        check_installation(words)
    elif words[0] == "pytest":
        assert all((ROOT / word.split("::")[0]).exists() for word in words[1:]), words


def parse_sparsecut(words: list[str]) -> None:
    """Parse arguments as the command line does; nothing is run."""
    if "--" in words:
        words = words[: words.index("--")]
    command = typer.main.get_command(app)
    while isinstance(command, typer.core.TyperGroup) and words and words[0] in command.commands:
        command = command.commands[words[0]]
        words = words[1:]
    if not isinstance(command, typer.core.TyperGroup):
        with command.make_context("sparsecut", list(words)):
            return
    assert command.invoke_without_command and not words, words


def check_script(words: list[str]) -> None:
    """Assert that a script of the repository exists and reads the options."""
    if words[0] == "my_parts.py":  # which its page has the reader write
        return parse_sparsecut(words[1:])
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    for word in words[1:]:
        assert not word.startswith("-") or f'"{word}"' in source, words
    return None


def check_installation(words: list[str]) -> None:
    """Assert that the files and extras exist which `pip install` names."""
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in re.findall(r" -[cr] (\S+)", " ".join(words)):
        assert (ROOT / name).is_file(), words
    for names in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        for extra in names.split(","):
            assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), words


def list_words_in_prose() -> list[tuple[str, str]]:
    """(page, command) of every `sparsecut ...` inside a sentence."""
    found = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        found += [(page.stem, command) for command in re.findall(r"`(sparsecut [^`]*)`", text)]
    return sorted(set(found))


@pytest.mark.parametrize(("page", "text"), list_words_in_prose())
def test_commands_in_sentences_have_verbs_and_options_that_exist(page, text):
    words = shlex.split(text)[1:]
    command = typer.main.get_command(app)
    while isinstance(command, typer.core.TyperGroup) and words and words[0][0].islower():
        if words[0] not in command.commands and command.invoke_without_command:
            break
        assert words[0] in command.commands, text
        command = command.commands[words[0]]
        words = words[1:]
    words = words[: words.index("--")] if "--" in words else words
    known = {name for parameter in command.params for name in parameter.opts}
    known |= {"--help", "--traceback", "--install-completion", "--show-completion"}
    used = {word.split("=")[0] for word in words if word.startswith("-")}
    assert used <= known, text


@pytest.mark.parametrize("block", SHOWN, ids=str)
def test_what_is_shown_can_be_read_and_has_keys_that_exist(block):
    known = {f.name for kind in (Recipe, Stage, Study, Variant, Plan) for f in fields(kind)}
    assert parse_shown(block) <= known


def test_a_page_is_followed_or_named_by_its_own_test():
    source = (ROOT / "tests/conformance/test_doc_pages.py").read_text()
    runnable = {b.page for b in BLOCKS if b.language in ("bash", "python") and not b.reason}
    assert [page for page in sorted(runnable) if f'"{page}"' not in source] == []


def test_paths_of_other_folders_are_not_printed():
    """The demo's models are where it writes them."""
    for page in PAGES:
        for path in re.findall(r"runs/demo/[\w./-]*final", page.read_text()):
            assert re.fullmatch(r"runs/demo/runs/main/\w+/0/final", path), (page.name, path)


def test_pages_are_found():
    assert len(PAGES) > 15
    assert len(SHELL) > 25
    assert Path(PAGES[0]).is_file()
