"""An upgraded model: its base untouched, identity before training, what is saved, and errors."""

import copy
import json
import re

import pytest
import torch
from helpers.bases import randomize_fusion
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import sparsecut
from sparsecut import load, upgrade
from sparsecut.fingerprint import base_hash
from sparsecut.hooks import RECOMPUTES_HOOKS
from sparsecut.processing_upgraded import cut_fine_views
from sparsecut.schema import UserError

IMAGE = "<image>"
PROMPTS = [
    f"USER : {IMAGE} what is it ? ASSISTANT :",
    f"USER : {IMAGE} is it a red cat ? ASSISTANT :",
]
SHORT = {"max_new_tokens": 5, "min_new_tokens": 5}


@pytest.fixture
def images():
    """Two smooth images of different sizes."""
    shapes = [
        Image.radial_gradient("L").resize((40, 24)),
        Image.linear_gradient("L").rotate(30).resize((17, 33)),
    ]
    return [
        Image.merge("RGB", [shape, shape.transpose(Image.Transpose.ROTATE_180), shape])
        for shape in shapes
    ]


def encode(processor, images, **settings):
    prompts = PROMPTS[: len(images)]
    return processor(images=images, text=prompts, padding=True, return_tensors="pt", **settings)


def find_hooked(model) -> list[str]:
    """Names of modules that have a hook or a wrapped method of ours."""
    names = []
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        wrapped = {"forward", "get_image_features"} & set(module.__dict__)
        if wrapped or any(is_ours(hook) for hook in hooks):
            names.append(name)
    return names


def is_ours(hook) -> bool:
    return "sparsecut" in getattr(getattr(hook, "func", hook), "__module__", "")


def generate(model, inputs, mode):
    torch.manual_seed(2)
    return model.generate(**inputs, **SHORT, **mode)


def test_nothing_changes_until_the_shortcuts_are_trained(llava, images):
    base, base_processor = llava
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    base_inputs = encode(base_processor, images)
    logits = base(**base_inputs).logits
    modes = [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True},
    ]
    if not RECOMPUTES_HOOKS:
        modes.append({"prefill_chunk_size": 3})
    expected = [generate(base, base_inputs, mode) for mode in modes]

    model, processor = upgrade(base, processor=base_processor)
    inputs = encode(processor, images)
    assert set(inputs) == {*base_inputs, "fine_pixel_values"}
    assert all(torch.equal(inputs[name], value) for name, value in base_inputs.items())
    assert torch.equal(model(**inputs).logits, logits)
    for mode, tokens in zip(modes, expected, strict=True):
        assert torch.equal(generate(model, inputs, mode), tokens), mode
    assert model.base is base
    assert all(torch.equal(weights[name], value) for name, value in base.state_dict().items())


def test_trained_shortcuts_act_on_the_model_and_leave_the_base_alone(llava, images):
    base, base_processor = llava
    base_inputs = encode(base_processor, images)
    logits = base(**base_inputs).logits
    model, processor = upgrade(base, processor=base_processor)
    randomize_fusion(model)
    inputs = encode(processor, images)
    change = (model(**inputs).logits - logits).abs().amax(-1)
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    assert (change[0, :first] == 0).all()
    assert (change[0, first:] > 1e-4).all()
    assert torch.equal(base(**base_inputs).logits, logits), "the base alone has no shortcuts"

    copied = copy.deepcopy(model)
    assert torch.equal(copied(**inputs).logits, model(**inputs).logits)
    assert model.detach() is base
    assert not find_hooked(base)
    assert torch.equal(base(**base_inputs).logits, logits)


@pytest.mark.parametrize(
    "mode", [{}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}]
)
def test_cached_equals_uncached(llava, images, mode):
    model, processor = upgrade(llava[0], processor=llava[1])
    randomize_fusion(model)
    inputs = encode(processor, images)
    if RECOMPUTES_HOOKS and "prefill_chunk_size" in mode:
        with pytest.raises(UserError, match=r"transformers>=5\.23"):
            model.generate(**inputs, **SHORT, **mode)
        return
    out = model.generate(
        **inputs, **SHORT, **mode, output_logits=True, return_dict_in_generate=True
    )
    length = inputs["input_ids"].shape[1]
    mask = torch.ones_like(out.sequences)
    mask[:, :length] = inputs["attention_mask"]
    longer = dict(inputs) | {"input_ids": out.sequences, "attention_mask": mask}
    logits = model(**longer, use_cache=False).logits[:, length - 1 : -1]
    assert torch.allclose(logits, torch.stack(out.logits, 1), atol=1e-5)


