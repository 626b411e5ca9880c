"""What vLLM would not serve exactly is refused before anything is loaded."""

import re

import pytest
import torch
from helpers.tiny import SPARSE, tiny_model
from helpers.vllm_bases import BASES as COMPARED_BASES
from helpers.vllm_bases import make_upgraded
from helpers.vllm_models import FAMILIES as COMPARED
from helpers.vllm_models import draw_images
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, LlamaConfig, WhisperConfig

from sparsecut import SparseCutConfig
from sparsecut.schema import UserError
from sparsecut.serving.vllm.checks import (
    BASES,
    FAMILIES,
    WHY_NOT,
    check_adapters,
    check_servable,
)
from sparsecut.serving.vllm.upgraded_vision import UpgradedVision
from sparsecut.serving.vllm.vision import VisionPart


def test_every_family_that_is_served_is_compared():
    assert set(FAMILIES) == set(COMPARED)


def test_every_base_that_is_served_is_compared():
    assert set(BASES) == set(COMPARED_BASES)


def test_a_built_llama_is_served():
    check_servable(tiny_model()[0].config)


@pytest.mark.parametrize("gate", ["context", "context_zero"])
def test_gates_that_need_whole_images(gate):
    with pytest.raises(UserError, match=f"gate='{gate}'"):
        check_servable(tiny_model({**SPARSE, "gate": gate})[0].config)


