"""A dry run on this machine: tokens of the model's own tokenizer, and a rate that is measured."""

import pytest
from helpers.runs import write_word_records

from sparsecut import placeholders
from sparsecut.building import build
from sparsecut.config.recipe import parse_recipe
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import read_source
from sparsecut.profiling import local_processor
from sparsecut.profiling.dry_run import dry_run, format_estimates
from sparsecut.profiling.dry_run_data import read_record_facts

NUM_WORDS = {f"r{i}": 3 + i for i in range(12)}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of the shipped backbones and twelve records."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "one.png").write_bytes(b"")
    data = write_word_records(folder / "data.json", NUM_WORDS)
    stage = {"name": "one", "data": data, "train": ["fusion"], "args": {"max_steps": 2}}
    model = {"vision": "shapes", "language": "shapes"}
    plain = {"model": model, "fusion": "sparsecut", "output": str(folder / "out")}
    return parse_recipe({**plain, "stages": [stage]})


@pytest.fixture(scope="module")
def counter(recipe):
    """What counts the tokens of its records."""
    processor = local_processor.read_local_processor(recipe)
    return local_processor.make_counter(processor, recipe.stages[0])


def test_text_tokens_are_those_that_training_makes(recipe, counter):
    _, processor = build("shapes", "shapes", recipe.fusion)
    encoder = example_encoder(processor)
    stage = recipe.stages[0]
    items = [encoder.encode(example) for example in read_source(stage.data[0], [])]
    texts = [len(item["input_ids"]) - encoder.count_image_tokens(item) for item in items]
    facts = read_record_facts(stage, counter)
    assert facts.text_tokens == pytest.approx(sum(texts) / len(texts))
    assert facts.longest_text == max(texts)
    assert read_record_facts(stage).text_tokens != facts.text_tokens


def test_of_very_many_records_some_are_counted(recipe, counter, monkeypatch):
    stage = recipe.stages[0]
    exact = read_record_facts(stage, counter).text_tokens
    monkeypatch.setattr(local_processor, "MOST_RECORDS", 4)
    assert read_record_facts(stage, counter).text_tokens == pytest.approx(exact, rel=0.2)


def test_models_that_are_not_here_have_no_counter(recipe):
    from dataclasses import replace

    absent = replace(recipe, model=replace(recipe.model, language="none/such"))
    assert local_processor.read_local_processor(absent) is None


def test_hours_are_those_of_this_machine_unless_another_is_named(recipe):
    (here,) = dry_run(recipe, tflops=None)
    assert here.measured_on and here.tflops > 0
    (named,) = dry_run(recipe, tflops=2 * here.tflops)
    assert named.measured_on is None
    assert named.hours == pytest.approx(here.hours / 2)
    assert "measured" in format_estimates([here], devices=1, tflops=None, mfu=0.4)


def test_rows_of_a_large_table_start_as_the_mean(monkeypatch):
    monkeypatch.setattr(placeholders, "MOST_COVARIANCE", 0)
    model, processor = build("shapes", "shapes", "llava")
    table = model.language_model.get_input_embeddings().weight
    row = processor.image_token_id
    assert len(table) == row + 1
    assert table[row].tolist() == pytest.approx(table[:row].mean(0).tolist(), abs=1e-6)
