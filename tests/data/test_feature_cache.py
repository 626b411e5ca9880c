"""Cached vision features: training and answers as with pixels, every image encoded once."""

import pickle

import pytest
import torch
from helpers.runs import log, recipe, run, stage, write_records
from helpers.tiny import tiny_model

from sparsecut.data.examples import read_examples
from sparsecut.data.feature_cache import (
    VisionFeatureCache,
    build_feature_cache,
    get_image_keys,
    get_tap_views,
)
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.schema import UserError

SPARSE = {"method": "sparsecut", "pattern": "bottom", "fine": 0.5}
PLANS = ["llava", SPARSE, "hires_tokens", "dense_connector_dci"]


@pytest.fixture
def examples(tmp_path):
    return read_examples(write_records(tmp_path) / "data.json")


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_cached_features_are_those_from_pixels(tmp_path, examples, plan):
    model, processor = tiny_model(plan)
    cache = build_feature_cache(tmp_path / "cache", model, processor, examples, batch_size=4)
    views = get_tap_views(model.plan, model.config.vision_depth)
    for example in examples[:8]:
        if not example.images:
            continue
        features = cache.read(example, views)
        for tap, expected in model.encode(processor.pixels(example.load_images())).items():
            torch.testing.assert_close(features[tap].float(), expected, atol=2e-3, rtol=1e-3)


def test_training_on_cached_features_is_training_on_pixels(tmp_path):
    write_records(tmp_path)
    args = {"learning_rate": 1e-3, "max_steps": 2}
    stages = [
        stage(tmp_path, args=args),
        stage(tmp_path, name="two", train=["fusion", "language"], args=args),
    ]
    run(tmp_path, *stages)
    run(tmp_path, *stages, output=str(tmp_path / "cached"), feature_cache=str(tmp_path / "cache"))
    for name in ("one", "two"):
        losses = [line["loss"] for line in log(tmp_path, name)]
        cached = [line["loss"] for line in log(tmp_path, name, "cached")]
        assert losses == pytest.approx(cached, abs=2e-3)


def test_answers_from_cached_features_are_those_from_pixels(tmp_path, examples):
    model, processor = tiny_model(SPARSE)
    cache = build_feature_cache(tmp_path / "cache", model, processor, examples)
    folders = {"pixels": None, "cached": cache}
    results, predictions = [], []
    for name, feature_cache in folders.items():
        out = tmp_path / name
        result = evaluate(
            model, processor, examples, max_new_tokens=4, feature_cache=feature_cache, out=out
        )
        results.append(result["accuracy"])
        predictions.append((out / "predictions.jsonl").read_text())
    assert results[0] == results[1]
    assert predictions[0] == predictions[1]


def test_a_folder_is_used_again_only_where_it_has_everything(tmp_path, examples, monkeypatch):
    folder = tmp_path / "cache"
    model, processor = tiny_model("hires_channels")
    build_feature_cache(folder, model, processor, examples[:4])
    before = (folder / "index.json").stat().st_mtime_ns

    def refuse(*args):
        raise AssertionError("an image was encoded again")

    with monkeypatch.context() as patch:
        patch.setattr("sparsecut.hooks.read_taps", refuse)
        cache = build_feature_cache(folder, model, processor, examples[:3])
        build_feature_cache(folder, *tiny_model("llava"), examples[:3])  # its views are among them
    assert get_image_keys(examples[0])[0] in cache.rows
    pickled = pickle.dumps(cache)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).rows == cache.rows
    build_feature_cache(folder, model, processor, examples)
    assert (folder / "index.json").stat().st_mtime_ns != before
    assert len(VisionFeatureCache(folder).rows) == 9
    other, _ = tiny_model("hires_channels", seed=1)
    build_feature_cache(folder, other, processor, examples)
    expected = other.encode(processor.pixels(examples[0].load_images()))[5]
    features = VisionFeatureCache(folder).read(examples[0], get_tap_views(other.plan, 6))[5]
    torch.testing.assert_close(features.float(), expected, atol=2e-3, rtol=1e-3)


def test_what_cannot_be_cached_is_refused(tmp_path, examples, monkeypatch):
    folder = tmp_path / "cache"
    with pytest.raises(UserError, match="trains vision"):
        recipe(tmp_path, stage(tmp_path, train=["vision"]), feature_cache="cache")
    model, processor = tiny_model("llava")
    with pytest.raises(UserError, match=r"\b5 views .*\b1\b"):
        build_feature_cache(folder, model, processor, examples, {1: 5})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
        with pytest.raises(UserError, match=r"cache has 10 free"):
            build_feature_cache(folder, model, processor, examples)
    assert not (folder / "index.json").exists()
    model.vision_tower.get_submodule("pre_layrnorm").weight.data *= 1e6
    with pytest.raises(UserError, match=r"tap 0 .*half precision"):
        build_feature_cache(folder, model, processor, examples, {0: 1})
