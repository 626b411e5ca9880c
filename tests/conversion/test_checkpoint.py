"""A folder of the released code becomes one of ours that computes the same."""

import json
from pathlib import Path

import pytest
import torch
from helpers.released import build_released, write_released_folder, write_vision_folder
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
)

from sparsecut.building import load
from sparsecut.conversion.checkpoint import convert
from sparsecut.conversion.released import from_official

CASE_A = Path(__file__).parents[3] / "shared" / "parity" / "A"


def logits(model, pixels, image_token: int):
    """Logits of a row with a picture, without those of the placeholders' ids."""
    ids = torch.tensor([[1, 5, *[image_token] * 16, 9, 7]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits[..., :27]


@pytest.mark.parametrize("fusion", ["cross_mlp", "cross_attention"])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickled"])
@pytest.mark.parametrize("tower", [True, False], ids=["tower inside", "tower apart"])
def test_the_folder_computes_what_from_official_does(tmp_path, fusion, pickled, tower):
    weights, configs, _ = build_released(fusion, depth=12)
    text = configs["text_config"].to_dict()
    source = write_released_folder(
        tmp_path / "in", weights, text, fusion=fusion, pickled=pickled, tower=tower
    )
    vision = write_vision_folder(tmp_path / "tower", weights, configs["vision_config"])
    want = from_official(weights, **configs, fusion=fusion)
    converted, _ = convert(source, tmp_path / "out", vision=str(vision))
    loaded, processor = load(tmp_path / "out")
    pixels = torch.randn(1, 5, 3, 32, 32)
    expected = logits(want, pixels, 50)
    assert torch.equal(logits(converted, pixels, 27), expected)
    assert torch.equal(logits(loaded, pixels, 27), expected)
    assert (
        loaded.plan == want.plan and processor.image_token_id == loaded.config.image_token_id == 27
    )
    assert loaded.config.mask_image_token and processor.num_image_tokens == 16


def test_the_auto_classes_read_it_and_the_prompt_is_vicunas(tmp_path):
    weights, configs, _ = build_released("cross_mlp", depth=12)
    source = write_released_folder(tmp_path / "in", weights, configs["text_config"].to_dict())
    vision = write_vision_folder(tmp_path / "tower", weights, configs["vision_config"])
    convert(source, tmp_path / "out", vision=str(vision))
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "are you sure"},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    opening, _, rest = text.partition("user's questions. ")
    assert opening.startswith(
        "A chat between a curious user and an artificial intelligence assistant. The assistant"
        " gives"
    )
    assert rest == "USER: <image>\nwhat is it ASSISTANT: a cat</s>USER: are you sure ASSISTANT:"
    other = [{"role": "system", "content": "Be brief."}, *turns[:1]]
    text = processor.apply_chat_template(other, add_generation_prompt=True)
    assert text == "Be brief. USER: <image>\nwhat is it ASSISTANT:"


def test_lists_and_order_come_from_the_checkpoint_or_the_caller(tmp_path):
    weights, configs, _ = build_released("cross_mlp", depth=12)
    text = configs["text_config"].to_dict()
    source = write_released_folder(tmp_path / "in", weights, text, feature_order_reverse=True)
    vision = str(write_vision_folder(tmp_path / "tower", weights, configs["vision_config"]))
    model, _ = convert(source, tmp_path / "reversed", vision=vision)
    assert [(s.taps, s.layer) for s in model.plan.shortcuts] == [((1,), 0), ((24,), 4), ((21,), 9)]
    source = write_released_folder(tmp_path / "in", weights, text)
    model, _ = convert(source, tmp_path / "own", vision=vision, taps=[2, 5], layers=[1, 11])
    assert [(s.taps, s.layer) for s in model.plan.shortcuts] == [((-2,), 0), ((3,), 1), ((6,), 11)]


@pytest.mark.skipif(not CASE_A.is_dir(), reason="the parity files are not here")
def test_case_a(tmp_path):
    meta, weights = (
        json.loads((CASE_A / "meta.json").read_text()),
        load_file(CASE_A / "weights.safetensors"),
    )
    vision_config = CLIPVisionConfig(**meta["vision_config"])
    source = write_released_folder(tmp_path / "in", weights, meta["text_config"], tower=False)
    vision = write_vision_folder(tmp_path / "tower", weights, vision_config)
    convert(source, tmp_path / "out", vision=str(vision))
    model, _ = load(tmp_path / "out")
    given, want = (
        load_file(CASE_A / "inputs.safetensors"),
        load_file(CASE_A / "outputs.safetensors"),
    )
    row = [x for t in given["input_ids"][0].tolist() for x in ([27] * 16 if t == -200 else [t])]
    with torch.no_grad():
        got = model(input_ids=torch.tensor([row]), pixel_values=given["images"][:1]).logits[0]
    kept = [c for c in range(96) if c != 27]
    torch.testing.assert_close(got[:, kept], want["logits"][0][:, kept], rtol=0, atol=1e-4)


def test_folders_that_cannot_be_converted_get_a_sentence(tmp_path):
    weights, configs, _ = build_released("cross_mlp", depth=6)
    text = configs["text_config"].to_dict()
    vision = str(write_vision_folder(tmp_path / "tower", weights, configs["vision_config"]))

    def refused(words: str, **changes):
        source = write_released_folder(tmp_path / "in", weights, text, **changes)
        with pytest.raises(ValueError, match=words):
            convert(source, tmp_path / "out", vision=vision)

    refused("projectors .* with --fusion", fusion="linear")
    refused("mm_use_im_start_end", mm_use_im_start_end=True)
    refused("class token", mm_vision_select_feature="cls_patch")
    refused("has 27 tokens, but the checkpoint's config.json says vocab_size=20", vocab_size=20)
    refused("has shape", hidden_size=28)
    with pytest.raises(ValueError, match="holds no config"):
        convert(tmp_path, tmp_path / "out", vision=vision)
    for file in (tmp_path / "in").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        convert(tmp_path / "in", tmp_path / "out", vision=vision)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="holds a model already"):
        convert(tmp_path / "in", tmp_path / "tower", vision=vision)
