"""Models inside vLLM that two processes share answer as `generate` does.

Tensor parallel cuts every layer in two, pipeline parallel the stack of layers.
"""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-test` runs these tests")

from helpers.vllm_models import (
    ask_engine,
    draw_images,
    generate_answer,
    make_request,
    make_vllm_model,
    start_engine,
    stop_engine,
)

# On CPUs vLLM makes room for what stages send only where it warms up for compiling.
STAGES = {
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}


@pytest.mark.parametrize(
    "settings",
    [
        {"tensor_parallel_size": 2},
        STAGES,
        {**STAGES, "max_num_batched_tokens": 16, "max_num_seqs": 8},
    ],
    ids=["tensor parallel", "pipeline parallel", "pipeline parallel in chunks"],
)
def test_two_processes_answer_as_generate_does(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two processes on one core or two
    model, processor = make_vllm_model(plan="deepstack")
    for weight in model.fusion.parameters():
        weight.data *= 2  # else layers of the second stage would hardly matter
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    # Two stages have layers 0, 1 and 2, 3: both receive features.
    assert min(model.plan.layers) < 2 <= max(model.plan.layers)
    images = draw_images(7)
    prompts = [("<image> what is it", [image]) for image in images[:5]]
    prompts += [("<image> is the <image> red", images[5:]), ("what is it", [])]
    want = [generate_answer(model, processor, *prompt) for prompt in prompts]
    later = [n for n, shortcut in enumerate(model.plan.shortcuts) if shortcut.layer >= 2]
    with model.fusion.switched_off(*later):
        assert [generate_answer(model, processor, *prompt) for prompt in prompts] != want
    engine = start_engine(tmp_path / "model", **settings)
    try:
        requests = [make_request(processor, *prompt) for prompt in prompts]
        assert ask_engine(engine, processor, requests) == want
        for request, answer in zip(requests, want, strict=True):
            assert ask_engine(engine, processor, [request]) == [answer]
    finally:
        stop_engine(engine)
