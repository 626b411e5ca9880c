"""Upgrades of all bases that vLLM is said to serve answer there as `generate` does."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-test` runs these tests")

from helpers.vllm_bases import BASES, DEFAULT_BASES, generate_without_upgrade, save_upgraded
from helpers.vllm_models import (
    ask_engine,
    draw_images,
    generate_answer,
    make_request,
    start_engine,
    stop_engine,
)

OTHER_BASES = [name for name in BASES if name not in DEFAULT_BASES]
CHUNKS = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_chunked_prefill": True}


@pytest.mark.parametrize("name", OTHER_BASES)
def test_answers_are_those_of_generate(name, tmp_path):
    model, processor, image = save_upgraded(tmp_path / name, name)
    images = draw_images(10)
    prompts = [(f"{image} what is it", [one]) for one in images[:6]]
    prompts += [(f"{image} is the {image} red", images[6:8]), ("what is it", [])]
    prompts += [(f"a b {image} c {image} d", images[8:])]
    want = [generate_answer(model, processor, *prompt) for prompt in prompts]
    off = [generate_without_upgrade(model, processor, *prompt) for prompt in prompts]
    assert all(a != b for a, b in zip(off[:7], want, strict=False))
    requests = [make_request(processor, *prompt) for prompt in prompts]
    engine = start_engine(tmp_path / name, **CHUNKS)
    try:
        assert ask_engine(engine, processor, requests) == want
        # Now the images come from vLLM's caches, and in other company.
        assert [ask_engine(engine, processor, [request])[0] for request in requests] == want
    finally:
        stop_engine(engine)
