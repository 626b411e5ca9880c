"""Any encoder, any decoder: tiny random models of many families, and a sentence for those that
cannot be joined.

`make grid` runs the same checks, and compilation, on every family of `families.py`, and writes docs/support.md.
"""

import pytest
import torch
from helpers import checks
from helpers.families import (
    EVERYDAY_LANGUAGE,
    EVERYDAY_VISION,
    family_language,
    family_vision,
    language_config,
    vision_config,
)
from transformers import AutoConfig

from sparsecut import METHODS, SparseCutConfig, make_plan


@pytest.fixture(scope="module", params=EVERYDAY_LANGUAGE)
def decoder(request):
    return checks.join(language=request.param)


@pytest.fixture(scope="module", params=EVERYDAY_VISION)
def encoder(request):
    return checks.join(vision=request.param)


@pytest.mark.parametrize(
    "check", [checks.gradients, checks.cached, checks.padded, checks.beams, checks.checkpointing]
)
def test_every_decoder_family(decoder, check):
    check(decoder)


@pytest.mark.parametrize(
    "check", [checks.taps, checks.stops, checks.gradients, checks.cached, checks.padded]
)
def test_every_encoder_family(encoder, check):
    check(encoder)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_leaves_a_parameter_without_gradient(method):
    depths = {"official_13b": (24, 40), "official_7b_as_run": (24, 32)}.get(method, (4, 4))
    vision, language = (
        family_vision("clip_vision_model", num_hidden_layers=depths[0]),
        family_language("llama", num_hidden_layers=depths[1]),
    )
    model = checks.join(vision, language, make_plan(method, *depths).to_dict())
    for (
        values,
        start,
    ) in model.fusion.initial_values():  # away from starts that hold others still, as zero gates do
        if start in (0.0, (0.0, 0.0)):
            torch.nn.init.normal_(values, std=0.3)
    checks.gradients(model)


@pytest.mark.parametrize("name", ["swin", "convnext", "vit_mae", "vitdet"])
def test_encoders_without_one_fixed_grid_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"the vision encoder {name} has .* one fixed grid"):
        SparseCutConfig(vision_config=vision_config(name), text_config=language_config("llama"))


REFUSED = {
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "trocr": "encoder-decoder",
    "bert": "is_decoder",
    "gemma4_text": "hidden_size_per_layer_input",
}


@pytest.mark.parametrize("name", REFUSED)
def test_language_models_that_cannot_read_embeddings_from_left_to_right_are_refused(name):
    with pytest.raises(ValueError, match=f" {name} .*{REFUSED[name]}"):
        SparseCutConfig(
            vision_config=vision_config("clip_vision_model"), text_config=AutoConfig.for_model(name)
        )
    if name == "bart":  # also where its decoder was cut out
        with pytest.raises(ValueError, match=REFUSED[name]):
            checks.join(language=family_language("bart"))


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv"])
def test_a_language_model_without_a_key_value_cache_is_refused(name):
    with pytest.raises(ValueError, match="does not take past_key_values"):
        checks.join(language=name)
