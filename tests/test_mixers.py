"""Mixers against plain loops: each on small grains, patch by patch."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.fusions import DIM, features, fuse, fusion
from torch import nn

from sparsecut import Plan, Shortcut
from sparsecut.mixers import arrange_grains, build_mixer


@pytest.mark.parametrize(("tiles", "rows"), [(2, 2), (2, 3), (3, 2), (3, 5), (4, 1)])
def test_fine_patches_lie_under_their_coarse_patch(tiles, rows):
    # The feature of every fine patch is its row and column in the whole image.
    places = torch.full((1, 1 + tiles**2, rows**2, 2), -1.0)
    for ty, tx, y, x in itertools.product(range(tiles), range(tiles), range(rows), range(rows)):
        place = [ty * rows + y, tx * rows + x]
        places[0, 1 + ty * tiles + tx, y * rows + x] = torch.tensor(place)
    grains = arrange_grains(places, tiles, rows)
    assert (grains[0, 0] == -1).all()
    for y, x, wy, wx in itertools.product(range(rows), range(rows), range(tiles), range(tiles)):
        fine = grains[0, 1 + wy * tiles + wx, y * rows + x]
        assert fine.tolist() == [y * tiles + wy, x * tiles + wx]


@pytest.mark.parametrize(("tiles", "rows"), [(2, 2), (2, 5), (3, 3)])
def test_under_an_averaging_encoder_the_fine_grains_average_to_the_coarse_one(tiles, rows):
    patch = 4
    size = rows * patch
    image = torch.randn(3, 1, tiles * size, tiles * size, dtype=torch.float64)
    views = [F.avg_pool2d(image, tiles)]
    for y, x in itertools.product(range(0, tiles * size, size), repeat=2):
        views.append(image[..., y : y + size, x : x + size])
    pixels = torch.stack(views, dim=1).flatten(0, 1)
    encoded = F.avg_pool2d(pixels, patch).flatten(2).mT.unflatten(0, (3, -1))
    grains = arrange_grains(encoded, tiles, rows)
    torch.testing.assert_close(grains[:, 1:].mean(1), grains[:, 0])


def test_without_tiles_the_only_grain_is_the_view():
    views = torch.randn(2, 1, 9, DIM)
    assert arrange_grains(views, 0, 3) is views


def test_grains_of_the_fine_views_are_the_stacks_of_deepstack():
    image = torch.arange(36.0).reshape(6, 6)
    views = [torch.zeros(9)]
    for y, x in itertools.product((0, 3), repeat=2):
        views.append(image[y : y + 3, x : x + 3].flatten())
    grains = arrange_grains(torch.stack(views)[None, ..., None], 2, 3)[0, 1:, :, 0]
    for number, (i, j) in enumerate(itertools.product((0, 1), repeat=2)):
        assert torch.equal(grains[number], image[i::2, j::2].flatten())


def make_mixer(mix, taps=(1, 2), tiles=2, rows=2, dim=DIM):
    """A mixer, and what it reads: [B, T, G, N, D]."""
    torch.manual_seed(0)
    shortcut = Shortcut(taps, 0, mix)
    plan = Plan((shortcut,), tiles=tiles)
    num_grains = plan.num_grains if shortcut.mixer.grains == "all" else 1
    x = torch.randn(2, len(taps), num_grains, rows**2, dim)
    return build_mixer(shortcut, plan, dim, rows), x


@pytest.mark.parametrize("grain", range(5))
def test_pick_is_one_grain_of_the_last_tap(grain):
    module = fusion(Shortcut((1, 2), 0, "pick", grain))
    x = features((1, 2))
    picked = arrange_grains(x[2], 2, 2)[:, grain]
    assert torch.equal(module(x)[0], module.paths[0].project(picked))
    assert module.paths[0].mixer.out_dim == DIM


@pytest.mark.parametrize("tiles", [0, 2, 3])
def test_channels_puts_taps_and_grains_of_a_patch_side_by_side(tiles):
    module, x = make_mixer("channels", tiles=tiles)
    mixed = module(x)
    for b, n in itertools.product(range(2), range(4)):
        parts = [x[b, t, g, n] for t, g in itertools.product(range(2), range(1 + tiles**2))]
        assert torch.equal(mixed[b, n], torch.cat(parts))
    assert module.out_dim == mixed.shape[-1]


@pytest.mark.parametrize(("tiles", "rows"), [(2, 2), (3, 2), (2, 3)])
def test_tokens_are_the_coarse_patches_and_then_the_whole_fine_image_row_by_row(tiles, rows):
    module, x = make_mixer("tokens", tiles=tiles, rows=rows)
    mixed = module(x)
    assert mixed.shape == (2, (1 + tiles**2) * rows**2, 2 * DIM)
    assert module.out_dim == 2 * DIM
    for n in range(rows**2):
        assert torch.equal(mixed[0, n], torch.cat([x[0, 0, 0, n], x[0, 1, 0, n]]))
    side = tiles * rows
    for y, x_place in itertools.product(range(side), repeat=2):
        grain = 1 + y % tiles * tiles + x_place % tiles
        coarse = y // tiles * rows + x_place // tiles
        expected = torch.cat([x[0, 0, grain, coarse], x[0, 1, grain, coarse]])
        assert torch.equal(mixed[0, rows**2 + y * side + x_place], expected)


def test_append_pools_eight_neighbours_and_the_plan_counts_them():
    module, x = make_mixer("append", taps=(1, 2, 4), tiles=0, rows=5)
    mixed = module(x)
    plan = Plan((Shortcut((1, 2, 4), 0, "append"),))
    assert mixed.shape[1] == plan.image_tokens(25) == 25 + 2 * 4
    assert torch.equal(mixed[:, :25], x[:, 2, 0])
    for t, k in itertools.product(range(2), range(4)):  # the last pool holds one patch
        pool = x[:, t, 0, 8 * k : 8 * k + 8]
        torch.testing.assert_close(mixed[:, 25 + 4 * t + k], pool.mean(1))


def make_reference(module, dim: int) -> nn.MultiheadAttention:
    """PyTorch's attention with a mixer's weights."""
    reference = nn.MultiheadAttention(dim, module.num_heads, batch_first=True)
    reference.in_proj_weight.data = torch.cat([module.query.weight, module.key_value.weight])
    reference.in_proj_bias.data = torch.cat([module.query.bias, module.key_value.bias])
    reference.out_proj.load_state_dict(module.output.state_dict())
    return reference


@pytest.mark.parametrize("taps", [(2,), (0, 1, 2)])
def test_attend_is_one_post_norm_block_whose_queries_are_coarse_and_are_no_keys(taps):
    module, x = make_mixer("attend", taps=taps)
    reference = make_reference(module, DIM)
    last = len(taps) - 1
    for b in range(2):
        coarse = x[b, last, 0]
        places = itertools.product(range(len(taps)), range(5))
        keys = torch.cat([x[b, t, g] for t, g in places if (t, g) != (last, 0)])
        attended, _ = reference(coarse[None], keys[None], keys[None])
        middle = module.norm1(coarse + attended[0])
        expected = module.norm2(middle + module.down(F.gelu(module.up(middle))))
        torch.testing.assert_close(module(x)[b], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("dim", "heads"), [(6, 1), (64, 1), (100, 1), (128, 2), (1024, 16), (1152, 18), (1408, 22)]
)
def test_attention_heads_divide_the_width_and_have_about_64_channels(dim, heads):
    with torch.device("meta"):
        shortcut = Shortcut((1, 2), 0, "attend")
        assert build_mixer(shortcut, Plan((shortcut,)), dim, 2).num_heads == heads


def test_enrich_starts_as_pick_and_is_a_gated_residual():
    module, x = make_mixer("enrich", taps=(0, 1, 3), tiles=0, dim=64)
    coarse = x[:, -1, 0]
    assert torch.equal(module(x), coarse)
    module.gate_cross.data.fill_(0.5)
    query = F.layer_norm(coarse, (64,))
    keys = F.layer_norm(x[:, :2, 0].flatten(1, 2), (64,))
    attended, _ = make_reference(module, 64)(query, keys, keys)
    expected = coarse + 0.5 * attended
    torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1e-5)
    module.gate_self.data.fill_(0.5)
    assert not torch.allclose(module(x), expected, atol=1e-3)


@pytest.mark.parametrize("tiles", [0, 2])
def test_blend_is_a_convex_mean_of_the_taps_that_starts_even(tiles):
    module, x = make_mixer("blend", taps=(0, 1, 3), tiles=tiles)
    for scores in ([0.0, 0.0, 0.0], [0.3, -1.0, 2.0]):
        module.scores.data = torch.tensor(scores)
        weights = [math.exp(score) for score in scores]
        mixed = module(x)
        assert module.out_dim == mixed.shape[-1]
        for b, n in itertools.product(range(2), range(4)):
            parts = []
            for g in range(1 + tiles**2):
                total = sum(weights[t] * x[b, t, g, n] for t in range(3))
                parts.append(total / sum(weights))
            torch.testing.assert_close(mixed[b, n], torch.cat(parts))


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (4, 6), (3, 5), (1, 7)])
def test_pool_is_attention_in_windows_whose_query_is_their_mean(rows, columns):
    dim, heads = 128, 2
    module, _ = make_mixer("pool", taps=(2, 1), tiles=0, dim=dim)
    x = torch.randn(2, 2, 1, rows * columns, dim)
    mixed = module(x, rows)
    places = list(itertools.product(range(0, rows, 2), range(0, columns, 2)))
    assert mixed.shape == (2, len(places), dim) and module.out_dim == dim
    count = Plan((Shortcut((2, 1), 0, "pool"),)).image_tokens(rows * columns, rows)
    assert count == len(places)
    key, value = module.key_value.weight.chunk(2)
    key_bias, value_bias = module.key_value.bias.chunk(2)
    for b, (number, (top, left)) in itertools.product(range(2), enumerate(places)):
        window = []
        for y, column in itertools.product(range(top, top + 2), range(left, left + 2)):
            if y < rows and column < columns:
                window.append(torch.cat([x[b, t, 0, y * columns + column] for t in range(2)]))
        patches = torch.stack(window)
        q = module.query(patches.mean(0))
        k, v = patches @ key.T + key_bias, patches @ value.T + value_bias
        heads_out = []
        for h in range(heads):
            part = slice(h * dim // heads, (h + 1) * dim // heads)
            weights = (k[:, part] @ q[part] / (dim // heads) ** 0.5).softmax(0)
            heads_out.append(weights @ v[:, part])
        expected = module.output(torch.cat(heads_out))
        torch.testing.assert_close(mixed[b, number], expected, atol=1e-5, rtol=1e-4)


def test_a_tuple_of_taps_is_their_mean():
    module = fusion(Shortcut(((0, 1, 3), -2), 0, "channels"), tiles=0)
    x = features((0, 1, 3, 4), tiles=0)
    mean = (x[0] + x[1] + x[3]) / 3
    expected = module.paths[0].project(torch.cat([mean[:, 0], x[4][:, 0]], dim=-1))
    torch.testing.assert_close(module(x)[0], expected)


def test_a_mean_may_join_taps_of_one_view_and_of_all_views():
    module = fusion(Shortcut(((1, 3),), 0), Shortcut((3,), 2, "channels"))
    x = features((1, 3))
    coarse = {1: x[1][:, :1], 3: x[3]}
    assert torch.equal(fuse(module, coarse)[0], fuse(module, x)[0])
