"""An upgraded model with adapters, on quantised bases, and spread over memory and disk."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from helpers.ecosystem import (
    SHORT,
    AnyProcessor,
    assert_trains,
    get_logits,
    tiny_base,
    tiny_upgraded,
)
from transformers import AutoModelForImageTextToText

from sparsecut import load, upgrade
from sparsecut.fingerprint import base_hash

LORA = {"target_modules": r".*language_model.*q_proj", "init_lora_weights": False}


def peft():
    return pytest.importorskip("peft", reason="adapters need peft, which is not installed")


@pytest.mark.parametrize("how", ["wrapped", "added"])
def test_a_base_with_an_adapter_answers_as_before_and_takes_saved_shortcuts(how, tmp_path):
    settings = peft().LoraConfig(**LORA)
    trained, inputs, _ = tiny_upgraded()
    trained.save_fusion(tmp_path)
    base, own = tiny_base()
    plain, known = get_logits(base, own), base_hash(base)
    given = peft().get_peft_model(base, settings) if how == "wrapped" else base
    if how == "added":
        base.add_adapter(settings)
    adapted = get_logits(base, own)
    assert not torch.equal(adapted, plain) and base_hash(base) == known
    model, _ = upgrade(given)
    assert model.base is base and torch.equal(get_logits(model, inputs), adapted)
    assert torch.equal(model.generate(**inputs, **SHORT), base.generate(**own, **SHORT))
    with_shortcuts, _ = load(tmp_path, model.detach(), processor=AnyProcessor())
    assert not torch.equal(get_logits(with_shortcuts, inputs), adapted)
    lora = [p for name, p in base.named_parameters() if "lora_" in name]
    assert_trains(with_shortcuts.requires_grad_(True), inputs, lora)
    assert torch.equal(get_logits(with_shortcuts.detach().eval(), own), adapted)


def test_an_adapter_on_top_trains_with_the_shortcuts_and_is_saved_with_them(tmp_path):
    model, inputs, before = tiny_upgraded()
    settings = peft().LoraConfig(**LORA | {"init_lora_weights": True}, modules_to_save=["fusion"])
    adapted = peft().get_peft_model(model, settings)
    assert torch.equal(get_logits(adapted, inputs), before)
    lora = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert_trains(adapted, inputs, lora)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.05)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    model.save_fusion(tmp_path / "shortcuts")
    want = get_logits(adapted, inputs)
    again = peft().PeftModel.from_pretrained(tiny_upgraded()[0], tmp_path / "adapter").eval()
    assert torch.equal(get_logits(again, inputs), want)
    assert torch.equal(again.generate(**inputs, **SHORT), adapted.generate(**inputs, **SHORT))
    alone, _ = load(tmp_path / "shortcuts", tiny_base()[0], processor=AnyProcessor())
    for name, value in alone.fusion.state_dict().items():
        assert torch.equal(value, model.fusion.modules_to_save["default"].state_dict()[name])


def test_shortcuts_with_an_adapter_inside_are_not_saved_alone(tmp_path):
    model, _, _ = tiny_upgraded()
    peft().get_peft_model(model, peft().LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.save_fusion(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def int8(base, folder):
    """Of a base, every linear layer of the language model in torchao's int8."""
    ao = pytest.importorskip(
        "torchao.quantization", reason="this needs torchao, which is not installed"
    )
    ao.quantize_(base.model.language_model, ao.Int8WeightOnlyConfig())
    return base


def eight_bits(base, folder):
    """A base loaded by transformers in bitsandbytes' eight bits."""
    pytest.importorskip("bitsandbytes", reason="this needs bitsandbytes, which is not installed")
    from transformers import BitsAndBytesConfig

    base.save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=settings, device_map="cpu"
    ).eval()


