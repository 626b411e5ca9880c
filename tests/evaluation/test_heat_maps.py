"""Heat maps: they equal plain computations, lie where the tokens look, and stay empty where a
shortcut adds nothing.
"""

import io

import numpy as np
import pytest
import torch
from helpers import native
from helpers.any_size import LIMITS
from helpers.bases import randomize_fusion
from helpers.tiny import tiny_llava, tiny_model
from PIL import Image

from sparsecut import upgrade
from sparsecut.any_size import list_grids
from sparsecut.data.examples import Example
from sparsecut.evaluation.heat_maps import KINDS, make_heat_maps, scaled
from sparsecut.evaluation.patch_places import locate_patches, watch_table
from sparsecut.evaluation.token_places import (
    choose_shape,
    group_tokens,
    locate_tokens,
    make_grid_boxes,
    spread_over_image,
)
from sparsecut.prompts import run_processor
from sparsecut.schema import UserError

PLAN = {"method": "sparsecut", "pattern": "sparse", "gate": "one"}
# Shortcuts that read the patches themselves, before any attention: a token depends on its own.
PATCHES = {
    "tiles": 2,
    "norm": False,
    "shortcuts": [
        {"taps": [0], "layer": 0},
        {"taps": [0], "layer": 1, "mix": "channels"},
        {"taps": [0], "layer": 2, "grain": 3},
    ],
}
TOKENS = {"tiles": 2, "norm": False, "shortcuts": [{"taps": [0], "layer": 0, "mix": "tokens"}]}
POOL = {"tiles": 0, "norm": False, "shortcuts": [{"taps": [0], "layer": 0, "mix": "pool"}]}
APPEND = {
    "tiles": 0,
    "norm": False,
    "shortcuts": [{"taps": [0, 0], "layer": 0, "mix": "append"}],
}


def write_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def make_example(*images: Image.Image, answer: str | None = "a cat") -> Example:
    question = "<image>\n" * len(images) + "what is it"
    messages = [{"role": "user", "content": question}]
    if answer:
        messages.append({"role": "assistant", "content": answer})
    return Example("one", [write_png(image) for image in images], messages)


