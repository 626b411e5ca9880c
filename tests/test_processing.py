"""Images become the views the released code makes, and texts the tokens the model expects."""

import hashlib
import json
from pathlib import Path

import numpy as np
import PIL
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


def draw_formula(width: int, height: int) -> Image.Image:
    """The image of the parity files."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    red = (3 * x + 5 * y) % 256
    green = (x * x // 64 + y * y // 32) % 256
    blue = 255 * ((x // 16 + y // 12) % 2)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def make_tokenizer(**changes):
    tokenizer = tiny_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def make_processor(size: int = 8, tokenizer=None, **options) -> SparseCutProcessor:
    options = {"image_size": size, "tiles": 2, "num_image_tokens": 4, **options}
    return SparseCutProcessor(CLIPImageProcessorPil(), tokenizer or make_tokenizer(), **options)


# Pillow 13 rounds some pixels of its bicubic filter in another way than 11 and 12.
@needs_parity
@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="recorded with Pillow 13")
@pytest.mark.parametrize("name", SIZES)
def test_pixels_equal_the_released_inference(name):
    expected = load_file(PARITY / "outputs.safetensors")
    facts = json.loads((PARITY / "meta.json").read_text())["facts"]
    image = draw_formula(*SIZES[name])
    released_image = load_file(PARITY / "inputs.safetensors")[f"{name}.rgb"]
    assert torch.equal(torch.from_numpy(np.array(image)), released_image)

    small = make_processor(112).pixels([image])[0]
    assert torch.equal(small, expected[f"{name}.pixels_112"])
    large = make_processor(336).pixels([image])[0]
    assert torch.equal(large[:, :, 8::16, 8::16], expected[f"{name}.pixels_336_every_16th"])
    for size in (112, 336):
        views = cut_views(image, 2, size)
        levels = np.stack([np.asarray(view).transpose(2, 0, 1) for view in views])
        digest = hashlib.sha256(levels.tobytes()).hexdigest()
        assert digest == facts[f"{name}@{size}"]["levels_sha256"]


@needs_parity
@pytest.mark.parametrize("name", SIZES)
def test_the_released_training_crop_is_a_named_option(name):
    expected = load_file(PARITY / "outputs.safetensors")[f"{name}.training_low_res_112"]
    pixels = make_processor(112, coarse="crop").pixels([draw_formula(*SIZES[name])])
    assert torch.equal(pixels[0, :1], expected)


def test_fine_views_lie_under_the_coarse_one():
    blocks = np.array([[0, 80], [160, 240]], np.uint8)
    image = Image.fromarray(np.kron(blocks, np.ones((30, 50), np.uint8)))
    coarse, *fine = (np.asarray(view)[..., 0] for view in cut_views(image, 2, 16))
    quarters = [coarse[:8, :8], coarse[:8, 8:], coarse[8:, :8], coarse[8:, 8:]]
    for view, quarter in zip(fine, quarters, strict=True):
        # the median ignores the smoothed edges
        assert abs(float(np.median(view)) - float(np.median(quarter))) < 1


def test_each_placeholder_is_expanded_and_pixels_follow_the_images():
    processor = make_processor()
    image = draw_formula(20, 30)
    texts = ["<image> a <image>", "b", "<image>"]
    batch = processor(images=[image, image, image], text=texts, padding=True)
    assert batch["pixel_values"].shape == (3, 5, 3, 8, 8)
    is_image_token = torch.as_tensor(batch["input_ids"]) == processor.image_token_id
    assert is_image_token.sum(-1).tolist() == [8, 0, 4]
    assert "pixel_values" not in processor(text=["a", "b"])
    assert "pixel_values" not in processor(text=["a", "b"], images=[[], []])


@pytest.mark.parametrize("kind", ["array", "tensor", "grey", "alpha"])
def test_every_kind_of_image_is_taken(kind):
    image = draw_formula(20, 30)
    other = {
        "array": np.asarray(image),
        "tensor": torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()),
        "grey": image.convert("L"),
        "alpha": image.convert("RGBA"),
    }[kind]
    reference = image.convert("L").convert("RGB") if kind == "grey" else image
    processor = make_processor()
    assert torch.equal(processor.pixels([other]), processor.pixels([reference]))


def test_wrong_numbers_of_images_are_refused():
    processor = make_processor()
    image = draw_formula(20, 30)
    with pytest.raises(UserError, match="text 0 has 1 placeholders <image>, but 2 images"):
        processor(images=[[image, image], []], text=["<image>", "<image>"])
    with pytest.raises(UserError, match=r"1 placeholders <image>.* 0 images"):
        processor(text=["<image>"])
    with pytest.raises(UserError, match=r"1 placeholders <image>.* 2 images"):
        processor(images=[image, image], text=["<image>"])
    with pytest.raises(UserError, match="'stretch'"):
        make_processor(coarse="stretch")
    with pytest.raises(UserError, match="'<picture>'"):
        make_processor(image_token="<picture>")


MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    {"role": "user", "content": "are you sure"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_takes_strings_only_gets_images():
    processor = make_processor(tokenizer=make_tokenizer(chat_template=CHATML))
    assert processor.apply_chat_template(MESSAGES, add_generation_prompt=True) == (
        "<|im_start|>user\n<image>\nwhat is it<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n"
        "<|im_start|>user\nare you sure<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_tokenizer_without_a_template_gets_ours():
    tokenizer = make_tokenizer(chat_template=None)
    processor = make_processor(tokenizer=tokenizer)
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    end = tokenizer.eos_token
    assert text == f"USER: <image>\nwhat is it ASSISTANT: a cat{end} USER: are you sure ASSISTANT:"


def test_a_saved_processor_loads_the_same(tmp_path):
    saved = make_processor()
    saved.save_pretrained(tmp_path)
    loaded = SparseCutProcessor.from_pretrained(tmp_path)
    for name in ("tiles", "image_size", "num_image_tokens", "chat_template"):
        assert getattr(loaded, name) == getattr(saved, name)
    image = draw_formula(9, 7)
    assert torch.equal(loaded.pixels([image]), saved.pixels([image]))
