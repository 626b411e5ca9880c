"""What an upgraded model of every family must do, as functions of a family's name.

The default tests run them for `bases.DEFAULT_FAMILIES`, tests/conformance for the other families,
and `make grid` for all. Each raises AssertionError, or the model's error, where a claim fails.
"""

import inspect

import pytest
import torch
from helpers import bases
from helpers.base_configs import IMAGE
from helpers.bases import randomize_fusion
from helpers.image_processors import IMAGE_PROCESSORS, awkward_images

from sparsecut import upgrade
from sparsecut.families import get_family
from sparsecut.hooks import RECOMPUTES_HOOKS, find_layers
from sparsecut.schema import UserError
from sparsecut.upgrade_hooks import get_encoder_depth

SHORT = {"max_new_tokens": 4, "min_new_tokens": 4}
READ_BLOCK = dict.fromkeys(
    ["llava", "vipllava", "llava_next", "llava_next_video"], -2
)  # the block that the base reads


def build_upgraded(name: str):
    """(base, upgraded model, inputs with finer views where they are read)."""
    base = bases.build_base(name)
    inputs = bases.build_inputs(name, base)
    model, _ = upgrade(base)
    return base, model, inputs | bases.build_fine_views(model, inputs)


def get_base_inputs(inputs: dict) -> dict:
    """The inputs that the base itself takes."""
    return {key: value for key, value in inputs.items() if key != "fine_pixel_values"}


def find_patches_by_gradient(base, inputs: dict, block: int) -> tuple[list[set[int]], torch.Tensor]:
    """The patches of a block's output on which each image token depends, and the family's table.

    Returns:
        One set of patch numbers per image token, and `patch_index` of the same images.
    """
    family = get_family(base)
    parts = family.parts(base)
    cut_states = {}

    def cut_graph(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        cut_states["value"] = states.detach().requires_grad_()
        if isinstance(output, tuple):
            return (cut_states["value"], *output[1:])
        return cut_states["value"]

    accepted = inspect.signature(parts.inner.get_image_features).parameters
    arguments = {key: value for key, value in inputs.items() if key in accepted}
    blocks = find_layers(parts.vision, get_encoder_depth(parts.vision), "the encoder")
    handle = blocks[block].register_forward_hook(cut_graph, prepend=True)
    images = parts.inner.get_image_features(**arguments).pooler_output
    handle.remove()

    states = cut_states["value"]
    tokens = torch.cat([image if image.dim() > 1 else image[None] for image in images])
    torch.manual_seed(4)
    reached = [_find_reached_patches(token, states) for token in tokens]
    return reached, family.patch_index(parts.inner, states.shape, arguments)


def _find_reached_patches(token, states) -> set[int]:
    if not token.requires_grad:
        return set()
    score = (token * torch.randn_like(token)).sum()
    (gradient,) = torch.autograd.grad(score, states, retain_graph=True, allow_unused=True)
    if gradient is None:
        return set()
    return set(gradient.flatten(0, -2).abs().sum(-1).nonzero().flatten().tolist())


def check_patch_table(name: str) -> None:
    """The patches listed under a token are exactly those on which it depends."""
    base = bases.build_base(name)
    inputs = bases.build_inputs(name, base)
    reached, table = find_patches_by_gradient(base, inputs, READ_BLOCK.get(name, -1))
    assert table.shape == (len(reached), get_family(base).patches_under(base))
    listed = [{number for number in row if number >= 0} for row in table.tolist()]
    assert listed == reached
    assert len(set.union(*listed)) > 8


def check_real_images(name: str) -> None:
    """The patch table holds for images of awkward sizes, prepared by the family's own processor."""
    table = check_table_of_images(name, bases.build_base(name), awkward_images())
    assert torch.unique(table).numel() > 40


def check_table_of_images(name: str, base, images: list) -> torch.Tensor:
    """The patches listed under a token are those on which it depends. Returns the table."""
    inputs = IMAGE_PROCESSORS[name]()(images, return_tensors="pt")
    reached, table = find_patches_by_gradient(base, inputs, READ_BLOCK.get(name, -1))
    assert table.shape == (len(reached), get_family(base).patches_under(base))
    for patches, row in zip(reached, table.tolist(), strict=True):
        listed = {number for number in row if number >= 0}
        if name == "llava_onevision":  # it interpolates images of many tiles
            assert listed <= patches
            assert bool(listed) == bool(patches)
        else:
            assert listed == patches
    assert torch.equal(table, table.sort(-1).values), "patches under a token are in raster order"
    return table


def check_fine_views(name: str) -> None:
    """A token reads the fine view over its place, and no other."""
    base = bases.build_base(name)
    model, _ = upgrade(base)
    randomize_fusion(model)
    inputs = bases.build_images(name)[1]  # two images
    fine = bases.build_fine_views(model, inputs)["fine_pixel_values"].requires_grad_()
    with model.shortcuts_active(fine):
        images = base.model.get_image_features(**inputs).pooler_output
    features = torch.stack(list(images))[..., 32:]  # behind the base's own 32 channels
    side = round(features.shape[1] ** 0.5)
    for image in range(2):
        for token in range(side**2):
            score = features[image, token].square().sum()
            (gradient,) = torch.autograd.grad(score, fine, retain_graph=True)
            row, column = token // side, token % side
            view = row // (side // 2) * 2 + column // (side // 2)
            read_views = gradient.flatten(2).abs().sum(-1).nonzero().tolist()
            assert read_views == [[image, view]]


def check_identity(name: str) -> None:
    """Before training, logits and generated tokens equal the base's to the bit."""
    base = bases.build_base(name)
    inputs = bases.build_inputs(name, base)
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    modes = [{}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True}]
    with torch.no_grad():
        logits = base(**inputs).logits
    expected = [_generate(base, inputs, mode) for mode in modes]

    model, _ = upgrade(base)
    inputs |= bases.build_fine_views(model, inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    for mode, tokens in zip(modes, expected, strict=True):
        assert torch.equal(_generate(model, inputs, mode), tokens), mode
    assert model.base is base
    assert all(torch.equal(weights[key], value) for key, value in base.state_dict().items())


def _generate(model, inputs, mode):
    torch.manual_seed(5)
    return model.generate(**inputs, **SHORT, **mode)


@torch.no_grad()
def check_effect(name: str) -> None:
    """Random shortcuts change the answer, not the text before an image and not the base itself."""
    base, model, inputs = build_upgraded(name)
    base_inputs = get_base_inputs(inputs)
    logits = base(**base_inputs).logits
    randomize_fusion(model)
    change = (model(**inputs).logits - logits).abs().amax(-1)
    assert (change[:, -1] > 1e-4).all()
    if name not in ("paligemma", "gemma3"):  # there, text attends to the image that follows it
        first_image = (inputs["input_ids"] == IMAGE).long().argmax(1)
        for row, first in zip(change, first_image, strict=True):
            assert (row[:first] == 0).all()
    assert torch.equal(base(**base_inputs).logits, logits), "the base alone has no shortcuts"

    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    text["attention_mask"] = torch.ones(1, 3, dtype=torch.long)
    for key in inputs:
        if key.endswith("token_type_ids"):
            text[key] = torch.zeros(1, 3, dtype=torch.long)
    assert torch.equal(model(**text).logits, base(**text).logits)
    assert model.detach() is base
    assert torch.equal(base(**base_inputs).logits, logits)


def check_cache(name: str) -> None:
    """Logits with a cache equal those without, and prefill in chunks gives the same tokens."""
    _, model, inputs = build_upgraded(name)
    randomize_fusion(model)
    out = model.generate(**inputs, **SHORT, output_logits=True, return_dict_in_generate=True)
    # Attention inside gemma3's images has no order, so the base has no chunks.
    if name != "gemma3" and not RECOMPUTES_HOOKS:
        assert torch.equal(model.generate(**inputs, **SHORT, prefill_chunk_size=5), out.sequences)
    if name == "paligemma":  # it attends to all input in both directions, also to its answer
        return
    length = inputs["input_ids"].shape[1]
    longer = dict(inputs) | {"input_ids": out.sequences}
    for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            more = torch.full((2, SHORT["max_new_tokens"]), int(key == "attention_mask"))
            longer[key] = torch.cat([inputs[key], more], dim=1)
    with torch.no_grad():
        logits = model(**longer, use_cache=False).logits[:, length - 1 : -1]
    assert torch.allclose(logits, torch.stack(out.logits, 1), atol=1e-5)


def check_batch(name: str) -> None:
    """Each row of a left-padded batch has the logits that it has alone."""
    base, model, inputs = build_upgraded(name)
    randomize_fusion(model)
    how = {**SHORT, "output_logits": True, "return_dict_in_generate": True}
    together = model.generate(**inputs, **how)
    begin = 0
    for row, images in enumerate(bases.build_images(name)):
        alone = bases.build_inputs(name, base, [images])
        if "fine_pixel_values" in inputs:
            end = begin + len(images["pixel_values"])
            alone["fine_pixel_values"] = inputs["fine_pixel_values"][begin:end]
            begin = end
        logits = model.generate(**alone, **how).logits
        for single, batched in zip(logits, together.logits, strict=True):
            assert torch.allclose(single[0], batched[row], atol=1e-4)


def check_gradients(name: str) -> None:
    """A training step reaches every parameter of the fusion and none of the base."""
    base, model, inputs = build_upgraded(name)
    randomize_fusion(model)
    model.train().requires_grad_(False)
    model.fusion.requires_grad_(True)
    model(**inputs, labels=mask_padding(inputs)).loss.backward()
    for parameter in model.fusion.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in base.parameters())