def make_noise(width: int, height: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.fixture(scope="module")
def built():
    """(model, processor) of a built model whose shortcuts add much."""
    model, processor = tiny_model(PLAN)
    for path in model.fusion.paths:
        path.linear_2.weight.data *= 8
    return model, processor


def score_by_hand(model, processor, example, features) -> torch.Tensor:
    """The log-probability of the answer's words, from given features of every layer."""
    prompt = f"USER : {processor.image_token * len(example.images)} what is it ASSISTANT :"
    images = [example.load_images()]
    inputs = run_processor(processor, [f"{prompt} a cat"], images)
    by_layer = [list(layer) for layer in features]
    output = model.get_image_features(inputs.pop("pixel_values"))
    output.pooler_output, output.deepstack_features = by_layer[0], by_layer[1:]
    logits = model(**inputs, mm_encoder_outputs={"image": output}).logits.log_softmax(-1)
    targets = inputs["input_ids"][0, -2:]
    return logits[0, -3:-1].gather(-1, targets[:, None]).sum()


def test_gradient_times_input_and_occlusion_equal_plain_computations(built):
    model, processor = built
    example = make_example(make_noise(20, 16), make_noise(9, 30, 1))
    maps = make_heat_maps(model, processor, example)
    pixels = processor.pixels(example.load_images())
    fused = [layer.detach() for layer in model.fusion(model.encode(pixels))]  # [images, N, H] each
    leaves = [layer.clone().requires_grad_() for layer in fused]
    score = score_by_hand(model, processor, example, leaves)
    assert maps.log_probability == pytest.approx(score.item(), abs=1e-4)
    gradients = torch.autograd.grad(score, leaves)
    for number, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        expected = (leaf * gradient).sum(-1).detach().reshape(2, 2, 2)
        for image in range(2):
            values = maps.get(number, "gradient", image).values
            assert values == pytest.approx(expected[image].numpy(), abs=1e-5)
    cut = [layer.clone() for layer in fused]
    cut[1][1, 2] = 0  # the second image's third patch
    with torch.no_grad():
        fall = score - score_by_hand(model, processor, example, cut)
    assert maps.get(1, "occlusion", 1).values[1, 0] == pytest.approx(fall.item(), abs=1e-4)
    with torch.no_grad():
        cut[1].zero_()
        whole = score_by_hand(model, processor, example, cut)
    assert maps.without[1] == pytest.approx(whole.item(), abs=1e-4)


def test_size_is_relative_to_the_hidden_state_at_the_same_token(built):
    model, processor = built
    image = make_noise(20, 16)
    maps = make_heat_maps(model, processor, make_example(image), kinds=["size"])
    prompt = f"USER : {processor.image_token}\nwhat is it ASSISTANT : a cat </s>"
    inputs = run_processor(processor, [prompt], [[image]])
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        fused = model.fusion(model.encode(inputs["pixel_values"]))
    is_image = inputs["input_ids"] == model.config.image_token_id
    assert maps.get(0, "size") is None  # what enters the input is added to nothing
    for position, number in enumerate((1, 2), start=1):
        layer = model.plan.shortcuts[number].layer
        expected = fused[position][0].norm(dim=-1) / states[layer][is_image].norm(dim=-1)
        values = maps.get(number, "size").values
        assert values.flatten() == pytest.approx(expected.numpy(), rel=1e-4)


@pytest.mark.parametrize("gate", ["context", "one_vector"])
def test_gates_count(gate):
    model, processor = tiny_model({**PLAN, "gate": gate})
    example = make_example(make_noise(20, 16))
    before = make_heat_maps(model, processor, example, kinds=["size"])
    context = [module.bias for module in model.fusion.context.values()]
    for gates in context or [model.fusion.gates]:
        gates.data += 0.5
    after = make_heat_maps(model, processor, example, kinds=["size"])
    grown = after.get(1, "size").values / before.get(1, "size").values
    expected = 1.5 if gate == "one_vector" else 2 / (1 + np.exp(-0.5))
    assert grown == pytest.approx(expected, rel=1e-3)


def find_changed(model, processor, image, spot, number) -> tuple[np.ndarray, np.ndarray]:
    """How much a spot changes each token's features of a shortcut, and the tokens' boxes."""
    black = Image.new("RGB", image)
    white = black.copy()
    left, top, right, bottom = spot
    width, height = image
    box = (left * width, top * height, right * width, bottom * height)
    white.paste((255, 255, 255), tuple(round(edge) for edge in box))
    features = []
    for shown in (black, white):
        inputs = processor.prepare_images([shown])
        grids = inputs.get("image_grids")
        grids = None if grids is None else list_grids(grids)
        with torch.no_grad():
            states = model.encode(inputs["pixel_values"], grids)
            fused = model.fusion(states, grids=grids)
        features.append(fused[number][0])
    (boxes,) = locate_tokens(model, processor, [black], number)
    return (features[1] - features[0]).norm(dim=-1).numpy(), boxes


@pytest.mark.parametrize(
    "plan", [PATCHES, TOKENS, APPEND, POOL], ids=["patches", "tokens", "append", "pool"]
)
@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((64, 64), {}),
        ((400, 48), {}),
        ((48, 400), LIMITS),
        ((330, 90), LIMITS),
        ((128, 64), {"coarse": "crop"}),
    ],
    ids=["square", "flat", "native-tall", "native-flat", "crop"],
)
def test_tokens_stand_where_a_change_of_the_image_reaches_them(plan, size, settings):
    model, processor = tiny_model(plan, **settings)
    for number in range(len(model.plan.shortcuts)):
        for x, y in ((0.4, 0.1), (0.63, 0.72)):
            spot = (x, y, x + 0.04, y + 0.04)
            changes, boxes = find_changed(model, processor, size, spot, number)
            assert len(changes) == len(boxes)
            left, top, right, bottom = np.moveaxis(boxes, -1, 0)
            meets = (left < spot[2]) & (right > spot[0]) & (top < spot[3]) & (bottom > spot[1])
            reached = changes > 0.02 * max(changes.max(), 1e-3)
            # Resizing reaches a little beyond a spot.
            near = (left < spot[2] + 0.04) & (right > spot[0] - 0.04)
            near &= (top < spot[3] + 0.04) & (bottom > spot[1] - 0.04)
            assert (reached <= near.any(-1)).all()
            if meets.any():
                assert meets.any(-1)[changes.argmax()]


def trace_patches(model, processor, images) -> tuple[list, list]:
    """What shortcut 1 of an upgraded model adds, [tokens, H], and its tokens' boxes, by image."""
    text = f"{processor.image_token}\n" * len(images) + "what is it"
    if processor.image_token == "<image_soft_token>":
        text = text.replace(processor.image_token, processor.boi_token)
    inputs = run_processor(processor, [text], [images])
    parts = {}
    with torch.no_grad(), watch_table(model) as table, scaled(model.fusion, {}, parts):
        model(**inputs)
    patches = locate_patches(model, processor, images, table, text)
    boxes = locate_tokens(model, processor, images, 1, patches)
    return list(parts[1].split([len(own) for own in boxes])), boxes


