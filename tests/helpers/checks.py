"""What every family must do, as functions of a model: the family tests and `make grid` run the same
ones.

Each raises AssertionError, or whatever the model raises, where the claim does not hold.
"""

import copy

import torch
from helpers.families import (
    IMAGE,
    VIEW_SIZES,
    family_language,
    family_vision,
    language_config,
    vision_config,
)

from sparsecut import SparseCutConfig, SparseCutForConditionalGeneration
from sparsecut.encoders import encoder_inputs, is_audio, to_raster_order
from sparsecut.hooks import find_layers, read_taps

PROMPTS = [[5, IMAGE, 6, 7], [8, 9, 10, IMAGE, 11, 12, 13]]  # one placeholder per picture
GREEDY = {
    "do_sample": False,
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "pad_token_id": 0,
    "suppress_tokens": [IMAGE],
}


SPARSE = {
    "method": "sparsecut",
    "pattern": "sparse",
}  # two shortcuts above the input in models of these depths


def join(vision="clip_vision_model", language="llama", plan=None):
    """A model of two tiny families, refused by their configurations where they do not fit; names or
    modules.

    plan: by default `sparsecut` in the pattern `sparse`, without fine views where the encoder
    listens.
    """
    configs = {
        "vision_config": vision_config(vision) if isinstance(vision, str) else vision.config,
        "text_config": language_config(language) if isinstance(language, str) else language.config,
    }
    settings = {
        "image_token_id": IMAGE,
        "view_size": VIEW_SIZES.get(configs["vision_config"].model_type),
    }
    settings["plan"] = plan or SPARSE | ({"tiles": 0} if is_audio(configs["vision_config"]) else {})
    SparseCutConfig(**configs, **settings)
    vision = family_vision(vision) if isinstance(vision, str) else vision
    language = family_language(language) if isinstance(language, str) else language
    config = SparseCutConfig(vision_config=vision.config, text_config=language.config, **settings)
    torch.manual_seed(1)
    model = SparseCutForConditionalGeneration(config, vision_tower=vision, language_model=language)
    for path in model.fusion.paths:  # features as large as the embeddings they join
        path.linear_2.weight.data *= 4
    return model.eval()


def expanded(model, row: list[int]) -> list[int]:
    """A prompt with each placeholder as often as a picture has image tokens."""
    return [
        n
        for token in row
        for n in [token] * (model.config.num_image_tokens if token == IMAGE else 1)
    ]


def batch(model, rows=PROMPTS, side="left") -> dict:
    """Padded prompts and random pixels of their pictures."""
    torch.manual_seed(2)
    rows = [expanded(model, row) for row in rows]
    pictures = sum(row.count(IMAGE) for row in rows) // model.config.num_image_tokens
    width = max(map(len, rows))
    pixels = torch.randn(pictures, model.plan.num_views, *model.config.grid.view)
    pads = [[0] * (width - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for pad, row in zip(pads, rows, strict=True)]
    ones = [[1] * len(row) for row in rows]
    masks = [
        pad + one if side == "left" else one + pad for pad, one in zip(pads, ones, strict=True)
    ]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(masks),
        "pixel_values": pixels,
    }


def gradients(model):
    """A training step gives every fusion parameter a gradient that is not zero."""
    inputs = batch(model, side="right")
    model.train()(
        **inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    ).loss.backward()
    model.eval()
    silent = [
        n
        for n, p in model.fusion.named_parameters()
        if p.grad is None or not p.grad.abs().sum() > 0
    ]
    model.zero_grad()
    assert not silent, f"no gradient in {silent[:3]}"


