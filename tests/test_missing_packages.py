"""Where a package is missing, the error names it; for videos alone, nothing is missed."""

import json
from importlib.util import find_spec

import pytest
import torch
from helpers.tiny import tiny_tokenizer
from PIL import Image
from transformers.models.auto import video_processing_auto

from sparsecut.absent_videos import read_without_videos
from sparsecut.loading import find_missing_package
from sparsecut.processing_upgraded import wrap_processor
from sparsecut.schema import UserError
from sparsecut.upgrading import read_processor

TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
FAMILIES = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}


IMAGES = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 784, "max_pixels": 6272}
VIDEOS = {"video_processor_type": "Qwen2VLVideoProcessor", "merge_size": 2, "fps": 3}
without_torchvision = pytest.mark.skipif(
    find_spec("torchvision") is not None, reason="torchvision is installed"
)


@pytest.mark.parametrize(
    ("text", "package"),
    [
        ("X requires the Torchvisiom library but it was not found", "torchvisiom"),
        ("make sure you have `nonesuch` installed", "nonesuch"),
        ("Package `nonesuch` is required to run it. Install it", "nonesuch"),
        ("No module named 'nonesuch.inner'", "nonesuch"),
        ("X requires the PIL library, and X requires the Nonesuch library", "nonesuch"),
        ("X requires the PIL library but it was not found", None),  # it is here
        ("a file is damaged", None),
    ],
)
def test_the_package_that_is_missing_is_found(text, package):
    assert find_missing_package(ImportError(text)) == package


def save_processor(folder, family, **kinds):
    """Files of a processor as a base has them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**IMAGES, **kinds}))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(VIDEOS))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))


@without_torchvision
@pytest.mark.parametrize("family", FAMILIES)
def test_what_needs_torchvision_for_videos_only_loads_without(family, tmp_path):
    save_processor(tmp_path, family, processor_class=FAMILIES[family])
    processor = read_processor(tmp_path)
    assert type(processor).__name__ == FAMILIES[family]
    image = Image.new("RGB", (56, 56))
    inputs = processor(images=[image], text=[f"{processor.image_token} a"])
    assert (torch.tensor(inputs["input_ids"]) == processor.image_token_id).sum() == 4
    with pytest.raises(UserError, match="torchvision"):
        processor(videos=[[image, image]], text=[f"{processor.video_token} a"])
    wrap_processor(processor).save_pretrained(tmp_path / "saved")
    again = read_processor(tmp_path / "saved")
    assert VIDEOS.items() <= again.video_processor.to_dict().items()


@without_torchvision
def test_what_needs_torchvision_for_images_names_it(tmp_path):
    kinds = {"processor_class": "Lfm2VlProcessor", "image_processor_type": "Lfm2VlImageProcessor"}
    save_processor(tmp_path, "lfm2_vl", **kinds)
    with pytest.raises(UserError, match="torchvision"):
        read_processor(tmp_path)


def test_transformers_is_as_before_after_a_processor_was_read():
    automatic = video_processing_auto.AutoVideoProcessor
    with read_without_videos():
        pass
    assert video_processing_auto.AutoVideoProcessor is automatic
