"""Upgraded models inside vLLM answer as `generate` does, token for token.

They run where vLLM is installed: `make vllm-test` makes an environment with it.
"""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-test` runs these tests")

from helpers.vllm_bases import DEFAULT_BASES, generate_without_upgrade, save_upgraded
from helpers.vllm_models import (
    ask_engine,
    draw_images,
    generate_answer,
    make_request,
    start_engine,
    stop_engine,
)


@pytest.fixture(scope="module", params=DEFAULT_BASES)
def saved(request, tmp_path_factory):
    """(folder, model, processor, how an image is written) of one upgrade."""
    folder = tmp_path_factory.mktemp("vllm_upgraded") / request.param
    return folder, *save_upgraded(folder, request.param)


@pytest.fixture(scope="module")
def prompts(saved):
    """(prompts with their images, what `generate` answers to each)."""
    _, model, processor, image = saved
    images = draw_images(12)
    prompts = [(f"{image} what is it", [one]) for one in images[:8]]
    prompts += [("what is it", []), (f"{image} is the {image} red", images[8:10])]
    prompts += [(f"a b {image} c d {image} {image} one two", images[9:12])]
    return prompts, [generate_answer(model, processor, *prompt) for prompt in prompts]


@pytest.fixture(scope="module", params=["whole prompts", "chunks of 16 tokens"])
def engine(request, saved):
    """An engine in this process; prefix caching is on."""
    settings = {}
    if request.param != "whole prompts":
        settings = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_chunked_prefill": True}
    engine = start_engine(saved[0], enable_prefix_caching=True, **settings)
    yield engine
    stop_engine(engine)


def test_prompts_together_and_alone(engine, saved, prompts):
    processor = saved[2]
    prompts, wanted = prompts
    requests = [make_request(processor, *prompt) for prompt in prompts]
    assert ask_engine(engine, processor, requests) == wanted
    for request, answer in zip(requests, wanted, strict=True):
        assert ask_engine(engine, processor, [request]) == [answer]


def test_repeated_images_and_prefixes(engine, saved):
    _, model, processor, image = saved
    images = draw_images(2, seed=7)
    beginning = f"{image} what is it a b c d one two three what is it"
    asked = [(f"{beginning} {word}", [images[0]]) for word in ("red", "blue", "cat")]
    asked.append((asked[0][0], [images[1]]))
    requests = [make_request(processor, *prompt) for prompt in asked]
    want = [generate_answer(model, processor, *prompt) for prompt in asked]
    for request, answer in zip(requests, want, strict=True):
        assert ask_engine(engine, processor, [request]) == [answer]
    assert ask_engine(engine, processor, requests) == want
    assert want[0] != want[3]


def test_shortcuts_change_the_answers(saved, prompts):
    _, model, processor, _ = saved
    prompts, wanted = prompts
    off = [generate_without_upgrade(model, processor, *prompt) for prompt in prompts[:8]]
    assert all(a != b for a, b in zip(off, wanted, strict=False))


def test_the_prompt_is_the_processors(engine, saved):
    processor, image = saved[2:]
    images = draw_images(2)
    text = f"{image} is the {image} red"
    output = engine.generate([make_request(processor, text, images)], use_tqdm=False)[0]
    inputs = processor(images=images, text=text, return_tensors="pt")
    assert output.prompt_token_ids == inputs["input_ids"][0].tolist()


def test_an_untrained_upgrade_answers_as_its_base(tmp_path):
    plan = {"method": "sparsecut", "tiles": 0}  # the base takes no fine views
    model, processor, image = save_upgraded(tmp_path / "base", "llava", plan, is_trained=False)
    prompts = [(f"{image} what is it", [one]) for one in draw_images(4)]
    requests = [make_request(processor, *prompt) for prompt in prompts]
    base = model.detach()
    want = [generate_answer(base, processor, *prompt) for prompt in prompts]
    engine = start_engine(tmp_path / "base")
    try:
        assert ask_engine(engine, processor, requests) == want
    finally:
        stop_engine(engine)


def test_an_adapter_of_the_language_model(tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    from vllm.lora.request import LoRARequest

    model, processor, image = save_upgraded(tmp_path / "base", "llava")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"])
    adapter = peft.get_peft_model(model.language_backbone(), config)
    for name, weight in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapter.save_pretrained(str(tmp_path / "language"), save_embedding_layers=False)
    prompts = [(f"{image} what is it", [one]) for one in draw_images(3)]
    want = [generate_answer(model, processor, *prompt) for prompt in prompts]
    requests = [make_request(processor, *prompt) for prompt in prompts]
    engine = start_engine(tmp_path / "base", enable_lora=True, max_lora_rank=8)
    try:
        plain = ask_engine(engine, processor, requests)
        lora = LoRARequest("language", 1, str(tmp_path / "language"))
        assert ask_engine(engine, processor, requests, lora_request=lora) == want
    finally:
        stop_engine(engine)
    assert all(a != b for a, b in zip(plain, want, strict=True))
