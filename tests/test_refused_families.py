"""Every image-text family of transformers can be upgraded, or is refused with its reason."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from sparsecut.families import FAMILIES, get_family
from sparsecut.refused_families import NOT_CHECKED, REASONS, explain_refusal
from sparsecut.schema import UserError

KNOWN = {"mllama", "blip-2", "fuyu", "chameleon", "udop", "florence2", "idefics2", "pix2struct"}


def test_every_family_is_supported_or_has_a_reason():
    types = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert types - FAMILIES.keys() >= KNOWN
    for model_type in types - FAMILIES.keys():
        assert explain_refusal(model_type)
    assert not REASONS.keys() & FAMILIES.keys()
    assert explain_refusal("of tomorrow") == NOT_CHECKED
    assert all(explain_refusal(model_type) != NOT_CHECKED for model_type in KNOWN)


@pytest.mark.parametrize("model_type", ["mllama", "fuyu", "glm5_next"])
def test_the_reason_and_what_to_do_instead_are_told(model_type):
    model = torch.nn.Module()
    model.config = AutoConfig.for_model(model_type)
    with pytest.raises(UserError) as error:
        get_family(model)
    assert explain_refusal(model_type) in str(error.value) and "sparsecut.build" in str(error.value)
