"""Where features are read and where they arrive: against a decoder run by hand, whatever stands
around an image.
"""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from helpers import checks
from helpers.checks import IMAGE, batch, expanded
from helpers.families import family_language
from helpers.fusions import fuse
from torch import nn

from sparsecut.hooks import connect_decoder, connect_encoder, find_layers, read_taps
from sparsecut.schema import UserError

TEXT = [[20, 21], [22, 23, 24, 25, 26, 27, 28, 29, 30, 31]]
WITH_IMAGES = {
    "start": [IMAGE, 5, 6],
    "middle": [5, 6, IMAGE, 7],
    "end": [5, 6, 7, IMAGE],
    "two in a row": [5, IMAGE, IMAGE, 6],
    "three apart": [IMAGE, 5, 6, IMAGE, 7, IMAGE, 8],
}


@pytest.fixture(scope="module")
def model():
    return checks.join()


def single(model, row, pixels):
    """Logits of one prompt, alone and without padding."""
    ids = torch.tensor([expanded(model, row)])
    return model(input_ids=ids, pixel_values=pixels if len(pixels) else None).logits[0]


def assert_close(values, expected, tolerance=1e-4):
    torch.testing.assert_close(values, expected, atol=tolerance, rtol=1e-4)


@cache
def join_method(method):
    """A model of a method, shared by all tests of it."""
    return checks.join(plan=method)


def read_states(model, pixels) -> dict:
    """The encoder's own hidden states without the class token: tap -> [images, views, N, D]."""
    states = {tap: [] for tap in range(model.config.vision_depth + 1)}
    for views in pixels:
        hidden = model.vision_tower(views, output_hidden_states=True).hidden_states
        for tap, per_tap in states.items():
            per_tap.append(hidden[tap][:, 1:])
    return {tap: torch.stack(per_tap) for tap, per_tap in states.items()}


def by_hand(model, row, pixels):
    """The method in plain steps: encode each view, fuse, and run the decoder layer by layer."""
    states = read_states(model, pixels)
    taps = model.plan.resolved_taps(model.config.vision_depth)
    features = fuse(model.fusion, {tap: states[tap] for tap in taps})
    ids = torch.tensor([expanded(model, row)])
    is_image = ids[0] == IMAGE
    decoder = model.language_model.model
    hidden = decoder.embed_tokens(ids).clone()
    hidden[0, is_image] = 0
    rope = decoder.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for number, layer in enumerate(decoder.layers):
        if number in features:
            hidden[0, is_image] += features[number].flatten(0, 1)
        hidden = layer(hidden, position_embeddings=rope)
    return model.language_model.lm_head(decoder.norm(hidden))[0]


@torch.no_grad()
@pytest.mark.parametrize(
    "method", ["llava", "hires_tokens", "hires_channels", "sparsecut", "sparsecut_input"]
)
@pytest.mark.parametrize("row", WITH_IMAGES.values(), ids=WITH_IMAGES)
def test_features_reach_exactly_the_image_positions_of_the_planned_layers(method, row):
    model = join_method(method)
    pixels = batch(model, [row])["pixel_values"]
    assert_close(single(model, row, pixels), by_hand(model, row, pixels), 1e-5)