def check_loss(name: str) -> None:
    """With `num_items_in_batch`, the loss is per token of the whole step, as in ordinary training.

    Some bases know only the mean over a micro-batch. Here the step has 40 trained tokens.
    """
    _, model, inputs = build_upgraded(name)
    labels = mask_padding(inputs)
    labels[:, : labels.shape[1] // 2] = -100
    num_trained = (labels[:, 1:] != -100).sum()
    mean = model(**inputs, labels=labels).loss
    of_step = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(40)).loss
    assert torch.allclose(of_step, mean * num_trained / 40, rtol=1e-5)


def mask_padding(inputs: dict) -> torch.Tensor:
    """Labels of all tokens except padding."""
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


@torch.no_grad()
def check_videos(name: str) -> None:
    """A video is refused before the base runs, beside images too; the base alone takes it."""
    base, model, inputs = build_upgraded(name)
    both = bases.add_video(name, inputs)
    assert base(**both).logits.isfinite().all()
    calls = []
    hook = base.register_forward_pre_hook(lambda *_: calls.append(1))
    for call in (model, model.generate):
        with pytest.raises(UserError, match="pixel_values_videos"):
            call(**both)
    assert not calls
    model(**inputs)
    assert calls
    hook.remove()


FAMILY_CHECKS = {
    "tables": check_patch_table,
    "identity": check_identity,
    "effect": check_effect,
    "cached = uncached": check_cache,
    "batch = single": check_batch,
    "gradients": check_gradients,
    "loss": check_loss,
}
