"""One contract for encoders: any grid, packed images, windows and audio come out as patches row
by row, or an error explains why not.
"""

import numpy as np
import pytest
import torch
from helpers import checks
from helpers.example_bases import load_example
from helpers.families import DEFAULT_KINDS, family_vision, language_config, vision_config
from helpers.tiny import tiny_language, tiny_tokenizer
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil

from sparsecut import SparseCutConfig
from sparsecut.building import build, load, save
from sparsecut.encoders import encoder_inputs, get_patch_order, read_grid, to_raster_order
from sparsecut.hooks import read_taps
from sparsecut.mixers import arrange_grains
from sparsecut.processing import cut_views
from sparsecut.schema import UserError


@pytest.fixture(scope="module", params=DEFAULT_KINDS)
def encoder(request):
    return checks.join(vision=request.param)


@pytest.mark.parametrize(
    "check", [checks.taps, checks.stops, checks.gradients, checks.cached, checks.padded]
)
def test_every_kind_of_encoder(encoder, check):
    check(encoder)


def oblong():
    """An encoder of views of 16 x 24 pixels in patches of 8 x 4: 2 rows and 6 columns."""
    return family_vision("vit", image_size=[16, 24], patch_size=[8, 4])


@pytest.mark.parametrize("check", [checks.taps, checks.gradients, checks.cached, checks.padded])
def test_views_and_patches_need_not_be_square(check):
    model = checks.join(vision=oblong())
    assert (model.config.grid.rows, model.config.grid.columns, model.config.num_image_tokens) == (
        2,
        6,
        12,
    )
    assert model.config.image_size == (16, 24)
    check(model)


@pytest.mark.parametrize("mix", ["channels", "tokens", "attend", "blend", "pool"])
def test_every_mixer_takes_an_oblong_grid(mix):
    taps = [1, -2] if mix == "blend" else [-2]  # one tap alone leaves a blend nothing to weigh
    plan = {"shortcuts": [{"taps": taps, "layer": 0, "mix": mix}], "tiles": 2}
    checks.gradients(checks.join(vision=oblong(), plan=plan))


def test_fine_patches_lie_under_the_coarse_one_of_an_oblong_grid():
    rows, columns, tiles = 2, 3, 2
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    fine = [
        places / tiles + torch.tensor([y * rows, x * columns]) / tiles
        for y in range(tiles)
        for x in range(tiles)
    ]
    grains = arrange_grains(torch.stack([places, *fine])[None], tiles, rows)
    assert torch.equal(grains[0, 1:].floor(), places.expand(4, -1, -1))


@torch.no_grad()
@pytest.mark.parametrize("size", [[32, 32], [48, 80], [64, 32]])
def test_windows_are_undone_as_the_encoder_makes_them(size):
    from transformers.vision_utils import get_vision_window_index

    encoder = family_vision("qwen2_5_vl_vision")
    grid = read_grid(encoder.config, size)
    inputs = encoder_inputs(grid, torch.randn(3, *grid.view))
    index, _ = get_vision_window_index(
        inputs["grid_thw"], spatial_merge_size=2, window_size=32, patch_size=8
    )
    squares = (
        torch.arange(3 * grid.num_patches).view(-1, 4)[index].flatten()
    )  # places in the order that is fed
    fed = read_grid(family_vision("qwen2_vl_vision").config, size)
    expected = torch.cat([get_patch_order(fed) + view * grid.num_patches for view in range(3)])[
        squares
    ]
    assert torch.equal(
        torch.cat([get_patch_order(grid) + view * grid.num_patches for view in range(3)]), expected
    )


@torch.no_grad()
def test_a_packed_encoder_gives_what_its_own_image_processor_leads_to():
    from transformers import Qwen2VLImageProcessorPil

    encoder = family_vision("qwen2_vl_vision")
    grid = read_grid(encoder.config, [32, 48])
    pixels = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    limits = {
        "size": {"shortest_edge": 1, "longest_edge": 10**6},
        "image_mean": [0.0] * 3,
        "image_std": [1.0] * 3,
    }
    processor = Qwen2VLImageProcessorPil(
        patch_size=8, temporal_patch_size=2, merge_size=2, **limits
    )
    theirs = processor(
        images=list(pixels.numpy()), return_tensors="pt", input_data_format="channels_first"
    )
    ours = encoder_inputs(grid, pixels / 255)
    assert torch.equal(ours["grid_thw"], theirs["image_grid_thw"])
    torch.testing.assert_close(ours["hidden_states"], theirs["pixel_values"])


