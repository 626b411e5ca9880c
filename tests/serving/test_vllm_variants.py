"""Models inside vLLM that need an engine of their own: images of any size, adapters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-test` runs these tests")

import torch
from helpers.vllm_bases import save_upgraded
from helpers.vllm_models import (
    ask_engine,
    draw_images,
    generate_answer,
    make_request,
    save_vllm_model,
    start_engine,
    stop_engine,
)

import sparsecut

QUESTION = "<image> what is it"
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, model, processor) of one built model."""
    folder = tmp_path_factory.mktemp("vllm_variants") / "model"
    return folder, *save_vllm_model(folder)


@pytest.fixture(scope="module")
def any_size(tmp_path_factory):
    """(folder, model, processor) of a model that takes images of any size."""
    folder = tmp_path_factory.mktemp("vllm_any") / "model"
    limits = {"coarse": "native", "min_pixels": 256, "max_pixels": 4096}
    return folder, *save_vllm_model(folder, **limits)


def test_images_of_any_size(any_size):
    folder, model, processor = any_size
    images = draw_images(12)
    prompts = [(QUESTION, [image]) for image in images]
    prompts += [("<image> is the <image> red", images[:2]), ("what is it", [])]
    want = [generate_answer(model, processor, *prompt) for prompt in prompts]
    engine = start_engine(folder, max_num_batched_tokens=64, max_num_seqs=8)
    try:
        requests = [make_request(processor, *prompt) for prompt in prompts]
        assert ask_engine(engine, processor, requests) == want
        for request, answer in zip(requests, want, strict=True):
            assert ask_engine(engine, processor, [request]) == [answer]
    finally:
        stop_engine(engine)


def test_an_adapter_of_the_language_model(saved, tmp_path):
    peft = pytest.importorskip("peft")
    from vllm.lora.request import LoRARequest

    folder, _, processor = saved
    adapted, _ = sparsecut.load(folder)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"])
    adapter = peft.get_peft_model(adapted.language_model, config)
    for name, weight in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapter.save_pretrained(str(tmp_path / "language"), save_embedding_layers=False)
    images = draw_images(3)
    want = [generate_answer(adapted, processor, QUESTION, [image]) for image in images]
    requests = [make_request(processor, QUESTION, [image]) for image in images]
    engine = start_engine(folder, enable_lora=True, max_lora_rank=8)
    try:
        plain = ask_engine(engine, processor, requests)
        lora = LoRARequest("language", 1, str(tmp_path / "language"))
        assert ask_engine(engine, processor, requests, lora_request=lora) == want
    finally:
        stop_engine(engine)
    assert all(a != b for a, b in zip(plain, want, strict=True))


@pytest.mark.parametrize("kind", ["built", "upgraded"])
def test_without_the_plug_in_a_sentence_tells_what_to_do(saved, tmp_path, kind):
    folder = saved[0] if kind == "built" else tmp_path
    if kind == "upgraded":
        save_upgraded(folder, "llava")
    code = (
        "import sys\n"
        "from helpers.vllm_models import start_engine\n"
        "start_engine(sys.argv[1], trust_remote_code=True, model_impl='transformers')\n"
    )
    settings = {**os.environ, "VLLM_PLUGINS": "", "PYTHONPATH": str(TESTS)}
    run = subprocess.run(
        [sys.executable, "-c", code, folder], env=settings, capture_output=True, text=True
    )
    assert run.returncode == 1  # not killed by a signal
    assert "pip install 'sparsecut[vllm]'" in run.stderr
