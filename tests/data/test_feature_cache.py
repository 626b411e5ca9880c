"""Kept states of a frozen encoder: the same training and answers as with pixels, every picture
encoded once, loud refusals.
"""

import json
import pickle

import pytest
import torch
from helpers.runs import log, recipe, run, stage, write_records
from helpers.tiny import tiny_model

from sparsecut.data.dataset import read_examples
from sparsecut.data.feature_cache import VisionFeatureCache, keys_of, prepare_states, views_of
from sparsecut.evaluation.evaluator import evaluate

PLANS = [
    "llava",
    {"method": "sparsecut", "pattern": "bottom", "fine": 0.5},
    "hires_tokens",
    "dense_connector_dci",
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_features_from_kept_states_are_those_from_pixels(tmp_path, plan):
    model, processor = tiny_model(plan)
    examples = read_examples(write_records(tmp_path) / "data.json")
    states = prepare_states(tmp_path / "kept", model, processor, examples, batch_size=4)
    for example in examples[:8]:
        if not example.images:
            continue
        kept = states.read(example, views_of(model.plan, model.config.vision_depth))
        expected = model.encode(processor.pixels(example.pictures()))
        for tap, x in expected.items():
            torch.testing.assert_close(kept[tap].float(), x, atol=2e-3, rtol=1e-3)


def test_training_on_kept_states_is_training_on_pixels(tmp_path):
    write_records(tmp_path)
    slow = {"learning_rate": 1e-3}
    both = [
        stage(tmp_path, args=slow),
        stage(tmp_path, name="two", train=["fusion", "language"], args=slow),
    ]
    run(tmp_path, *both)
    run(tmp_path, *both, output=str(tmp_path / "other"), states=str(tmp_path / "kept"))
    for name in ("one", "two"):
        losses = [
            [line["loss"] for line in log(tmp_path, name, output)] for output in ("out", "other")
        ]
        assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def test_answers_from_kept_states_are_those_from_pixels(tmp_path):
    model, processor = tiny_model({"method": "sparsecut", "pattern": "bottom", "fine": 0.5})
    examples = read_examples(write_records(tmp_path) / "data.json")
    states = prepare_states(tmp_path / "kept", model, processor, examples)
    plain = evaluate(model, processor, examples, max_new_tokens=4, out=tmp_path / "a")
    kept = evaluate(
        model, processor, examples, max_new_tokens=4, feature_cache=states, out=tmp_path / "b"
    )
    assert kept["accuracy"] == plain["accuracy"]
    assert (tmp_path / "a" / "predictions.jsonl").read_text() == (
        tmp_path / "b" / "predictions.jsonl"
    ).read_text()


def test_a_folder_is_used_again_only_where_it_has_everything(tmp_path, monkeypatch):
    examples = read_examples(write_records(tmp_path) / "data.json")
    model, processor = tiny_model("hires_channels")
    prepare_states(tmp_path / "kept", model, processor, examples[:4])
    before = (tmp_path / "kept" / "index.json").stat().st_mtime_ns

    def refused(*args):
        raise AssertionError("a picture was encoded again")

    with monkeypatch.context() as patch:
        patch.setattr("sparsecut.hooks.read_taps", refused)
        states = prepare_states(tmp_path / "kept", model, processor, examples[:3])
        coarse_model, coarse_processor = tiny_model("llava")  # the coarse view is among them
        prepare_states(tmp_path / "kept", coarse_model, coarse_processor, examples[:3])
    assert keys_of(examples[0])[0] in states.rows
    assert (
        len(pickle.dumps(states)) < 1000 and pickle.loads(pickle.dumps(states)).rows == states.rows
    )
    prepare_states(tmp_path / "kept", model, processor, examples)
    assert (tmp_path / "kept" / "index.json").stat().st_mtime_ns != before
    assert len(VisionFeatureCache(tmp_path / "kept").rows) == 9
    other, _ = tiny_model("hires_channels", seed=1)
    prepare_states(tmp_path / "kept", other, processor, examples)
    pixels = processor.pixels(examples[0].pictures())
    kept = VisionFeatureCache(tmp_path / "kept").read(examples[0], views_of(other.plan, 6))
    torch.testing.assert_close(kept[5].float(), other.encode(pixels)[5], atol=2e-3, rtol=1e-3)


def test_what_cannot_be_kept_is_refused_in_a_sentence(tmp_path, monkeypatch):
    examples = read_examples(write_records(tmp_path) / "data.json")
    with pytest.raises(
        ValueError, match="only be kept of an encoder that is frozen, and a stage trains vision"
    ):
        recipe(tmp_path, stage(tmp_path, train=["vision"]), states="kept")
    model, processor = tiny_model("llava")
    with pytest.raises(ValueError, match="states of 5 views are wanted, but the processor makes 1"):
        prepare_states(tmp_path / "kept", model, processor, examples, {1: 5})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
        with pytest.raises(ValueError, match=r"the states need [\d,]+ bytes, but .* has 10 free"):
            prepare_states(tmp_path / "kept", model, processor, examples)
    assert not (tmp_path / "kept" / "index.json").exists()
    model.vision_tower.get_submodule("pre_layrnorm").weight.data *= 1e6
    with pytest.raises(ValueError, match="too large for half precision"):
        prepare_states(tmp_path / "kept", model, processor, examples, {0: 1})
    assert json.loads((tmp_path / "data.json").read_text())
