"""An upgraded model: its base untouched, identity before training, what is saved, and what is
refused.
"""

import copy
import json

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
)

import sparsecut
from sparsecut import load, upgrade
from sparsecut.fingerprint import base_hash
from sparsecut.processing_upgraded import fine_pixels

IMAGE = "<image>"


@pytest.fixture
def pictures():
    """Two smooth pictures of different sizes."""
    shapes = [
        Image.radial_gradient("L").resize((40, 24)),
        Image.linear_gradient("L").rotate(30).resize((17, 33)),
    ]
    return [
        Image.merge("RGB", [shape, shape.transpose(Image.Transpose.ROTATE_180), shape])
        for shape in shapes
    ]


PROMPTS = [
    f"USER : {IMAGE} what is it ? ASSISTANT :",
    f"USER : {IMAGE} is it a red cat ? ASSISTANT :",
]
SHORT = {"max_new_tokens": 5, "min_new_tokens": 5}


def stir(model):
    """Give the fusion weights that do something."""
    torch.manual_seed(1)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def asked(processor, pictures, **more):
    return processor(
        images=pictures, text=PROMPTS[: len(pictures)], padding=True, return_tensors="pt", **more
    )


def left_on(model) -> list[str]:
    """Names of modules on which something of ours is left."""
    ours = lambda f: "sparsecut" in getattr(getattr(f, "func", f), "__module__", "")  # noqa: E731
    names = []
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(map(ours, hooks)) or any(
            key in module.__dict__ for key in ("forward", "get_image_features")
        ):
            names.append(name)
    return names


def test_nothing_changes_until_the_shortcuts_are_trained(llava, pictures):
    base, own = llava
    before = {name: value.clone() for name, value in base.state_dict().items()}
    inputs = asked(own, pictures)
    logits = base(**inputs).logits
    modes = [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True},
        {"prefill_chunk_size": 3},
    ]
    answers = [
        (torch.manual_seed(2), base.generate(**inputs, **SHORT, **mode))[1] for mode in modes
    ]
    model, processor = upgrade(base, processor=own)
    mine = asked(processor, pictures)
    assert set(mine) == {*inputs, "fine_pixel_values"}
    assert all(torch.equal(mine[name], inputs[name]) for name in inputs)
    assert torch.equal(model(**mine).logits, logits)
    for mode, answer in zip(modes, answers, strict=True):
        torch.manual_seed(2)
        assert torch.equal(model.generate(**mine, **SHORT, **mode), answer), mode
    assert model.base is base
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_trained_shortcuts_act_on_the_model_and_leave_the_base_alone(llava, pictures):
    base, own = llava
    inputs = asked(own, pictures)
    logits = base(**inputs).logits
    model, processor = upgrade(base, processor=own)
    stir(model)
    mine = asked(processor, pictures)
    changed = (model(**mine).logits - logits).abs().amax(-1)
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    assert (changed[0, :first] == 0).all() and (changed[0, first:] > 1e-4).all()
    assert torch.equal(base(**inputs).logits, logits), "the base by itself has no shortcuts"
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**mine).logits, model(**mine).logits)
    given = model.detach()
    assert given is base and not left_on(base)
    assert torch.equal(base(**inputs).logits, logits)


@pytest.mark.parametrize(
    "mode", [{}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}]
)
def test_cached_equals_uncached(llava, pictures, mode):
    model, processor = upgrade(llava[0], processor=llava[1])
    stir(model)
    inputs = asked(processor, pictures)
    out = model.generate(
        **inputs, **SHORT, **mode, output_logits=True, return_dict_in_generate=True
    )
    length = inputs["input_ids"].shape[1]
    grown = dict(inputs) | {
        "input_ids": out.sequences,
        "attention_mask": torch.ones_like(out.sequences),
    }
    grown["attention_mask"][:, :length] = inputs["attention_mask"]
    full = model(**grown, use_cache=False).logits[:, length - 1 : -1]
    assert torch.allclose(full, torch.stack(out.logits, 1), atol=1e-5)


