"""Decoders of all families that vLLM is said to serve answer there as `generate` does."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-test` runs these tests")

from helpers.vllm_models import (
    FAMILIES,
    ask_engine,
    draw_images,
    generate_answer,
    generate_without_shortcuts,
    make_request,
    save_vllm_model,
    start_engine,
    stop_engine,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_generate(family, tmp_path):
    model, processor = save_vllm_model(tmp_path / family, family)
    images = draw_images(5)
    prompts = [("<image> what is it", [image]) for image in images[:3]]
    prompts += [("<image> is the <image> red", images[3:]), ("what is it", [])]
    want = [generate_answer(model, processor, *prompt) for prompt in prompts]
    off = [generate_without_shortcuts(model, processor, *prompt) for prompt in prompts[:4]]
    assert off != want[:4]
    engine = start_engine(tmp_path / family, max_num_batched_tokens=48)
    try:
        assert ask_engine(engine, processor, [make_request(processor, *x) for x in prompts]) == want
    finally:
        stop_engine(engine)
