"""The fusion: shared weights, corrections, gates, and shortcuts that are switched off."""

import pytest
import torch
from helpers import checks
from helpers.fusions import HIDDEN, features, fuse, fusion
from torch import nn

from sparsecut import Plan, Shortcut
from sparsecut.hooks import read_taps
from sparsecut.methods import METHODS
from sparsecut.mixers import arrange_grains
from sparsecut.schema import UserError

SPARSE = {"method": "sparsecut", "pattern": "sparse"}


@pytest.mark.parametrize("mix", ["pick", "channels", "attend"])
def test_shared_shortcuts_in_one_batched_call_equal_separate_calls(mix):
    places = [(-2, 0), (1, 1), (3, 4)]
    module = fusion(*(Shortcut((tap,), layer, mix) for tap, layer in places), shared=True)
    x = features((4, 1, 3))
    (path,) = module.paths
    fused = fuse(module, x)
    for tap, layer in [(4, 0), (1, 1), (3, 4)]:
        alone = path(arrange_grains(x[tap], 2, 2).unsqueeze(1))
        torch.testing.assert_close(fused[layer], alone, atol=1e-6, rtol=1e-5)


def test_only_shortcuts_of_one_kind_share_a_path():
    shortcuts = (
        Shortcut((1,), 0),
        Shortcut((2,), 1),
        Shortcut((2,), 2, grain=1),  # grains of `pick` take the same weights
        Shortcut((2,), 3, "channels"),
        Shortcut((1, 2), 4, "channels"),
    )
    assert fusion(*shortcuts, shared=True).groups == [[0, 1, 2], [3], [4]]
    assert len(fusion(*shortcuts).paths) == 5


def test_a_norm_gives_every_tapped_feature_mean_zero_and_deviation_one():
    shortcut = Shortcut((1,), 0, "channels")
    x = features((1,))
    scaled = {1: 7 * x[1] + 3}
    normed = fusion(shortcut, norm=True)
    plain = fusion(shortcut)
    assert torch.allclose(normed(x)[0], normed(scaled)[0], atol=1e-3)
    assert not torch.allclose(plain(x)[0], plain(scaled)[0], atol=1e-1)


def test_gates_are_parameters_only_where_the_plan_trains_them():
    shortcuts = [Shortcut((1,), 0), Shortcut((2,), 1), Shortcut((3,), 3)]
    for gate, start in {None: 1, "zero": 0, "one": 1}.items():
        module = fusion(*shortcuts, gate=gate)
        assert module.gates.tolist() == [start, start]
        assert ("gates" in dict(module.named_parameters())) == (gate is not None)
        assert ("gates" in dict(module.named_buffers())) == (gate is None)


def test_a_gate_scales_its_own_shortcut_and_never_the_input():
    module = fusion(Shortcut((1,), 0), Shortcut((2,), 1), Shortcut((3,), 3), gate="one")
    x = features((1, 2, 3))
    before = fuse(module, x)
    module.gates.data = torch.tensor([0.5, -2.0])
    after = fuse(module, x)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], 0.5 * before[1])
    assert torch.equal(after[3], -2 * before[3])


@pytest.mark.parametrize("gate", ["zero_vector", "one_vector"])
def test_vector_gates_scale_channels(gate):
    shortcuts = (Shortcut((4,), 0), Shortcut((1,), 1))
    module = fusion(*shortcuts, gate=gate)
    plain = fusion(*shortcuts)
    x = features((1, 4))
    assert module.gates.shape == (1, HIDDEN)
    assert (module.gates == float(gate == "one_vector")).all()
    factor = torch.randn(HIDDEN)
    module.gates.data[0] = factor
    torch.testing.assert_close(module(x)[1], plain(x)[1] * factor)


def test_two_shortcuts_into_one_layer_add_up():
    module = fusion(Shortcut((1,), 0), Shortcut((2,), 2), Shortcut((3,), 2))
    x = features((1, 2, 3))
    parts = []
    for path, tap in zip(module.paths, (1, 2, 3), strict=True):
        parts.append(path(arrange_grains(x[tap], 2, 2).unsqueeze(1)))
    fused = fuse(module, x)
    assert list(fused) == [0, 2]
    torch.testing.assert_close(fused[2], parts[1] + parts[2], atol=1e-6, rtol=1e-5)


def test_features_of_an_image_do_not_depend_on_the_others():
    module = fusion(Shortcut((1,), 0, "attend"), Shortcut((2,), 1, "attend"))
    x = features((1, 2), images=3)
    together = module(x)
    for b in range(3):
        alone = module({tap: states[b : b + 1] for tap, states in x.items()})
        for all_images, one_image in zip(together, alone, strict=True):
            torch.testing.assert_close(all_images[b : b + 1], one_image, atol=1e-6, rtol=1e-5)


def test_parts_in_half_precision_take_features_of_any_type():
    module = fusion(Shortcut((1,), 0, "channels")).to(torch.bfloat16)
    assert module(features((1,)))[0].dtype == torch.bfloat16


def test_a_correction_adds_its_own_low_rank_map_to_the_shared_projector():
    shortcuts = (Shortcut((4,), 0), Shortcut((1,), 1), Shortcut((3,), 2))
    module = fusion(*shortcuts, shared=True, rank=2)
    plain = fusion(*shortcuts, shared=True)
    plain.paths.load_state_dict(module.paths.state_dict())
    module.corrections["1"].up.weight.data.zero_()
    x = features((1, 3, 4))
    corrected = fuse(module, x)
    shared = fuse(plain, x)
    assert torch.equal(corrected[0], shared[0])
    assert torch.equal(corrected[1], shared[1])
    correction = module.corrections["2"]
    matrix = correction.up.weight @ correction.down.weight
    assert torch.linalg.matrix_rank(matrix) == 2
    torch.testing.assert_close(corrected[2] - shared[2], x[3][:, 0] @ matrix.T)


