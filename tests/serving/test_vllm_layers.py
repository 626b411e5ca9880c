"""Features reach the layers of a decoder whose hidden states are one row of tokens, also in stages
of a pipeline.
"""

import pytest
import torch
from torch import nn

from sparsecut.serving.vllm.layers import ShortcutBuffers

CHOSEN = (1, 2, 5)
DEPTH, WIDTH, ROOM = 6, 4, 16


class Layer(nn.Module):
    """A decoder layer with vLLM's arguments."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, positions, hidden_states, residual=None):
        return torch.tanh(self.linear(hidden_states))


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(DEPTH))


@pytest.fixture
def step():
    """Hidden states [7, H], features [3, layers * H] and where they belong."""
    torch.manual_seed(1)
    mask = torch.tensor([False, True, True, False, False, True, False])
    return torch.randn(7, WIDTH), torch.randn(3, len(CHOSEN) * WIDTH), mask


def copy_stage(layers, stage: range):
    """(layers, buffers) of a stage; layers of other stages are placeholders."""
    own = nn.ModuleList(nn.Identity() for _ in layers)
    for number in stage:
        own[number] = Layer()
        own[number].load_state_dict(layers[number].state_dict())
    return own, ShortcutBuffers(own, CHOSEN, ROOM, WIDTH, torch.float32, stage)


def run_layers(layers, stage: range, hidden):
    for number in stage:
        hidden = layers[number](None, hidden)
    return hidden


def compute_directly(layers, hidden, features, mask):
    """What the layers give when features are added by hand."""
    parts = features.chunk(len(CHOSEN), dim=-1)
    for number, layer in enumerate(layers):
        if number in CHOSEN:
            hidden = hidden.clone()
            hidden[mask] += parts[CHOSEN.index(number)]
        hidden = layer(None, hidden)
    return hidden


def run_pipeline(stages, hidden, features, mask):
    """A step through all stages, as vLLM runs it; every stage clears its buffers."""
    sent = None
    for own, buffers in stages:
        if sent is None:
            buffers.write(features, mask)
        else:
            hidden = buffers.receive(sent)["hidden_states"]
        hidden = run_layers(own, buffers.stage, hidden)
        sent = {"hidden_states": hidden, **buffers.copy_later(len(hidden))}
        buffers.clear(len(hidden))
    return hidden


@pytest.mark.parametrize("ends", [(6,), (3, 6), (1, 2, 6), (2, 4, 6), (1, 2, 3, 4, 5, 6)])
@torch.no_grad()
def test_stages_add_what_one_stage_adds(layers, step, ends):
    hidden, features, mask = step
    want = compute_directly(layers, hidden, features, mask)
    plain = run_layers(layers, range(DEPTH), hidden)
    stages = [copy_stage(layers, range(a, b)) for a, b in zip((0, *ends[:-1]), ends, strict=True)]
    torch.testing.assert_close(run_pipeline(stages, hidden, features, mask), want)
    assert not torch.allclose(want, plain)
    # Without images, the next step sees none of it.
    torch.testing.assert_close(run_pipeline(stages, hidden, None, None), plain)


def test_a_stage_receives_what_the_stage_before_it_sends(layers, step):
    _, features, mask = step
    (_, first), (_, second) = (copy_stage(layers, x) for x in (range(2), range(2, DEPTH)))
    first.write(features, mask)
    sent = first.copy_later(len(mask))
    room = second.make_empty(len(mask), torch.float32, torch.device("cpu"))
    assert {n: x.shape for n, x in sent.items()} == {n: x.shape for n, x in room.items()}
    assert len(sent) == 2 and not any(x.any() for x in room.values())
    assert not first.make_empty(3, torch.float32, torch.device("cpu"))
    assert not second.copy_later(3)


def test_what_is_sent_outlives_the_step(layers, step):
    _, features, mask = step
    _, buffers = copy_stage(layers, range(2))
    buffers.write(features, mask)
    sent = buffers.copy_later(len(mask))
    buffers.clear(len(mask))
    assert all(x[mask].any() for x in sent.values())
