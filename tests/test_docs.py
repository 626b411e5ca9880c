"""The documentation site: its navigation is whole, its links lead somewhere, its blocks run, and
its tables are the code's.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

import sparsecut
from sparsecut import plan
from sparsecut.config import recipe
from sparsecut.config.yaml_io import read_yaml
from sparsecut.experiments import study
from sparsecut.methods import PATTERNS
from sparsecut.shapes.questions import split_scene
from sparsecut.shapes.scenes import draw

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
HOOK = importlib.util.spec_from_file_location("build_pages", DOCS / "build_pages.py")
pages = importlib.util.module_from_spec(HOOK)
HOOK.loader.exec_module(pages)


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), re.S)


def named(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [
        name
        for one in (entry.values() if isinstance(entry, dict) else entry)
        for name in named(one)
    ]


def test_the_navigation_names_every_page_once():
    nav = named(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted([*(page.name for page in PAGES), *pages.GENERATED])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_files_lead_somewhere(page):
    prose = re.sub(r"`[^`]*`", "", pages.insert_readme_sections(page.read_text()))
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", prose):
        assert target in pages.GENERATED or (DOCS / target).exists(), target


def test_readme_sections_are_found_or_refused():
    assert "make demo" in pages.insert_readme_sections("[Two commands](../README.md#two-commands)")
    with pytest.raises(ValueError, match="no section #nothing"):
        pages.get_readme_section("nothing")


def test_links_get_the_titles_of_their_pages():
    markdown = "[docs/data.md](data.md), [here.md](x)"
    assert pages.name_links_by_title(markdown) == "[Data](data.md), [here.md](x)"


def test_every_command_and_option_is_on_its_page():
    text = pages.commands_page()
    help_text = subprocess.run(
        [sys.executable, "-m", "sparsecut", "--help"], capture_output=True, text=True
    ).stdout
    for words, command in pages.list_commands():
        assert f"## {words}\n" in text and words.split()[1] in help_text
        for option in (name for p in command.params if not pages.is_argument(p) for name in p.opts):
            assert option in text, f"{words} {option}"


def test_every_method_is_drawn_and_every_public_name_documented():
    text = pages.plans_page()
    assert all(f"## {name}\n" in text for name in sparsecut.METHODS) and text.count("<svg") == len(
        sparsecut.METHODS
    )
    assert all(f"{name}\n" in pages.api_page() for name in sparsecut.__all__)


TABLES = {
    "Recipe": recipe.Recipe,
    "Model": recipe.Model,
    "Stage": recipe.Stage,
    "Source": recipe.Source,
    "Adapter": recipe.Lora,
    "Evaluate": recipe.Evaluation,
    "A plan's keys": plan.Plan,
    "A shortcut's keys": plan.Shortcut,
    "Study": study.Study,
    "Its pictures": study.DrawnImages,
    "Its questions": study.Question,
    "Its rates": study.Rates,
    "Its variants": study.Variant,
}


@pytest.mark.parametrize("title", TABLES)
def test_recipes_page_names_every_key_with_its_default(title):
    text = (DOCS / "recipes.md").read_text()
    after = re.split(rf"^(?:## )?{title}:?$", text, flags=re.M)[1]
    table = re.search(r"^\|---\|---\|---\|\n((?:\|.*\n)+)", after, re.M)[1]
    shown = dict(
        re.match(r"\| `(\w+)` \| *`?(.*?)`? *\|", row).groups() for row in table.splitlines()
    )
    wanted = {f.name: default_of(f) for f in fields(TABLES[title])}
    assert shown == wanted


def default_of(f) -> str:
    if f.name == "budgets" and f.default_factory is not MISSING:  # those of a study
        return "main: []"
    value = (
        f.default
        if f.default is not MISSING
        else f.default_factory()
        if f.default_factory is not MISSING
        else "required"
    )
    if value is None or value == "":
        return ""
    return (
        str(value).lower()
        if isinstance(value, bool)
        else str(list(value))
        if isinstance(value, tuple)
        else str(value)
    )


def test_the_method_page_lists_every_mixer_gate_and_pattern():
    text = (DOCS / "method.md").read_text()
    names = {*plan.MIXERS, *plan.GATES, *PATTERNS} - {None, "base"}
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", ["recipes.md", "add-a-method.md", "upgrade.md"])
def test_yaml_blocks_load(page):
    found = [read_yaml(block, page) for block in blocks(page, "yaml")]
    assert found
    for plain in found:
        if "arms" in plain:
            assert study.parse_study(plain).list_runs()
        elif "model" in plain:
            assert recipe.parse_recipe(plain).stages
        else:
            assert sparsecut.make_plan(plain["fusion"], 24, 32)


def test_the_upgrade_walk_through_runs(tmp_path, monkeypatch, llava):
    monkeypatch.chdir(tmp_path)
    draw(split_scene("test/0/0")).save("picture.png")
    for part in llava:  # a tiny one in the place that is named
        part.save_pretrained("llava-hf/llava-1.5-7b-hf")
    room = {}
    for block in blocks("upgrade.md", "python"):
        exec(compile(block, "upgrade.md", "exec"), room)
    assert type(room["base"]).__name__ == "LlavaForConditionalGeneration"


@pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("base64")), reason="curl or base64 is not installed"
)
def test_both_ways_of_asking_a_server_run(tmp_path, monkeypatch, capsys):
    from helpers.clients import start_server
    from helpers.tiny import tiny_model

    from sparsecut.serving.engine import Engine

    monkeypatch.chdir(tmp_path)
    Path("runs/demo/data/test").mkdir(parents=True)
    draw(split_scene("test/0/0")).save("runs/demo/data/test/0.png")
    engine = Engine(*tiny_model())
    with start_server(engine) as client:

        def here(block: str) -> str:
            assert "http://127.0.0.1:8000/v1" in block
            return block.replace(
                "http://127.0.0.1:8000/v1", str(client.base_url).rstrip("/")
            ).replace("sparsecut", "tiny")

        [python] = blocks("serving.md", "python")
        [curl] = [block for block in blocks("serving.md", "bash") if "curl" in block]
        exec(compile(here(python), "serving.md", "exec"), {})
        answer = capsys.readouterr().out.strip()
        output = subprocess.run(["bash", "-c", here(curl)], capture_output=True, text=True).stdout
    engine.close()
    events = [json.loads(line[6:]) for line in output.splitlines() if line.startswith("data: {")]
    assert (
        answer
        == "".join(event["choices"][0]["delta"].get("content", "") for event in events).strip()
    )
    assert events[-1]["choices"][0]["finish_reason"] and output.rstrip().endswith("[DONE]")


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            tmp_path / "site",
        ],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert "WARNING" not in made.stderr
    assert {page.stem for page in (tmp_path / "site").glob("*.html")} >= {p.stem for p in PAGES}
    assert (tmp_path / "site" / "search" / "search_index.js").is_file()  # read without a server
    for page in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]*?(?:src|href)=\"?https?:", page.read_text())
        assert not loaded, f"{page.name} loads something from elsewhere"
