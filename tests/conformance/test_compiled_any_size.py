"""Compiled and exported models on images of any size."""

import torch
from helpers.tiny import tiny_language, tiny_tokenizer, tiny_vision
from PIL import Image
from transformers import CLIPImageProcessorPil

from sparsecut import build


def test_a_compiled_and_an_exported_model_read_grids_that_are_given_as_numbers():
    torch.manual_seed(0)
    parts = {"image_processor": CLIPImageProcessorPil(), "tokenizer": tiny_tokenizer()}
    plan = {"method": "sparsecut", "tiles": 2}
    model, processor = build(tiny_vision(), tiny_language(), plan, coarse="native", **parts)
    images = [Image.effect_noise((40, 10), 80), Image.effect_noise((16, 16), 80)]
    inputs = processor(images=images, text="<image> what <image> is", return_tensors="pt")
    expected = model(**inputs).logits
    grids = inputs.pop("image_grids").tolist()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(**inputs, image_grids=grids).logits, expected, atol=1e-5)
    arguments = {**inputs, "image_grids": grids, "use_cache": False}
    exported = torch.export.export(model, (), arguments, strict=False).module()
    assert torch.allclose(exported(**arguments).logits, expected, atol=1e-5)
