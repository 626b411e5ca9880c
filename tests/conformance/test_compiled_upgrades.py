"""An upgraded model compiles: prefill and decoding are one graph each."""

import copy

import torch
from helpers.ecosystem import tiny_upgraded


@torch.no_grad()
def test_the_prefill_and_a_decoding_step_are_one_graph_each():
    torch._dynamo.reset()
    model, inputs, logits = tiny_upgraded(depth=2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    prefill = compiled(**inputs)
    assert torch.equal(prefill.logits, logits)

    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": logits[:, -1:].argmax(-1), "attention_mask": mask}
    cache = copy.deepcopy(prefill.past_key_values)
    expected = model(**step, past_key_values=cache).logits
    assert torch.equal(compiled(**step, past_key_values=prefill.past_key_values).logits, expected)
