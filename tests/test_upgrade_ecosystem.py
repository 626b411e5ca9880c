"""An upgraded model with adapters, on quantized bases, and spread over memory and disk."""

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
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from sparsecut import load, upgrade
from sparsecut.fingerprint import base_hash
from sparsecut.schema import UserError

LORA = {"target_modules": r".*language_model.*q_proj", "init_lora_weights": False}


def import_peft():
    return pytest.importorskip("peft", reason="peft is not installed")


def skip_where_transformers_refuses_peft():
    """Transformers' own `add_adapter` takes only a PEFT of its time."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError:
        version = import_peft().__version__
        pytest.skip(f"this transformers needs PEFT {MIN_PEFT_VERSION}, and {version} is installed")


@pytest.mark.parametrize("how", ["wrapped", "added"])
def test_a_base_with_an_adapter_answers_as_before_and_takes_saved_shortcuts(how, tmp_path):
    settings = import_peft().LoraConfig(**LORA)
    trained, inputs, _ = tiny_upgraded()
    trained.save_fusion(tmp_path)
    base, base_inputs = tiny_base()
    plain = get_logits(base, base_inputs)
    known_hash = base_hash(base)
    if how == "wrapped":
        with_adapter = import_peft().get_peft_model(base, settings)
    else:
        skip_where_transformers_refuses_peft()
        base.add_adapter(settings)
        with_adapter = base
    adapted = get_logits(base, base_inputs)
    assert not torch.equal(adapted, plain)
    assert base_hash(base) == known_hash

    model, _ = upgrade(with_adapter)
    assert model.base is base
    assert torch.equal(get_logits(model, inputs), adapted)
    expected = base.generate(**base_inputs, **SHORT)
    assert torch.equal(model.generate(**inputs, **SHORT), expected)

    loaded, _ = load(tmp_path, model.detach(), processor=AnyProcessor())
    assert not torch.equal(get_logits(loaded, inputs), adapted)
    lora = [p for name, p in base.named_parameters() if "lora_" in name]
    assert_trains(loaded.requires_grad_(True), inputs, lora)
    assert torch.equal(get_logits(loaded.detach().eval(), base_inputs), adapted)


def test_an_adapter_on_top_trains_with_the_shortcuts_and_is_saved_with_them(tmp_path):
    peft = import_peft()
    model, inputs, logits = tiny_upgraded()
    settings = peft.LoraConfig(**LORA | {"init_lora_weights": True}, modules_to_save=["fusion"])
    adapted = peft.get_peft_model(model, settings)
    assert torch.equal(get_logits(adapted, inputs), logits)
    assert_trains(
        adapted, inputs, [p for name, p in adapted.named_parameters() if "lora_B" in name]
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    model.save_fusion(tmp_path / "shortcuts")
    expected = get_logits(adapted, inputs)

    loaded = peft.PeftModel.from_pretrained(tiny_upgraded()[0], tmp_path / "adapter").eval()
    assert torch.equal(get_logits(loaded, inputs), expected)
    tokens = adapted.generate(**inputs, **SHORT)
    assert torch.equal(loaded.generate(**inputs, **SHORT), tokens)

    alone, _ = load(tmp_path / "shortcuts", tiny_base()[0], processor=AnyProcessor())
    trained = model.fusion.modules_to_save["default"].state_dict()
    for name, value in alone.fusion.state_dict().items():
        assert torch.equal(value, trained[name])


def test_shortcuts_with_an_adapter_inside_are_not_saved_alone(tmp_path):
    model, _, _ = tiny_upgraded()
    peft = import_peft()
    peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(UserError, match="merge_and_unload"):
        model.save_fusion(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def quantize_by_torchao(base, folder):
    """Turn every linear layer of the language model into torchao's int8."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(base.model.language_model, torchao.Int8WeightOnlyConfig())
    return base


