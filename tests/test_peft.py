"""PEFT on whole models: adapters on encoder and language model, the fusion trained in full."""

import pytest
import torch
from helpers.peft_checks import WHOLE, adapt, check_an_adapter, start, train_a_step
from helpers.tiny import tiny_model
from helpers.trl_runs import KINDS

from sparsecut.schema import UserError

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("kind", ["built", "llava"])
def test_an_adapter_trains_merges_and_loads(kind, tmp_path):
    check_an_adapter(kind, tmp_path)


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
