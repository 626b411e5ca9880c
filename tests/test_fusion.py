"""The fusion against plain loops: aligned grains, four mixers, shared paths, gates."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import checks
from helpers.fusions import DIM, features, fuse, fusion
from torch import nn

from sparsecut import Plan, Shortcut
from sparsecut.mixers import arrange_grains, build_mixer


@pytest.mark.parametrize(("tiles", "rows"), [(2, 2), (2, 3), (3, 2), (3, 5), (4, 1)])
def test_fine_patches_lie_under_their_coarse_patch(tiles, rows):
    places = torch.empty(
        1, 1 + tiles**2, rows**2, 2
    )  # of every fine patch: its row and column in the whole picture
    for ty, tx, y, x in itertools.product(range(tiles), range(tiles), range(rows), range(rows)):
        places[0, 1 + ty * tiles + tx, y * rows + x] = torch.tensor([ty * rows + y, tx * rows + x])
    places[0, 0] = -1
    grains = arrange_grains(places, tiles, rows)
    assert (grains[0, 0] == -1).all()
    for y, x, wy, wx in itertools.product(range(rows), range(rows), range(tiles), range(tiles)):
        assert grains[0, 1 + wy * tiles + wx, y * rows + x].tolist() == [
            y * tiles + wy,
            x * tiles + wx,
        ]


@pytest.mark.parametrize(("tiles", "rows"), [(2, 2), (2, 5), (3, 3)])
def test_under_an_averaging_encoder_the_fine_grains_average_to_the_coarse_one(tiles, rows):
    patch = 4
    size = rows * patch
    big = torch.randn(3, 1, tiles * size, tiles * size, dtype=torch.float64)
    tiled = [
        big[..., y : y + size, x : x + size]
        for y in range(0, tiles * size, size)
        for x in range(0, tiles * size, size)
    ]
    views = torch.stack([F.avg_pool2d(big, tiles), *tiled], dim=1)
    encoded = F.avg_pool2d(views.flatten(0, 1), patch).flatten(2).mT.unflatten(0, (3, -1))
    grains = arrange_grains(encoded, tiles, rows)
    torch.testing.assert_close(grains[:, 1:].mean(1), grains[:, 0])


def test_without_tiles_the_only_grain_is_the_view():
    views = torch.randn(2, 1, 9, DIM)
    assert arrange_grains(views, 0, 3) is views


def mixer(mix, taps=(1, 2), tiles=2, rows=2, grain=0):
    """A mixer, and what it reads: [B, T, G, N, D]."""
    torch.manual_seed(0)
    shortcut = Shortcut(taps, 0, mix, grain)
    plan = Plan((shortcut,), tiles=tiles)
    return build_mixer(shortcut, plan, DIM, rows), torch.randn(
        2, len(taps), plan.num_grains, rows**2, DIM
    )


@pytest.mark.parametrize("grain", range(5))
def test_pick_is_one_grain_of_the_last_tap(grain):
    module, x = fusion(Shortcut((1, 2), 0, "pick", grain)), features((1, 2))
    assert torch.equal(module(x)[0], module.paths[0].project(arrange_grains(x[2], 2, 2)[:, grain]))
    assert module.paths[0].mixer.out_dim == DIM


@pytest.mark.parametrize("tiles", [0, 2, 3])
def test_channels_puts_taps_and_grains_of_a_patch_side_by_side(tiles):
    module, x = mixer("channels", tiles=tiles)
    for b, n in itertools.product(range(2), range(4)):
        expected = torch.cat([x[b, t, g, n] for t in range(2) for g in range(1 + tiles**2)])
        assert torch.equal(module(x)[b, n], expected)
    assert module.out_dim == len(expected)


@pytest.mark.parametrize(("tiles", "rows"), [(2, 2), (3, 2), (2, 3)])
def test_tokens_are_the_coarse_patches_and_then_the_whole_fine_picture_row_by_row(tiles, rows):
    module, x = mixer("tokens", tiles=tiles, rows=rows)
    out = module(x)
    assert out.shape == (2, (1 + tiles**2) * rows**2, 2 * DIM) and module.out_dim == 2 * DIM
    for n in range(rows**2):
        assert torch.equal(out[0, n], torch.cat([x[0, 0, 0, n], x[0, 1, 0, n]]))
    side = tiles * rows
    for big_y, big_x in itertools.product(range(side), range(side)):
        grain = 1 + big_y % tiles * tiles + big_x % tiles
        under = big_y // tiles * rows + big_x // tiles
        expected = torch.cat([x[0, 0, grain, under], x[0, 1, grain, under]])
        assert torch.equal(out[0, rows**2 + big_y * side + big_x], expected)


@pytest.mark.parametrize("taps", [(2,), (0, 1, 2)])
def test_attend_is_one_post_norm_block_whose_queries_are_coarse_and_are_no_keys(taps):
    module, x = mixer("attend", taps=taps)
    reference = nn.MultiheadAttention(DIM, module.num_heads, batch_first=True)
    reference.in_proj_weight.data = torch.cat([module.query.weight, module.key_value.weight])
    reference.in_proj_bias.data = torch.cat([module.query.bias, module.key_value.bias])
    reference.out_proj.load_state_dict(module.output.state_dict())
    for b in range(2):
        coarse = x[b, -1, 0]
        others = [
            x[b, t, g] for t in range(len(taps)) for g in range(5) if (t, g) != (len(taps) - 1, 0)
        ]
        keys = torch.cat(others)
        attended, _ = reference(coarse[None], keys[None], keys[None])
        middle = module.norm1(coarse + attended[0])
        expected = module.norm2(middle + module.down(F.gelu(module.up(middle))))
        torch.testing.assert_close(module(x)[b], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("dim", "heads"), [(6, 1), (64, 1), (100, 1), (128, 2), (1024, 16), (1152, 18), (1408, 22)]
)
def test_attention_heads_divide_the_width_and_have_about_64_channels(dim, heads):
    shortcut = Shortcut((1, 2), 0, "attend")
    with torch.device("meta"):
        assert build_mixer(shortcut, Plan((shortcut,)), dim, 2).num_heads == heads


@pytest.mark.parametrize("mix", ["pick", "channels", "attend"])
def test_shared_shortcuts_in_one_batched_call_equal_separate_calls(mix):
    module = fusion(*(Shortcut((t,), d, mix) for t, d in [(-2, 0), (1, 1), (3, 4)]), shared=True)
    x = features((4, 1, 3))
    assert len(module.paths) == 1
    for tap, layer in [(4, 0), (1, 1), (3, 4)]:
        alone = module.paths[0](arrange_grains(x[tap], 2, 2).unsqueeze(1))
        torch.testing.assert_close(fuse(module, x)[layer], alone, atol=1e-6, rtol=1e-5)


def test_only_shortcuts_of_one_kind_share_a_path():
    kinds = [
        ((1,), "pick", 0),
        ((2,), "pick", 0),
        ((2,), "pick", 1),
        ((2,), "channels", 0),
        ((1, 2), "channels", 0),
    ]
    shortcuts = [Shortcut(taps, i, mix, grain) for i, (taps, mix, grain) in enumerate(kinds)]
    assert fusion(*shortcuts, shared=True).groups == [
        [0, 1, 2],
        [3],
        [4],
    ]  # grains of `pick` take the same weights
    assert len(fusion(*shortcuts).paths) == 5


def test_a_norm_gives_every_tapped_feature_mean_zero_and_deviation_one():
    shortcut, x = Shortcut((1,), 0, "channels"), features((1,))
    scaled = {1: 7 * x[1] + 3}
    assert torch.allclose(
        fusion(shortcut, norm=True)(x)[0], fusion(shortcut, norm=True)(scaled)[0], atol=1e-3
    )
    assert not torch.allclose(fusion(shortcut)(x)[0], fusion(shortcut)(scaled)[0], atol=1e-1)


def test_gates_are_parameters_only_where_the_plan_trains_them():
    shortcuts = [Shortcut((1,), 0), Shortcut((2,), 1), Shortcut((3,), 3)]
    constant, zero, one = (fusion(*shortcuts, gate=gate) for gate in (None, "zero", "one"))
    assert "gates" in dict(constant.named_buffers()) and "gates" not in dict(
        constant.named_parameters()
    )
    assert [g.gates.tolist() for g in (constant, zero, one)] == [[1, 1], [0, 0], [1, 1]]
    assert all("gates" in dict(g.named_parameters()) and g.gates.shape == (2,) for g in (zero, one))


def test_a_gate_scales_its_own_shortcut_and_never_the_input():
    module = fusion(Shortcut((1,), 0), Shortcut((2,), 1), Shortcut((3,), 3), gate="one")
    x = features((1, 2, 3))
    before = fuse(module, x)
    module.gates.data = torch.tensor([0.5, -2.0])
    after = fuse(module, x)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], 0.5 * before[1]) and torch.equal(after[3], -2 * before[3])


def test_two_shortcuts_into_one_layer_add_up():
    module = fusion(Shortcut((1,), 0), Shortcut((2,), 2), Shortcut((3,), 2))
    x = features((1, 2, 3))
    parts = [
        path(arrange_grains(x[tap], 2, 2).unsqueeze(1))
        for path, tap in zip(module.paths, (1, 2, 3), strict=True)
    ]
    out = fuse(module, x)
    assert set(out) == {0, 2}
    torch.testing.assert_close(out[2], parts[1] + parts[2], atol=1e-6, rtol=1e-5)


def test_features_of_a_picture_do_not_depend_on_the_others():
    module = fusion(Shortcut((1,), 0, "attend"), Shortcut((2,), 1, "attend"))
    x = features((1, 2), pictures=3)
    for b in range(3):
        alone = module({tap: v[b : b + 1] for tap, v in x.items()})
        for together, one in zip(module(x), alone, strict=True):
            torch.testing.assert_close(together[b : b + 1], one, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mix", ["channels", "attend"])
def test_a_zero_gate_is_the_model_without_shortcuts_bit_for_bit(mix):
    gated = checks.join(
        plan={"method": "sparsecut", "pattern": "bottom", "mix": mix, "gate": "zero"}
    )
    plain = checks.join(plan={"method": "hires_channels", "mix": mix})
    plain.fusion.paths[0].load_state_dict(gated.fusion.paths[0].state_dict())
    inputs = checks.batch(plain)
    assert gated.plan.layers and not plain.plan.layers
    assert torch.equal(gated(**inputs).logits, plain(**inputs).logits)
    gated.fusion.gates.data += 1
    assert not torch.allclose(gated(**inputs).logits, plain(**inputs).logits, atol=1e-2)


def test_parts_in_half_precision_take_features_of_any_type():
    module = fusion(Shortcut((1,), 0, "channels")).to(torch.bfloat16)
    assert module(features((1,)))[0].dtype == torch.bfloat16
