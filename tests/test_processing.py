"""Pictures become the views the released code makes, and texts the tokens the model expects."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_tokenizer
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from sparsecut.processing import SparseCutProcessor, cut_views
from sparsecut.schema import UserError

PARITY = Path(__file__).parents[2] / "shared" / "parity" / "F"
needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason="the parity files are not here")
SIZES = {"landscape_500x333": (500, 333), "portrait_210x345": (210, 345)}


def formula(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    red, green, blue = (
        (3 * x + 5 * y) % 256,
        (x * x // 64 + y * y // 32) % 256,
        255 * ((x // 16 + y // 12) % 2),
    )
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def processor(size: int, **options) -> SparseCutProcessor:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    options = {"image_size": size, "tiles": 2, "num_image_tokens": 4, **options}
    return SparseCutProcessor(CLIPImageProcessorPil(), tokenizer, **options)


@needs_parity
@pytest.mark.parametrize("name", SIZES)
def test_pixels_equal_the_released_inference(name):
    expected, meta = (
        load_file(PARITY / "outputs.safetensors"),
        json.loads((PARITY / "meta.json").read_text()),
    )
    picture = formula(*SIZES[name])
    assert torch.equal(
        torch.from_numpy(np.array(picture)), load_file(PARITY / "inputs.safetensors")[f"{name}.rgb"]
    )
    small, large = processor(112).pixels([picture])[0], processor(336).pixels([picture])[0]
    assert torch.equal(small, expected[f"{name}.pixels_112"])
    assert torch.equal(large[:, :, 8::16, 8::16], expected[f"{name}.pixels_336_every_16th"])
    for size in (112, 336):
        levels = np.stack([np.asarray(v).transpose(2, 0, 1) for v in cut_views(picture, 2, size)])
        assert (
            hashlib.sha256(levels.tobytes()).hexdigest()
            == meta["facts"][f"{name}@{size}"]["levels_sha256"]
        )


@needs_parity
@pytest.mark.parametrize("name", SIZES)
def test_the_released_training_crop_is_a_named_option(name):
    expected = load_file(PARITY / "outputs.safetensors")[f"{name}.training_low_res_112"]
    assert torch.equal(
        processor(112, coarse="crop").pixels([formula(*SIZES[name])])[0, :1], expected
    )


def test_fine_views_lie_under_the_coarse_one():
    picture = Image.fromarray(
        np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((30, 50), np.uint8))
    )
    coarse, *fine = (np.asarray(v)[..., 0] for v in cut_views(picture, 2, 16))
    quarters = [coarse[:8, :8], coarse[:8, 8:], coarse[8:, :8], coarse[8:, 8:]]
    for view, quarter in zip(
        fine, quarters, strict=True
    ):  # inner parts, away from the smoothed edges
        assert abs(float(np.median(view)) - float(np.median(quarter))) < 1


def test_each_placeholder_is_expanded_and_pixels_follow_the_pictures():
    p, picture = processor(8), formula(20, 30)
    batch = p(
        images=[picture, picture, picture], text=["<image> a <image>", "b", "<image>"], padding=True
    )
    assert batch["pixel_values"].shape == (3, 5, 3, 8, 8)
    assert (torch.as_tensor(batch["input_ids"]) == p.image_token_id).sum(-1).tolist() == [8, 0, 4]
    assert "pixel_values" not in p(text=["a", "b"])
    assert "pixel_values" not in p(text=["a", "b"], images=[[], []])


@pytest.mark.parametrize("kind", ["array", "tensor", "grey", "alpha"])
def test_every_kind_of_picture_is_taken(kind):
    picture = formula(20, 30)
    other = {
        "array": np.asarray(picture),
        "tensor": torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy()),
        "grey": picture.convert("L"),
        "alpha": picture.convert("RGBA"),
    }[kind]
    reference = picture.convert("L").convert("RGB") if kind == "grey" else picture
    assert torch.equal(processor(8).pixels([other]), processor(8).pixels([reference]))


def test_wrong_numbers_of_pictures_are_refused():
    p, picture = processor(8), formula(20, 30)
    with pytest.raises(UserError, match="text 0 has 1 placeholders <image>, but 2 images"):
        p(images=[[picture, picture], []], text=["<image>", "<image>"])
    with pytest.raises(ValueError, match="no images were passed"):
        p(text=["<image>"])
    with pytest.raises(ValueError, match="coarse is 'stretch'"):
        processor(8, coarse="stretch")


MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    {"role": "user", "content": "are you sure"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_knows_strings_only_takes_pictures():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    p = SparseCutProcessor(
        CLIPImageProcessorPil(), tokenizer, image_size=8, tiles=2, num_image_tokens=4
    )
    text = p.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert (
        text == "<|im_start|>user\n<image>\nwhat is it<|im_end|>\n<|im_start|>assistant\na"
        " cat<|im_end|>\n"
        "<|im_start|>user\nare you sure<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_tokenizer_without_a_template_gets_ours():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    p = SparseCutProcessor(
        CLIPImageProcessorPil(), tokenizer, image_size=8, tiles=2, num_image_tokens=4
    )
    text = p.apply_chat_template(MESSAGES, add_generation_prompt=True)
    end = tokenizer.eos_token
    assert text == f"USER: <image>\nwhat is it ASSISTANT: a cat{end} USER: are you sure ASSISTANT:"


def test_a_saved_processor_loads_the_same(tmp_path):
    p = processor(8)
    p.save_pretrained(tmp_path)
    q = SparseCutProcessor.from_pretrained(tmp_path)
    assert (q.tiles, q.image_size, q.num_image_tokens, q.chat_template) == (
        2,
        8,
        4,
        p.chat_template,
    )
    assert torch.equal(q.pixels([formula(9, 7)]), p.pixels([formula(9, 7)]))