@torch.no_grad()
def cached(model):
    """Greedy decoding gives the same tokens, and scores within 1e-4, with and without a cache."""
    inputs, settings = (
        batch(model),
        GREEDY
        | {
            "return_dict_in_generate": True,
            "output_logits": True,
        },
    )
    with_cache, without = (
        model.generate(**inputs, use_cache=use, **settings) for use in (True, False)
    )
    assert torch.equal(with_cache.sequences, without.sequences), "other tokens"
    torch.testing.assert_close(
        torch.stack(with_cache.logits), torch.stack(without.logits), atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def padded(model):
    """A left-padded batch gives every row the logits that it has alone."""
    inputs = batch(model)
    together = model(**inputs).logits
    for i, row in enumerate(expanded(model, row) for row in PROMPTS):
        alone = model(
            input_ids=torch.tensor([row]), pixel_values=inputs["pixel_values"][i : i + 1]
        ).logits
        torch.testing.assert_close(together[i, -len(row) :], alone[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def beams(model):
    """Beam search with several returned sequences: the best beam of a row is that of the row
    alone.
    """
    inputs, settings = batch(model), GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    for i, row in enumerate(expanded(model, row) for row in PROMPTS):
        ids, pixels = torch.tensor([row]), inputs["pixel_values"][i : i + 1]
        alone = model.generate(input_ids=ids, pixel_values=pixels, **settings)[:, len(row) :]
        assert torch.equal(together[2 * i : 2 * i + 2], alone), "beams depend on the neighbour"


def fusion_gradients(model, inputs) -> dict:
    """Gradients of the fusion's parameters for one training pass."""
    model.zero_grad()
    torch.manual_seed(3)  # some families have dropout
    model(
        **inputs,
        labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100),
        use_cache=False,
    ).loss.backward()
    return {name: p.grad.clone() for name, p in model.fusion.named_parameters()}


def assert_same(gradients: dict, expected: dict, tolerance: float = 1e-6):
    """Equal gradients, name by name; tolerance: of a gradient's largest value where that is above
    1.
    """
    for name, grad in expected.items():
        atol = tolerance * max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(
            gradients[name], grad, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def checkpointing(model):
    """Gradient checkpointing of either kind gives the same gradients."""
    inputs = batch(model, side="right")
    model = copy.deepcopy(model).train()
    expected = fusion_gradients(model, inputs)
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        assert_same(fusion_gradients(model, inputs), expected)


def compiles(model):
    """Full-graph compilation gives the logits and the gradients of eager mode."""
    torch._dynamo.reset()
    inputs = batch(model, side="right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    logits, expected = model(**inputs, use_cache=False).logits, fusion_gradients(model, inputs)
    model.zero_grad()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(
        **inputs, labels=labels, use_cache=False
    )
    out.loss.backward()
    torch.testing.assert_close(out.logits, logits, atol=1e-4, rtol=1e-4)
    assert_same({name: p.grad for name, p in model.fusion.named_parameters()}, expected, 1e-5)
    model.zero_grad()


@torch.no_grad()
def taps(model):
    """The taps are the encoder's own hidden states, their prefix tokens removed, and each stands
    where its patch does.
    """
    grid, depth = model.config.grid, model.config.vision_depth
    views = torch.randn(2, *grid.view)
    states = model.vision_tower(
        **encoder_inputs(grid, views), output_hidden_states=True
    ).hidden_states
    for deepest in (0, 1, depth - 1):  # the last one is normalised in some families
        found = read_taps(model.vision_tower, views, grid, range(deepest + 1))
        for tap in range(deepest + 1):
            assert torch.equal(found[tap], to_raster_order(grid, states[tap], 2)), f"tap {tap}"
            torch.testing.assert_close(
                read_taps(model.vision_tower, views[1:], grid, [tap])[tap],
                found[tap][1:],
                atol=1e-5,
                rtol=1e-4,
            )
    height, width = grid.view[-2] // grid.rows, grid.view[-1] // grid.columns
    for number in range(grid.num_patches):
        row, column = divmod(number, grid.columns)
        touched = views.clone()
        touched[
            1, ..., row * height : (row + 1) * height, column * width : (column + 1) * width
        ] += 1
        moved = (
            read_taps(model.vision_tower, touched, grid, [0])[0]
            - read_taps(model.vision_tower, views, grid, [0])[0]
        )
        most = int(moved.abs().sum(-1).flatten().argmax()) - grid.num_patches
        assert abs(most - number) <= is_audio(model.config.vision_config), (
            f"patch {most} moved most when {number} was touched"
        )


@torch.no_grad()
def stops(model):
    """Blocks above the deepest wanted tap do not run while taps are read, and run as ever
    otherwise.
    """
    depth, grid, runs = model.config.vision_depth, model.config.grid, []
    views = torch.randn(1, *grid.view)
    before = model.vision_tower(**encoder_inputs(grid, views)).last_hidden_state
    inner = [
        next(m for m in block.modules() if not list(m.children()))
        for block in find_layers(model.vision_tower, depth, "")
    ]
    handles = [m.register_forward_hook(lambda *_, i=i: runs.append(i)) for i, m in enumerate(inner)]
    read_taps(model.vision_tower, views, grid, [1, 2])
    assert set(runs) == {0, 1}, f"blocks {sorted(set(runs))} ran"
    assert torch.equal(model.vision_tower(**encoder_inputs(grid, views)).last_hidden_state, before)
    assert set(runs) == set(range(depth))
    for handle in handles:
        handle.remove()


DECODER_CHECKS = (gradients, cached, padded, beams, checkpointing)
ENCODER_CHECKS = (taps, stops, gradients, cached, padded)