@torch.no_grad()
def test_two_shortcuts_into_one_layer_and_none_into_others(row=(5, IMAGE, 6)):
    shortcuts = [
        {"taps": [2], "layer": 0},
        {"taps": [1], "layer": 2},
        {"taps": [0, 3], "layer": 2, "mix": "channels"},
    ]
    model = checks.join(plan={"shortcuts": shortcuts, "tiles": 2})
    pixels = batch(model, [row])["pixel_values"]
    assert_close(single(model, row, pixels), by_hand(model, row, pixels), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_row_depends_on_its_neighbours_or_padding(model, side):
    rows = [TEXT[0], *WITH_IMAGES.values(), TEXT[1], WITH_IMAGES["middle"], TEXT[0]]
    inputs = batch(model, rows, side)
    logits = model(**inputs).logits
    is_text = inputs["attention_mask"].bool()
    start = 0
    for i, row in enumerate(rows):
        end = start + row.count(IMAGE)
        alone = single(model, row, inputs["pixel_values"][start:end])
        assert_close(logits[i][is_text[i]], alone)
        start = end
    assert start == len(inputs["pixel_values"])


@torch.no_grad()
def test_text_only_rows_are_the_language_model_untouched(model):
    ids = torch.tensor([TEXT[1]])
    assert torch.equal(model(input_ids=ids).logits, model.language_model(input_ids=ids).logits)
    together = batch(model, [TEXT[1], WITH_IMAGES["end"]])
    alone = model.language_model(input_ids=ids).logits[0]
    assert_close(model(**together).logits[0, -len(TEXT[1]) :], alone)


@torch.no_grad()
def test_only_tapped_states_are_kept_and_prefix_tokens_removed(model):
    pixels = torch.randn(2, 3, 16, 16)
    found = read_taps(model.vision_tower, pixels, 4, [0, 2])
    states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert sorted(found) == [0, 2] and states[0].shape[1] == 5
    assert all(torch.equal(found[t], states[t][:, 1:]) for t in found)


@torch.no_grad()
def test_reading_ends_at_the_deepest_tap_and_leaves_the_encoder_as_it_was(model):
    checks.stops(model)


@torch.no_grad()
def test_models_with_other_plans_share_one_encoder_and_one_decoder(model):
    inputs = batch(model)
    before = model(**inputs).logits
    shallow = {"shortcuts": [{"taps": [1], "layer": 0}, {"taps": [1], "layer": 3}], "tiles": 2}
    other = checks.join(model.vision_tower, model.language_model, shallow)
    assert not torch.allclose(other(**inputs).logits, before, atol=1e-2)
    assert torch.equal(model(**inputs).logits, before)
    layer, block = model.language_model.model.layers[1], model.vision_tower.encoder.layers[0]
    counts = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in (layer, block)]
    checks.join(model.vision_tower, model.language_model)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in (layer, block)] == counts
    assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_eight_threads_answer_as_one_does(model):
    rows = [[5 + i] * i + [IMAGE, 6 + i] for i in range(7)] + [TEXT[1]]
    inputs = [batch(model, [row]) for row in rows]
    for i, given in enumerate(inputs):
        given["pixel_values"] = given["pixel_values"] + i
    inputs[-1].pop("pixel_values")
    expected = [model(**given).logits for given in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            answers = list(pool.map(lambda given: model(**given).logits, inputs))
            assert all(torch.equal(a, e) for a, e in zip(answers, expected, strict=True))


@torch.no_grad()
def test_copies_compute_the_same_and_stand_on_their_own():
    model = (
        checks.join()
    )  # one that never gave hidden states: transformers' own hooks for those cannot be pickled
    inputs = batch(model)
    before, buffer = model(**inputs).logits, io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin(**inputs).logits, before)
        for p in [*twin.vision_tower.parameters(), *twin.language_model.parameters()]:
            p.zero_()
        assert twin(**inputs).logits.abs().sum() == 0
        assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_a_forward_that_fails_inside_leaves_nothing_behind():
    model, text = checks.join(), torch.tensor([TEXT[1]])
    before, tower = model(input_ids=text).logits, torch.randn(1, 3, 16, 16)
    states = model.vision_tower(tower).last_hidden_state

    def fail(*_):
        raise KeyboardInterrupt

    for module in (model.language_model.model.layers[2], model.vision_tower.encoder.layers[1]):
        handle = module.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(**batch(model))
        handle.remove()
        assert torch.equal(model(input_ids=text).logits, before)
        assert torch.equal(model.vision_tower(tower).last_hidden_state, states)


def test_a_replaced_decoder_layer_is_an_error_until_connected_again():
    model = checks.join()
    layers, inputs = model.language_model.model.layers, batch(model)
    expected = model(**inputs).logits
    fresh = type(layers[3])(model.config.text_config, 3)
    fresh.load_state_dict(layers[3].state_dict())
    layers[3] = fresh
    with pytest.raises(
        RuntimeError,
        match=r"\[1, 3\] should .* \[1\] fired",
    ):
        model(**inputs)
    assert model(input_ids=torch.tensor([TEXT[1]])).logits.isfinite().all()
    connect_decoder(model.language_model, 4)
    assert torch.equal(model(**inputs).logits, expected)


def test_a_layer_that_runs_twice_is_an_error():
    model = checks.join()
    layers = model.language_model.model.layers
    layers[2] = layers[1]
    with pytest.raises(RuntimeError, match=r"layers \[1, 1, 3\] fired"):
        model(**batch(model), use_cache=False)