class Int8Linear(torch.nn.Module):
    """What quantisation does, in a few lines, where no library for it is installed: weights in
    int8, one scale a row.
    """

    def __init__(self, linear):
        super().__init__()
        self.scale = torch.nn.Buffer(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = torch.nn.Parameter(
            (linear.weight.detach() / self.scale).round().to(torch.int8), False
        )
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(
            x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias
        )


def by_hand(base, folder):
    for layer in base.model.language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(block, name, Int8Linear(linear))
    return base


@pytest.mark.parametrize("quantise", [by_hand, int8, eight_bits])
def test_saved_shortcuts_load_on_a_quantised_base_and_learn_there(quantise, tmp_path):
    trained, inputs, _ = tiny_upgraded()
    trained.save_fusion(tmp_path / "shortcuts")
    base, own = tiny_base()
    plain, known = get_logits(base, own), base_hash(base)
    base = quantise(base, tmp_path / "base")
    quantised = get_logits(base, own)
    assert base_hash(base) == known and not torch.equal(quantised, plain)
    model, _ = upgrade(base)
    assert torch.equal(get_logits(model, inputs), quantised)
    assert torch.equal(model.generate(**inputs, **SHORT), base.generate(**own, **SHORT))
    model, _ = load(tmp_path / "shortcuts", model.detach(), processor=AnyProcessor())
    assert all(
        torch.equal(p, q)
        for p, q in zip(model.fusion.parameters(), trained.fusion.parameters(), strict=True)
    )
    assert not torch.equal(get_logits(model, inputs), quantised)
    model.requires_grad_(False)
    model.fusion.requires_grad_(True)
    assert_trains(model, inputs)


def test_a_decoder_without_floating_weights_is_refused():
    base, own = tiny_base()
    before = get_logits(base, own)
    whole = copy.deepcopy(base)
    for p in whole.model.language_model.parameters():
        p.requires_grad_(False)
        p.data = p.data.to(torch.int8)
    with pytest.raises(ValueError, match="LlamaModel has no floating-point weight"):
        upgrade(whole)
    assert not whole.model.language_model.layers[0]._forward_pre_hooks
    assert torch.equal(get_logits(base, own), before)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_an_offloaded_model_answers_as_one_in_memory(offload, tmp_path):
    model, inputs, want = tiny_upgraded()
    answer = model.generate(**inputs, **SHORT)
    where = {"offload_dir": tmp_path} if offload is disk_offload else {}
    offload(model, execution_device="cpu", **where)
    assert torch.equal(get_logits(model, inputs), want) and torch.equal(
        model.generate(**inputs, **SHORT), answer
    )


def test_a_device_map_over_memory_and_disk(tmp_path):
    model, inputs, want = tiny_upgraded()
    answer, known = model.generate(**inputs, **SHORT), base_hash(model.base)
    model.save_pretrained(tmp_path / "whole")
    model.save_fusion(tmp_path / "shortcuts")
    plain, own = tiny_base()
    plain.save_pretrained(tmp_path / "base")
    deep = {f"model.language_model.layers.{i}": "disk" if i != 1 else "cpu" for i in range(4)}
    names = (
        "vision_tower",
        "language_model.embed_tokens",
        "language_model.norm",
        "language_model.rotary_emb",
    )
    places = deep | {f"model.{name}": "cpu" for name in names}
    places |= {"model.multi_modal_projector": "disk", "lm_head": "cpu"}
    whole_places = {f"base.{name}": place for name, place in places.items()} | {"fusion": "disk"}
    how = {"offload_folder": tmp_path / "offloaded"}
    whole = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "whole", device_map=whole_places, **how
    ).eval()
    base = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "base", device_map=places, **how
    ).eval()
    assert (
        base.model.language_model.layers[0].mlp.up_proj.weight.is_meta and base_hash(base) == known
    )
    fresh, _ = upgrade(base)
    assert torch.equal(get_logits(fresh, inputs), get_logits(plain, own))
    placed, _ = load(tmp_path / "shortcuts", fresh.detach(), processor=AnyProcessor())
    for one in (whole, placed):
        assert torch.equal(get_logits(one, inputs), want) and torch.equal(
            one.generate(**inputs, **SHORT), answer
        )
