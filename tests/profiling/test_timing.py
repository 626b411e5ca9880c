"""Measured times are times, and models that are compared share their backbones."""

import json

import pytest
from helpers.counting import get_tiny_configs
from helpers.tiny import tiny_model

from sparsecut.profiling import timing


def test_measuring_gives_positive_ordered_figures():
    models = {"llava": tiny_model("llava"), "sparsecut": tiny_model()}
    models["llava"][0].train()
    measured = timing.measure_all(
        models, num_new_tokens=3, num_text_tokens=4, repeats=3, warmup=1, batch_size=2
    )
    for m in measured.values():
        assert min(m.encoder_ms, m.fusion_ms, m.language_prefill_ms, m.tokens_per_second) > 0
        assert max(m.encoder_ms, m.language_prefill_ms) < m.first_token_ms
        assert m.peak_bytes is None or m.peak_bytes >= 0
        assert m.first_token_spread_ms >= 0
        assert json.loads(json.dumps(m.to_dict())) == m.to_dict()
    assert measured["llava"].first_token_ratio == measured["llava"].new_token_ratio == 1
    assert models["llava"][0].training  # as it was
    single = timing.measure(models["sparsecut"][0], repeats=1, num_new_tokens=2)
    assert single.num_prompt_tokens == 64 + 4
    assert single.first_token_spread_ms == 0


def test_models_to_measure_share_their_backbones():
    models = timing.random_models(*get_tiny_configs(), {"a": "llava", "b": "sparsecut"})
    first = models["a"][0]
    second = models["b"][0]
    assert first.vision_tower is second.vision_tower
    assert first.language_model is second.language_model
    assert first.fusion is not second.fusion
    measured = timing.measure_all(models, repeats=1, num_new_tokens=2)
    assert measured["b"].first_token_ms > 0


def test_what_cannot_be_measured_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="repeats is 0"):
        timing.measure_all({"a": (None, None)}, repeats=0)
    with pytest.raises(ValueError, match="at least one"):
        timing.measure_all({})
    monkeypatch.setattr(timing, "_count_free_bytes", lambda device: 2**30)
    huge_vision, huge_language = get_tiny_configs()
    huge_language = type(huge_language)(**{**huge_language.to_dict(), "vocab_size": 10**8})
    with pytest.raises(ValueError, match=r"float32, but cpu has 1\.0 GiB"):
        timing.random_models(huge_vision, huge_language, {"llava": "llava"})
