"""An upgraded model under compilers, threads, checkpointing and other number formats, and every way
of generating.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import bases
from helpers.ecosystem import SHORT, get_logits, randomize_fusion, tiny_base, tiny_upgraded

from sparsecut import upgrade


def test_the_prompt_pass_can_be_exported():
    model, inputs, want = tiny_upgraded(depth=2)
    program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
    other = inputs | {"pixel_values": inputs["pixel_values"] + 1}
    assert torch.equal(program.module()(**inputs, use_cache=False).logits, want)
    assert torch.equal(program.module()(**other, use_cache=False).logits, get_logits(model, other))


@torch.no_grad()
def test_the_prompt_pass_and_a_step_after_it_are_one_graph_each():
    torch._dynamo.reset()
    model, inputs, want = tiny_upgraded(depth=2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    prompt = compiled(**inputs)
    assert torch.equal(prompt.logits, want)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": want[:, -1:].argmax(-1), "attention_mask": mask}
    expected = model(**step, past_key_values=copy.deepcopy(prompt.past_key_values)).logits
    assert torch.equal(compiled(**step, past_key_values=prompt.past_key_values).logits, expected)


@torch.no_grad()
def test_eight_threads_answer_as_one_does():
    model, inputs, _ = tiny_upgraded()
    asked = [inputs | {"pixel_values": inputs["pixel_values"] + i} for i in range(7)]
    asked.append(
        {"input_ids": inputs["input_ids"].clamp(max=50), "attention_mask": inputs["attention_mask"]}
    )
    expected = [model(**one).logits for one in asked]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            answers = list(pool.map(lambda one: model(**one).logits, asked))
            assert all(torch.equal(a, e) for a, e in zip(answers, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    model, inputs, _ = tiny_upgraded()
    model.train()

    def gradients():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients()
    assert set(found) == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-5)


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
def test_every_way_of_generating_is_the_base_s(mode):
    base, inputs = tiny_base()
    if "prompt_lookup_num_tokens" in mode or "assistant_model" in mode:  # these take one prompt
        inputs = {name: value[:1] for name, value in inputs.items()}
    helper = {"assistant_model": tiny_base()[0]} if "assistant_model" in mode else {}
    torch.manual_seed(0)
    want = base.generate(**inputs, **SHORT, **mode | helper)
    model, _ = upgrade(base)
    given = inputs | bases.build_fine_views(model, inputs)
    helper = {"assistant_model": upgrade(tiny_base()[0])[0]} if helper else {}
    torch.manual_seed(0)
    assert torch.equal(model.generate(**given, **SHORT, **mode | helper), want)
    torch.manual_seed(0)
    assert not torch.equal(
        randomize_fusion(model).generate(**given, **SHORT, **mode | helper), want
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_number_formats(dtype):
    base, own = tiny_base()
    want = get_logits(base.to(dtype), own)
    model, _ = upgrade(base)
    inputs = own | bases.build_fine_views(model, own)
    assert torch.equal(get_logits(model, inputs), want) and {
        p.dtype for p in model.fusion.parameters()
    } == {dtype}
    single = get_logits(randomize_fusion(model).float(), inputs)
    assert single.dtype == torch.float32 and not torch.equal(single, want.float())
    assert get_logits(model.to("cpu", dtype), inputs).dtype == dtype
    model.generate(**inputs, **SHORT)