def test_a_rank_without_sharing_narrows_every_projector_but_the_first_into_the_input():
    module = fusion(Shortcut((4,), 0), Shortcut((1,), 0), Shortcut((3,), 2), rank=3)
    assert [path.linear_1.out_features for path in module.paths] == [HIDDEN, 3, 3]


@pytest.mark.parametrize("mix", ["channels", "attend"])
def test_a_zero_gate_is_the_model_without_shortcuts_bit_for_bit(mix):
    plan = {"method": "sparsecut", "pattern": "bottom", "mix": mix, "gate": "zero"}
    gated = checks.join(plan=plan)
    plain = checks.join(plan={"method": "hires_channels", "mix": mix})
    plain.fusion.paths[0].load_state_dict(gated.fusion.paths[0].state_dict())
    inputs = checks.batch(plain)
    expected = plain(**inputs).logits
    assert gated.plan.layers and not plain.plan.layers
    assert torch.equal(gated(**inputs).logits, expected)
    gated.fusion.gates.data += 1
    assert not torch.allclose(gated(**inputs).logits, expected, atol=1e-2)


def test_projectors_that_start_at_zero_are_the_model_without_shortcuts_and_learn():
    model = checks.join(plan={**SPARSE, "gate": "zero_projector"})
    inputs = checks.batch(model, side="right")
    with model.fusion.switched_off(*model.fusion.gated):
        expected = model(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for path in model.fusion.paths:
        assert path.linear_2.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_shortcuts_that_are_switched_off_add_nothing():
    model = checks.join(plan=SPARSE)
    inputs = checks.batch(model)
    input_only = checks.join(plan=Plan(model.plan.shortcuts[:1], tiles=2).to_dict())
    input_only.fusion.paths[0].load_state_dict(model.fusion.paths[0].state_dict())
    before = model(**inputs).logits
    gated = model.fusion.gated
    with model.fusion.switched_off(*gated):
        assert torch.equal(model(**inputs).logits, input_only(**inputs).logits)
        with model.fusion.switched_off(0):
            assert model.fusion.off == {0, *gated}
    assert torch.equal(model(**inputs).logits, before)
    with pytest.raises(UserError, match="no shortcut 9"), model.fusion.switched_off(9):
        pass
    assert not model.fusion.off


@pytest.fixture
def context_model():
    """A model with context gates that are away from their start."""
    places = [(-2, 0), (1, 1), (2, 1), (3, 3)]
    shortcuts = tuple(Shortcut((tap,), layer) for tap, layer in places)
    model = checks.join(plan=Plan(shortcuts, gate="context").to_dict())
    for parameter in model.fusion.context.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def test_context_gates_start_at_one_and_then_depend_on_the_image(context_model):
    model = context_model
    inputs = checks.batch(model)
    changed = model(**inputs).logits
    for parameter in model.fusion.context.parameters():
        parameter.zero_()
    plain = checks.join(plan={**model.plan.to_dict(), "gate": None})
    plain.fusion.paths.load_state_dict(model.fusion.paths.state_dict())
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, plain(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, changed, atol=1e-3)


@pytest.mark.parametrize("check", [checks.cached, checks.padded, checks.gradients])
def test_a_model_with_context_gates_generates_and_trains_like_any_other(context_model, check):
    check(context_model)


@torch.no_grad()
def test_later_text_does_not_reach_earlier_positions_through_context_gates(context_model):
    inputs = checks.batch(context_model)
    before = context_model(**inputs).logits[:, :-1]
    inputs["input_ids"][:, -1] = (inputs["input_ids"][:, -1] + 1) % 4
    assert torch.equal(context_model(**inputs).logits[:, :-1], before)


def test_context_gates_refuse_a_part_of_an_image(context_model):
    gate = context_model.fusion.context["3"]
    width = gate.weight.shape[-1] // 2
    with pytest.raises(UserError, match="gate='context'"):
        gate(torch.zeros(6, width), torch.zeros(6, width), num_tokens=4)


@torch.no_grad()
def test_fine_views_stop_at_the_deepest_tap_read_from_them_and_give_the_same_states():
    model = checks.join(plan={"method": "sparsecut", "pattern": "bottom", "fine": 0.5})
    depth = model.config.vision_depth
    pixels = checks.batch(model)["pixel_values"]
    fine = model.plan.fine_taps(depth)
    taps = model.plan.resolved_taps(depth)
    assert fine and max(fine) <= depth / 2 < max(taps)
    states = model.encode(pixels)
    views = {tap: x.shape[1] for tap, x in states.items()}
    assert views == {tap: 5 if tap in fine else 1 for tap in taps}
    whole = read_taps(model.vision_tower, pixels.flatten(0, 1), model.config.grid, taps)
    for tap, x in states.items():
        expected = whole[tap].unflatten(0, (-1, 5))[:, : views[tap]]
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("official")])
@torch.no_grad()
def test_features_instead_of_pixels_change_nothing(method):
    model = checks.join(plan=method)  # official plans need deep models
    inputs = checks.batch(model)
    expected = model(**inputs).logits
    states = model.encode(inputs.pop("pixel_values"))
    assert torch.equal(model(**inputs, vision_states=states).logits, expected)


def test_image_features_need_pixels_or_states():
    model = checks.join(plan="llava")
    pixels = checks.batch(model)["pixel_values"]
    for inputs in ({}, {"pixel_values": pixels, "vision_states": model.encode(pixels)}):
        with pytest.raises(UserError, match="pixel_values"):
            model.get_image_features(**inputs)