@torch.no_grad()
def test_a_configuration_without_a_view_size_needs_one():
    text = language_config("llama")
    with pytest.raises(UserError, match=r"multiple of 16 pixels.*view_size=256"):
        SparseCutConfig(vision_config=vision_config("qwen2_vl_vision"), text_config=text)
    again = SparseCutConfig.from_dict(
        SparseCutConfig(
            vision_config=vision_config("qwen2_vl_vision"), text_config=text, view_size=[32, 48]
        ).to_dict()
    )
    assert again.grid.view == (3, 32, 48)
    assert (
        SparseCutConfig(vision_config=vision_config("pixtral"), text_config=text).image_size == 32
    )  # has its own


REFUSED = [
    (
        "aimv2_vision_model",
        {},
        32,
        "aimv2_vision_model has learned positions for views of 16 x 16 .*such as DINOv2",
    ),
    ("qwen2_5_vl_vision", {}, 24, "view_size 24, which is not a multiple of its patch_size 16"),
    ("qwen2_5_vl_vision", {}, "large", "view_size is 'large'"),
    ("qwen2_5_vl_vision", {}, (16, 0), r"view_size is \(16, 0\)"),
    ("pixtral", {}, 64, "pixtral .* 32 pixels"),
    (
        "internvl_vision",
        {"patch_size": [7, 7]},
        None,
        "image_size 16, which is not a multiple of its patch_size 7",
    ),
    (
        "dinov2",
        {"image_size": [16, 24]},
        None,
        "16 x 24 pixels .* square",
    ),
    ("dinov2", {}, 36, "view_size 36, which is not a multiple of its patch_size 8.*view_size=32"),
    ("clip_vision_model", {}, (16, 20), "20.* multiple of its patch_size 8"),
    ("clip_vision_model", {}, True, "view_size is True"),
    ("siglip_vision_model", {"image_size": 20}, None, "image_size 20.* patch_size 8.*view_size=16"),
    ("vit", {"image_size": [16, 24]}, 32, "16 x 24 pixels .* square where it interpolates"),
    ("sam_vision_model", {}, 32, "sam_vision_model .* does not interpolate"),
    ("whisper", {}, 16, "view_size is 16, .*whisper .* 6 frames"),
    ("whisper", {"encoder_layerdrop": 0.1}, None, "encoder_layerdrop=0.1"),
]


@pytest.mark.parametrize(("name", "settings", "size", "sentence"), REFUSED)
def test_a_grid_that_cannot_be_is_refused_in_a_sentence(name, settings, size, sentence):
    with pytest.raises(UserError, match=sentence):
        read_grid(vision_config(name, **settings), size)


def test_states_of_another_grid_are_refused():
    grid = read_grid(vision_config("qwen3_vl_vision"), [32, 48])
    with pytest.raises(UserError, match=r"\(1, 8, 16\) for 1 views"):
        to_raster_order(grid, torch.zeros(1, 8, 16), 1)
    with pytest.raises(UserError, match="9 or more tokens"):
        read_taps(checks.join().vision_tower, torch.zeros(1, 3, 16, 16), 9, [1])


def test_an_encoder_that_needs_more_than_views_is_refused():
    encoder = family_vision("siglip2_vision_model")
    encoder.config.model_type = "siglip_vision_model"  # as if it were an unknown one
    encoder.config.image_size = 16
    with pytest.raises(UserError, match="pixel_attention_mask and spatial_shapes"):
        checks.join(vision=encoder)


def test_audio_in_and_text_out_from_building_to_loading(tmp_path):
    example = load_example("audio")
    torch.manual_seed(0)
    encoder, extractor, language, tokenizer = example.build_parts()
    plan = {"method": "sparsecut", "tiles": 0}
    model, processor = build(
        encoder, language, plan, image_processor=extractor, tokenizer=tokenizer
    )
    losses = example.train(model, processor, 30, batch_size=4)
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
    clips, _ = example.make_tones(4, seed=0)
    answers = example.answer(model, processor, clips)
    assert answers == [example.answer(model, processor, [clip])[0] for clip in clips]
    save(model, processor, tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True).audio_token == "<audio>"
    assert (tmp_path / "processing_audio.py").is_file()
    again = load(tmp_path)
    assert type(again[1]) is type(processor) and type(again[0].vision_tower) is type(encoder)
    assert example.answer(*again, clips) == answers
    talk = [
        {
            "role": "user",
            "content": [{"type": "audio", "audio": "x"}, {"type": "text", "text": "how"}],
        }
    ]
    assert again[1].apply_chat_template(talk, tokenize=False).count("<audio>") == 1


