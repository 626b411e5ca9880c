"""Checks of adapters of PEFT on whole models."""

import copy

import pytest
import torch
from helpers.trl_runs import build_for_trl, encode_as_we_do

from sparsecut.building import load, save
from sparsecut.modeling_base import is_sparsecut_model

peft = pytest.importorskip("peft")
WHOLE = {"target_modules": "all-linear", "modules_to_save": ["fusion"]}


def start(kind):
    model, processor = build_for_trl(kind)
    return model, encode_as_we_do(processor), processor


def adapt(model, **settings):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **WHOLE | settings))


def get_logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def train_a_step(adapted, batch) -> list[str]:
    """One step of training; returns the names of what has changed."""
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02)
    for _ in range(2):  # LoRA's first matrix learns from the second step on
        adapted.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [name for name, p in trained.items() if not torch.equal(p, before[name])]


def check_an_adapter(kind: str, folder, **settings) -> None:
    """Assert that an adapter trains with the fusion, merges, and loads again."""
    model, batch, processor = start(kind)
    plain = copy.deepcopy(model)
    expected = get_logits(model, batch)
    adapted = adapt(model, **settings)
    assert is_sparsecut_model(adapted)
    torch.testing.assert_close(get_logits(adapted, batch), expected, rtol=1e-4, atol=1e-4)
    changed = train_a_step(adapted, batch)
    for part in ("vis", "language", "fusion.modules_to_save"):
        assert any(part in name for name in changed), part
    assert not [name for name in changed if "fusion" in name and "lora" in name]
    trained = get_logits(adapted, batch)
    assert not torch.allclose(trained, expected, atol=1e-3)
    with adapted.disable_adapter():
        torch.testing.assert_close(get_logits(adapted, batch), expected, rtol=1e-5, atol=1e-5)

    adapted.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(plain, folder / "adapter")
    torch.testing.assert_close(get_logits(again, batch), trained, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(get_logits(merged, batch), trained, rtol=1e-3, atol=1e-3)
    save(merged, processor, folder / "whole")
    loaded, _ = load(folder / "whole")
    assert torch.equal(get_logits(loaded, batch), get_logits(merged, batch))
