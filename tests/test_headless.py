"""`AutoModel` loads a saved folder without the head; its states are the whole model's."""

import logging

import pytest
import torch
from helpers import checks
from helpers.bases import DEFAULT_FAMILIES, build_base, build_fine_views, build_inputs
from helpers.checks import IMAGE, batch
from transformers import AutoModel, AutoModelForImageTextToText

from sparsecut import upgrade
from sparsecut.building import save
from sparsecut.modeling import SparseCutForConditionalGeneration, SparseCutModel
from sparsecut.modeling_upgraded import SparseCutUpgrade, SparseCutUpgradeModel

# each names the part below its head differently: model, transformer, gpt_neox, and tied weights
LANGUAGES = ("llama", "gpt2", "gpt_neox", "gemma2")


class NoProcessor:
    """Saves nothing: these tests need models only."""

    def save_pretrained(self, folder):
        pass


def head_names(model) -> list[str]:
    return [name for name, _ in model.named_parameters() if "head" in name or "embed_out" in name]


@torch.no_grad()
def assert_same_states(whole, headless, inputs):
    """The headless model's last state is the whole model's last hidden state, to the bit."""
    expected = whole(**inputs, output_hidden_states=True)
    output = headless(**inputs, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, expected.hidden_states[-1])
    assert len(output.hidden_states) == len(expected.hidden_states)
    assert "logits" not in output


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_joined_model_loads_without_its_head(language, tmp_path, caplog):
    whole = checks.join(language=language)
    save(whole, NoProcessor(), tmp_path)
    with caplog.at_level(logging.WARNING):
        headless, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(headless) is SparseCutModel
    assert not head_names(headless) and headless.get_output_embeddings() is None
    assert not info["missing_keys"] and not info["unexpected_keys"] and not caplog.records
    inputs = batch(whole)
    assert_same_states(whole, headless, inputs)
    embeddings = headless.get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert_same_states(whole, headless, rest | {"inputs_embeds": embeddings})
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is SparseCutForConditionalGeneration
    assert torch.equal(again(**inputs).logits, whole(**inputs).logits)


@pytest.mark.parametrize("family", DEFAULT_FAMILIES)
def test_an_upgraded_model_loads_without_its_head(family, tmp_path):
    whole, _ = upgrade(build_base(family), {"method": "sparsecut", "pattern": "sparse"})
    torch.manual_seed(1)
    for parameter in whole.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save(whole, NoProcessor(), tmp_path)
    headless, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(headless) is SparseCutUpgradeModel
    assert not head_names(headless.base)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = build_inputs(family, whole.base)
    inputs |= build_fine_views(whole, inputs)
    assert_same_states(whole, headless, inputs)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is SparseCutUpgrade


def test_the_base_model_of_a_whole_model_shares_its_weights():
    whole = checks.join()
    body = whole.base_model
    assert type(body) is SparseCutModel and not head_names(body)
    names = dict(whole.named_parameters())
    assert all(names[name] is parameter for name, parameter in body.named_parameters())
    assert_same_states(whole, body, batch(whole))
    upgraded, _ = upgrade(build_base("llava"))
    inputs = build_inputs("llava", upgraded.base)
    inputs |= build_fine_views(upgraded, inputs)
    assert_same_states(upgraded, upgraded.base_model, inputs)


def test_a_cache_goes_on_without_the_head():
    whole = checks.join()
    body = whole.base_model
    inputs = batch(whole, [[5, IMAGE, 6, 7]])
    states = body(**inputs).last_hidden_state
    ids = inputs["input_ids"]
    begun = body(input_ids=ids[:, :-1], pixel_values=inputs["pixel_values"], use_cache=True)
    rest = body(input_ids=ids[:, -1:], past_key_values=begun.past_key_values, continued=True)
    torch.testing.assert_close(rest.last_hidden_state[:, -1], states[:, -1], atol=1e-5, rtol=1e-4)