def test_audio_that_does_not_fit_the_encoder_is_refused():
    example = load_example("audio")
    encoder, extractor, language, tokenizer = example.build_parts()
    parts = {"image_processor": extractor, "tokenizer": tokenizer}
    with pytest.raises(UserError, match="tiles=2, but whisper"):
        build(encoder, language, **parts)
    plan = {"method": "sparsecut", "tiles": 0}
    wide = type(extractor)(feature_size=80, chunk_length=1)
    with pytest.raises(UserError, match=r"80 mels and 100 frames.* 40 and 100"):
        build(encoder, language, plan, **parts | {"image_processor": wide})
    _, processor = build(encoder, language, plan, **parts)
    with pytest.raises(UserError, match=r"16001 samples.* 16000"):
        processor(audio=[[0.0] * 16001], text="<audio>")
    problem = UserError
    with pytest.raises(problem):
        processor(audio=[[0.0] * 100], text="<audio> <audio>")


def test_oblong_views_are_made_of_images_and_kept_when_saved(tmp_path):
    tokenizer, language = tiny_tokenizer(), tiny_language()
    encoder, image_processor = family_vision("qwen2_5_vl_vision"), CLIPImageProcessorPil()
    plan = {"method": "sparsecut", "pattern": "sparse"}
    parts = {"image_processor": image_processor, "tokenizer": tokenizer}
    with pytest.raises(UserError, match="view_size"):
        build(encoder, language, plan, **parts)
    model, processor = build(encoder, language, plan, **parts, view_size=(32, 48))
    image = Image.new("RGB", (60, 30), "red")
    batch = processor(images=[image], text="<image> what is it", return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 5, 3, 32, 48)
    save(model, processor, tmp_path)
    again, other = load(tmp_path)
    assert torch.equal(
        other(images=[image], text="<image> what is it", return_tensors="pt")["pixel_values"],
        batch["pixel_values"],
    )
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_fine_views_of_an_oblong_size_lie_under_the_coarse_one():
    image = Image.fromarray(
        np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((30, 50), np.uint8))
    )
    coarse, *fine = (np.asarray(v)[..., 0] for v in cut_views(image, 2, (16, 24)))
    assert coarse.shape == (16, 24)
    for view, quarter in zip(
        fine, [coarse[:8, :12], coarse[:8, 12:], coarse[8:, :12], coarse[8:, 12:]], strict=True
    ):
        assert abs(float(np.median(view)) - float(np.median(quarter))) < 1
    cropped = cut_views(image, 0, (16, 24), "crop")[0]
    assert cropped.size == (24, 16)


def test_an_encoder_without_weights_of_its_own_in_a_folder_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaModel

    encoder, language = family_vision("vit"), tiny_language()
    encoder.config.save_pretrained(tmp_path)
    config = encoder.config
    LlamaModel(
        LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=8)
    ).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    parts = {"image_processor": CLIPImageProcessorPil(), "tokenizer": tiny_tokenizer()}
    with pytest.raises(UserError, match=r"ViTModel.*embeddings\.cls_token"):
        build(str(tmp_path), language, {"method": "sparsecut", "pattern": "sparse"}, **parts)


def save_blip(folder):
    """A BLIP of two towers whose encoder's weights have other names than the encoder's own."""
    from transformers import BlipConfig, BlipModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    vision = sizes | {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = sizes | {"num_attention_heads": 2, "vocab_size": 32, "num_hidden_layers": 1}
    model = BlipModel(BlipConfig(vision_config=vision, text_config=text)).eval()
    model.save_pretrained(folder)
    return model.vision_model


def test_an_encoder_inside_of_a_larger_checkpoint_is_found_by_its_configuration(tmp_path):
    own = save_blip(tmp_path)
    parts = {"image_processor": CLIPImageProcessorPil(), "tokenizer": tiny_tokenizer()}
    plan = {"method": "sparsecut", "pattern": "sparse"}
    model, _ = build(str(tmp_path), tiny_language(), plan, **parts)
    assert type(model.vision_tower) is type(own)
    for name, value in own.state_dict().items():
        assert torch.equal(model.vision_tower.state_dict()[name], value)
    save(model, parts["tokenizer"], tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    pixels = torch.randn(1, 5, 3, 16, 16)
    for tap, states in again.eval().encode(pixels).items():
        assert torch.equal(states, model.encode(pixels)[tap])


def test_a_masked_autoencoder_shows_all_its_patches(tmp_path):
    encoder = family_vision("vit_mae", mask_ratio=0.75)
    parts = {"image_processor": CLIPImageProcessorPil(), "tokenizer": tiny_tokenizer()}
    plan = {"method": "sparsecut", "pattern": "sparse"}
    with pytest.raises(UserError, match=r"mask_ratio=0\.75"):
        build(encoder, tiny_language(), plan, **parts)
    encoder.save_pretrained(tmp_path)
    model, _ = build(str(tmp_path), tiny_language(), plan, **parts)
    views = torch.randn(2, 3, 16, 16)
    states = read_taps(model.vision_tower, views, model.grid, [0, 2])
    assert torch.equal(read_taps(model.vision_tower, views, model.grid, [0, 2])[2], states[2])
    checks.assert_patches_in_raster_order(model, views)
