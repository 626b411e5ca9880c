"""PEFT on whole models: adapters on encoder and language model, the fusion trained in full."""

import copy

import pytest
import torch
from helpers.tiny import tiny_model
from helpers.trl_runs import KINDS, build_for_trl, encode_as_we_do

from sparsecut.building import load, save
from sparsecut.modeling_base import is_sparsecut_model
from sparsecut.schema import UserError

peft = pytest.importorskip("peft")
WHOLE = {"target_modules": "all-linear", "modules_to_save": ["fusion"]}
KINDS_OF_LORA = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


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


@pytest.mark.parametrize("settings", KINDS_OF_LORA.values(), ids=KINDS_OF_LORA)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_merges_and_loads(kind, settings, tmp_path):
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

    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(get_logits(again, batch), trained, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(get_logits(merged, batch), trained, rtol=1e-3, atol=1e-3)
    save(merged, processor, tmp_path / "whole")
    loaded, _ = load(tmp_path / "whole")
    assert torch.equal(get_logits(loaded, batch), get_logits(merged, batch))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(kind, reentrant):
    model, batch, _ = start(kind)
    adapted = adapt(model, init_lora_weights=False)
    adapted.train()(**batch).loss.backward()
    expected = {
        name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None
    }
    adapted.zero_grad()
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapted(**batch).loss.backward()
    for name, gradient in expected.items():
        found = dict(adapted.named_parameters())[name].grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_preparing_for_quantized_training_freezes_and_the_fusion_is_trained_after(kind):
    model, batch, _ = start(kind)
    model.to(torch.bfloat16)
    prepared = peft.prepare_model_for_kbit_training(model)
    assert not any(p.requires_grad for p in prepared.parameters())
    adapted = adapt(prepared)
    assert any("fusion" in name for name in train_a_step(adapted, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_targets_that_match_the_fusion_leave_its_layers_whole(kind):
    model, _, _ = start(kind)
    adapted = adapt(model, target_modules=r".*(q_proj|v_proj|qkv|linear_[12])")
    inside = [name for name, _ in adapted.named_modules() if "lora_A" in name]
    assert inside
    assert not any("fusion" in name for name in inside)


def test_shortcuts_that_could_never_learn_are_refused_and_frozen_new_ones_told(caplog):
    zero = {"method": "sparsecut", "pattern": "sparse", "gate": "zero"}
    inside = peft.get_peft_model(tiny_model(zero)[0], peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(UserError, match="modules_to_save"):
        inside.train()
    assert not inside.eval().training
    settings = peft.LoraConfig(target_modules=r".*language_model.*q_proj")
    peft.get_peft_model(tiny_model(zero)[0], settings).train()
    assert "modules_to_save" in caplog.text
    caplog.clear()
    for plan in (zero, {**zero, "gate": "one"}):
        peft.get_peft_model(tiny_model(plan)[0], peft.LoraConfig(**WHOLE)).train()
    learned = tiny_model(zero)[0]
    torch.nn.init.ones_(learned.fusion.gates)
    peft.get_peft_model(learned, peft.LoraConfig(target_modules="all-linear")).train()
    assert "modules_to_save" not in caplog.text
