"""A recipe or a study from anything: it equals what it writes, or a sentence says what is wrong."""

from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
from helpers.fuzzing import LEAVES, TEXTS, draw_changed, list_places
from hypothesis import strategies as st
from transformers import TrainingArguments

from sparsecut.config.overrides import override
from sparsecut.config.recipe import dump_recipe, load_recipe, parse_recipe
from sparsecut.config.yaml_io import read_yaml, read_yaml_file
from sparsecut.experiments.study import dump_study, load_study, parse_study
from sparsecut.schema import UserError
from sparsecut.training.arguments import build_arguments

CONFIGS = Path(__file__).parents[2] / "sparsecut" / "recipes"
RECIPES = [read_yaml_file(CONFIGS / name) for name in ("tiny.yaml", "upgrade-llava-7b.yaml")]
STUDY = """
title: small
recipe:
  model: {vision: shapes, language: shapes}
  stages: [{name: align, data: {path: a.json}, train: [fusion], args: {max_steps: 2}}]
  evaluate: {data: {path: b.json}, batch_size: 2}
pictures: {train: 20, ask: 10, split: dev}
seeds: [0, 1]
budgets: {short: [], long: {change: [stages.0.args.max_steps=4], arms: [llava], seeds: [1]}}
baseline: llava
arms: {llava: llava, deep: {method: sparsecut, count: 1}}
families: {llava: one}
output: studied
"""
WORDS = st.one_of(TEXTS, st.sampled_from(["base", "lora", "fusion", "streaming", "args", "pack"]))


def test_recipes(fuzz, tmp_path):
    def check(plain):
        try:
            recipe = parse_recipe(plain)
        except UserError:
            return
        dump_recipe(recipe, tmp_path / "recipe.yaml")
        dump_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "again.yaml")
        assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "recipe.yaml").read_bytes()

    fuzz(check, st.sampled_from(RECIPES).flatmap(partial(draw_changed, words=WORDS)))


def test_training_arguments(fuzz, tmp_path):
    plain = read_yaml_file(CONFIGS / "tiny.yaml")
    usual = plain["stages"][-1]["args"]
    names = st.sampled_from([field.name for field in fields(TrainingArguments) if field.init])

    def check(changes):
        stage = {**plain["stages"][-1], "args": {**usual, **changes}}
        try:
            recipe = parse_recipe({**plain, "stages": [stage]})
            build_arguments(recipe.stages[-1], 0, tmp_path)
        except UserError:
            return

    fuzz(check, st.dictionaries(names, LEAVES, min_size=1, max_size=2))


def test_studies(fuzz, tmp_path):
    def check(plain):
        try:
            study = parse_study(plain)
        except UserError:
            return
        dump_study(study, tmp_path / "study.yaml")
        dump_study(load_study(tmp_path / "study.yaml"), tmp_path / "again.yaml")
        assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "study.yaml").read_bytes()

    fuzz(check, draw_changed(read_yaml(STUDY, "study"), words=WORDS))


def test_overrides(fuzz):
    plain = read_yaml_file(CONFIGS / "tiny.yaml")
    places = [".".join(map(str, place)) for place in list_places(plain) if place]
    dotted = st.one_of(st.sampled_from(places), WORDS)
    values = st.one_of(TEXTS, st.sampled_from(["1e400", "[[", "*a", "2001-99-99", "!!int x", "{a"]))

    def check(example):
        try:
            parse_recipe(override(plain, "=".join(example)))
        except UserError:
            return

    fuzz(check, st.tuples(dotted, values))


def test_texts(fuzz):
    text = (CONFIGS / "tiny.yaml").read_text(encoding="utf-8")
    pieces = st.one_of(TEXTS, st.text("[]{}&*!|>%@`:-,\"' \n\t#?~", max_size=6))

    def check(example):
        start, length, piece = example
        changed = text[:start] + piece + text[start + length :]
        try:
            parse_recipe(read_yaml(changed, "text"))
        except UserError:
            return

    fuzz(check, st.tuples(st.integers(0, len(text)), st.integers(0, 20), pieces))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "&a [*a]",
        "a: &a {b: *a}",
        "- " * 3000 + "a",
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9)),
        "a: " + "9" * 5000,
        "a: 2001-99-99",
        "a: !!python/object/apply:os.system [ls]",
        "? [a]\n: b",
        "? {a: b}\n: c",
        "a: !!binary x",
        "a: !!timestamp x",
        "<<: 3",
        "<<: [1, 2]",
        "a: \x00",
        "a: \ud800",
    ],
)
def test_hostile_yaml_is_refused(text):
    with pytest.raises(UserError) as error:
        read_yaml(text, "recipe.yaml")
        parse_recipe(read_yaml(text, "recipe.yaml"))
    assert len(str(error.value)) < 2500