def test_decoders_that_were_never_compared():
    config = GPT2Config(n_embd=24, n_layer=4, n_head=2, vocab_size=40)
    model, _ = tiny_model(language=AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        check_servable(model.config)


def test_audio():
    config = WhisperConfig(
        d_model=32, encoder_layers=4, encoder_attention_heads=2, max_source_positions=50
    )
    audio = SparseCutConfig(
        vision_config=config,
        text_config=LlamaConfig(num_hidden_layers=4),
        plan={"method": "sparsecut", "tiles": 0},
    )
    with pytest.raises(UserError, match="audio"):
        check_servable(audio)


@pytest.mark.parametrize("part", ["text_config", "vision_config", None])
def test_quantized_weights(part):
    config = tiny_model()[0].config
    holder = getattr(config, part) if part else config
    holder.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(UserError, match="quantization_config"):
        check_servable(config)


@pytest.mark.parametrize(
    ("parts", "takes_lora", "is_refused"),
    [
        ([], False, False),
        (["language"], False, True),
        (["language"], True, False),
        (["vision"], True, True),
        (["language", "vision"], True, True),
    ],
)
def test_adapters_beside_a_model(tmp_path, parts, takes_lora, is_refused):
    for part in parts:
        (tmp_path / "adapters" / part).mkdir(parents=True)
        (tmp_path / "adapters" / part / "adapter_config.json").write_text("{}")
    if not is_refused:
        return check_adapters(str(tmp_path), takes_lora)
    with pytest.raises(UserError, match="adapter"):
        check_adapters(str(tmp_path), takes_lora)


def test_vllm_without_the_plug_in_is_told_what_to_do():
    model, _ = tiny_model()
    model.config.text_config._attn_implementation = "vllm"  # as its general backend sets it
    with pytest.raises(UserError, match="plug-in"):
        AutoModel.from_config(model.config)


HALVES = {
    "squash": (SPARSE, {}),
    "native": (SPARSE, {"coarse": "native"}),
    "tied": ({"method": "cli", "gate": "zero", "rank": 2}, {}),
    "pooled": ("molmo", {"coarse": "native"}),
    "blended": ({"shortcuts": [{"taps": [1, -2], "layer": 0, "mix": "blend"}]}, {}),
}


@pytest.mark.parametrize("name", HALVES)
def test_the_half_that_reads_images_gives_what_the_model_gives(name):
    plan, settings = HALVES[name]
    model, processor = tiny_model(plan, **settings)
    check_servable(model.config)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    half = VisionPart(model.config)
    weights = model.state_dict()
    half.load({n: x for n, x in weights.items() if not n.startswith("language_model.")})
    image = Image.effect_noise((40, 24), 80).convert("RGB")
    inputs = processor(images=[image], text=processor.image_token, return_tensors="pt")
    given = {n: inputs[n] for n in ("pixel_values", "image_grids") if n in inputs}
    with torch.no_grad():
        features = model.get_image_features(**given)
        (packed,) = half(*given.values())
    layers = [features.pooler_output, *(features.deepstack_features or ())]
    assert torch.equal(packed, torch.cat([layer[0] for layer in layers], dim=-1))


@pytest.fixture(scope="module", params=COMPARED_BASES)
def upgraded(request):
    """(model, processor, how an image is written) of one base."""
    return make_upgraded(request.param)


def test_an_upgrade_is_served(upgraded):
    check_servable(upgraded[0].config)


def test_bases_that_were_never_compared(upgraded, monkeypatch):
    config = upgraded[0].config
    monkeypatch.setattr("sparsecut.serving.vllm.checks.BASES", ("another",))
    with pytest.raises(UserError, match=config.base_config.model_type):
        check_servable(config)


@pytest.mark.parametrize("upgraded", ["llava"], indirect=True)
@pytest.mark.parametrize("name", WHY_NOT)
def test_bases_that_were_compared_and_differ(upgraded, monkeypatch, name):
    base_config = upgraded[0].config.base_config
    monkeypatch.setattr(type(base_config), "model_type", name)
    with pytest.raises(UserError, match=re.escape(WHY_NOT[name])):
        check_servable(upgraded[0].config)


def test_decoders_of_bases_that_were_never_compared(upgraded, monkeypatch):
    monkeypatch.setattr("sparsecut.serving.vllm.checks.DECODERS", ("another",))
    with pytest.raises(UserError, match="ForCausalLM"):
        check_servable(upgraded[0].config)


@torch.no_grad()
def test_the_half_of_an_upgrade_that_reads_images_gives_what_the_model_adds(upgraded):
    model, processor, image = upgraded
    half = UpgradedVision(model.config, torch.float32).eval()
    weights = model.state_dict()
    names = [name for name in weights if half.name_language_weight(name) is None]
    half.load({name: weights[name] for name in names})
    images = draw_images(3)
    inputs = processor(images=images, text=" ".join([image] * 3), return_tensors="pt")
    named = {"input_ids", "attention_mask", "mm_token_type_ids"}
    given = {name: values for name, values in inputs.items() if name not in named}
    sizes = [(one.height, one.width) for one in images]
    rows = processor._get_num_multimodal_tokens(sizes).num_image_patches
    packed = torch.cat(half.encode(rows, dict(given)))
    added = record_additions(model, inputs)
    assert set(half.layers) == set(added)
    parts = packed.split(model.config.text_config.hidden_size, dim=-1)
    for part, layer in zip(parts[1:], half.layers, strict=True):
        torch.testing.assert_close(part, added[layer], rtol=1e-4, atol=1e-4)


def record_additions(model, inputs) -> dict[int, torch.Tensor]:
    """What a model adds before each layer at its image tokens: layer -> [tokens, H].

    It is what enters a layer, less what the layer before returned.
    """
    is_image = inputs["input_ids"] == model.config.image_token_id
    before, entered, hooks = {}, {}, []
    layers = model.language_backbone().layers

    def note(states, number):
        return lambda _, args: states.update({number: args[0]})

    def note_output(number):
        return lambda _, args, output: before.update({number: output})

    # Around our own hook, which adds the features.
    hooks.append(layers[0].register_forward_pre_hook(note(before, 0), prepend=True))
    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(note(entered, number)))
        hooks.append(layer.register_forward_hook(note_output(number + 1)))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    added = {number: (states - before[number])[is_image] for number, states in entered.items()}
    return {number: values for number, values in added.items() if values.any()}
