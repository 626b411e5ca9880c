"""What every family must do, as functions of a model: the family tests and `make grid` run them.

Each raises AssertionError, or whatever the model raises, where the claim does not hold.
"""

import copy
from functools import partial

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
from sparsecut.encoders import encoder_inputs, is_audio, read_grid, to_raster_order
from sparsecut.hooks import CHECKPOINTING, read_taps
from sparsecut.layers import find_blocks
from sparsecut.schema import UserError

PROMPTS = [[5, IMAGE, 6, 7], [8, 9, 10, IMAGE, 11, 12, 13]]  # one placeholder per image
GREEDY = {
    "do_sample": False,
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "pad_token_id": 0,
    "suppress_tokens": [IMAGE],
}
# two shortcuts above the input in models of these depths
SPARSE = {"method": "sparsecut", "pattern": "sparse"}


def join(vision="clip_vision_model", language="llama", plan=None, view_size=None):
    """A model of two tiny families; UserError where their configurations do not fit.

    Args:
        vision: Name of an encoder family, or a module.
        language: Name of a language model family, or a module.
        plan: Default: `sparsecut` in the pattern `sparse`, without fine views for audio.
        view_size: Default: that of `VIEW_SIZES`, where the encoder has none of its own.
    """
    encoder_config = vision_config(vision) if isinstance(vision, str) else vision.config
    text_config = language_config(language) if isinstance(language, str) else language.config
    if plan is None:
        plan = SPARSE | {"tiles": 0} if is_audio(encoder_config) else SPARSE
    settings = {
        "image_token_id": IMAGE,
        "view_size": view_size or VIEW_SIZES.get(encoder_config.model_type),
        "plan": plan,
    }
    SparseCutConfig(vision_config=encoder_config, text_config=text_config, **settings)
    if isinstance(vision, str):
        vision = family_vision(vision)
    if isinstance(language, str):
        language = family_language(language)
    config = SparseCutConfig(vision_config=vision.config, text_config=language.config, **settings)
    torch.manual_seed(1)
    model = SparseCutForConditionalGeneration(config, vision_tower=vision, language_model=language)
    for path in model.fusion.paths:  # features as large as the embeddings they join
        path.linear_2.weight.data *= 4
    return model.eval()


def expanded(model, row: list[int]) -> list[int]:
    """A prompt with each placeholder as often as an image has image tokens."""
    ids = []
    for token in row:
        times = model.config.num_image_tokens if token == IMAGE else 1
        ids += [token] * times
    return ids


def batch(model, rows=PROMPTS, side="left") -> dict:
    """Padded prompts and random pixels of their images."""
    torch.manual_seed(2)
    rows = [expanded(model, row) for row in rows]
    num_images = sum(row.count(IMAGE) for row in rows) // model.config.num_image_tokens
    pixels = torch.randn(num_images, model.plan.num_views, *model.config.grid.view)
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        start = length - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def text_labels(input_ids: torch.Tensor) -> torch.Tensor:
    """Labels of all tokens but image tokens."""
    return input_ids.masked_fill(input_ids == IMAGE, -100)


def gradients(model):
    """A training step gives every fusion parameter a gradient that is not zero."""
    inputs = batch(model, side="right")
    model.train()
    model(**inputs, labels=text_labels(inputs["input_ids"])).loss.backward()
    model.eval()
    silent = []
    for name, parameter in model.fusion.named_parameters():
        if parameter.grad is None or not parameter.grad.abs().sum() > 0:
            silent.append(name)
    model.zero_grad()
    assert not silent, f"no gradient in {silent[:3]}"


@torch.no_grad()
def cached(model):
    """Greedy decoding gives the same tokens, and scores within 1e-4, with and without a cache."""
    inputs = batch(model)
    settings = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    with_cache = model.generate(**inputs, use_cache=True, **settings)
    without = model.generate(**inputs, use_cache=False, **settings)
    assert torch.equal(with_cache.sequences, without.sequences), "other tokens"
    assert_close(torch.stack(with_cache.logits), torch.stack(without.logits))


def assert_close(values: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4):
    """Equal within a tolerance, absolute and relative."""
    torch.testing.assert_close(values, expected, atol=tolerance, rtol=1e-4)


@torch.no_grad()
def padded(model):
    """A left-padded batch gives every row the logits that it has alone."""
    inputs = batch(model)
    together = model(**inputs).logits
    for i, prompt in enumerate(PROMPTS):
        row = expanded(model, prompt)
        pixels = inputs["pixel_values"][i : i + 1]
        alone = model(input_ids=torch.tensor([row]), pixel_values=pixels).logits
        assert_close(together[i, -len(row) :], alone[0])


@torch.no_grad()
def beams(model):
    """In beam search with several returned sequences, a row's best beam is that of the row
    alone.
    """
    inputs = batch(model)
    settings = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    for i, prompt in enumerate(PROMPTS):
        row = expanded(model, prompt)
        pixels = inputs["pixel_values"][i : i + 1]
        alone = model.generate(input_ids=torch.tensor([row]), pixel_values=pixels, **settings)
        new = alone[:, len(row) :]
        assert torch.equal(together[2 * i : 2 * i + 2], new), "beams depend on the neighbour"