def test_a_batch_answers_as_its_rows_do(llava, images):
    model, processor = upgrade(llava[0], processor=llava[1])
    randomize_fusion(model)
    together = model(**encode(processor, images)).logits[:, -1]
    for row, image in enumerate(images):
        alone = processor(images=[image], text=[PROMPTS[row]], return_tensors="pt")
        assert torch.allclose(model(**alone).logits[0, -1], together[row], atol=1e-5)


def test_gradients_reach_the_shortcuts_and_text_alone_trains_too(llava, images):
    model, processor = upgrade(llava[0], processor=llava[1])
    model.train().requires_grad_(False)
    model.fusion.requires_grad_(True)
    randomize_fusion(model)
    inputs = encode(processor, images)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for parameter in model.fusion.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0

    model.zero_grad(set_to_none=True)
    text = processor(text=["USER : what is it ?"], return_tensors="pt")
    model(**text, labels=text["input_ids"]).loss.backward()
    for parameter in model.fusion.parameters():
        assert parameter.grad is not None, "every rank needs a gradient of every parameter"


def test_fine_views_lie_under_the_coarse_view(llava, images):
    image_processor = llava[1].image_processor
    coarse = image_processor(images=images, return_tensors="pt")["pixel_values"]
    fine = cut_fine_views(image_processor, images, 2)
    assert fine.shape == (2, 4, 3, 16, 16)
    upper = torch.cat([fine[:, 0], fine[:, 1]], -1)
    lower = torch.cat([fine[:, 2], fine[:, 3]], -1)
    small = torch.nn.functional.avg_pool2d(torch.cat([upper, lower], -2), 2)
    for view, expected in zip(small, coarse, strict=True):
        assert torch.corrcoef(torch.stack([view.flatten(), expected.flatten()]))[0, 1] > 0.98


def test_shortcuts_are_saved_apart_and_found_again(llava, images, tmp_path):
    base, base_processor = llava
    base.save_pretrained(tmp_path / "base")
    base_processor.save_pretrained(tmp_path / "base")
    model, processor = upgrade(tmp_path / "base")
    randomize_fusion(model)
    inputs = encode(processor, images)
    expected = model(**inputs).logits
    folder = tmp_path / "shortcuts"
    model.save_fusion(folder)
    assert {path.name for path in folder.iterdir()} == {"fusion.safetensors", "fusion.json"}
    for arguments in ({}, {"base": base, "processor": base_processor}):
        loaded, processor = load(folder, **arguments)
        assert torch.equal(loaded(**inputs).logits, expected)
        fine = encode(processor, images)["fine_pixel_values"]
        assert torch.equal(fine, inputs["fine_pixel_values"])

    (folder / "fusion.safetensors").unlink()
    with pytest.raises(UserError, match=re.escape(str(folder))):
        load(folder)


