"""The demo from end to end, small: four variants, one page, and nothing trained twice."""

import io
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from helpers.pages import check_page
from helpers.studies import rough_counts
from rich.console import Console
from transformers.utils.logging import is_progress_bar_enabled

from sparsecut.cli.demo import run_demo
from sparsecut.cli.demo_display import (
    NO_BARS,
    Clock,
    describe_end,
    describe_steps,
    draw_steps,
    show_demo,
)
from sparsecut.cli.main import app
from sparsecut.experiments.demo import FIVE_SEEDS, OVER_CONTROLS, VARIANTS, build_demo_study
from sparsecut.experiments.demo_progress import list_steps, measure_done
from sparsecut.experiments.study import load_study
from sparsecut.schema import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, page, lines of the log) of a quick demo."""
    folder = tmp_path_factory.mktemp("demo")
    lines = []
    with rough_counts():
        page = run_demo(folder, quick=True, workers=0, log=lines.append)
    return folder, page, lines


def test_variants_differ_in_fusion_and_output_only(tmp_path):
    study = build_demo_study(tmp_path)
    recipes = [study.get_recipe(run) for run in study.list_runs()]
    assert len({recipe.output for recipe in recipes}) == len(recipes) == len(VARIANTS)
    for recipe in recipes:
        assert recipe.stages == recipes[0].stages
        assert recipe.evaluate == recipes[0].evaluate
    methods = {recipe.fusion["method"] for recipe in recipes}
    assert methods == set(VARIANTS) == set(study.arms)


def test_the_page_shows_every_variant_and_some_answers(finished):
    _, page, lines = finished
    text = page.read_text()
    outline = check_page(text)
    for variant in VARIANTS.values():
        assert variant.title in text
        assert any(variant.title in line for line in lines)
    assert outline.counts["svg"] >= 8
    assert text.count("data:image/png;base64,") == 8
    assert "one run per variant" in text
    assert "mean nothing" in outline.verdicts[0]
    assert "is empty" in text, "four steps log one loss, which is no curve"


def test_five_seeds_and_the_one_tap_control_stand_beside_the_run(finished):
    _, page, lines = finished
    text = page.read_text()
    results = (Path(__file__).parents[2] / "docs" / "older-results.md").read_text()
    for name, published in FIVE_SEEDS.items():
        row = next(row for row in results.splitlines() if row.startswith(f"| {name} | 5 |"))
        assert f"| {published.average} |" in row
        assert f"| {published.above} |" in row
        assert published.title in text
        assert published.average in text
        assert published.variant is None or published.variant in VARIANTS
    for difference in OVER_CONTROLS.values():
        assert difference in text
        assert any(difference in line for line in lines)
        value, interval = difference.split(" points ")
        assert value in results
        assert interval.strip("()") in results


def test_the_page_says_how_much_either_study_trains(finished):
    folder, page, _ = finished
    text = page.read_text()
    for study in (build_demo_study(folder, quick=True), load_study("shapes")):
        assert f"with {study.pictures.train:,} images, " in text
        for stage in study.recipe["stages"]:
            args = stage["args"]
            number, batch = args["max_steps"], args["per_device_train_batch_size"]
            assert f"{number} steps of {batch}" in text


def test_what_is_finished_is_kept_and_another_demo_is_refused(finished):
    folder, page, lines = finished
    for number in range(1, 5):
        assert any(line.startswith(f"{number}/4  main ") for line in lines)
    again = []
    assert run_demo(folder, quick=True, log=again.append) == page
    assert any("4 finished, 0 to do" in line for line in again)
    with pytest.raises(UserError, match="pictures"):
        run_demo(folder, seed=1, quick=True, log=again.append)


def test_the_last_lines_are_commands_that_run_as_printed(finished, tmp_path, monkeypatch, capsys):
    folder, page, lines = finished
    printed = "\n".join(lines)
    assert str(page) in printed
    found = re.findall(r"^  (?:sparsecut|\S+ -m sparsecut) (.+)$", printed, re.M)
    commands = [shlex.split(line) for line in found]
    assert [words[0] for words in commands] == ["chat", "serve", "explain"]
    group = typer.main.get_command(app)
    for words in commands:
        group.commands[words[0]].make_context(words[0], list(words[1:]))  # fails on what is unknown
        assert all(Path(word).exists() for word in words if str(folder) in word)
    monkeypatch.chdir(tmp_path)
    for words in ([*commands[0], "--ask", "what shape is top-left"], commands[2]):
        with pytest.raises(SystemExit) as ended:
            app([*words, "--device", "cpu"])
        assert not ended.value.code
    assert "shortcut" in capsys.readouterr().out


def test_the_end_says_how_the_command_is_found(monkeypatch, tmp_path):
    commands = {"ask": ["chat", "my model"]}
    page = tmp_path / "report.html"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    assert f"{sys.executable} -m sparsecut chat 'my model'" in describe_end(page, commands)
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "activate").touch()
    monkeypatch.chdir(tmp_path)
    text = describe_end(page, commands)
    assert text.index("source env/bin/activate") < text.index("  sparsecut chat")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/sparsecut")
    assert "activate" not in describe_end(page, commands)


def test_progress_is_what_the_folder_holds(finished, tmp_path):
    folder, _, _ = finished
    titles = {name: variant.title for name, variant in VARIANTS.items()}
    fresh = list_steps(build_demo_study(tmp_path / "new", quick=True), titles)
    assert measure_done(fresh) == 0
    part = tmp_path / "part"
    shutil.copytree(folder, part)
    study = build_demo_study(part, quick=True)
    whole = list_steps(study, titles)
    assert measure_done(whole) == 1
    assert [step.name for step in whole[2:]] == list(titles.values())
    run = part / "runs" / "main" / "sparsecut" / "0"
    (run / "facts.json").unlink()
    (run / "eval" / "result.json").unlink()
    without_result = list_steps(study, titles)
    (run / "eval" / "predictions.jsonl").unlink()
    without_answers = list_steps(study, titles)
    (run / "tune" / "log.jsonl").unlink()
    first_stage = list_steps(study, titles)
    (part / "states" / "index.json").unlink()
    (part / "data" / "drawn.json").unlink()
    (part / "data" / "train" / "0.png").unlink()
    damaged = list_steps(study, titles)
    done = [measure_done(x) for x in (without_result, without_answers, first_stage, damaged)]
    assert 1 > done[0] > done[1] > done[2] > done[3] > 0
    assert "step 3 of 7" in first_stage[-1].note
    assert 0.9 < damaged[0].fraction < 1
    assert 0.5 < damaged[1].fraction < 1, "the size of the features is known beforehand"


def test_a_terminal_shows_every_part_and_one_bar(finished):
    folder, _, _ = finished
    titles = {name: variant.title for name, variant in VARIANTS.items()}
    steps = list_steps(build_demo_study(folder, quick=True), titles)
    steps[-1] = replace(steps[-1], fraction=0.5, note="training, step 3 of 7")
    steps[-2] = replace(steps[-2], fraction=0.0, note="waits")
    clock = Clock(0.0)
    clock.start -= 600
    console = Console(width=100, file=io.StringIO(), force_terminal=True)
    console.print(draw_steps(steps, clock))
    shown = console.file.getvalue()
    assert all(step.name in shown for step in steps)
    line = describe_steps(steps, clock)
    for text in (shown, line):
        assert "minutes left" in text
        assert "step 3 of 7" in text
        assert f"{measure_done(steps):.0%}" in text
    assert line.index(steps[-1].name) < line.index(steps[-2].name), "what comes stands last"


def test_a_terminal_shows_the_parts_in_place_and_no_other_line(finished, monkeypatch, capsys):
    folder, _, _ = finished
    titles = {name: variant.title for name, variant in VARIANTS.items()}
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal then
    before = os.environ.get(NO_BARS)
    logged = []
    study = build_demo_study(folder, quick=True)
    with show_demo(study, titles, logged.append) as log:
        assert not is_progress_bar_enabled()
        log("counting what 4 plans cost ...")
    shown = capsys.readouterr().err
    assert all(title in shown for title in titles.values())
    assert "counting" not in shown
    assert logged == []
    assert is_progress_bar_enabled()
    assert os.environ.get(NO_BARS) == before
