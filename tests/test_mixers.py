"""What the peers' plans needed: means of taps, appended tokens, enriched patches, corrections,
gates, switches, short fine passes.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import checks
from helpers.fusions import DIM, HIDDEN, features, fuse, fusion
from torch import nn

from sparsecut import Plan, Shortcut
from sparsecut.hooks import read_taps
from sparsecut.methods import METHODS, make_plan
from sparsecut.mixers import arrange_grains, build_mixer


def test_a_tuple_of_taps_is_their_mean():
    module, x = (
        fusion(Shortcut(((0, 1, 3), -2), 0, "channels"), tiles=0),
        features((0, 1, 3, 4), tiles=0),
    )
    mean = (x[0] + x[1] + x[3]) / 3
    expected = module.paths[0].project(torch.cat([mean[:, 0], x[4][:, 0]], dim=-1))
    torch.testing.assert_close(module(x)[0], expected)


def test_append_pools_eight_neighbours_and_the_plan_counts_them():
    plan = Plan((Shortcut((1, 2, 4), 0, "append"),))
    module = build_mixer(plan.shortcuts[0], plan, DIM, 5)
    x = torch.randn(2, 3, 1, 25, DIM)
    out = module(x)
    assert out.shape[1] == plan.image_tokens(25) == 25 + 2 * 4
    assert torch.equal(out[:, :25], x[:, 2, 0])
    for t in range(2):
        for k in range(4):
            expected = x[:, t, 0, 8 * k : 8 * k + 8].mean(
                1
            )  # the last of them is the one patch that is left
            torch.testing.assert_close(out[:, 25 + 4 * t + k], expected)


def test_enrich_starts_as_pick_and_is_a_gated_residual():
    plan = Plan((Shortcut((0, 1, 3), 0, "enrich"),))
    torch.manual_seed(0)
    module, x = build_mixer(plan.shortcuts[0], plan, 64, 2), torch.randn(2, 3, 1, 4, 64)
    assert torch.equal(module(x), x[:, -1, 0])
    module.gate_cross.data.fill_(0.5)
    cross = nn.MultiheadAttention(64, 1, batch_first=True)
    cross.in_proj_weight.data = torch.cat([module.query.weight, module.key_value.weight])
    cross.in_proj_bias.data = torch.cat([module.query.bias, module.key_value.bias])
    cross.out_proj.load_state_dict(module.output.state_dict())
    query, others = F.layer_norm(x[:, -1, 0], (64,)), F.layer_norm(x[:, :2, 0].flatten(1, 2), (64,))
    expected = x[:, -1, 0] + 0.5 * cross(query, others, others)[0]
    torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1e-5)
    module.gate_self.data.fill_(0.5)
    assert not torch.allclose(module(x), expected, atol=1e-3)


def test_a_correction_adds_its_own_low_rank_map_to_the_shared_projector():
    shortcuts = [Shortcut((t,), d, "pick") for t, d in ((4, 0), (1, 1), (3, 2))]
    module, x = fusion(*shortcuts, shared=True, rank=2), features((1, 3, 4))
    module.corrections["1"].up.weight.data.zero_()
    plain = fusion(*shortcuts, shared=True)
    plain.paths.load_state_dict(module.paths.state_dict())
    assert torch.equal(module(x)[0], plain(x)[0]) and torch.equal(module(x)[1], plain(x)[1])
    low = module.corrections["2"]
    assert torch.linalg.matrix_rank(low.up.weight @ low.down.weight) == 2
    torch.testing.assert_close(
        fuse(module, x)[2] - fuse(plain, x)[2], x[3][:, 0] @ (low.up.weight @ low.down.weight).T
    )


def test_a_rank_without_sharing_narrows_every_projector_but_the_first_into_the_input():
    module = fusion(Shortcut((4,), 0), Shortcut((1,), 0), Shortcut((3,), 2), rank=3)
    assert [p.linear_1.out_features for p in module.paths] == [HIDDEN, 3, 3]


@pytest.mark.parametrize("gate", ["zero_vector", "one_vector"])
def test_vector_gates_scale_channels(gate):
    module = fusion(Shortcut((4,), 0), Shortcut((1,), 1), gate=gate)
    free, x = fusion(Shortcut((4,), 0), Shortcut((1,), 1)), features((1, 4))
    factor = torch.randn(HIDDEN)
    assert module.gates.shape == (1, HIDDEN) and (module.gates == float(gate == "one_vector")).all()
    module.gates.data[0] = factor
    torch.testing.assert_close(module(x)[1], free(x)[1] * factor)


def test_projectors_that_start_at_zero_are_the_model_without_shortcuts_and_learn():
    model = checks.join(plan={"method": "sparsecut", "pattern": "sparse", "gate": "zero_projector"})
    inputs = checks.batch(model, side="right")
    with model.fusion.switched_off(*range(1, len(model.plan.shortcuts))):
        expected = model(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.linear_2.weight.grad.abs().sum() > 0 for p in model.fusion.paths)


def context_model():
    """A model with context gates that are away from their start."""
    plan = Plan(
        (Shortcut((-2,), 0), Shortcut((1,), 1), Shortcut((2,), 1), Shortcut((3,), 3)),
        gate="context",
    )
    model = checks.join(plan=plan.to_dict())
    for gate in model.fusion.context.values():
        for p in gate.parameters():
            nn.init.normal_(p, std=0.5)
    return model


@torch.no_grad()
def test_context_gates_start_at_one_and_then_depend_on_the_picture_alone():
    model = context_model()
    inputs = checks.batch(model)
    changed = model(**inputs).logits
    for gate in model.fusion.context.values():
        for p in gate.parameters():
            p.zero_()
    plain = checks.join(plan={**model.plan.to_dict(), "gate": None})
    plain.fusion.paths.load_state_dict(model.fusion.paths.state_dict())
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(**inputs).logits, changed, atol=1e-3)


@pytest.mark.parametrize("check", [checks.cached, checks.padded, checks.gradients])
def test_a_model_with_context_gates_generates_and_trains_like_any_other(check):
    check(context_model())


@torch.no_grad()
def test_later_words_do_not_reach_earlier_positions_through_context_gates():
    model = context_model()
    inputs = checks.batch(model)
    ids = inputs["input_ids"].clone()
    ids[:, -1] = (ids[:, -1] + 1) % 4
    before, after = (
        model(**{**inputs, "input_ids": i}).logits[:, :-1] for i in (inputs["input_ids"], ids)
    )
    assert torch.equal(before, after)


@torch.no_grad()
def test_shortcuts_that_are_switched_off_add_nothing():
    model = checks.join(plan={"method": "sparsecut", "pattern": "sparse"})
    inputs = checks.batch(model)
    only = checks.join(plan=Plan(model.plan.shortcuts[:1], tiles=2).to_dict())
    only.fusion.paths[0].load_state_dict(model.fusion.paths[0].state_dict())
    before, others = model(**inputs).logits, range(1, len(model.plan.shortcuts))
    with model.fusion.switched_off(*others):
        assert torch.equal(model(**inputs).logits, only(**inputs).logits)
        with model.fusion.switched_off(0):
            assert model.fusion.off == {0, *others}
    assert torch.equal(model(**inputs).logits, before)
    with pytest.raises(ValueError, match="there is no shortcut 9; this plan's are 0 to"):
        model.fusion.switched_off(9).__enter__()
    assert not model.fusion.off


@torch.no_grad()
def test_fine_views_stop_at_the_deepest_tap_read_from_them_and_give_the_same_states():
    model = checks.join(plan={"method": "sparsecut", "pattern": "bottom", "fine": 0.5})
    depth, pixels = model.config.vision_depth, checks.batch(model)["pixel_values"]
    fine, taps = model.plan.fine_taps(depth), model.plan.resolved_taps(depth)
    assert fine and max(fine) <= depth / 2 < max(taps)
    passed = []
    from sparsecut.hooks import find_layers

    hooks = [
        block.register_forward_hook(
            lambda m, a, out, k=k: passed.append((k, len(a[0] if a else out[0])))
        )
        for k, block in enumerate(find_layers(model.vision_tower, depth, "the encoder"), 1)
    ]
    states = model.encode(pixels)
    for hook in hooks:
        hook.remove()
    assert {tap: x.shape[1] for tap, x in states.items()} == {
        tap: 5 if tap in fine else 1 for tap in taps
    }
    whole = read_taps(model.vision_tower, pixels.flatten(0, 1), model.config.grid, taps)
    for tap, x in states.items():
        torch.testing.assert_close(
            x, whole[tap].unflatten(0, (-1, 5))[:, : x.shape[1]], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    "method", [m for m in METHODS if not m.startswith("official")]
)  # those need deep models
@torch.no_grad()
def test_states_given_instead_of_pixels_change_nothing(method):
    model = checks.join(plan=method)
    inputs = checks.batch(model)
    pixels = inputs.pop("pixel_values")
    expected = model(**inputs, pixel_values=pixels).logits
    assert torch.equal(model(**inputs, vision_states=model.encode(pixels)).logits, expected)
    with pytest.raises(ValueError, match="either pixel_values or vision_states"):
        model.get_image_features()


def test_grains_of_the_fine_view_are_the_stacks_of_deepstack():
    rows, tiles = 3, 2
    big = torch.arange(36.0).reshape(6, 6)
    views = torch.stack(
        [torch.zeros(9), *(big[y : y + 3, x : x + 3].flatten() for y in (0, 3) for x in (0, 3))]
    )
    grains = arrange_grains(views[None, ..., None], tiles, rows)[0, 1:, :, 0]
    for k, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        assert torch.equal(grains[k], big[i::2, j::2].flatten())


def test_published_lists_come_out_of_the_functions_of_depth():
    of = {
        m: make_plan(m, 24, 32).shortcuts
        for m in ("dense_connector_sci", "mmfuser", "lsf_internal_direct")
    }
    assert of["dense_connector_sci"][0].taps == (-2, 7, 15)
    assert of["mmfuser"][0].taps == (3, 8, 13, 18, -2)
    assert [(s.taps[0], s.layer) for s in of["lsf_internal_direct"][1:]] == [
        (3, 3),
        (18, 23),
        (23, 29),
    ]
    granite = make_plan("granite4", 27, 40).shortcuts
    assert [(s.taps[0], s.layer) for s in granite[:4]] == [(-1, 0), (-7, 3), (-13, 6), (-19, 9)]
    assert [(s.grain, s.layer) for s in granite[4:]] == [(1, 12), (2, 15), (3, 18), (4, 21)]
    assert [(s.taps[0], s.layer) for s in make_plan("qwen3_vl", 27, 36).shortcuts[1:]] == [
        (9, 1),
        (17, 2),
        (25, 3),
    ]