def fusion_gradients(model, inputs) -> dict:
    """Gradients of the fusion's parameters for one training pass."""
    model.zero_grad()
    torch.manual_seed(3)  # some families have dropout
    labels = text_labels(inputs["input_ids"])
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.fusion.named_parameters()}


def assert_same(gradients: dict, expected: dict, tolerance: float = 1e-6):
    """Equal gradients, name by name; tolerance: of a gradient's largest value if that is above
    1.
    """
    for name, grad in expected.items():
        atol = tolerance * max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(
            gradients[name], grad, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def checkpointing(model):
    """Activation checkpointing of either kind gives the same gradients."""
    inputs = batch(model, side="right")
    model = copy.deepcopy(model).train()
    expected = fusion_gradients(model, inputs)
    for reentrant in (False, True):
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
        assert_same(fusion_gradients(model, inputs), expected)


def compiles(model):
    """Full-graph compilation gives the logits and the gradients of eager mode."""
    torch._dynamo.reset()
    inputs = batch(model, side="right")
    logits = model(**inputs, use_cache=False).logits
    expected = fusion_gradients(model, inputs)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(**inputs, labels=text_labels(inputs["input_ids"]), use_cache=False)
    output.loss.backward()
    assert_close(output.logits, logits)
    assert_same({name: p.grad for name, p in model.fusion.named_parameters()}, expected, 1e-5)
    model.zero_grad()


@torch.no_grad()
def taps(model):
    """Taps are the encoder's own hidden states without prefix tokens, each where its patch is."""
    grid = model.config.grid
    views = torch.randn(2, *grid.view)
    inputs = encoder_inputs(grid, views)
    if grid.shapes:
        staged_taps(model, views)
        return
    states = model.vision_tower(**inputs, output_hidden_states=True).hidden_states
    # The deepest state is normalised in some families.
    for deepest in (0, 1, model.config.vision_depth - 1):
        read = read_taps(model.vision_tower, views, grid, range(deepest + 1))
        for tap in range(deepest + 1):
            assert torch.equal(read[tap], to_raster_order(grid, states[tap], 2)), f"tap {tap}"
            alone = read_taps(model.vision_tower, views[1:], grid, [tap])[tap]
            assert_close(alone, read[tap][1:], tolerance=1e-5)
    assert_patches_in_raster_order(model, views)


def staged_taps(model, views: torch.Tensor):
    """Taps of an encoder in stages: every patch has the state of the cell that covers it, which is
    that of the encoder's own block, with zeros behind it.
    """
    tower = model.vision_tower
    depth = model.config.vision_depth
    shapes = model.config.grid.shapes
    for wanted in (range(depth + 1), [depth], [0, 1], [depth - 1]):
        grid = read_grid(model.config.vision_config, model.config.view_size, wanted)
        assert (grid.rows, grid.width) == (
            max(shapes[tap].rows for tap in wanted),
            max(shapes[tap].width for tap in wanted),
        )
        read = read_taps(tower, views, grid, wanted)
        for tap, own in record_blocks(tower, grid, depth, views).items():
            if tap not in wanted:
                continue
            cells = to_cells(tower, grid, tap, own)
            assert cells.shape[1] == shapes[tap].width
            spread = torch.nn.functional.interpolate(cells, (grid.rows, grid.columns))
            states = spread.flatten(2).transpose(1, 2)
            assert torch.equal(read[tap][..., : cells.shape[1]], states), f"tap {tap}"
            assert not read[tap][..., cells.shape[1] :].any()
            alone = read_taps(tower, views[1:], grid, [tap])[tap]
            assert_close(alone, read[tap][1:], tolerance=1e-5)
    for tap in range(depth + 1):
        assert_cells_in_raster_order(model, views, tap)


def record_blocks(tower, grid, depth: int, views: torch.Tensor) -> dict:
    """What enters the first block and what every block returns, by hooks of this test's own."""
    seen = {}

    def keep_input(module, args, kwargs):
        seen[0] = args[0] if args else kwargs["hidden_states"]

    def keep_output(tap, module, args, output):
        seen[tap] = output[0] if isinstance(output, tuple) else output

    blocks = find_blocks(tower, depth, grid.blocks)
    handles = [blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    for number, block in enumerate(blocks):
        handles.append(block.register_forward_hook(partial(keep_output, number + 1)))
    tower(**encoder_inputs(grid, views))
    for handle in handles:
        handle.remove()
    return seen


def to_cells(tower, grid, tap: int, states: torch.Tensor) -> torch.Tensor:
    """A block's own states as [views, channels, rows, columns], by other code than ours."""
    shape = grid.shapes[tap]
    if grid.layout == "channels":
        return states
    if grid.layout == "map":
        return states.movedim(-1, 1)
    if tower.config.model_type == "hiera":
        owners = [stage for stage, n in enumerate(tower.config.depths) for _ in range(n)]
        config = copy.deepcopy(tower.config)
        config.image_size = list(grid.view[1:])
        encoder = type(tower.encoder)(config)  # its order of cells depends on the image size
        return encoder.reroll(states, owners[max(tap, 1) - 1]).movedim(-1, 1)
    own = states[:, -shape.rows * shape.columns :]  # a class token comes first
    return own.transpose(1, 2).unflatten(2, (shape.rows, shape.columns))


def assert_cells_in_raster_order(model, views: torch.Tensor, tap: int):
    """A change of a corner's pixels moves the states at that corner most, as far as there are
    enough cells for a corner to be far from the others.
    """
    grid = read_grid(model.config.vision_config, model.config.view_size, [tap])
    if grid.rows < 4:
        return
    height, width = grid.view[1:]
    before = read_taps(model.vision_tower, views, grid, [tap])[tap]
    for bottom in (False, True):
        for right in (False, True):
            touched = views.clone()
            rows = slice(height // 2, None) if bottom else slice(height // 2)
            columns = slice(width // 2, None) if right else slice(width // 2)
            touched[:, :, rows, columns] += 1
            moved = read_taps(model.vision_tower, touched, grid, [tap])[tap] - before
            sums = moved.abs().sum(-1)[1].view(grid.rows, grid.columns)
            halves = [half.chunk(2, dim=1) for half in sums.chunk(2, dim=0)]
            means = torch.tensor([[part.mean() for part in half] for half in halves])
            assert means.argmax() == 2 * bottom + right, f"tap {tap}"


def assert_patches_in_raster_order(model, views: torch.Tensor):
    """Changing the pixels of a patch changes the state of that patch most, for the second of two
    views.
    """
    grid = model.config.grid
    height = grid.view[-2] // grid.rows
    width = grid.view[-1] // grid.columns
    before = read_taps(model.vision_tower, views, grid, [0])[0]
    for number in range(grid.num_patches):
        row, column = divmod(number, grid.columns)
        rows = slice(row * height, (row + 1) * height)
        columns = slice(column * width, (column + 1) * width)
        touched = views.clone()
        touched[1, ..., rows, columns] += 1
        moved = read_taps(model.vision_tower, touched, grid, [0])[0] - before
        most = int(moved.abs().sum(-1).flatten().argmax()) - grid.num_patches
        allowed = is_audio(model.config.vision_config)  # convolutions reach into the next frame
        assert abs(most - number) <= allowed, f"patch {most} moved most, not {number}"


@torch.no_grad()
def stops(model):
    """Blocks above the deepest wanted tap do not run while taps are read, and run otherwise."""
    depth = model.config.vision_depth
    grid = model.config.grid
    views = torch.randn(1, *grid.view)
    inputs = encoder_inputs(grid, views)
    before = model.vision_tower(**inputs).last_hidden_state
    ran = set()
    handles = []
    for number, block in enumerate(find_blocks(model.vision_tower, depth, grid.blocks)):
        leaf = next(module for module in block.modules() if not list(module.children()))
        handles.append(leaf.register_forward_hook(lambda *_, number=number: ran.add(number)))
    read_taps(model.vision_tower, views, grid, [1, 2])
    assert ran == {0, 1}, f"blocks {sorted(ran)} ran"
    assert torch.equal(model.vision_tower(**inputs).last_hidden_state, before)
    assert ran == set(range(depth))
    for handle in handles:
        handle.remove()


def resizes(model):
    """Views of another size give what the encoder gives when it interpolates its own positions.

    Returns:
        "fixed" for an encoder that is refused at other sizes, else None.
    """
    config = model.config
    if is_audio(config.vision_config):
        return "fixed"
    grid = config.grid
    smaller, larger = [
        tuple(side * times for side, times in zip(grid.view[1:], factors, strict=True))
        for factors in ((1, 2), (2, 2))
    ]
    try:
        read_grid(config.vision_config, larger)
    except UserError as error:
        assert config.vision_config.model_type in str(error)
        return "fixed"
    for size in (smaller, larger):
        resized = join(model.vision_tower, model.language_model, config.plan, size)
        with torch.no_grad():
            taps(resized)
        padded(resized)
        assert resized.config.grid.view[1:] == size
        again = SparseCutConfig.from_dict(resized.config.to_dict())
        assert again.grid == resized.config.grid
    assert_positions_learn(resized)
    taps(model)  # the encoder is as it was


def assert_positions_learn(model):
    """Interpolated positions get the gradient of a training step, where the encoder has any."""
    tower = model.vision_tower.requires_grad_(True)
    inputs = batch(model, side="right")
    model(**inputs, labels=text_labels(inputs["input_ids"])).loss.backward()
    for name, parameter in tower.named_parameters():
        if "position_embedding" in name or "pos_embed" in name:
            assert parameter.grad.abs().sum() > 0, name
    model.zero_grad(set_to_none=True)


DECODER_CHECKS = (gradients, cached, padded, beams, checkpointing)
ENCODER_CHECKS = (taps, stops, gradients, cached, padded)
