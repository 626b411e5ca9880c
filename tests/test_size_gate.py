"""The gate `size`: no projector can make a shortcut larger than the states that it is added to."""

import pytest
import torch
from helpers.tiny import tiny_model

from sparsecut.fusion import CONTEXT_GATES
from sparsecut.training.shortcut_stats import ShortcutMonitor

PLAN = {"method": "sparsecut", "pattern": "sparse", "gate": "size"}


def make_gate(*fractions: float):
    """A gate of shortcuts with these fractions."""
    gate = CONTEXT_GATES["SizeGate"](len(fractions), 8)
    gate.fractions.data = torch.tensor(fractions)
    return gate


def get_size(x):
    """Root mean square of every token."""
    return x.square().mean(-1).sqrt()


@pytest.mark.parametrize("scale", [0.1, 1.0, 1000.0])
def test_what_is_added_has_a_fraction_of_the_size_at_any_scale(scale):
    torch.manual_seed(0)
    hidden, features = torch.randn(6, 8), torch.randn(6, 8)
    added = make_gate(0.3)(hidden, scale * features, 3)
    torch.testing.assert_close(get_size(added), 0.3 * get_size(hidden), rtol=1e-2, atol=1e-5)
    cosine = torch.cosine_similarity(added, features, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(6), rtol=1e-4, atol=1e-4)


def test_shortcuts_of_a_layer_are_normed_one_by_one():
    torch.manual_seed(0)
    hidden, one, other = torch.randn(4, 8), torch.randn(4, 8), 100 * torch.randn(4, 8)
    both = make_gate(0.3, 0.5)(hidden, torch.cat([one, other], -1), 2)
    expected = make_gate(0.3)(hidden, one, 2) + make_gate(0.5)(hidden, other, 2)
    torch.testing.assert_close(both, expected)
    nothing = make_gate(0.3)(hidden, torch.zeros(4, 8), 2)
    assert torch.equal(nothing, torch.zeros(4, 8)), "a shortcut that is switched off adds nothing"


def test_a_model_learns_through_it_and_its_ratio_stays_what_it_is():
    model, processor = tiny_model(PLAN)
    images = [torch.rand(3, 16, 16) * 255 for _ in range(2)]
    text = [f"{processor.image_token} what"] * 2
    batch = processor(images=[[i.byte()] for i in images], text=text, return_tensors="pt")
    for path in model.fusion.paths[1:]:
        path.linear_2.weight.data *= 1000
    monitor = ShortcutMonitor(model.fusion, "one")
    with monitor.observe(True):
        logits = model(**batch).logits
    logits.square().sum().backward()
    for path in model.fusion.paths:
        assert path.linear_1.weight.grad.abs().sum() > 0
    for gate in model.fusion.context.values():
        assert gate.fractions.grad.abs().sum() > 0
        assert torch.equal(gate.fractions, torch.full_like(gate.fractions, 0.1))
    one = processor(images=[images[0].byte()], text=text[:1], return_tensors="pt")
    torch.testing.assert_close(model(**one).logits[0], logits[0], atol=1e-4, rtol=1e-3)
