"""Views of another size than the encoder's own: its positions are interpolated, by its own code."""

import pytest
import torch
from helpers import checks
from helpers.families import IMAGE, family_vision, language_config, vision_config
from helpers.tiny import tiny_language, tiny_tokenizer
from PIL import Image
from transformers import CLIPImageProcessorPil

from sparsecut import SparseCutConfig
from sparsecut.building import build, load, save
from sparsecut.encoder_classes import find_encoder_class
from sparsecut.experiments.compare import ComparedRun, _add_model_facts
from sparsecut.hooks import read_taps
from sparsecut.profiling.counting import count_plan
from sparsecut.schema import UserError

SPARSE = {"method": "sparsecut", "pattern": "sparse"}
# One that asks for interpolation, one that does it unasked, and one that computes positions.
KINDS = {
    "siglip_vision_model": {"interpolate_pos_encoding": True},
    "dinov2": {},
    "dinov3_vit": {},
}


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(16, 32), (40, 24), (8, 8)])
def test_states_are_those_of_the_encoder_at_that_size(name, size):
    encoder = family_vision(name)
    config = SparseCutConfig(
        vision_config=encoder.config, text_config=language_config("llama"), view_size=size
    )
    assert (config.grid.rows, config.grid.columns) == (size[0] // 8, size[1] // 8)
    model = checks.join(encoder, view_size=size)
    views = torch.randn(2, 3, *size)
    read = read_taps(encoder, views, model.grid, range(4))
    own = encoder(pixel_values=views, output_hidden_states=True, **KINDS[name]).hidden_states
    for tap, states in read.items():
        assert torch.equal(states, own[tap][:, -config.num_patches :])


@pytest.mark.parametrize("name", KINDS)
def test_every_claim_holds_at_another_size(name):
    assert checks.resizes(checks.join(name)) is None


def test_the_own_size_is_run_as_before():
    grids = []
    for size in (None, 16, (16, 16)):
        config = SparseCutConfig(
            vision_config=vision_config("clip_vision_model"),
            text_config=language_config("llama"),
            view_size=size,
        )
        grids.append(config.grid)
    assert grids[0] == grids[1] == grids[2] and not grids[0].interpolates


def test_a_view_size_makes_a_grid_of_an_encoder_whose_own_is_no_whole_number_of_patches():
    # like SigLIP so400m: 384 pixels, patches of 14, 27 x 27 positions
    encoder = family_vision("siglip_vision_model", image_size=20)
    views = torch.randn(1, 3, 16, 16)
    model = checks.join(encoder, view_size=16)
    larger = torch.nn.functional.pad(views, (0, 4, 0, 4))
    with torch.no_grad():
        own = encoder(larger, output_hidden_states=True).hidden_states
        assert torch.equal(read_taps(encoder, views, model.grid, [2])[2], own[2])


def test_images_are_cut_to_the_view_size_and_it_is_saved(tmp_path):
    parts = {"image_processor": CLIPImageProcessorPil(), "tokenizer": tiny_tokenizer()}
    encoder = family_vision("dinov2")
    model, processor = build(encoder, tiny_language(), SPARSE, **parts, view_size=[24, 32])
    assert model.config.num_image_tokens == 12
    image = Image.new("RGB", (60, 30), "red")
    batch = processor(images=[image], text="<image> what is it", return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 5, 3, 24, 32)
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 12
    save(model, processor, tmp_path)
    again, _ = load(tmp_path)
    assert again.config.view_size == [24, 32]
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    run = ComparedRun.__new__(ComparedRun)
    _add_model_facts(run, tmp_path / "eval", str(tmp_path))
    assert run.cost["num_image_tokens"] == 12


def test_costs_are_counted_at_the_view_size():
    parts = vision_config("clip_vision_model"), language_config("llama")
    settings = {"num_text_tokens": 4, "dtype": torch.float32}
    small = count_plan(*parts, SPARSE, **settings)
    large = count_plan(*parts, SPARSE, **settings, view_size=32)
    assert (small.num_image_tokens, large.num_image_tokens) == (4, 16)
    assert large.encoder_coarse_flops > 3 * small.encoder_coarse_flops
    assert large.num_total_parameters == small.num_total_parameters


def test_an_encoder_that_is_not_listed_anywhere_has_the_class_of_its_folder():
    class OwnConfig(type(vision_config("vit"))):
        pass

    assert find_encoder_class(vision_config("clip_vision_model")).__name__ == "CLIPVisionModel"
    name = "Qwen2VisionTransformerPretrainedModel"
    assert find_encoder_class(vision_config("qwen2_vl_vision")).__name__ == name
    with pytest.raises(UserError, match="OwnConfig"):
        find_encoder_class(OwnConfig())


def test_prompts_have_as_many_image_tokens_as_the_view_has_patches():
    model = checks.join("clip_vision_model", view_size=24)
    ids = torch.tensor([[5, *[IMAGE] * 9, 6]])
    pixels = torch.randn(1, model.plan.num_views, 3, 24, 24)
    assert model(input_ids=ids, pixel_values=pixels).logits.isfinite().all()
    with pytest.raises(UserError):
        model(input_ids=ids, pixel_values=pixels[..., :16, :16])
