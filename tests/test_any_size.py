"""Images of any size in built models: `coarse="native"`."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.any_size import FINE, build_tiny, draw_image, make_naflex
from helpers.tiny import tiny_vision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    PixtralVisionConfig,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from sparsecut.any_size import read_patches
from sparsecut.cutting import choose_grid, cut_patches
from sparsecut.encoders import encoder_inputs, make_encoder, read_grid
from sparsecut.hooks import RECOMPUTES_HOOKS, connect_encoder, read_taps
from sparsecut.schema import UserError

SIZES = [(10, 40), (16, 16), (1, 500), (40, 30), (16, 16)]  # height and width in pixels


chunks_cut_images = pytest.mark.skipif(
    RECOMPUTES_HOOKS, reason="before 5.23 transformers gives every chunk all images"
)


def make_native(config):
    if not hasattr(config, "num_hidden_layers"):
        pytest.skip("this release of transformers does not say how many blocks the encoder has")
    torch.manual_seed(1)
    return make_encoder(config).eval()


def make_qwen2():
    sizes = {"depth": 3, "embed_dim": 16, "num_heads": 2, "hidden_size": 24, "mlp_ratio": 2}
    config = Qwen2VLVisionConfig(patch_size=4, spatial_merge_size=2, **sizes)
    return make_native(config)


def make_qwen2_5():
    sizes = {"depth": 3, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
    settings = {"window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 24}
    config = Qwen2_5_VLVisionConfig(patch_size=4, spatial_merge_size=2, **sizes, **settings)
    return make_native(config)


def make_qwen3():
    """Learned positions of a grid of 4 x 4, interpolated for every image."""
    sizes = {"depth": 3, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
    settings = {"num_position_embeddings": 16, "deepstack_visual_indexes": [1]}
    config = Qwen3VLVisionConfig(
        patch_size=4, spatial_merge_size=2, out_hidden_size=24, **sizes, **settings
    )
    return make_native(config)


def make_pixtral():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    return make_native(
        PixtralVisionConfig(num_hidden_layers=3, image_size=64, patch_size=8, head_dim=8, **sizes)
    )


NATIVE = {
    "qwen2": make_qwen2,
    "qwen2_5": make_qwen2_5,
    "qwen3": make_qwen3,
    "pixtral": make_pixtral,
    "naflex": make_naflex,
}


@pytest.fixture(scope="module")
def tiled():
    """A CLIP encoder of 2 x 2 patches; images have 4 to 30 of them."""
    return build_tiny(coarse="native", min_pixels=256, max_pixels=1920)


# --- sizes


@settings(deadline=None, max_examples=300)
@given(
    st.tuples(st.integers(1, 6000), st.integers(1, 6000)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(1, 500),
    st.integers(4, 9),
)
@example((1, 5000), (14, 14), 16, 4)
@example((5000, 1), (14, 14), 16, 4)
@example((1, 1), (14, 14), 16, 4)
@example((400, 100), (16, 16), 1, 4)
def test_the_aspect_ratio_is_kept_within_a_patch_and_the_limits_hold(size, unit, fewest, times):
    one = unit[0] * unit[1]
    low, high = fewest * one, fewest * times * one
    rows, columns = choose_grid(size, unit, low, high)
    assert low <= rows * columns * one <= high
    # As one side of the true shape: some scale of the image is less than a unit away from both.
    height, width = size[0] / unit[0], size[1] / unit[1]
    least = max((rows - 1) / height, (columns - 1) / width)
    most = min((rows + 1) / height, (columns + 1) / width)
    assert least < most


def test_an_image_within_the_limits_keeps_its_size():
    assert choose_grid((100, 400), (10, 10), 100, 100_000) == (10, 40)


@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 40))
@settings(deadline=None, max_examples=100)
def test_close_limits_never_allow_more_than_the_most(height, width, most):
    rows, columns = choose_grid((height, width), (10, 10), most * 100, most * 100)
    assert 1 <= rows * columns <= most


@pytest.mark.parametrize("limits", [(0, 1000), (True, 1000), (1, 63), (640, 600), (1, 1e6)])
def test_limits_that_hold_no_patch_are_refused(limits):
    with pytest.raises(UserError, match=r"min_pixels|max_pixels"):
        build_tiny(coarse="native", min_pixels=limits[0], max_pixels=limits[1])


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels"])
def test_limits_without_effect_are_refused(name):
    with pytest.raises(UserError, match=name):
        build_tiny(**{name: 400})


def test_gates_that_pool_whole_images_are_refused():
    with pytest.raises(UserError, match="gate='context'"):
        build_tiny(plan={"method": "sparsecut", "gate": "context"}, coarse="native")


# --- patches


@pytest.mark.parametrize("tiles", [2, 3])
def test_fine_patches_show_what_their_coarse_patch_shows(tiles):
    """A mark in one coarse patch of a non-square image changes that patch and those under it."""
    grid, patch = (3, 5), (8, 8)
    for row, column in [(0, 0), (1, 3), (2, 4)]:
        plain = Image.new("RGB", (5 * 48, 3 * 48))
        marked = plain.copy()
        # Inside of the patch, so that the filter's blur does not reach its neighbours.
        marked.paste("white", (column * 48 + 18, row * 48 + 18, column * 48 + 30, row * 48 + 30))
        before = cut_patches(plain, tiles, grid, patch)
        after = cut_patches(marked, tiles, grid, patch)
        changed = (before != after).any((1, 2, 3, 4)).nonzero()[0].tolist()
        assert changed == [row * 5 + column]
        # The fine patches form the coarse one, twice or three times as large.
        fine = after[changed[0], 1:].reshape(tiles, tiles, 8, 8, 3).swapaxes(1, 2)
        fine = Image.fromarray(fine.reshape(8 * tiles, 8 * tiles, 3))
        small = np.asarray(fine.resize((8, 8), Image.Resampling.BOX), dtype=int)
        assert abs(small - after[changed[0], 0]).mean() < 8


@pytest.mark.parametrize("name", [*NATIVE, "clip"])
def test_the_gradient_of_a_patch_reaches_its_own_pixels_first(name):
    """States of coarse and fine patches depend on the pixels that lie at their place.

    At tap 0 a patch depends on its own pixels alone.
    """
    encoder = tiny_vision() if name == "clip" else NATIVE[name]()
    view_size = None if name == "clip" else 16
    grid = read_grid(encoder.config, view_size)
    connect_encoder(encoder, 3 if "qwen" in name else encoder.config.num_hidden_layers)
    patch = grid.view[-1] // grid.columns
    grids = [(2, 6), (4, 2)]
    pixels = torch.randn(20, 5, 3, patch, patch, requires_grad=True)
    states = read_patches(encoder, grid, grids, pixels, [0])[0]
    assert states.shape[:2] == (20, 5)
    for row, view in [(0, 0), (7, 0), (9, 3), (17, 4)]:
        (gradient,) = torch.autograd.grad(states[row, view, 0], pixels, retain_graph=True)
        assert gradient.flatten(2).any(-1).nonzero().tolist() == [[row, view]]


@pytest.mark.parametrize("name", NATIVE)
def test_native_encoders_read_the_image_as_they_do_themselves(name):
    """The states are those of the encoder's own forward on an image of that size."""
    encoder = NATIVE[name]()
    grid = read_grid(encoder.config, 16)
    connect_encoder(encoder, 3)
    patch = grid.patch[0]
    rows, columns = 4, 6
    image = torch.randn(3, rows * patch, columns * patch)
    whole = dataclasses.replace(grid, rows=rows, columns=columns, view=tuple(image.shape))
    inputs = encoder_inputs(whole, image[None])
    blocks = []
    encoder_blocks = next(m for m in encoder.modules() if isinstance(m, torch.nn.ModuleList))
    handle = encoder_blocks[2].register_forward_hook(lambda m, a, out: blocks.append(out))
    encoder(**inputs)
    handle.remove()
    own = blocks[0][0] if isinstance(blocks[0], tuple) else blocks[0]
    expected = read_taps(encoder, image[None], whole, [3])[3][0]
    pieces = image.reshape(3, rows, patch, columns, patch).permute(1, 3, 0, 2, 4).flatten(0, 1)
    # Beside an image of another size.
    others = torch.randn(4, 3, patch, patch)
    both = torch.cat([others, pieces])[:, None]
    states = read_patches(encoder, grid, [(2, 2), (rows, columns)], both, [3])[3]
    assert torch.equal(states[4:, 0], expected)
    assert torch.allclose(own.reshape(-1, own.shape[-1]).sum(0), expected.sum(0), atol=1e-4)


