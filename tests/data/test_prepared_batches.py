"""Images are opened once, by whichever process, and all ways give the same bytes."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import recipe, stage, write_records
from helpers.tiny import SPARSE, tiny_model

from sparsecut.data import feature_cache
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import read_examples
from sparsecut.data.feature_cache import build_feature_cache
from sparsecut.data.images import ImageStore
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.training.stages import open_feature_cache


@pytest.fixture
def examples(tmp_path):
    return read_examples(write_records(tmp_path) / "data.json")


@pytest.fixture
def opened(monkeypatch):
    """Names of the images that were opened, in order."""
    names = []
    load = ImageStore.load

    def record(store, name):
        names.append(name)
        return load(store, name)

    monkeypatch.setattr(ImageStore, "load", record)
    return names


def read_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix}


def test_other_processes_prepare_the_same_features(tmp_path, examples, opened):
    model, processor = tiny_model(SPARSE)
    build_feature_cache(tmp_path / "here", model, processor, examples, batch_size=4)
    assert sorted(opened) == sorted({name for e in examples for name in e.images})
    opened.clear()
    state = torch.get_rng_state()
    build_feature_cache(tmp_path / "there", model, processor, examples, batch_size=4, workers=2)
    assert not opened and torch.equal(torch.get_rng_state(), state)
    here, there = read_files(tmp_path / "here"), read_files(tmp_path / "there")
    assert here == there and len(here) > 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_names_its_record(tmp_path, examples, workers):
    model, processor = tiny_model(SPARSE)
    (tmp_path / "5.png").write_bytes(b"no image")
    with pytest.raises(RecordError, match=r"5\.png") as caught:
        build_feature_cache(tmp_path / "cache", model, processor, examples, workers=workers)
    assert caught.value.where in {e.place for e in examples if "5.png" in e.images}
    with pytest.raises(RecordError, match=r"5\.png"):
        evaluate(model, processor, examples, workers=workers)


def test_a_recipe_s_workers_prepare_images_for_the_cache(tmp_path, examples, monkeypatch):
    asked = []
    prepare = feature_cache.prepare_batches

    def record(function, batches, workers):
        asked.append(workers)
        return prepare(function, batches, 0)

    monkeypatch.setattr(feature_cache, "prepare_batches", record)
    for number in (0, 3):
        settings = recipe(tmp_path, stage(tmp_path), feature_cache=str(tmp_path / str(number)))
        args = SimpleNamespace(
            dataloader_num_workers=number,
            main_process_first=lambda desc: contextlib.nullcontext(),
        )
        open_feature_cache(settings, *tiny_model(SPARSE), examples, args)
    assert asked == [0, 3]


def test_questions_about_one_image_open_it_once(tmp_path, opened):
    model, processor = tiny_model(SPARSE)
    records = json.loads((write_records(tmp_path) / "data.json").read_text())
    (tmp_path / "more.json").write_text(json.dumps(records * 2))
    examples = read_examples(tmp_path / "more.json")
    together = evaluate(model, processor, examples, batch_size=len(examples), max_new_tokens=3)
    assert sorted(opened) == sorted({name for e in examples for name in e.images})
    alone = evaluate(model, processor, examples, batch_size=1, max_new_tokens=3)
    answers = [record["prediction"] for record in together.records]
    assert answers == [record["prediction"] for record in alone.records]


def test_an_image_that_is_given_twice_has_the_same_pixels_twice(examples):
    _, processor = tiny_model(SPARSE)
    (one,), (other,) = (example.load_images() for example in examples[:2])
    pixels = processor.pixels([one, other, one, one.copy()])
    for number, image in enumerate([one, other, one, one]):
        assert torch.equal(pixels[number], processor.pixels([image])[0])
