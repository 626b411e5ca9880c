"""An upgraded model: export, threads, checkpointing, other dtypes, every mode of generate.

Compilation is tested in tests/conformance.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import bases
from helpers.bases import randomize_fusion
from helpers.ecosystem import SHORT, get_logits, tiny_base, tiny_upgraded

from sparsecut import upgrade
from sparsecut.hooks import CHECKPOINTING, RECOMPUTES_HOOKS


def test_the_prefill_can_be_exported():
    model, inputs, logits = tiny_upgraded(depth=2)
    program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
    exported = program.module()
    assert torch.equal(exported(**inputs, use_cache=False).logits, logits)
    other = inputs | {"pixel_values": inputs["pixel_values"] + 1}
    assert torch.equal(exported(**other, use_cache=False).logits, get_logits(model, other))


@torch.no_grad()
def test_eight_threads_answer_as_one_does():
    model, inputs, _ = tiny_upgraded()
    requests = [inputs | {"pixel_values": inputs["pixel_values"] + i} for i in range(7)]
    text_ids = inputs["input_ids"].clamp(max=50)
    requests.append({"input_ids": text_ids, "attention_mask": inputs["attention_mask"]})
    expected = [model(**request).logits for request in requests]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            answers = list(pool.map(lambda request: model(**request).logits, requests))
            for answer, logits in zip(answers, expected, strict=True):
                assert torch.equal(answer, logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    model, inputs, _ = tiny_upgraded()
    model.train()
    expected = compute_gradients(model, inputs)
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    gradients = compute_gradients(model, inputs)
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-5)


def compute_gradients(model, inputs) -> dict:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


MODES = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams over a cut prompt": {"num_beams": 3, "prefill_chunk_size": 4},
    "samples": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "guidance": {"guidance_scale": 1.5},
    "penalty": {"repetition_penalty": 1.3},
    "guesses from the prompt": {"prompt_lookup_num_tokens": 2},
    "guesses of an assistant": {"assistant_model": None},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_mode_of_generate_is_that_of_the_base(mode):
    if RECOMPUTES_HOOKS and "prefill_chunk_size" in mode:
        pytest.skip("before 5.23 transformers gives every chunk all images")
    base, inputs = tiny_base()
    has_assistant = "assistant_model" in mode
    if has_assistant or "prompt_lookup_num_tokens" in mode:  # these modes take one prompt
        inputs = {name: value[:1] for name, value in inputs.items()}
    expected = generate(base, inputs, mode, tiny_base()[0] if has_assistant else None)

    model, _ = upgrade(base)
    inputs |= bases.build_fine_views(model, inputs)
    assistant = upgrade(tiny_base()[0])[0] if has_assistant else None
    assert torch.equal(generate(model, inputs, mode, assistant), expected)
    randomize_fusion(model)
    assert not torch.equal(generate(model, inputs, mode, assistant), expected)


def generate(model, inputs, mode, assistant):
    if assistant is not None:
        mode = {"assistant_model": assistant}
    torch.manual_seed(0)
    return model.generate(**inputs, **SHORT, **mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    base, base_inputs = tiny_base()
    expected = get_logits(base.to(dtype), base_inputs)
    model, _ = upgrade(base)
    inputs = base_inputs | bases.build_fine_views(model, base_inputs)
    assert torch.equal(get_logits(model, inputs), expected)
    assert {p.dtype for p in model.fusion.parameters()} == {dtype}

    in_float32 = get_logits(randomize_fusion(model).float(), inputs)
    assert in_float32.dtype == torch.float32
    assert not torch.equal(in_float32, expected.float())
    assert get_logits(model.to("cpu", dtype), inputs).dtype == dtype
    model.generate(**inputs, **SHORT)