def test_a_pixtral_wider_than_its_positions_is_read_in_several_views():
    encoder = make_pixtral()
    grid = read_grid(encoder.config)
    connect_encoder(encoder, 3)
    pixels = torch.randn(1 * 20, 1, 3, 8, 8)
    states = read_patches(encoder, grid, [(1, 20)], pixels, [3])[3]
    assert states.shape == (20, 1, 16)
    # Three views of seven columns; the first is as if it were alone.
    alone = read_patches(encoder, grid, [(1, 7)], pixels[:7], [3])[3]
    assert torch.allclose(states[:7], alone, atol=1e-6)


# --- models


@pytest.mark.parametrize("plan", [FINE, "hires_tokens", "llava", "dense_connector_sti"])
def test_a_square_image_of_the_views_size_is_as_if_it_were_squashed(plan):
    model, processor = build_tiny(plan=plan)
    other, native = build_tiny(plan=plan, coarse="native")
    images = [draw_image(16, 16, seed) for seed in range(3)]
    prompts = ["<image> what is it", "<image> <image> are you sure"]
    images = [images[:1], images[1:]]
    squashed = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    inputs = native(images=images, text=prompts, return_tensors="pt", padding=True)
    assert torch.equal(inputs["input_ids"], squashed["input_ids"])
    assert torch.equal(other(**inputs).logits, model(**squashed).logits)