def test_replaced_encoder_blocks_are_an_error_until_connected_again():
    model = checks.join()
    blocks = model.vision_tower.encoder.layers
    expected = model(**batch(model)).logits
    for i, block in enumerate(blocks):
        fresh = type(block)(model.config.vision_config)
        fresh.load_state_dict(block.state_dict())
        blocks[i] = fresh
    with pytest.raises(
        RuntimeError,
        match=r"taps \[1, 3\] .*CLIPVisionModel",
    ):
        model(**batch(model))
    connect_encoder(model.vision_tower, 4)
    assert torch.equal(model.eval()(**batch(model)).logits, expected)


def test_blocks_that_are_no_list_are_refused():
    with pytest.raises(UserError, match=r"language model Linear .* 3 layers"):
        find_layers(nn.Linear(2, 2), 3, "the language model")


def test_states_that_are_not_one_row_of_patches_are_refused(model):
    with pytest.raises(
        UserError,
        match=r"\(1, 5, 16\) for 1 views, but .*9 or more tokens",
    ):
        read_taps(model.vision_tower, torch.randn(1, 3, 16, 16), 9, [1])


LABELS = torch.zeros(2, 11, dtype=torch.long)
TEXT_ONLY = {"input_ids": torch.tensor([TEXT[1]]), "attention_mask": None}
CUT_OFF = {"input_ids": torch.tensor([[5, *[IMAGE] * 7]]), "attention_mask": None}
TWO_SOURCES = {"mm_encoder_outputs": {"image": object()}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pixel_values": None, "labels": LABELS}, r"8 image tokens.* 0 features"),
        (TEXT_ONLY, r"0 image tokens.* 8 features"),
        (CUT_OFF, r"7 image tokens.* 8 features.*length limit"),
        ({"pixel_values": torch.zeros(2, 4, 3, 16, 16)}, r"\(2, 4, 3, 16, 16\), .*\(images, 5, 3"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, r"\(2, 3, 16, 16\), .*\(images, 5, 3"),
        ({"pixel_values": torch.zeros(2, 5, 3, 32, 32)}, r"\(images, 5, 3, 16, 16\), coarse"),
        ({"inputs_embeds": torch.zeros(2, 11, 32)}, "input_ids or inputs_embeds"),
        ({"input_ids": None}, "input_ids or inputs_embeds"),
        (TWO_SOURCES, "pixel_values, vision_states and mm_encoder_outputs"),
    ],
)
def test_images_that_do_not_match_the_prompt_are_refused_in_a_sentence(model, change, sentence):
    with pytest.raises(UserError, match=sentence):
        model(**batch(model) | change)


@torch.no_grad()
def test_a_bare_pass_without_images_warns_and_reads_placeholders_as_text(model):
    ids = batch(model)["input_ids"]
    with pytest.warns(UserWarning, match=r"8 image tokens.* 0 features"):
        logits = model(input_ids=ids).logits
    assert torch.equal(logits, model.language_model(input_ids=ids).logits)
    with pytest.raises(UserError, match="8 image tokens"):
        model.generate(input_ids=ids, max_new_tokens=1)


def test_features_of_another_model_are_refused_in_a_sentence(model):
    inputs = batch(model)
    for language, plan in (
        (family_language("llama", hidden_size=16), "sparsecut"),
        ("llama", "llava"),
    ):
        other = checks.join(language=language, plan=plan)
        images = other.get_image_features(batch(other)["pixel_values"])
        with pytest.raises(
            UserError,
            match=(r"width \d+ and \d layers .* width 32 and 2 layers"),
        ):
            model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": images})


@torch.no_grad()
def test_a_batch_of_no_images_is_a_batch_of_texts(model):
    ids, none = torch.tensor([TEXT[1]]), torch.empty(0, 5, 3, 16, 16)
    assert torch.equal(model(input_ids=ids, pixel_values=none).logits, model(input_ids=ids).logits)
    for beams in (1, 2):
        settings = {"max_new_tokens": 3, "do_sample": False, "num_beams": beams}
        expected = model.generate(input_ids=ids, **settings)
        assert torch.equal(model.generate(input_ids=ids, pixel_values=none, **settings), expected)
    with pytest.raises(UserError, match=r"8 image tokens.* 0 features"):
        model(**batch(model) | {"pixel_values": none})


def test_a_plan_of_one_view_takes_plain_pixels():
    model = checks.join(plan="llava")
    inputs = batch(model)
    plain = inputs | {"pixel_values": inputs["pixel_values"].squeeze(1)}
    assert torch.equal(model(**plain).logits, model(**inputs).logits)


def test_a_text_only_training_batch_gives_fusion_zero_gradients():
    model = checks.join().train()
    ids = torch.tensor([TEXT[1]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.fusion.parameters())
