"""Every family that can be upgraded: which patches lie under a token, identity before training, and
what shortcuts do after.
"""

import inspect

import pytest
import torch
from helpers import bases
from transformers import AutoConfig, AutoModelForImageTextToText

from sparsecut import upgrade
from sparsecut.families import FAMILIES, family_of
from sparsecut.hooks import find_layers
from sparsecut.upgrade_hooks import depth_of
from sparsecut.upgrading import load_fusion

SHORT = {"max_new_tokens": 4, "min_new_tokens": 4}
families = pytest.mark.parametrize("name", bases.NAMES)


def made(name: str):
    """(base, upgraded model, inputs with finer views where they are read)."""
    base = bases.base_of(name)
    inputs = bases.inputs_of(name, base, bases.pictures(name))
    model, _ = upgrade(base)
    return base, model, inputs | bases.fine_of(model, inputs)


def own(inputs: dict) -> dict:
    """What the base itself takes."""
    return {key: value for key, value in inputs.items() if key != "fine_pixel_values"}


def stir(model):
    torch.manual_seed(3)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def test_all_known_families_are_tried():
    assert set(bases.NAMES) == set(FAMILIES)


def patches_that_count(base, inputs: dict, layer: int) -> tuple[list[set[int]], torch.Tensor]:
    """For every image token the patches of a block's output on which it depends, by its gradient,
    and the family's own table.
    """
    family = family_of(base)
    parts, kept = family.parts(base), {}
    wanted = inspect.signature(parts.inner.get_image_features).parameters
    call = {key: value for key, value in inputs.items() if key in wanted}

    def cut(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        kept["states"] = states.detach().requires_grad_()
        return (kept["states"], *output[1:]) if isinstance(output, tuple) else kept["states"]

    block = find_layers(parts.vision, depth_of(parts.vision), "the encoder")[layer]
    handle = block.register_forward_hook(cut, prepend=True)
    pooled = parts.inner.get_image_features(**call).pooler_output
    handle.remove()
    tokens = torch.cat([part if part.dim() > 1 else part[None] for part in pooled])
    torch.manual_seed(4)
    found = []
    for token in tokens:
        (gradient,) = (
            torch.autograd.grad(
                (token * torch.randn_like(token)).sum(),
                kept["states"],
                retain_graph=True,
                allow_unused=True,
            )
            if token.requires_grad
            else (None,)
        )
        reached = (
            []
            if gradient is None
            else gradient.flatten(0, -2).abs().sum(-1).nonzero().flatten().tolist()
        )
        found.append(set(reached))
    return found, family.patch_index(parts.inner, kept["states"].shape, call)


LAYER = {"llava": -2, "vipllava": -2, "llava_next": -2}  # the block that the base reads


@families
def test_the_patches_under_a_token_are_those_it_depends_on(name):
    base = bases.base_of(name)
    inputs = bases.inputs_of(name, base, bases.pictures(name))
    found, table = patches_that_count(base, inputs, LAYER.get(name, -1))
    assert table.shape == (len(found), family_of(base).patches_under(base))
    for reached, row in zip(found, table.tolist(), strict=True):
        assert reached == {number for number in row if number >= 0}
    assert len({number for row in table.tolist() for number in row if number >= 0}) > 8


@pytest.mark.parametrize("registers", [0, 4])
def test_class_and_register_tokens_in_the_prompt_show_no_patch(registers):
    config = bases.config("llava")
    if registers:
        kind = {
            "model_type": "dinov2_with_registers",
            "num_register_tokens": registers,
            "mlp_ratio": 2,
        }
        config.vision_config = AutoConfig.for_model(**{**bases.CLIP, **kind})
    else:
        config.vision_feature_select_strategy = "full"
    base = AutoModelForImageTextToText.from_config(config).eval()
    row = bases.pictures("llava")[1]
    found, table = patches_that_count(base, row, -2)
    prefix = registers or 1  # by itself, a LLaVA leaves out the class token alone
    assert len(found) == 2 * (16 + prefix) and (table.view(2, -1)[:, :prefix] == -1).all()
    shown = table.view(2, -1)[:, prefix:].flatten().tolist()
    assert [{number} for number in shown] == [
        found[i] for i in range(len(found)) if i % (16 + prefix) >= prefix
    ]
    model, _ = upgrade(base)
    stir(model)
    with torch.no_grad(), model.shortcuts_active(torch.randn(2, 4, 3, 16, 16)):
        beside = base.get_image_features(**row).pooler_output
    beside = torch.stack(list(beside))[..., 32:]
    assert (beside[:, :prefix] == 0).all() and (beside[:, prefix:] != 0).any(-1).all()


def test_an_interpolated_picture_gives_each_token_the_nearest_patch():
    name = "llava_onevision"
    base = bases.base_of(name)
    base.config.vision_aspect_ratio = (  # so few tokens that four tiles have to be interpolated
        "anyres_max_1"
    )
    row = {"pixel_values": torch.randn(1, 5, 3, 16, 16), "image_sizes": torch.tensor([[31, 30]])}
    found, table = patches_that_count(base, row, -1)
    assert len(found) < 16 + 8 * 9, "it was interpolated"
    assert all(
        {n for n in patches if n >= 0} <= reached
        for reached, patches in zip(found, table.tolist(), strict=True)
    )


@families
def test_nothing_changes_until_the_shortcuts_are_trained(name):
    base = bases.base_of(name)
    inputs = bases.inputs_of(name, base, bases.pictures(name))
    before = {key: value.clone() for key, value in base.state_dict().items()}
    modes = [{}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True}]
    with torch.no_grad():
        logits = base(**inputs).logits
    answers = [
        (torch.manual_seed(5), base.generate(**inputs, **SHORT, **mode))[1] for mode in modes
    ]
    model, _ = upgrade(base)
    mine = inputs | bases.fine_of(model, inputs)
    with torch.no_grad():
        assert torch.equal(model(**mine).logits, logits)
    for mode, answer in zip(modes, answers, strict=True):
        torch.manual_seed(5)
        assert torch.equal(model.generate(**mine, **SHORT, **mode), answer), mode
    assert model.base is base
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


