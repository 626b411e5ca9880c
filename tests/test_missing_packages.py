"""Where a package is missing, the error names it and not the model."""

import json
from importlib.util import find_spec

import pytest
from helpers.tiny import tiny_tokenizer

from sparsecut.loading import find_missing_package
from sparsecut.schema import UserError
from sparsecut.upgrading import read_processor

TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
FAMILIES = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}


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


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_that_needs_torchvision_says_so(family, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    tokenizer.save_pretrained(tmp_path)
    kinds = {"processor_class": FAMILIES[family], "image_processor_type": "Qwen2VLImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kinds))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(UserError, match="torchvision"):
        read_processor(tmp_path)