def test_a_whole_model_is_an_ordinary_one(llava, images, tmp_path):
    model, processor = upgrade(llava[0], processor=llava[1])
    randomize_fusion(model)
    expected = model(**encode(processor, images)).logits
    sparsecut.building.save(model, processor, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = encode(AutoProcessor.from_pretrained(tmp_path), images)
    assert type(loaded) is sparsecut.SparseCutUpgrade
    assert torch.equal(loaded(**inputs).logits, expected)
    loaded, processor = load(tmp_path)
    assert torch.equal(loaded(**encode(processor, images)).logits, expected)


def test_another_base_is_refused_and_nothing_left_on_it(llava, tmp_path):
    base, base_processor = llava
    model, _ = upgrade(base, processor=base_processor)
    model.save_fusion(tmp_path)
    other = copy.deepcopy(model.detach())
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    with pytest.raises(UserError, match="check_base") as error:
        load(tmp_path, other, processor=base_processor)
    assert base_hash(base) in str(error.value)
    assert base_hash(other) in str(error.value)
    assert not find_hooked(other)
    loaded, _ = load(tmp_path, other, processor=base_processor, check_base=False)
    assert loaded.base is other
    in_bfloat16 = copy.deepcopy(base).to(torch.bfloat16)
    assert base_hash(base) == base_hash(in_bfloat16) != base_hash(other)


SHORTCUTS_TOO_DEEP = [{"taps": [1], "layer": 0}, {"taps": [2], "layer": 9}]
TAP_TOO_DEEP = [{"taps": [1], "layer": 0}, {"taps": [7], "layer": 1}]
LONGER_PROMPT = [{"taps": [1], "layer": layer, "mix": "tokens"} for layer in (0, 1)]
REFUSED_PLANS = {
    "no shortcut": ("llava", "no shortcut"),
    "a longer prompt": ({"tiles": 2, "shortcuts": LONGER_PROMPT}, "'tokens'"),
    "not an identity": ({"method": "sparsecut", "gate": "one"}, "without effect"),
    "too deep": ({"shortcuts": SHORTCUTS_TOO_DEEP}, "layer 9"),
    "no such tap": ({"shortcuts": TAP_TOO_DEEP}, "tap 7"),
}


@pytest.mark.parametrize("plan, problem", REFUSED_PLANS.values(), ids=REFUSED_PLANS)
def test_plans_that_cannot_be_added_are_refused_before_anything_is_touched(llava, plan, problem):
    with pytest.raises(UserError, match=problem):
        upgrade(llava[0], plan, processor=llava[1])
    assert not find_hooked(llava[0])


def test_a_model_that_cannot_be_upgraded_is_named(llava, tmp_path):
    base, base_processor = llava
    model, _ = upgrade(base, processor=base_processor)
    for wrong, problem in (
        (model, r"model\.detach"),
        (base.get_decoder(), r"LlamaModel \(llama\).*paligemma.*qwen2_5_vl"),
        (base.model, "LlavaModel.*llava.*AutoModelForImageTextToText"),
        (tmp_path, re.escape(str(tmp_path))),
    ):
        with pytest.raises(UserError, match=problem):
            upgrade(wrong)


def test_inputs_of_the_base_alone_are_refused(llava, images):
    base, base_processor = llava
    inputs = encode(base_processor, images)
    features = base.get_image_features(inputs["pixel_values"])
    model, _ = upgrade(base, processor=base_processor)
    with pytest.raises(UserError, match="fine_pixel_values") as error:
        model(**inputs)
    assert {"4", "2"} <= set(re.findall(r"\d+", str(error.value)))
    with pytest.raises(UserError, match="get_image_features"):
        model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": features})


def test_shortcuts_without_a_known_base_need_one(tmp_path):
    facts = {"base": None, "base_type": "llava", "base_digest": "0", "plan": {}, "depths": [4, 4]}
    (tmp_path / "fusion.json").write_text(json.dumps(facts))
    (tmp_path / "fusion.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="base="):
        load(tmp_path)


def test_a_tokenizer_in_place_of_a_processor_is_refused(llava, tmp_path):
    """transformers returns one silently where the class of the processor is not known."""
    for part in llava:
        part.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        file.write_text(file.read_text().replace("LlavaProcessor", "UnknownProcessor"))
    with pytest.raises(UserError, match="UnknownProcessor"):
        upgrade(tmp_path)


NOT_FOR_UPGRADES = {
    "llava",
    "hires_tokens",
    "hires_channels",
    "cli",
    "official_7b_as_run",
    "official_13b",
    # these change the input alone
    "dense_connector_sti",
    "dense_connector_sci",
    "dense_connector_dci",
    "external_direct",
    "mmfuser",
    "molmo",  # and has fewer tokens
}


@pytest.mark.parametrize("method", sparsecut.METHODS)
def test_every_method_upgrades_without_effect_or_is_refused(llava, images, method):
    base, base_processor = llava
    if method in NOT_FOR_UPGRADES:
        with pytest.raises(UserError):
            upgrade(base, method, processor=base_processor)
        assert not find_hooked(base)
        return
    check_identity_and_effect(base, base_processor, images, method)


def test_tied_shortcuts_upgrade_without_effect(llava, images):
    check_identity_and_effect(*llava, images, {"method": "cli", "gate": "zero", "rank": 2})


@pytest.mark.parametrize("mix", ["pick", "channels", "blend", "attend", "enrich"])
def test_every_mixer_and_start_works(llava, images, mix):
    for gate, shared in (("zero", True), ("zero_vector", False), ("zero_projector", False)):
        plan = {"method": "sparsecut", "mix": mix, "gate": gate, "shared": shared, "count": 2}
        check_identity_and_effect(*llava, images, plan)


def check_identity_and_effect(base, base_processor, images, plan):
    logits = base(**encode(base_processor, images)).logits
    model, processor = upgrade(base, plan, processor=base_processor)
    inputs = encode(processor, images)
    assert torch.equal(model(**inputs).logits, logits)
    randomize_fusion(model)
    assert (model(**inputs).logits - logits).abs().max() > 1e-3
