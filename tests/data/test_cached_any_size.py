"""Cached vision features of images of any size: every image has its own number of patches."""

import json
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers.any_size import LIMITS, build_tiny, make_naflex, write_sized_records
from helpers.runs import read_losses, run, stage

from sparsecut.any_size import read_patches
from sparsecut.data.cached_features import VisionFeatureCache
from sparsecut.data.dataset import TrainingData, make_blank_item
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import read_examples
from sparsecut.data.feature_cache import build_feature_cache, get_tap_views
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.schema import UserError


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return read_examples(write_sized_records(tmp_path_factory.mktemp("sized")))


@pytest.fixture(scope="module", params=["views", "whole"])
def parts(request):
    """(model, processor), its encoder of a fixed view, or one that reads images whole."""
    vision = None if request.param == "views" else make_naflex()
    return build_tiny(vision, **LIMITS)


def make_cache(folder, parts, examples, **settings):
    """(cache, its taps and views)."""
    model, processor = parts
    cache = build_feature_cache(folder, model, processor, examples, **settings)
    return cache, get_tap_views(model.plan, model.config.vision_depth)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_cached_features_are_those_from_patches(tmp_path, parts, examples, batch_size):
    model, processor = parts
    inline = [(examples[0].store.find_file(examples[1].images[0])).read_bytes()]
    examples = [*examples, replace(examples[1], images=inline)]
    cache, views = make_cache(tmp_path, parts, examples, batch_size=batch_size)
    again = pickle.loads(pickle.dumps(cache))
    for example in examples:
        if not example.images:
            continue
        inputs = processor.prepare_images(example.load_images())
        states = model.encode(*inputs.values())
        assert again.read_grids(example) == inputs["image_grids"].tolist()
        for tap, features in again.read(example, views).items():
            assert features.dtype == torch.float16
            torch.testing.assert_close(features.float(), states[tap], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("plan", ["llava", "hires_tokens"])
def test_an_image_that_is_encoded_alone_has_the_states_of_the_model_to_the_bit(
    tmp_path, examples, plan
):
    model, processor = build_tiny(plan=plan, **LIMITS)
    taps = get_tap_views(model.plan, model.config.vision_depth)
    cache = build_feature_cache(tmp_path, model, processor, examples[:1], batch_size=1)
    inputs = processor.prepare_images(examples[0].load_images())
    pixels, grids = inputs["pixel_values"], inputs["image_grids"].tolist()
    for tap, features in cache.read(examples[0], taps).items():
        read = partial(read_patches, model.vision_tower, model.config.grid, grids, wanted=[tap])
        with torch.inference_mode():
            views = [read(pixels[:, :1])[tap]]
            if plan == "hires_tokens":
                views.append(read(pixels[:, 1:])[tap])
        assert torch.equal(features, torch.cat(views, dim=1).half())


def test_training_on_cached_features_is_training_on_patches(tmp_path):
    write_sized_records(tmp_path)
    args = {"learning_rate": 1e-3}
    one = stage(tmp_path, "sized.json", train=["fusion", "language"], args=args)
    packed = {**one, "name": "two", "pack": 120}
    stages = [one, packed]
    run(tmp_path, *stages, fit=LIMITS)
    cached = {"output": str(tmp_path / "cached"), "feature_cache": str(tmp_path / "cache")}
    run(tmp_path, *stages, fit=LIMITS, **cached)
    for name in ("one", "two"):
        losses = read_losses(tmp_path, name)
        assert len(losses) == 3 and losses[0] > losses[2] + 5e-3
        assert read_losses(tmp_path, name, "cached") == pytest.approx(losses, abs=2e-3)


def test_answers_from_cached_features_are_those_from_patches(tmp_path, parts, examples):
    model, processor = parts
    cache, _ = make_cache(tmp_path, parts, examples)
    results = []
    for features in (None, cache):
        result = evaluate(model, processor, examples, max_new_tokens=4, feature_cache=features)
        results.append([record["prediction"] for record in result.records])
    assert results[0] == results[1]


def test_other_limits_make_the_features_again(tmp_path, examples):
    parts = build_tiny(**LIMITS)
    make_cache(tmp_path, parts, examples)
    before = (tmp_path / "index.json").stat().st_mtime_ns
    make_cache(tmp_path, parts, examples[:5])
    assert (tmp_path / "index.json").stat().st_mtime_ns == before
    other = build_tiny(**LIMITS | {"max_pixels": 960})
    lines = []
    cache, _ = make_cache(tmp_path, other, examples, log=lines.append)
    assert any("another encoder" in line for line in lines)
    assert max(np.prod(grid) for grid in cache.grids) <= 15
    with pytest.raises(UserError, match="prepared in another way"):
        evaluate(*parts, examples, feature_cache=cache)


@pytest.mark.parametrize("kind", ["bit", "short", "grids"])
def test_damaged_features_of_any_size_are_never_read(tmp_path, examples, kind):
    parts = build_tiny(plan="llava", **LIMITS)
    _, views = make_cache(tmp_path, parts, examples)
    (tap,) = views
    file = tmp_path / f"tap-{tap:02}.f16"
    data = bytearray(file.read_bytes())
    if kind == "grids":
        index = json.loads((tmp_path / "index.json").read_text())
        index["grids"][:2] = index["grids"][1::-1]
        (tmp_path / "index.json").write_text(json.dumps(index))
    elif kind == "bit":
        data[5] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[:-2])
    with pytest.raises(UserError, match=file.name):
        VisionFeatureCache(tmp_path).read(examples[0], views)


def test_room_is_counted_by_the_sizes_of_the_images(tmp_path, examples, monkeypatch):
    model, processor = parts = build_tiny(plan="llava", **LIMITS)
    images = {name: 0 for example in examples for name in example.images}
    for example in examples:
        for name, (height, width) in zip(example.images, example.read_sizes(), strict=True):
            images[name] = np.prod(processor.choose_grid(height, width))
    num_bytes = 2 * sum(images.values()) * model.config.grid.width
    for free in (num_bytes - 1, num_bytes):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr("shutil.disk_usage", lambda path, usage=usage: usage)
        if free < num_bytes:
            with pytest.raises(UserError, match=f"{num_bytes:,} bytes"):
                make_cache(tmp_path, parts, examples)
        else:
            make_cache(tmp_path, parts, examples)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.f16")) == num_bytes


def test_a_blank_image_of_cached_features_fits_its_tokens(tmp_path, examples):
    model, processor = parts = build_tiny(**LIMITS)
    cache, views = make_cache(tmp_path, parts, examples)
    data = TrainingData(examples, example_encoder(processor), feature_cache=cache, tap_views=views)
    blank = make_blank_item(data.encoder, cache, views)
    items = [data[3], blank]
    batch = data.encoder.build_batch(items)
    assert model(**batch).loss.isfinite()
