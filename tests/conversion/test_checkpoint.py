"""A folder of the released code becomes one of ours that computes the same."""

import pytest
import torch
from helpers.released import build_released, write_released_folder, write_vision_folder
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
)

from sparsecut.building import load
from sparsecut.conversion.checkpoint import convert
from sparsecut.conversion.released import from_released
from sparsecut.schema import UserError

DEPTH = 12


@pytest.fixture(scope="module")
def released():
    """Weights under the released names and their configurations, by fusion."""
    return {
        fusion: build_released(fusion, DEPTH)[:2] for fusion in ("cross_mlp", "cross_attention")
    }


@pytest.fixture(scope="module")
def vision(released, tmp_path_factory):
    """A folder of the vision tower, which is the same for every fusion."""
    weights, configs = released["cross_mlp"]
    folder = tmp_path_factory.mktemp("tower") / "tower"
    return str(write_vision_folder(folder, weights, configs["vision_config"]))


@pytest.fixture
def write_source(released, tmp_path):
    """Write a folder as the released code does."""

    def write(fusion="cross_mlp", **settings):
        weights, configs = released[fusion]
        text = configs["text_config"].to_dict()
        return write_released_folder(tmp_path / "in", weights, text, fusion=fusion, **settings)

    return write


def compute_logits(model, pixels, image_token: int):
    """Logits of a row with an image, without those of the placeholders' ids."""
    ids = torch.tensor([[1, 5, *[image_token] * 16, 9, 7]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits[..., :27]


FOLDERS = {
    "safetensors": ("cross_mlp", {}),
    "pickled": ("cross_attention", {"pickled": True}),
    "tower apart": ("cross_mlp", {"tower": False}),
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folder_computes_what_its_weights_do(released, vision, write_source, tmp_path, folder):
    fusion, settings = FOLDERS[folder]
    weights, configs = released[fusion]
    tower = vision
    if not settings.get("tower", True) or fusion != "cross_mlp":
        tower = str(write_vision_folder(tmp_path / "tower", weights, configs["vision_config"]))
    expected_model = from_released(weights, **configs, fusion=fusion)
    converted, _ = convert(write_source(fusion, **settings), tmp_path / "out", vision=tower)
    loaded, processor = load(tmp_path / "out")
    pixels = torch.randn(1, 5, 3, 32, 32)
    expected = compute_logits(expected_model, pixels, 50)
    assert torch.equal(compute_logits(converted, pixels, 27), expected)
    assert torch.equal(compute_logits(loaded, pixels, 27), expected)
    assert loaded.plan == expected_model.plan
    assert processor.image_token_id == loaded.config.image_token_id == 27
    assert loaded.config.mask_image_token and processor.num_image_tokens == 16


def test_the_auto_classes_read_it_and_the_prompt_is_vicunas(vision, write_source, tmp_path):
    convert(write_source(), tmp_path / "out", vision=vision)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    question = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "are you sure"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    opening, _, rest = text.partition("user's questions. ")
    assert opening.startswith("A chat between a curious user and an artificial intelligence")
    assert rest == "USER: <image>\nwhat is it ASSISTANT: a cat</s>USER: are you sure ASSISTANT:"
    brief = [{"role": "system", "content": "Be brief."}, messages[0]]
    text = processor.apply_chat_template(brief, add_generation_prompt=True)
    assert text == "Be brief. USER: <image>\nwhat is it ASSISTANT:"


def get_places(model) -> list[tuple]:
    return [(s.taps[0], s.layer) for s in model.plan.shortcuts]


def test_lists_and_order_come_from_the_checkpoint_or_the_caller(vision, write_source, tmp_path):
    source = write_source(feature_order_reverse=True)
    model, _ = convert(source, tmp_path / "reversed", vision=vision)
    assert get_places(model) == [(1, 0), (24, 4), (21, 9)]
    lists = {"taps": [2, 5], "layers": [1, 11]}
    model, _ = convert(write_source(), tmp_path / "listed", vision=vision, **lists)
    assert get_places(model) == [(-2, 0), (3, 1), (6, 11)]


REFUSED = {
    "fusion": ({"fusion": "linear"}, "'linear'.*--fusion"),
    "tokens around images": ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
    "class token": ({"mm_vision_select_feature": "cls_patch"}, "'cls_patch'"),
    "vocabulary": ({"vocab_size": 20}, "27 tokens.*vocab_size=20"),
    "shape": ({"hidden_size": 28}, "shape"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_folders_that_cannot_be_converted_are_refused(released, vision, tmp_path, mistake):
    changes, facts = REFUSED[mistake]
    weights, configs = released["cross_mlp"]
    text = configs["text_config"].to_dict()
    source = write_released_folder(tmp_path / "in", weights, text, **changes)
    with pytest.raises(UserError, match=facts):
        convert(source, tmp_path / "out", vision=vision)
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(vision, write_source, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        convert(tmp_path, tmp_path / "out", vision=vision)
    source = write_source()
    with pytest.raises(UserError, match="nowhere"):
        convert(source, tmp_path / "out", vision="nowhere/nowhere")
    with pytest.raises(UserError, match="holds a model already"):
        convert(source, vision, vision=vision)
    for file in source.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="safetensors"):
        convert(source, tmp_path / "out", vision=vision)
    (source / "config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        convert(source, tmp_path / "out", vision=vision)
    assert not (tmp_path / "out").exists()