@pytest.mark.parametrize("name", ["llava", "llava_next", "gemma3", "idefics3"])
def test_tokens_of_an_upgraded_model_stand_where_they_look(name):
    base_processor = native.PROCESSORS[name]()
    base = native.build_base(name, base_processor)
    plan = {"norm": False, "shortcuts": [{"taps": [], "layer": 0, "mix": "base"}]}
    plan["shortcuts"].append({"taps": [0], "layer": 1, "mix": "channels"})
    model, processor = upgrade(base, plan, processor=base_processor)
    randomize_fusion(model)
    sizes = [(64, 40), (30, 33)]
    for changed, (x, y) in ((0, (0.36, 0.6)), (1, (0.7, 0.27))):
        traces = []
        for level in (0, 255):
            images = [Image.new("RGB", size) for size in sizes]
            width, height = sizes[changed]
            place = (round(x * width), round(y * height))
            images[changed].paste((level,) * 3, (*place, place[0] + 2, place[1] + 2))
            traces.append(trace_patches(model, processor, images))
        (black, boxes), (white, _) = traces
        assert not (white[1 - changed] != black[1 - changed]).any()
        changes = (white[changed] - black[changed]).norm(dim=-1).numpy()
        left, top, right, bottom = np.moveaxis(boxes[changed], -1, 0)
        middle = (place[0] + 1) / width, (place[1] + 1) / height
        shows = (left <= middle[0]) & (middle[0] <= right)
        shows &= (top <= middle[1]) & (middle[1] <= bottom)
        assert shows.any(-1)[changes.argmax()]
        assert shows.any(-1).sum() <= 4  # in the whole view, and in a tile or at its edge


def test_an_untrained_upgrade_has_empty_maps_and_a_trained_one_has_none():
    base, base_processor = tiny_llava()
    model, processor = upgrade(base, processor=base_processor)
    example = make_example(make_noise(40, 16))
    maps = make_heat_maps(model, processor, example)
    assert len(maps.maps) == 3 * len(model.fusion.gated)
    assert all(one.is_empty and one.find_peak() is None for one in maps.maps)
    assert set(maps.without.values()) == {maps.log_probability}
    randomize_fusion(model)
    maps = make_heat_maps(model, processor, example)
    assert not any(one.is_empty for one in maps.maps)


def test_the_model_is_left_as_it_was(built):
    model, processor = built
    base, base_processor = tiny_llava()
    upgraded, processor_2 = upgrade(base, processor=base_processor)
    for one, its_processor in ((model, processor), (upgraded, processor_2)):
        one.train()
        one.fusion.eval()
        frozen = next(one.parameters())
        frozen.requires_grad_(False)
        before = [(p.requires_grad, p.grad) for p in one.parameters()]
        hooks = len(one.fusion._forward_hooks)
        family = getattr(one, "family", None)
        with torch.inference_mode():  # as a server has it
            make_heat_maps(one, its_processor, make_example(make_noise(20, 16)))
        assert one.training
        assert not one.fusion.training
        assert [(p.requires_grad, p.grad) for p in one.parameters()] == before
        assert len(one.fusion._forward_hooks) == hooks
        assert getattr(one, "family", None) is family
        one.eval().requires_grad_(True)


def test_without_an_answer_the_models_own_is_explained(built):
    model, processor = built
    example = make_example(make_noise(20, 16, 3), answer=None)
    maps = make_heat_maps(model, processor, example, kinds=["gradient"], max_new_tokens=3)
    given = make_example(make_noise(20, 16, 3), answer=maps.answer)
    again = make_heat_maps(model, processor, given, kinds=["gradient"])
    assert again.log_probability == maps.log_probability


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"kinds": ["gradiant"]}, "gradient"), ({"shortcuts": [7]}, "7")],
)
def test_what_cannot_be_mapped_is_refused(built, settings, named):
    with pytest.raises(UserError, match=named):
        make_heat_maps(*built, make_example(make_noise(20, 16)), **settings)
    with pytest.raises(UserError, match="image"):
        make_heat_maps(*built, make_example(), kinds=KINDS)


def test_cells_get_the_mean_of_the_tokens_that_show_them():
    coarse, fine = make_grid_boxes((1, 2)), make_grid_boxes((2, 4))
    boxes = np.concatenate([coarse, fine])[:, None]
    assert choose_shape(boxes) == (2, 4)
    drawn = spread_over_image(np.arange(10.0), boxes, (2, 4))
    assert drawn.tolist() == [[1.0, 1.5, 2.5, 3.0], [3.0, 3.5, 4.5, 5.0]]
    groups = group_tokens(boxes, (1, 2))
    assert groups.tolist() == [0, 1, 0, 0, 1, 1, 0, 0, 1, 1]
    nowhere = np.full((1, 1, 4), np.nan)
    assert group_tokens(np.concatenate([boxes, nowhere]), (1, 2))[-1] == -1
    assert np.isnan(spread_over_image(np.ones(1), nowhere, (1, 1))).all()
