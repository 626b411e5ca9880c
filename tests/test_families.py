"""Encoders and decoders of many families, as tiny random models, and errors for the other ones.

The default suite tries one family per mechanism. tests/conformance runs the same checks on more
families, `make grid` on all of them.
"""

import pytest
import torch
from helpers import checks
from helpers.families import (
    DEFAULT_LANGUAGE,
    DEFAULT_VISION,
    family_language,
    family_vision,
    language_config,
    vision_config,
)
from transformers import AutoConfig

from sparsecut import METHODS, SparseCutConfig, make_plan
from sparsecut.schema import UserError


@pytest.fixture(scope="module", params=DEFAULT_LANGUAGE)
def decoder(request):
    return checks.join(language=request.param)


@pytest.fixture(scope="module", params=DEFAULT_VISION)
def encoder(request):
    return checks.join(vision=request.param)


@pytest.mark.parametrize("check", checks.DECODER_CHECKS)
def test_every_decoder_family(decoder, check):
    check(decoder)


@pytest.mark.parametrize("check", checks.ENCODER_CHECKS)
def test_every_encoder_family(encoder, check):
    check(encoder)


DEPTHS = {"official_13b": (24, 40), "official_7b_as_run": (24, 32)}


@pytest.mark.parametrize("method", METHODS)
def test_no_method_leaves_a_parameter_without_gradient(method):
    vision_depth, language_depth = DEPTHS.get(method, (4, 4))
    vision = family_vision("clip_vision_model", num_hidden_layers=vision_depth)
    language = family_language("llama", num_hidden_layers=language_depth)
    plan = make_plan(method, vision_depth, language_depth)
    model = checks.join(vision, language, plan.to_dict())
    for parameter, start in model.fusion.initial_values():
        if start in (0.0, (0.0, 0.0)):  # a zero gate blocks the gradient of what it scales
            torch.nn.init.normal_(parameter, std=0.3)
    checks.gradients(model)


@pytest.mark.parametrize("name", ["vivit", "videomae"])
def test_encoders_without_one_fixed_grid_are_refused_by_name(name):
    with pytest.raises(UserError, match=name):
        SparseCutConfig(vision_config=vision_config(name), text_config=language_config("llama"))


REFUSED = {
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "trocr": "encoder-decoder",
    "bert": "later tokens",
    "gemma4_text": "token ids",
}


@pytest.mark.parametrize("name, problem", REFUSED.items())
def test_language_models_that_cannot_read_embeddings_from_left_to_right_are_refused(name, problem):
    vision = vision_config("clip_vision_model")
    with pytest.raises(UserError, match=f"{name} .*{problem}"):
        SparseCutConfig(vision_config=vision, text_config=AutoConfig.for_model(name))


def test_a_decoder_cut_out_of_a_pair_is_refused_too():
    with pytest.raises(UserError, match="encoder-decoder"):
        checks.join(language=family_language("bart"))


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv", "xlstm"])
def test_a_language_model_without_a_key_value_cache_is_refused(name):
    with pytest.raises(UserError, match="cache of keys and values"):
        checks.join(language=name)