def test_a_batch_answers_as_its_rows_do(llava, pictures):
    model, processor = upgrade(llava[0], processor=llava[1])
    stir(model)
    together = model(**asked(processor, pictures)).logits[:, -1]
    for row, picture in enumerate(pictures):
        alone = processor(images=[picture], text=[PROMPTS[row]], return_tensors="pt")
        assert torch.allclose(model(**alone).logits[0, -1], together[row], atol=1e-5)


def test_gradients_reach_the_shortcuts_and_text_alone_trains_too(llava, pictures):
    model, processor = upgrade(llava[0], processor=llava[1])
    model.train().requires_grad_(False)
    model.fusion.requires_grad_(True)
    stir(model)
    inputs = asked(processor, pictures)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.fusion.parameters())
    model.zero_grad(set_to_none=True)
    text = processor(text=["USER : what is it ?"], return_tensors="pt")
    model(**text, labels=text["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.fusion.parameters()), (
        "every rank has a gradient for every parameter"
    )


def test_fine_views_lie_under_the_coarse_view(llava, pictures):
    coarse = llava[1].image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    fine = fine_pixels(llava[1].image_processor, pictures, 2)
    assert fine.shape == (2, 4, 3, 16, 16)
    whole = torch.cat(
        [torch.cat([fine[:, 0], fine[:, 1]], -1), torch.cat([fine[:, 2], fine[:, 3]], -1)], -2
    )
    small = torch.nn.functional.avg_pool2d(whole, 2)
    for one, other in zip(small, coarse, strict=True):
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.98


def test_shortcuts_are_saved_apart_and_found_again(llava, pictures, tmp_path):
    base, own = llava
    base.save_pretrained(tmp_path / "base")
    own.save_pretrained(tmp_path / "base")
    model, processor = upgrade(tmp_path / "base")
    stir(model)
    inputs = asked(processor, pictures)
    want = model(**inputs).logits
    model.save_fusion(tmp_path / "shortcuts")
    assert {p.name for p in (tmp_path / "shortcuts").iterdir()} == {
        "fusion.safetensors",
        "fusion.json",
    }
    for given in ({}, {"base": base, "processor": own}):
        again, processor = load(tmp_path / "shortcuts", **given)
        assert torch.equal(again(**inputs).logits, want)
        assert torch.equal(
            asked(processor, pictures)["fine_pixel_values"], inputs["fine_pixel_values"]
        )


def test_a_whole_model_is_an_ordinary_one(llava, pictures, tmp_path):
    model, processor = upgrade(llava[0], processor=llava[1])
    stir(model)
    want = model(**asked(processor, pictures)).logits
    sparsecut.building.save(model, processor, tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = asked(AutoProcessor.from_pretrained(tmp_path), pictures)
    assert type(again) is sparsecut.SparseCutUpgrade and torch.equal(again(**inputs).logits, want)
    again, processor = load(tmp_path)
    assert torch.equal(again(**asked(processor, pictures)).logits, want)


def test_another_base_is_refused_and_nothing_left_on_it(llava, tmp_path):
    base, own = llava
    model, _ = upgrade(base, processor=own)
    model.save_fusion(tmp_path)
    other = copy.deepcopy(model.detach())
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    with pytest.raises(
        ValueError, match=r"were trained on .* but the base given is .* give that base"
    ):
        load(tmp_path, other, processor=own)
    assert not left_on(other)
    assert load(tmp_path, other, processor=own, check_base=False)[0].base is other
    assert base_hash(base) == base_hash(copy.deepcopy(base).to(torch.bfloat16)) != base_hash(other)


REFUSED = {
    "no shortcut": ("llava", "upgraded by shortcuts beside its own input"),
    "a longer prompt": ("hires_tokens", "leave the prompt as it is"),
    "not an identity": ({"method": "sparsecut", "gate": "one"}, "start without effect"),
    "too deep": (
        {"shortcuts": [{"taps": [1], "layer": 0}, {"taps": [2], "layer": 9}]},
        "would never fire",
    ),
    "no such tap": (
        {"shortcuts": [{"taps": [1], "layer": 0}, {"taps": [7], "layer": 1}]},
        "reads tap 7",
    ),
}


@pytest.mark.parametrize("plan, words", REFUSED.values(), ids=REFUSED)
def test_plans_that_cannot_be_added_are_refused_before_anything_is_touched(llava, plan, words):
    with pytest.raises(ValueError, match=words):
        upgrade(llava[0], plan, processor=llava[1])
    assert not left_on(llava[0])


def test_refusals_name_what_is_wrong(llava, pictures, tmp_path):
    base, own = llava
    model, _ = upgrade(base, processor=own)
    with pytest.raises(
        ValueError, match="read 4 finer views of each of the 2 pictures, but none were given"
    ):
        model(**asked(own, pictures))
    with pytest.raises(ValueError, match="upgraded already"):
        upgrade(model)
    with pytest.raises(
        ValueError, match="is not a vision-language model that can be upgraded; known are"
    ):
        upgrade(base.get_decoder())
    with pytest.raises(
        ValueError, match="says it is a llava, but the parts of one cannot be read from it"
    ):
        upgrade(base.model)
    features = base.get_image_features(asked(own, pictures)["pixel_values"])
    ids = asked(own, pictures)["input_ids"]
    with pytest.raises(ValueError, match="channels beside the model's own 32"):
        model(input_ids=ids, mm_encoder_outputs={"image": features})
    with pytest.raises(ValueError, match="could not be read as a vision-language model"):
        upgrade(tmp_path)
    (tmp_path / "fusion.json").write_text(json.dumps({"base": None}))
    with pytest.raises(ValueError, match="do not say where their base came from"):
        load(tmp_path)


def test_a_tokenizer_in_place_of_a_processor_is_refused(llava, tmp_path, monkeypatch):
    """transformers gives one without a word where the class of the processor is not known."""
    monkeypatch.setattr(
        AutoProcessor, "from_pretrained", lambda *args, **kwargs: llava[1].tokenizer
    )
    with pytest.raises(
        ValueError, match="takes no pictures: what prepares them is not in the folder"
    ):
        upgrade(tmp_path)


NOT_FOR_UPGRADES = {
    "llava",
    "hires_tokens",
    "hires_channels",
    "cli",
    "official_7b_as_run",
    "official_13b",
}
NOT_FOR_UPGRADES |= {
    "dense_connector_sti",
    "dense_connector_sci",
    "dense_connector_dci",
    "mmfuser",
}  # the input alone


@pytest.mark.parametrize("method", sparsecut.METHODS)
def test_every_method_upgrades_without_effect_or_is_refused(llava, pictures, method):
    base, own = llava
    if method in NOT_FOR_UPGRADES:
        with pytest.raises(
            ValueError,
            match=r"can only be upgraded by shortcuts|would never fire|hidden states 0 to 4",
        ):
            upgrade(base, method, processor=own)
        return
    logits = base(**asked(own, pictures)).logits
    model, processor = upgrade(base, method, processor=own)
    inputs = asked(processor, pictures)
    assert torch.equal(model(**inputs).logits, logits)
    assert (stir(model)(**inputs).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize("mix", ["pick", "channels", "attend", "enrich"])
def test_every_mixer_and_start_works(llava, pictures, mix):
    base, own = llava
    logits = base(**asked(own, pictures)).logits
    for gate, shared in (("zero", True), ("zero_vector", False), ("zero_projector", False)):
        spec = {"method": "sparsecut", "mix": mix, "gate": gate, "shared": shared, "count": 2}
        model, processor = upgrade(base, spec, processor=own)
        inputs = asked(processor, pictures)
        assert torch.equal(model(**inputs).logits, logits)
        assert (stir(model)(**inputs).logits - logits).abs().max() > 1e-3


def test_a_processor_that_cannot_be_made_here_is_no_tokenizer(llava, tmp_path):
    for part in llava:
        part.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        file.write_text(file.read_text().replace("LlavaProcessor", "UnheardProcessor"))
    with pytest.raises(
        ValueError, match="takes no pictures: UnheardProcessor is not in the folder, not known here"
    ):
        upgrade(tmp_path)