@pytest.mark.parametrize("name", ["clip", *NATIVE])
@pytest.mark.parametrize("plan", [FINE, "hires_tokens"])
def test_images_of_several_sizes_in_a_batch_are_as_alone(name, plan):
    vision = None if name == "clip" else NATIVE[name]()
    model, processor = build_tiny(vision, plan, coarse="native", min_pixels=256, max_pixels=1920)
    images = [draw_image(*size, seed) for seed, size in enumerate(SIZES)]
    images = [images[:3], images[3:], []]
    texts = ["<image> <image> what <image> is", "<image> <image> it", "are you"]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    together = model(**inputs).logits
    assert len(set(map(tuple, inputs["image_grids"].tolist()))) >= 3
    for row, (row_images, text) in enumerate(zip(images, texts, strict=True)):
        alone = model(**processor(images=row_images or None, text=text, return_tensors="pt"))
        length = alone.logits.shape[1]
        assert torch.allclose(together[row, -length:], alone.logits[0], atol=1e-4)


def test_tokens_follow_row_by_row(tiled):
    """A mark moves through the image tokens as it moves through the image."""
    model, processor = tiled
    rows, columns = processor.choose_grid(16, 64)
    assert (rows, columns) == (2, 8)
    plain = processor.prepare_images([Image.new("RGB", (64, 16))])
    for row in range(rows):
        for column in range(columns):
            image = Image.new("RGB", (64, 16))
            image.paste("white", (column * 8, row * 8, column * 8 + 8, row * 8 + 8))
            inputs = processor.prepare_images([image])
            changed = (inputs["pixel_values"][:, 0] != plain["pixel_values"][:, 0]).flatten(1)
            assert changed.sum(1).argmax() == row * columns + column
    features = model.get_image_features(**plain)
    assert [len(x) for x in features.pooler_output] == [16]


def test_the_processor_counts_as_it_writes(tiled):
    _, processor = tiled
    sizes = [(1, 5000), (5000, 1), (1, 1), (100, 400), (16, 16)]
    counted = processor._get_num_multimodal_tokens(sizes)
    for number, (height, width) in enumerate(sizes):
        image = Image.new("RGB", (width, height))
        inputs = processor(images=[image], text="<image> what", return_tensors="pt")
        num_tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
        assert counted.num_image_tokens[number] == num_tokens <= processor.num_image_tokens
        assert counted.num_image_patches[number] == len(inputs["pixel_values"])
        assert int(inputs["image_grids"].prod()) == num_tokens


def test_gradients_reach_every_shortcut():
    model, processor = build_tiny(coarse="native")
    images = [draw_image(*size) for size in SIZES[:2]]
    inputs = processor(images=images, text="<image> what <image> is", return_tensors="pt")
    model.zero_grad()
    for path in model.fusion.paths:  # those above the input start at zero
        torch.nn.init.normal_(path.linear_2.weight)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.fusion.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_return_sequences": 2, "num_beams": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        pytest.param({"prefill_chunk_size": 5}, marks=chunks_cut_images),
    ],
    ids=lambda value: "-".join(value) or "greedy",
)
def test_generation_is_as_without_a_cache(tiled, settings):
    model, processor = tiled
    images = [[draw_image(10, 40), draw_image(40, 30)], [draw_image(1, 500)]]
    texts = ["<image> <image> what is", "<image> it"]
    if "prompt_lookup_num_tokens" in settings:  # it takes one prompt
        images, texts = images[:1], texts[:1]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    limits = {"max_new_tokens": 5, "do_sample": False}
    answers = model.generate(**inputs, **limits, **settings)
    plain = {k: v for k, v in settings.items() if k in ("num_beams", "num_return_sequences")}
    expected = model.generate(**inputs, **limits, **plain, use_cache=False)
    assert torch.equal(answers, expected)


def test_vision_states_stand_for_pixels(tiled):
    model, processor = tiled
    images = [draw_image(*size) for size in SIZES[:2]]
    inputs = processor(images=images, text="<image> what <image> is", return_tensors="pt")
    expected = model(**inputs).logits
    pixels = inputs.pop("pixel_values")
    states = model.encode(pixels, inputs["image_grids"])
    assert torch.equal(model(**inputs, vision_states=states).logits, expected)


def test_patches_of_another_processor_are_refused(tiled):
    model, processor = tiled
    inputs = processor.prepare_images([draw_image(10, 40)])
    with pytest.raises(UserError, match="image_grids"):
        model.get_image_features(inputs["pixel_values"], image_grids=torch.tensor([[1, 2]]))
    with pytest.raises(UserError, match="pixel_values"):
        model.get_image_features(inputs["pixel_values"])


def test_a_saved_processor_keeps_its_limits(tiled, tmp_path):
    model, processor = tiled
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    from sparsecut import load

    _, again = load(tmp_path)
    for name in ("coarse", "min_pixels", "max_pixels", "patch_size", "num_image_tokens"):
        assert getattr(again, name) == getattr(processor, name)
    image = draw_image(10, 40)
    inputs = again.prepare_images([image])
    for name, value in processor.prepare_images([image]).items():
        assert torch.equal(inputs[name], value)
