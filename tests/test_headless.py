"""`AutoModel` loads a saved folder without the head; its states are the whole model's."""

import copy
import logging
import pickle

import pytest
import torch
from helpers import checks
from helpers.bases import (
    DEFAULT_FAMILIES,
    build_base,
    build_fine_views,
    build_inputs,
    randomize_fusion,
)
from helpers.checks import IMAGE, batch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

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
    for model in (whole, body, upgraded, upgraded.base_model):
        assert model.get_encoder("image") is model.vision_backbone()
        assert any(model.get_decoder() is module for module in model.language_backbone().modules())


def test_the_base_model_of_a_compiled_model_has_no_head():
    whole = checks.join()
    inputs = batch(whole)
    whole.compile(backend="eager")
    assert "logits" not in whole.base_model(**inputs)


def test_a_cache_goes_on_without_the_head():
    whole = checks.join()
    body = whole.base_model
    inputs = batch(whole, [[5, IMAGE, 6, 7]])
    states = body(**inputs).last_hidden_state
    ids = inputs["input_ids"]
    begun = body(input_ids=ids[:, :-1], pixel_values=inputs["pixel_values"], use_cache=True)
    rest = body(input_ids=ids[:, -1:], past_key_values=begun.past_key_values, continued=True)
    torch.testing.assert_close(rest.last_hidden_state[:, -1], states[:, -1], atol=1e-5, rtol=1e-4)


@pytest.fixture(params=["joined", "tied", "upgraded"])
def saved(request, tmp_path):
    """A saved whole model, its inputs, and the states that the headless one gives."""
    if request.param == "upgraded":
        whole, _ = upgrade(build_base("qwen2_5_vl"))
        inputs = build_inputs("qwen2_5_vl", randomize_fusion(whole).base)
    else:
        whole = checks.join(language={"joined": "llama", "tied": "gpt2"}[request.param])
        inputs = batch(whole)
    save(whole, NoProcessor(), tmp_path)
    return tmp_path, inputs, compute_states(AutoModel.from_pretrained(tmp_path), inputs)


@torch.no_grad()
def compute_states(model, inputs):
    return model.eval()(**inputs).last_hidden_state


def test_a_headless_model_is_saved_with_its_code_and_copied_like_any_other(saved, tmp_path):
    folder, inputs, states = saved
    model = AutoModel.from_pretrained(folder, device_map="cpu")
    assert torch.equal(compute_states(model, inputs), states)
    save(model, NoProcessor(), tmp_path / "again")
    again, info = AutoModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    files = {path.name for path in (tmp_path / "again").glob("*.py")}
    assert files == {path.name for path in folder.glob("*.py")} and "hooks.py" in files
    for copied in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(compute_states(copied, inputs), states)


def test_a_headless_model_is_made_of_a_configuration_and_in_half_precision(saved):
    folder, inputs, states = saved
    new = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    assert compute_states(new, inputs).shape == states.shape and not head_names(new)
    half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert compute_states(half, inputs).dtype == torch.bfloat16


def test_a_headless_model_takes_an_adapter(saved, tmp_path):
    folder, inputs, states = saved
    settings = LoraConfig(r=2, target_modules=r".*(q_proj|c_attn)", init_lora_weights=False)
    adapted = get_peft_model(AutoModel.from_pretrained(folder), settings)
    expected = compute_states(adapted, inputs)
    assert not torch.equal(expected, states)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(compute_states(again, inputs), expected)