def quantize_by_bitsandbytes(base, folder):
    """Save a base and load it in the eight bits of bitsandbytes."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    base.save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=settings, device_map="cpu"
    ).eval()


class Int8Linear(torch.nn.Module):
    """A quantized layer where no library is installed: int8 weights, and one scale per row."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = torch.nn.Buffer(weight.abs().amax(1, keepdim=True) / 127)
        levels = (weight / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(levels, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return torch.nn.functional.linear(x, weight, self.bias)


def quantize_by_hand(base, folder):
    for layer in base.model.language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(block, name, Int8Linear(linear))
    return base


@pytest.mark.parametrize(
    "quantize", [quantize_by_hand, quantize_by_torchao, quantize_by_bitsandbytes]
)
def test_saved_shortcuts_load_on_a_quantized_base_and_train_there(quantize, tmp_path):
    trained, inputs, _ = tiny_upgraded()
    trained.save_fusion(tmp_path / "shortcuts")
    base, base_inputs = tiny_base()
    plain = get_logits(base, base_inputs)
    known_hash = base_hash(base)
    base = quantize(base, tmp_path / "base")
    quantized = get_logits(base, base_inputs)
    assert base_hash(base) == known_hash
    assert not torch.equal(quantized, plain)

    model, _ = upgrade(base)
    assert torch.equal(get_logits(model, inputs), quantized)
    expected = base.generate(**base_inputs, **SHORT)
    assert torch.equal(model.generate(**inputs, **SHORT), expected)

    model, _ = load(tmp_path / "shortcuts", model.detach(), processor=AnyProcessor())
    for loaded, saved in zip(model.fusion.parameters(), trained.fusion.parameters(), strict=True):
        assert torch.equal(loaded, saved)
    assert not torch.equal(get_logits(model, inputs), quantized)
    model.requires_grad_(False)
    model.fusion.requires_grad_(True)
    assert_trains(model, inputs)


def test_a_decoder_without_floating_weights_is_refused():
    base, base_inputs = tiny_base()
    before = get_logits(base, base_inputs)
    quantized = copy.deepcopy(base)
    for parameter in quantized.model.language_model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(torch.int8)
    with pytest.raises(UserError, match="LlamaModel has no floating-point weight"):
        upgrade(quantized)
    assert not quantized.model.language_model.layers[0]._forward_pre_hooks
    assert torch.equal(get_logits(base, base_inputs), before)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_an_offloaded_model_answers_as_one_in_memory(offload, tmp_path):
    model, inputs, logits = tiny_upgraded()
    tokens = model.generate(**inputs, **SHORT)
    where = {"offload_dir": tmp_path} if offload is disk_offload else {}
    offload(model, execution_device="cpu", **where)
    assert torch.equal(get_logits(model, inputs), logits)
    assert torch.equal(model.generate(**inputs, **SHORT), tokens)


BASE_DEVICES = {
    "model.vision_tower": "cpu",
    "model.multi_modal_projector": "disk",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "model.language_model.layers.0": "disk",
    "model.language_model.layers.1": "cpu",
    "model.language_model.layers.2": "disk",
    "model.language_model.layers.3": "disk",
    "lm_head": "cpu",
}


def test_a_device_map_over_memory_and_disk(tmp_path):
    model, inputs, logits = tiny_upgraded()
    tokens = model.generate(**inputs, **SHORT)
    known_hash = base_hash(model.base)
    model.save_pretrained(tmp_path / "whole")
    model.save_fusion(tmp_path / "shortcuts")
    plain, base_inputs = tiny_base()
    plain.save_pretrained(tmp_path / "base")

    def read(name, devices):
        return AutoModelForImageTextToText.from_pretrained(
            tmp_path / name, device_map=devices, offload_folder=tmp_path / "offloaded"
        ).eval()

    base = read("base", BASE_DEVICES)
    assert base.model.language_model.layers[0].mlp.up_proj.weight.is_meta
    assert base_hash(base) == known_hash
    upgraded, _ = upgrade(base)
    assert torch.equal(get_logits(upgraded, inputs), get_logits(plain, base_inputs))

    on_base, _ = load(tmp_path / "shortcuts", upgraded.detach(), processor=AnyProcessor())
    whole_devices = {f"base.{name}": device for name, device in BASE_DEVICES.items()}
    whole = read("whole", whole_devices | {"fusion": "disk"})
    for loaded in (whole, on_base):
        assert torch.equal(get_logits(loaded, inputs), logits)
        assert torch.equal(loaded.generate(**inputs, **SHORT), tokens)
