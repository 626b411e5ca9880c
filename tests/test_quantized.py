"""No quantizer touches the shortcuts, and what is quantized is saved and loaded as it is."""

import json
import shutil

import pytest
import torch
from helpers.tiny import tiny_language, tiny_llava, tiny_model, tiny_tokenizer, tiny_vision
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CLIPImageProcessorPil,
    GgufConfig,
)
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsecut import build, upgrade
from sparsecut.building import load, save
from sparsecut.loading import find_compute_dtype

NAME = "by_hand"


class ByHandConfig(QuantizationConfigMixin):
    """The configuration of a quantizer that needs no package."""

    def __init__(self, modules_to_not_convert=None, **kwargs):
        self.quant_method = NAME
        self.modules_to_not_convert = modules_to_not_convert


class MarkedLinear(nn.Linear):
    """A layer that was converted."""


class ByHandQuantizer(HfQuantizer):
    """Marks the layers that transformers tells a quantizer to convert, and quantizes nothing."""

    requires_calibration = False
    is_trainable = True

    def _process_model_before_weight_loading(self, model, **kwargs):
        from transformers.quantizers.quantizers_utils import should_convert_module

        skipped = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules
        )
        for name, module in model.named_modules():
            if type(module) is nn.Linear and should_convert_module(name, skipped):
                module.__class__ = MarkedLinear

    def is_serializable(self, **kwargs):
        return True


@pytest.fixture(scope="module", autouse=True)
def registered():
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = ByHandConfig
    auto.AUTO_QUANTIZER_MAPPING[NAME] = ByHandQuantizer
    yield
    del auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME]
    del auto.AUTO_QUANTIZER_MAPPING[NAME]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A built model and an upgraded one, each saved whole."""
    place = tmp_path_factory.mktemp("folders")
    save(*tiny_model(), place / "built")
    base, processor = tiny_llava()
    save(*upgrade(base, processor=processor), place / "whole")
    return place


def get_kinds(module) -> set[str]:
    return {type(one).__name__ for one in module.modules() if isinstance(one, nn.Linear)}


def make_by_hand(skipped=None):
    return ByHandConfig(skipped)


def make_bitsandbytes(**settings):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**settings)


def make_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(torchao.Int8WeightOnlyConfig())


QUANTIZERS = {
    "by hand": make_by_hand,
    "by hand, but the head": lambda: make_by_hand(["lm_head"]),
    "eight bits": lambda: make_bitsandbytes(load_in_8bit=True),
    "four bits": lambda: make_bitsandbytes(load_in_4bit=True),
    "torchao": make_torchao,
}


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", ["built", "whole"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_shortcuts_keep_their_values_whatever_the_quantizer(folders, which, quantizer, dtype):
    plain, _ = load(folders / which)
    settings = {} if dtype is None else {"dtype": dtype}
    config = QUANTIZERS[quantizer]()
    model, _ = load(folders / which, quantization_config=config, **settings)
    assert get_kinds(model.fusion) == {"Linear"}
    for value, expected in zip(model.fusion.parameters(), plain.fusion.parameters(), strict=True):
        assert value.dtype == find_compute_dtype(model) == (dtype or torch.float32)
        assert torch.equal(value, expected.to(value.dtype))
    if "hand" in quantizer:
        assert "MarkedLinear" in get_kinds(model.language_backbone())
        head = type(model.get_output_embeddings()).__name__
        assert head == "Linear"


def load_in_trl(folder, config):
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset

    adapter = peft.LoraConfig(target_modules="all-linear", modules_to_save=["fusion"])
    args = trl.SFTConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to=[])
    trainer = trl.SFTTrainer(
        str(folder),
        args,
        train_dataset=Dataset.from_list([{"text": "what is it"}]),
        quantization_config=config,
        peft_config=adapter,
    )
    assert any(p.requires_grad for p in trainer.model.fusion.parameters())
    return trainer.model.get_base_model()


def load_as_auto(folder, config):
    return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("read", [load_as_auto, load_in_trl])
@pytest.mark.parametrize("which", ["built", "whole"])
def test_no_way_to_load_quantizes_shortcuts(folders, tmp_path, which, read):
    folder = shutil.copytree(folders / which, tmp_path / "model")
    model = read(folder, make_by_hand())
    assert get_kinds(model.fusion) == {"Linear"}
    assert "MarkedLinear" in get_kinds(model.language_backbone())
    assert "MarkedLinear" in get_kinds(model.vision_backbone())


def test_parts_that_build_quantizes_leave_new_shortcuts_alone(tmp_path):
    tiny_vision().save_pretrained(tmp_path / "vision")
    tiny_language().save_pretrained(tmp_path / "language")
    tiny_tokenizer().save_pretrained(tmp_path / "language")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "vision")
    parts = str(tmp_path / "vision"), str(tmp_path / "language")
    model, _ = build(*parts, quantization_config=make_by_hand())
    assert get_kinds(model.fusion) == {"Linear"}
    assert "MarkedLinear" in get_kinds(model.language_backbone())
    assert all(value.requires_grad for value in model.fusion.parameters())


@pytest.mark.parametrize("which", ["built", "whole"])
@pytest.mark.parametrize("quantizer", ["eight bits", "torchao"])
def test_a_quantized_model_is_saved_and_loaded_as_it_is(folders, tmp_path, which, quantizer):
    model, processor = load(folders / which, quantization_config=QUANTIZERS[quantizer]())
    save(model, processor, tmp_path)
    again, _ = load(tmp_path)
    assert get_kinds(again) == get_kinds(model)
    for value, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert value.dtype == expected.dtype


@pytest.mark.parametrize("how", ["built", "whole", "saved before"])
def test_a_language_model_that_was_read_from_gguf_is_an_ordinary_one(folders, tmp_path, how):
    if how == "whole":
        base, processor = tiny_llava()
        base.config.quantization_config = GgufConfig()
        model, processor = upgrade(base, processor=processor)
    elif how == "built":
        language = tiny_language()
        language.config.quantization_config = GgufConfig()
        model, processor = tiny_model(language=language)
    else:
        model, processor = load(folders / "built")
    save(model, processor, tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    assert "quantization_config" not in file.read_text()
    if how == "saved before":
        values["text_config"]["quantization_config"] = {"quant_method": "gguf"}
        file.write_text(json.dumps(values))
    again, _ = load(tmp_path)
    assert getattr(again, "hf_quantizer", None) is None
    for value, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(value, expected)