@families
def test_trained_shortcuts_reach_the_answer_and_leave_the_base_alone(name):
    base, model, inputs = made(name)
    with torch.no_grad():
        logits = base(**own(inputs)).logits
        stir(model)
        changed = (model(**inputs).logits - logits).abs().amax(-1)
        assert (changed[:, -1] > 1e-4).all()
        if name not in (
            "paligemma",
            "gemma3",
        ):  # there, words look at the picture that follows them
            first = (inputs["input_ids"] == bases.IMAGE).long().argmax(1)
            assert all((row[:place] == 0).all() for row, place in zip(changed, first, strict=True))
        assert torch.equal(base(**own(inputs)).logits, logits), (
            "called by itself it has no shortcuts"
        )
        words = {
            "input_ids": torch.tensor([[5, 6, 7]]),
            "attention_mask": torch.ones(1, 3, dtype=torch.long),
        }
        words |= {
            key: torch.zeros(1, 3, dtype=torch.long)
            for key in inputs
            if key.endswith("token_type_ids")
        }
        assert torch.equal(model(**words).logits, base(**words).logits)
        assert model.detach() is base
        assert torch.equal(base(**own(inputs)).logits, logits)


@families
def test_cached_equals_uncached_and_chunks_equal_the_whole(name):
    _, model, inputs = made(name)
    stir(model)
    out = model.generate(**inputs, **SHORT, output_logits=True, return_dict_in_generate=True)
    if (
        name != "gemma3"
    ):  # its pictures look at themselves as a whole, so the base cannot be cut either
        assert torch.equal(model.generate(**inputs, **SHORT, prefill_chunk_size=5), out.sequences)
    if name == "paligemma":  # all that is given is a prefix to it, also what it has said
        return
    length = inputs["input_ids"].shape[1]
    grown = dict(inputs) | {"input_ids": out.sequences}
    for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            more = torch.full((2, SHORT["max_new_tokens"]), int(key == "attention_mask"))
            grown[key] = torch.cat([inputs[key], more], dim=1)
    with torch.no_grad():
        full = model(**grown, use_cache=False).logits[:, length - 1 : -1]
    assert torch.allclose(full, torch.stack(out.logits, 1), atol=1e-5)


@families
def test_a_batch_answers_as_its_rows_do(name):
    base, model, inputs = made(name)
    stir(model)
    together = model.generate(**inputs, **SHORT, output_logits=True, return_dict_in_generate=True)
    begun = 0
    for row, given in enumerate(bases.pictures(name)):
        alone = bases.inputs_of(name, base, [given])
        if "fine_pixel_values" in inputs:
            number = len(given["pixel_values"])
            alone["fine_pixel_values"] = inputs["fine_pixel_values"][begun : begun + number]
            begun += number
        out = model.generate(**alone, **SHORT, output_logits=True, return_dict_in_generate=True)
        for one, many in zip(out.logits, together.logits, strict=True):
            assert torch.allclose(one[0], many[row], atol=1e-4)


@families
def test_gradients_reach_every_part_of_the_fusion_and_nothing_else(name):
    base, model, inputs = made(name)
    stir(model)
    model.train().requires_grad_(False)
    model.fusion.requires_grad_(True)
    model(
        **inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    ).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.fusion.parameters())
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("name", bases.WITH_VIDEOS)
def test_videos_are_the_bases_own_also_beside_pictures(name):
    base, model, inputs = made(name)
    both = bases.with_video(name, inputs)
    with torch.no_grad():
        assert torch.equal(model(**both).logits, base(**both).logits)
        assert torch.equal(model.generate(**both, **SHORT), base.generate(**both, **SHORT))
        stir(model)
        words = inputs["input_ids"].shape[1] - 2
        assert torch.allclose(
            model(**both).logits[:, :words], model(**inputs).logits[:, :words], atol=1e-5
        )
        alone = {key: value for key, value in both.items() if key not in bases.pictures(name)[0]}
        alone["input_ids"] = both["input_ids"].masked_fill(both["input_ids"] == bases.IMAGE, 5)
        if "mm_token_type_ids" in alone:
            alone["mm_token_type_ids"] = 2 * (alone["input_ids"] == bases.VIDEO).long()
        assert torch.equal(model(**alone).logits, base(**alone).logits), "no picture, no shortcut"


def test_shortcuts_of_a_base_that_was_made_on_the_spot_need_no_processor(tmp_path):
    _, model, inputs = made("qwen2_5_vl")
    stir(model)
    model.save_fusion(tmp_path)
    again, processor = load_fusion(tmp_path, bases.base_of("qwen2_5_vl"))
    with torch.no_grad():
        assert processor is None and torch.equal(again(**inputs).logits, model(**inputs).logits)


@families
def test_the_loss_is_per_token_of_the_whole_step(name):
    """Some bases know only the mean over a micro-batch's own tokens; with 40 learned tokens in the
    step all count alike.
    """
    _, model, inputs = made(name)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    inputs["labels"][:, : inputs["labels"].shape[1] // 2] = -100
    num = (inputs["labels"][:, 1:] != -100).sum()
    mean, shared = (
        model(**inputs, **more).loss for more in ({}, {"num_items_in_batch": torch.tensor(40)})
    )
    assert torch.allclose(shared, mean * num / 40, rtol=1e-5)
