"""Adapters that a model's parts have are saved beside it, and put back on by whoever loads it."""

import pytest
import torch
from helpers.ecosystem import encode_messages, upgraded_with_processor
from helpers.tiny import tiny_language, tiny_model
from transformers import AutoModel, AutoModelForImageTextToText

from sparsecut.adapters import (
    add_adapters,
    get_adapters,
    merge_adapters,
    save_adapters,
)
from sparsecut.building import load, save
from sparsecut.config.recipe import Lora
from sparsecut.schema import UserError

pytest.importorskip("peft")
BUILDERS = {
    "built": tiny_model,
    "tied": lambda: tiny_model(language=tiny_language(tie=True)),
    "upgraded": upgraded_with_processor,
}


def build_adapted(kind: str):
    """(model, processor): adapters with an effect on encoder and language model."""
    model, processor = BUILDERS[kind]()
    settings = Lora(r=2, alpha=4, targets=("q_proj", "v_proj"))
    add_adapters(model, ("language:lora", "vision:lora"), settings)
    for adapter in get_adapters(model).values():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    return model.eval(), processor


@torch.no_grad()
def get_logits(model, processor):
    return model.eval()(**encode_messages(processor), use_cache=False).logits


@pytest.mark.parametrize("kind", BUILDERS)
def test_adapters_come_back_with_every_way_to_load(kind, tmp_path):
    model, processor = build_adapted(kind)
    expected = get_logits(model, processor)
    save(model, processor, tmp_path / "saved")
    assert "adapters" in (tmp_path / "saved/README.md").read_text()
    again, _ = load(tmp_path / "saved")
    assert set(get_adapters(again)) == {"language", "vision"}
    assert torch.equal(get_logits(again, processor), expected)
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert torch.equal(get_logits(auto, processor), expected)
    headless = AutoModel.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        inputs = encode_messages(processor)
        states = headless(**inputs, use_cache=False).last_hidden_state
        whole = model(**inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(states, whole)
    # What is saved once more is the same, and a merged model is not adapted twice.
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(get_logits(load_model(tmp_path / "again"), processor), expected)
    merge_adapters(again)
    with pytest.raises(UserError, match="adapters"):
        again.save_pretrained(tmp_path / "again")
    again.save_pretrained(tmp_path / "merged")
    merged = get_logits(load_model(tmp_path / "merged"), processor)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def load_model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


def test_shortcuts_alone_are_saved_with_adapters(tmp_path):
    model, processor = build_adapted("upgraded")
    model.save_fusion(tmp_path)
    assert (tmp_path / "adapters/language/adapter_config.json").is_file()
    base = upgraded_with_processor()[0].detach()
    again, processor = load(tmp_path, base=base, processor=processor)
    assert torch.equal(get_logits(again, processor), get_logits(model, processor))
    plain, _ = upgraded_with_processor()
    with pytest.raises(UserError, match="language"):
        plain.save_fusion(tmp_path)


def test_weights_of_a_model_without_its_adapters_are_refused():
    adapted, _ = build_adapted("built")
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    with pytest.raises(UserError, match="merge_adapters"):
        adapted.load_state_dict(tiny_model(seed=1)[0].state_dict(), strict=False)
    for name, value in adapted.state_dict().items():
        assert torch.equal(value, before[name])
    adapted.load_state_dict(before)
    adapted.load_state_dict({"fusion.gates": before["fusion.gates"]}, strict=False)


def test_an_adapter_of_no_part_is_refused_by_the_auto_classes(tmp_path):
    model, processor = build_adapted("built")
    save(model, processor, tmp_path)
    save_adapters(model, tmp_path)
    (tmp_path / "adapters/vision").rename(tmp_path / "adapters/ears")
    with pytest.raises(UserError, match="ears"):
        load_model(tmp_path)
